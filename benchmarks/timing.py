"""Compile, run and time programs, interleaved so that a drift of the machine hits all of them alike.

Every program takes its last result as a donated argument, as a train step does with its old gradients: results then
alias memory that is already there. Without that, a result of the size of all experts' gradients is fresh memory in
every call, and the page faults of its first touch are timed with it.

On an accelerator a time is that of the device: calls are enqueued one after the other, the host waits for the last one
only, and the seconds are divided by their number. The clocks are warm by then, and the arguments rotate through copies
that are larger than any cache, so that none finds its input there from the call before. What runs for less than some 50
microseconds is bound by the host, which cannot enqueue faster.
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
# On an accelerator: seconds of one timing at least, seconds of running before the first, and bytes of arguments that a
# call must not have seen lately (more than twice the cache of an H200, which has 50 MB).
BATCH_SECONDS, WARM_SECONDS, ROTATED_BYTES = 0.02, 1.0, 1 << 27
_MOST_CALLS, _MOST_COPIES = 200, 64


@dataclasses.dataclass
class Program:
    """A compiled call, its last result, and the seconds of its repetitions so far by round."""

    name: str
    call: jax.stages.Compiled
    arguments: tuple[Any, ...]
    last: Any
    compile_seconds: float
    temp_bytes: int
    peak_bytes: int
    """Arguments + results - aliased + temporary, of the program that really runs."""
    seconds: dict[int, float] = dataclasses.field(default_factory=dict)
    warm_up: float | None = None
    """Seconds of the first run, whose result is also what is checked."""
    calls: int = 1
    """Calls of one timing, enqueued one after the other."""
    copies: list[tuple[Any, ...]] = dataclasses.field(default_factory=list)
    """More arguments of the same values, elsewhere in memory."""

    def run(self) -> float:
        """Run to the end; seconds of a call."""
        rotation = [self.arguments, *self.copies]
        start = time.perf_counter()
        for number in range(self.calls):
            self.last = self.call(self.last, *rotation[number % len(rotation)])
        jax.block_until_ready(self.last)
        return (time.perf_counter() - start) / self.calls

    def batch(self) -> None:
        """Make a timing long enough for an accelerator, and its arguments too many for a cache."""
        seconds = self.run()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self.arguments))
        if 0 < size < ROTATED_BYTES:
            number = min(math.ceil(ROTATED_BYTES / size), _MOST_COPIES)
            self.copies = [jax.tree.map(jax.numpy.copy, self.arguments) for _ in range(number)]
        self.calls = min(max(math.ceil(BATCH_SECONDS / seconds), len(self.copies) + 1), _MOST_CALLS)


def compile_program(name: str, call: Callable[..., Any], arguments: tuple[Any, ...], dtype: str) -> Program:
    """Compile with the old result donated. In float32, products are exact for all (`highest`), ours and peers alike."""
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
    """Fill `seconds`: rounds of all programs, beginning with another one each time; slow ones in the first rounds only.

    `batched` is for accelerators: see above.

    A KeyboardInterrupt passes through; what was timed by then stays.
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
    """Median ratio over the rounds in which both ran; None if there are none.

    >>> paired_ratio({0: 2.0, 1: 6.0, 2: 9.0}, {0: 1.0, 1: 2.0})
    2.5
    """
    rounds = sorted(mine.keys() & base.keys())
    return float(np.median([mine[number] / base[number] for number in rounds])) if rounds else None


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, and again in a second unless `caught()`: callbacks of Python's collector drop it."""
    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1)
    raise KeyboardInterrupt


def caught() -> None:
    """Whoever catches KeyboardInterrupt says so."""
    signal.setitimer(signal.ITIMER_REAL, 0)
