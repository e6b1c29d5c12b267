"""`--profile`: a trace of a few steps, which shows where a step's time goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

# The first step compiles and the next ones warm up, so a profile starts after them.
PROFILE_AFTER = 5


class Profile:
    """Traces `num_steps` steps with jax.profiler into a folder, after the first ones, and says which it has traced.

    >>> with Profile(Path("runs/tiny/profile"), 3, 0, print) as profile:
    ...     for step in range(1, 5):
    ...         profile.at(step)
    --profile has traced nothing: it starts after the first 5 steps of a command, and this one made 4
    """

    def __init__(self, folder: Path, num_steps: int, first: int, say: Callable[[str], None]) -> None:
        self._folder, self._num_steps, self._say = folder, num_steps, say
        self._first = self._step = first
        self._start = first + PROFILE_AFTER + 1
        self._running = False

    def __enter__(self) -> Profile:
        return self

    def at(self, step: int, running: Any = None) -> None:
        """Start or stop the trace before this step, after waiting for the step before it, whose outputs are
        `running`."""
        if self._num_steps and step in (self._start, self._start + self._num_steps):
            jax.block_until_ready(running)
        if self._num_steps and step == self._start:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif step == self._start + self._num_steps:
            self._end()
        self._step = step

    def __exit__(self, *error: object) -> None:
        self._end()
        if self._num_steps and self._step < self._start:
            self._say(
                f"--profile has traced nothing: it starts after the first {PROFILE_AFTER} steps of a command, "
                f"and this one made {self._step - self._first}"
            )

    def _end(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            self._say(f"the trace of steps {self._start} to {self._step} is in {self._folder}")
