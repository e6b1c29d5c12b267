"""Compile, run and time programs, interleaved so that a drift of the machine hits all of them alike.

Every program takes its last result as a donated argument, as a train step does with its old gradients: results then
alias memory that is already there. Without that, a result of the size of all experts' gradients is fresh memory in
every call, and the page faults of its first touch are timed with it.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

# A program that takes longer than this gets `slow` repetitions.
SLOW_SECONDS = 5.0


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

    def run(self) -> float:
        """Run once, to the end; seconds."""
        start = time.perf_counter()
        self.last = jax.block_until_ready(self.call(self.last, *self.arguments))
        return time.perf_counter() - start


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


def time_programs(programs: list[Program], repetitions: int, slow: int = 1) -> None:
    """Fill `seconds`: rounds of all programs, beginning with another one each time; slow ones in the first rounds only.

    A KeyboardInterrupt passes through; what was timed by then stays.
    """
    count = {}
    for program in programs:
        first = program.run() if program.warm_up is None else program.warm_up
        count[program.name] = slow if first > SLOW_SECONDS else repetitions
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
