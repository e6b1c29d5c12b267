"""Small runs of two processes on one machine, each with two CPU devices."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from run_cases import command, environment, metrics, settings

# Eight groups of two pairs on four devices.
MESH = ("model.group_examples=2", "mesh.data=2", "mesh.expert=2", "train.steps=10", "train.checkpoint_every=4")
PATIENCE = 240


class Ended(NamedTuple):
    """How a process ended, after how long, and what it said on either channel."""

    status: int
    seconds: float
    said: str


class Team:
    """The processes of a run, killed when the block ends; `of_second` are settings of the second one alone."""

    def __init__(self, folder: Path, *more: str, of_second: tuple[str, ...] = ()):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        self.folder = folder
        self.processes = []
        cache = folder.parent / "compiled"
        variables = {
            **environment(),
            "JAX_NUM_CPU_DEVICES": "2",
            # The second start of a run need not compile again.
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        for number in range(2):
            flags = [f"--coordinator={address}", "--num-processes=2", f"--process-id={number}"]
            own = of_second if number else ()
            words = command("train", f"--workdir={folder}", *flags, "--set", *settings(*MESH, *more, *own))
            log = open(folder.parent / f"process{number}.log", "w+")  # noqa: SIM115 (read when the process has ended)
            self.processes.append((subprocess.Popen(words, env=variables, stdout=log, stderr=log), log))

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *error: object) -> None:
        for process, log in self.processes:
            process.kill()
            process.wait()
            log.close()

    def send(self, number: int, which: signal.Signals) -> None:
        self.processes[number][0].send_signal(which)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            for number, (process, _) in enumerate(self.processes):
                assert process.poll() is None, self.said(number)
            assert time.monotonic() < end, self.said(0)
            time.sleep(0.01)

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: (self.folder / "metrics.jsonl").exists() and len(metrics(self.folder)) >= step)

    def end(self, number: int) -> Ended:
        began = time.monotonic()
        status = self.processes[number][0].wait(PATIENCE)
        return Ended(status, time.monotonic() - began, self.said(number))

    def said(self, number: int) -> str:
        log = self.processes[number][1]
        os.fsync(log.fileno())
        log.seek(0)
        return log.read()
