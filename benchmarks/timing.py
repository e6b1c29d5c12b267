"""Compile, run and time programs in turns, so that a drift of the machine affects all of them alike.

Every program takes its last result as a donated argument, like a train step with its old gradients. The new result
reuses that memory. Otherwise, a result as large as all experts' gradients would be new memory in every call, and the
time would include its page faults.

On an accelerator we measure the time of the device. Calls are enqueued one after the other, the host waits only for the
last one, and the seconds are divided by their number. Programs run before that to bring the clocks up. The arguments
rotate through copies that are larger than any cache, so that no call finds its inputs in the cache. Below about 50
microseconds the host limits the rate of calls.
"""

import dataclasses
import math
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
import numpy as np

# A program that takes longer than this gets `slow` repetitions.
SLOW_SECONDS = 5.0
# On an accelerator: the least seconds of one timing, the seconds of warming up, and the bytes of all copies of the
# arguments (more than twice the cache of an H200, which has 50 MB).
BATCH_SECONDS, WARM_SECONDS, ROTATED_BYTES = 0.02, 1.0, 1 << 27
_MOST_CALLS, _MOST_COPIES = 200, 64


@dataclasses.dataclass
class Program:
    """A compiled call, its last result, and the seconds of its repetitions by round."""

    name: str
    call: jax.stages.Compiled
    arguments: tuple[Any, ...]
    last: Any
    compile_seconds: float
    temp_bytes: int
    peak_bytes: int
    """Arguments + results - aliased + temporary, of this compiled program."""
    seconds: dict[int, float] = dataclasses.field(default_factory=dict)
    warm_up: float | None = None
    """Seconds of the first run, whose result is checked."""
    calls: int = 1
    """Number of calls in one timing, enqueued one after the other."""
    copies: list[tuple[Any, ...]] = dataclasses.field(default_factory=list)
    """Copies of the arguments, elsewhere in memory."""

    def run(self) -> float:
        """Run to the end, and return the seconds of a call."""
        rotation = [self.arguments, *self.copies]
        start = time.perf_counter()
        for number in range(self.calls):
            self.last = self.call(self.last, *rotation[number % len(rotation)])
        jax.block_until_ready(self.last)
        return (time.perf_counter() - start) / self.calls

    def batch(self) -> None:
        """Set the number of calls and copies for an accelerator: a long enough timing, and more bytes than a cache."""
        seconds = self.run()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self.arguments))
        if 0 < size < ROTATED_BYTES:
            number = min(math.ceil(ROTATED_BYTES / size), _MOST_COPIES)
            self.copies = [jax.tree.map(jax.numpy.copy, self.arguments) for _ in range(number)]
        self.calls = min(max(math.ceil(BATCH_SECONDS / seconds), len(self.copies) + 1), _MOST_CALLS)


def compile_program(name: str, call: Callable[..., Any], arguments: tuple[Any, ...], dtype: str) -> Program:
    """Compile with the old result donated. In float32 all implementations have exact products (`highest`)."""
    shapes = jax.eval_shape(call, *arguments)
    last = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), shapes)
    step = jax.jit(lambda old, *arguments: call(*arguments), donate_argnums=0, keep_unused=True)
    with jax.default_matmul_precision("highest" if dtype == "float32" else None):
        lowered = step.lower(last, *arguments)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    assert memory is not None
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    temp = int(memory.temp_size_in_bytes)
    return Program(name, compiled, arguments, last, seconds, temp, int(peak) + temp)


def time_programs(programs: list[Program], repetitions: int, slow: int = 1, *, batched: bool = False) -> None:
    """Fill `seconds` in rounds of all programs. Each round starts with another one. Slow ones run `slow` rounds.

    Set `batched` on accelerators. After a KeyboardInterrupt, which passes through, the times so far stay.
    """
    count = {}
    for program in programs:
        first = program.run() if program.warm_up is None else program.warm_up
        count[program.name] = slow if first > SLOW_SECONDS else repetitions
    if batched:
        for program in programs:
            program.batch()
        end = time.perf_counter() + WARM_SECONDS
        while time.perf_counter() < end:
            for program in programs:
                program.run()
    for number in range(repetitions):
        shift = number % len(programs)
        for program in programs[shift:] + programs[:shift]:
            if number < count[program.name]:
                program.seconds[number] = program.run()


def paired_ratio(mine: dict[int, float], base: dict[int, float]) -> float | None:
    """Compute the median ratio over the rounds in which both ran; None if there are none.

    >>> paired_ratio({0: 2.0, 1: 6.0, 2: 9.0}, {0: 1.0, 1: 2.0})
    2.5
    """
    rounds = sorted(mine.keys() & base.keys())
    return float(np.median([mine[number] / base[number] for number in rounds])) if rounds else None


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, and again each second until `caught()`, because Python's collector may swallow it."""
    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1)
    raise KeyboardInterrupt


def caught() -> None:
    """Confirm that KeyboardInterrupt was caught, so that `interrupt` does not raise it again."""
    signal.setitimer(signal.ITIMER_REAL, 0)
