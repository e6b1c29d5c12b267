"""Several processes that train together, one on each host: joining, agreeing, and noticing that one is gone.

`jax.distributed` does the work: it finds the cluster (TPU pods, Slurm, GKE) or is told, and its heartbeats say who is
alive. Left to itself it ends the others late and with a C++ stack; `Watch` ends them soon and says why.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import NoReturn

import jax
import numpy as np

# The client that multihost_utils uses, and how jax.distributed finds a cluster: JAX has no public way to ask either.
from jax._src import clusters, distributed
from jax.experimental import multihost_utils

from limoe.config.schema import ConfigError

# A process without a sign of life for this long counts as gone.
HEARTBEAT_SECONDS = 10
# How long processes wait for each other at the start.
JOIN_SECONDS = 300
EXIT_STATUS = 75  # "temporary failure": the same command goes on
_POLL_SECONDS = 1.0
# How long the first process stays for the others to leave, after all have agreed on the end.
_SECONDS_TO_SEE_OFF = 15.0
# What is wrong is mostly wrong everywhere; without the first process the others are aborted before they can say it.
_SECONDS_FOR_THE_SAME_ERROR = 3.0
# As long as Orbax waits for all to have written: what is told beside a step is that a large write is done.
_SECONDS_TO_TELL = 1200.0
_BLOCK = 1024  # bytes
# What jax.distributed says where it finds no cluster, and where it is too late for one.
_NO_CLUSTER = "coordinator_address should be defined."
_USED_BEFORE = "jax.distributed.initialize() must be called before"

# Runs beside a process until that ends; only what is killed or aborted ends without a word.
_LAST_WORDS = """
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)
if not sys.stdin.buffer.read(1): sys.stderr.write(sys.argv[1])
"""


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Join the other processes of the run: as told, else as the cluster says, else stay alone.

    Before anything of JAX runs. Raises ConfigError when only some of the three are given, the cluster that is found
    does not say enough, it is too late to join it, or the others do not come.
    """
    told = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    missing = [flag for flag, value in told.items() if value is None]
    if missing and len(missing) < len(told):
        raise ConfigError(f"{', '.join(missing)} is missing; give all of {', '.join(told)}, or none in a known cluster")
    if process_id is not None and num_processes is not None and not 0 <= process_id < num_processes:
        raise ConfigError(f"--process-id={process_id} is not one of --num-processes={num_processes}; count from 0")
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise ConfigError(f"--coordinator={coordinator} has no port; give HOST:PORT, the same on every host")
    nothing_told = len(missing) == len(told)
    if nothing_told and jax.distributed.is_initialized():
        return  # the program that calls us has joined them
    # Else the end of one ends the others inside C++, before anybody can say why.
    jax.config.update("jax_enable_recoverability", True)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, LookupError) as error:
        if nothing_told and str(error) == _NO_CLUSTER:
            return  # one process does it all
        raise _unusable_cluster(error) from error
    except RuntimeError as error:
        if _USED_BEFORE not in str(error):
            raise ConfigError(
                f"the {num_processes or ''} processes did not come together within {JOIN_SECONDS} s: {error}; is each "
                f"of them started, and does it reach the coordinator {coordinator or 'of the cluster'}?"
            ) from error
        if not nothing_told or _size_of_cluster() > 1:
            raise ConfigError(
                "this program has used JAX already, so it cannot join the other processes any more; start limoe train "
                "as a program of its own, or call jax.distributed.initialize before anything else of JAX"
            ) from error


def _size_of_cluster() -> int:
    """Processes of the cluster that JAX finds around this one; 1 where there is none."""
    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, JOIN_SECONDS)
    except (ValueError, LookupError, RuntimeError) as error:
        raise _unusable_cluster(error) from error
    return found[1] or 1


def _unusable_cluster(error: Exception) -> ConfigError:
    return ConfigError(
        f"the cluster that JAX sees here does not say what is needed: {type(error).__name__}: {error}; give "
        "--coordinator, --num-processes and --process-id, or mend the cluster's environment variables"
    )


def is_first() -> bool:
    """Whether this process writes logs and speaks for all."""
    return jax.process_index() == 0


def added_up(*numbers: int) -> tuple[int, ...]:
    """Each number added up over all processes; all must call it.

    >>> added_up(2, 0)
    (2, 0)
    """
    if jax.process_count() == 1:
        return numbers
    return tuple(int(n) for n in np.asarray(multihost_utils.process_allgather(np.array(numbers))).sum(axis=0))


def from_first(number: int) -> int:
    """The number that the first process has; all must call it.

    >>> from_first(3)
    3
    """
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int64(number)))


def texts_of_all(text: str) -> list[str]:
    """The text that each process has, in their order; all must call it.

    >>> texts_of_all("alone")
    ['alone']
    """
    if jax.process_count() == 1:
        return [text]
    own = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([own.size])).reshape(-1)
    # In whole blocks, because every shape is compiled anew.
    padded = np.zeros(-(-max(int(sizes.max()), 1) // _BLOCK) * _BLOCK, np.uint8)
    padded[: own.size] = own
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def told_to_all(name: str, number: int, text: str) -> list[str]:
    """The text that each process has, in their order, without the devices: also for threads beside a step.

    All must call it with the same name and number; numbers of a name count up, and a call ends when all have called.

    >>> told_to_all("greeting", 0, "alone")
    ['alone']
    """
    if jax.process_count() == 1:
        return [text]
    client = distributed.global_state.client
    assert client is not None
    of = lambda number, process: f"limoe/{name}/{number}/{process}"  # noqa: E731
    client.key_value_set(of(number, jax.process_index()), text)
    patience = int(_SECONDS_TO_TELL * 1000)
    told = [client.blocking_key_value_get(of(number, process), patience) for process in range(jax.process_count())]
    if number:  # all have read what was told before
        client.key_value_delete(of(number - 1, jax.process_index()))
    return told


def wait_for_all(name: str) -> None:
    """Wait until all processes are here; each place has its name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def first_before_others(name: str) -> Iterator[None]:
    """The first process goes through the block alone, then the others do: what it writes, they find."""
    if not is_first():
        wait_for_all(name)
    yield
    if is_first():
        wait_for_all(name)


class Watch:
    """While it is open, the loss of another process ends this one with a message, whatever it waits for.

    The first process keeps the list of who is alive. If it is killed itself, JAX aborts the others at once; then a
    little process beside each of them says why.
    """

    def __init__(self) -> None:
        self._count, self._index = jax.process_count(), jax.process_index()
        self._over, self._together = threading.Event(), True
        self._beside: subprocess.Popen[bytes] | None = None
        self._looking: threading.Thread | None = None

    def __enter__(self) -> Watch:
        if self._count > 1:
            words = (
                f"\nlimoe: process {self._index} of {self._count} was ended from outside, or lost the first process. "
                f"{_WHAT_TO_DO}\n"
            )
            self._beside = subprocess.Popen(
                [sys.executable, "-S", "-c", _LAST_WORDS, words], stdin=subprocess.PIPE, start_new_session=True
            )
            self._looking = threading.Thread(target=self._look, daemon=True)
            self._looking.start()
        return self

    def part(self) -> None:
        """This process ends before the others, which will notice."""
        self._together = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._count == 1:
            return
        if error is None and self._together:
            wait_for_all("the end")
        self._over.set()
        if error is None and self._index == 0 and self._looking is not None:
            # Whoever finds the first process gone when it takes its leave is aborted by JAX.
            self._looking.join(_SECONDS_TO_SEE_OFF)
        if isinstance(error, jax.errors.JaxRuntimeError | ValueError) and _is_broken_exchange(str(error)):
            self._leave("lost the connection to another one in the middle of an exchange")
        if error is not None and self._index == 0:
            time.sleep(_SECONDS_FOR_THE_SAME_ERROR)
        self._say_goodbye()

    def _look(self) -> None:
        client = distributed.global_state.client
        assert client is not None
        while not self._over.wait(_POLL_SECONDS):
            try:
                alive = client.get_live_nodes(list(range(self._count)))
                gone = sorted(set(range(self._count)) - set(alive))
                reason = f"has had no sign of life of process {', '.join(map(str, gone))}" if gone else ""
            except jax.errors.JaxRuntimeError:
                reason = "does not reach the first process any more"
            # At the end, which all have agreed on, the others are gone before this one.
            if reason and not self._over.is_set():
                self._leave(reason)
        if self._index == 0:
            # Answered when every other process has asked too, or has left.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                while len(client.get_live_nodes(list(range(self._count)))) > 1:
                    time.sleep(_POLL_SECONDS / 20)

    def _leave(self, reason: str) -> NoReturn:
        sys.stderr.write(f"\nlimoe: process {self._index} of {self._count} {reason}. {_WHAT_TO_DO}\n")
        sys.stderr.flush()
        self._say_goodbye()
        # Not sys.exit: the main thread may wait for the lost process for ever, inside a device's program.
        os._exit(EXIT_STATUS)

    def _say_goodbye(self) -> None:
        if self._beside is not None and self._beside.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._beside.stdin.write(b".")
                self._beside.stdin.close()
            self._beside.wait()


_WHAT_TO_DO = (
    "No process goes on without the others. Start the same command on every host again: it goes on from the last "
    "checkpoint."
)


def _is_broken_exchange(text: str) -> bool:
    return any(word in text for word in ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Connection"))
