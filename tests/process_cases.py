"""Small runs of two processes on one machine, each with two CPU devices."""

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from run_cases import command, environment, instead, metrics, settings

STEPS = 12
CHECKPOINT_EVERY = 4
# Eight groups of two pairs on four devices. Processes lie along `data`, so rows go to experts inside a process; only
# gradients cross over.
MESH = (
    *("model.group_examples=2", "mesh.data=2", "mesh.expert=2"),
    *(f"train.steps={STEPS}", f"train.checkpoint_every={CHECKPOINT_EVERY}"),
)
# The same devices in a row, so that rows go to the experts of the other process too.
CROSSING = ("mesh.data=1", "mesh.expert=4")
PATIENCE = 240


def slurm_task(number: int, job: int) -> dict[str, str]:
    """What Slurm tells task `number` of two on this machine; JAX derives a port above the ephemeral ones from `job`."""
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number),
    }


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Ended(NamedTuple):
    """How a process ended, after how long, and what it said on either channel."""

    status: int
    seconds: float
    said: str


class Team:
    """The processes of a run, killed when the block ends.

    `more` are added to MESH, or take the place of those of the same name, and so are `of_second` for the second process
    alone. With `slurm` the processes are told nothing by flags and find each other as tasks of a Slurm job do.
    """

    def __init__(self, folder: Path, *more: str, of_second: tuple[str, ...] = (), slurm: bool = False):
        port = free_port()
        self.folder = folder
        self.processes = []
        job = random.randrange(2**20)
        variables = {**environment(), "JAX_NUM_CPU_DEVICES": "2"}
        for number in range(2):
            flags = [f"--coordinator=localhost:{port}", "--num-processes=2", f"--process-id={number}"]
            task = {}
            if slurm:
                flags, task = [], slurm_task(number, job)
            own = of_second if number else ()
            words = command("train", f"--workdir={folder}", *flags, "--set", *settings(*instead(MESH, *more, *own)))
            log = open(folder.parent / f"process{number}.log", "w+")  # noqa: SIM115 (read when the process has ended)
            self.processes.append((subprocess.Popen(words, env=variables | task, stdout=log, stderr=log), log))

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
