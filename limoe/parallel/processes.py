"""Several processes that train together, one on each host: how they join, exchange values and notice a lost process.

`jax.distributed` does the work. It finds the cluster (TPU pods, Slurm, GKE) or is given it, and its heartbeats show
which processes are alive. By itself it ends the others late and with a C++ stack trace. `Watch` ends them soon and
says why.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

import jax
import numpy as np

# JAX has no public access to the client of multihost_utils, nor to the search for a cluster of jax.distributed.
from jax._src import clusters, distributed
from jax.experimental import multihost_utils

from limoe.config.schema import ConfigError

# A process without a heartbeat for this long counts as gone.
HEARTBEAT_SECONDS = 10
# How long processes wait for each other at the start.
JOIN_SECONDS = 300
EXIT_STATUS = 75  # "temporary failure": run the same command again
_POLL_SECONDS = 1.0
# How long the first process waits for the others to leave, after all have agreed to end.
_SECONDS_TO_SEE_OFF = 15.0
# Most errors occur in every process. JAX aborts the others when the first one ends, before they can print the error.
_SECONDS_FOR_THE_SAME_ERROR = 3.0
# As long as Orbax waits for all writers: processes exchange texts beside a step after they wrote large files.
_SECONDS_TO_TELL = 1200.0
_BLOCK = 1024  # bytes
# Messages of jax.distributed: no cluster was found, and JAX was used before.
_NO_CLUSTER = "coordinator_address should be defined."
_USED_BEFORE = "jax.distributed.initialize() must be called before"

# Program of a helper process. It prints its argument if the process that started it ends without writing a byte, as a
# killed or aborted process does.
_LAST_WORDS = """
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)
if not sys.stdin.buffer.read(1): sys.stderr.write(sys.argv[1])
"""


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Join the other processes of the run: those given, else those of the cluster that JAX finds, else none.

    Call it before anything else of JAX. Raises ConfigError if only some of the three arguments are given, if the
    cluster does not say enough, if it is too late to join, or if the others do not join in time.
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
        return  # the calling program has joined them
    # Without it, the end of one process ends the others inside C++, before any message.
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
            return  # a single process
        raise _unusable_cluster(error) from error
    except RuntimeError as error:
        if _USED_BEFORE not in str(error):
            raise ConfigError(
                f"the {num_processes or ''} processes did not all join within {JOIN_SECONDS} s: {error}; check that "
                f"each one is started and reaches the coordinator {coordinator or 'of the cluster'}"
            ) from error
        if not nothing_told or _size_of_cluster() > 1:
            raise ConfigError(
                "this program has used JAX already, so it can no longer join the other processes; start limoe train as "
                "its own program, or call jax.distributed.initialize before anything else of JAX"
            ) from error


def _size_of_cluster() -> int:
    """Count the processes of the cluster that JAX finds; 1 without a cluster."""
    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, JOIN_SECONDS)
    except (ValueError, LookupError, RuntimeError) as error:
        raise _unusable_cluster(error) from error
    return found[1] or 1


def _unusable_cluster(error: Exception) -> ConfigError:
    return ConfigError(
        f"the cluster that JAX sees here does not say what is needed: {type(error).__name__}: {error}; give "
        "--coordinator, --num-processes and --process-id, or fix the cluster's environment variables"
    )


def is_first() -> bool:
    """Whether this is the first process, which writes logs and messages."""
    return jax.process_index() == 0


def added_up(number: int) -> int:
    """Add a number up over all processes; all must call it.

    >>> added_up(2)
    2
    """
    return number if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.array(number)).sum())


def from_first(number: int) -> int:
    """Get the number of the first process; all must call it.

    >>> from_first(3)
    3
    """
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int64(number)))


def texts_of_all(text: str) -> list[str]:
    """Get the text of each process, in order of processes; all must call it.

    >>> texts_of_all("alone")
    ['alone']
    """
    if jax.process_count() == 1:
        return [text]
    own = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([own.size])).reshape(-1)
    # Pad to whole blocks, because JAX compiles the gather for each shape.
    padded = np.zeros(-(-max(int(sizes.max()), 1) // _BLOCK) * _BLOCK, np.uint8)
    padded[: own.size] = own
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def told_to_all(name: str, number: int, text: str) -> list[str]:
    """Get the text of each process without using the devices, so that a thread can call it during a step.

    All processes must call it with the same name and number. The numbers of a name count up from 0. A call returns when
    all have called.

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
    if number:  # all processes have read the previous texts
        client.key_value_delete(of(number - 1, jax.process_index()))
    return told


def wait_for_all(name: str) -> None:
    """Wait until all processes call this with the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def first_before_others(name: str) -> Iterator[None]:
    """Run the block in the first process, then in the others, which find what it wrote."""
    if not is_first():
        wait_for_all(name)
    yield
    if is_first():
        wait_for_all(name)


class Watch:
    """While it is open, the loss of another process ends this one with a message, even if it waits for something.

    The first process keeps the list of live processes. If it is killed itself, JAX aborts the others at once, and a
    helper process beside each of them prints why.
    """

    def __init__(self) -> None:
        self._count, self._index = jax.process_count(), jax.process_index()
        self._over, self._together = threading.Event(), True
        self._beside: subprocess.Popen[bytes] | None = None
        self._looking: threading.Thread | None = None

    def __enter__(self) -> Watch:
        if self._count > 1:
            words = (
                f"\nlimoe: process {self._index} of {self._count} was killed, or lost the first process. "
                f"{_WHAT_TO_DO}\n"
            )
            self._beside = subprocess.Popen(
                [sys.executable, "-S", "-c", _LAST_WORDS, words], stdin=subprocess.PIPE, start_new_session=True
            )
            self._looking = threading.Thread(target=self._look, daemon=True)
            self._looking.start()
        return self

    def part(self) -> None:
        """End this process before the others, without waiting for them. They will notice."""
        self._together = False

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._count == 1:
            return
        if error is None and self._together:
            wait_for_all("the end")
        self._over.set()
        if error is None and self._index == 0 and self._looking is not None:
            # JAX aborts a process that leaves after the first one is gone.
            self._looking.join(_SECONDS_TO_SEE_OFF)
        if isinstance(error, jax.errors.JaxRuntimeError | ValueError) and _is_broken_exchange(str(error)):
            self._leave("lost the connection to another process during an exchange")
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
                reason = f"got no sign of life of process {', '.join(map(str, gone))}" if gone else ""
            except jax.errors.JaxRuntimeError:
                reason = "does not reach the first process any more"
            # After all have agreed to end, the others may leave before this one.
            if reason and not self._over.is_set():
                self._leave(reason)
        if self._index == 0:
            # The answer comes when every other process has asked too, or has left.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                while len(client.get_live_nodes(list(range(self._count)))) > 1:
                    time.sleep(_POLL_SECONDS / 20)

    def _leave(self, reason: str) -> NoReturn:
        sys.stderr.write(f"\nlimoe: process {self._index} of {self._count} {reason}. {_WHAT_TO_DO}\n")
        sys.stderr.flush()
        self._say_goodbye()
        # Not sys.exit: the main thread may wait for ever for the lost process, inside a program on the device.
        os._exit(EXIT_STATUS)

    def _say_goodbye(self) -> None:
        if self._beside is not None and self._beside.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._beside.stdin.write(b".")
                self._beside.stdin.close()
            self._beside.wait()


_WHAT_TO_DO = (
    "No process continues without the others. Start the same command on every host again: it continues from the last "
    "checkpoint."
)


def _is_broken_exchange(text: str) -> bool:
    return any(word in text for word in ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Connection"))
