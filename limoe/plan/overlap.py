"""Compute a step's time from the costs of its instructions, with the overlap that the compiled program allows.

Instructions run in the order of the program. An exchange overlaps with the instructions between its start and its done.
An asynchronous copy to or from the memory on the chip overlaps with them too, but only while they do not use the main
memory. One second of work covers one second of exchanges and one of copies, never two of a kind. A fusion with an
exchange inside covers that one first. Time that nothing covers is added to the step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from limoe.plan.hlo import COPIES, HloError, Run


class Cost(NamedTuple):
    """The cost of one run of an instruction: modelled seconds, and the FLOPs of its matmuls."""

    compute: float = 0.0
    hbm: float = 0.0
    exchange: float = 0.0
    flops: int = 0


class Times(NamedTuple):
    """The modelled seconds of a step."""

    compute: float
    """By the roofline: matmuls at peak, padded to the matrix unit. By the schedule: bundles, at one a clock cycle."""
    hbm: float
    """Traffic of the main memory at full bandwidth."""
    busy: float
    """The longer of the two for each instruction, and copies that nothing covers."""
    exchange: float
    """All exchanges between devices."""
    hidden: float
    """The part of the exchanges that other work covers."""

    @property
    def step(self) -> float:
        """The whole step."""
        return self.busy + self.exchange - self.hidden


@dataclass
class _Pending:
    """An exchange or copy between its start and its done: its seconds in a step, and those not covered yet."""

    seconds: float
    is_copy: bool
    left: float

    def cover(self, spare: float) -> float:
        """Use spare time of an instruction that runs meanwhile. Return what is left of that time."""
        used = min(spare, self.left)
        self.left -= used
        return spare - used


def schedule(costs: Iterable[tuple[Run, Cost]]) -> Times:
    """Compute the times of a step from its instructions in order, each with the cost of one run.

    Raises HloError for a start without a done or a done without a start.
    """
    compute = hbm = busy = exchange = hidden = 0.0
    pending: dict[tuple[str, str], _Pending] = {}
    for run, cost in costs:
        instruction, home, trips = run.instruction, run.computation.name, run.trips
        opcode = instruction.opcode
        if opcode.endswith("-done") or opcode == "async-update":
            going = pending.pop((home, instruction.operands[0]), None)
            if going is None:
                raise HloError(f"{instruction.name} ends {instruction.operands[0]}, which has not started in {home}")
            if opcode == "async-update":
                pending[home, instruction.name] = going
            elif going.is_copy:
                busy += going.left
            else:
                hidden += going.seconds - going.left
            continue
        in_compute, in_hbm, in_exchange = cost.compute * trips, cost.hbm * trips, cost.exchange * trips
        compute, hbm, exchange = compute + in_compute, hbm + in_hbm, exchange + in_exchange
        if opcode in COPIES:
            pending[home, instruction.name] = _Pending(in_hbm, True, in_hbm)
            continue
        here = max(in_compute, in_hbm)
        busy += here
        starts = opcode.endswith("-start") or opcode in ("send", "recv")
        own = 0.0 if starts else min(in_exchange, here)
        hidden += own
        spare = {True: here - in_hbm, False: here - own}
        for waiting in pending.values():
            spare[waiting.is_copy] = waiting.cover(spare[waiting.is_copy])
        if starts:
            pending[home, instruction.name] = _Pending(in_exchange, False, in_exchange)
    if pending:
        raise HloError(f"{', '.join(name for _, name in pending)} started, but nothing waits for the end")
    return Times(compute, hbm, busy, exchange, hidden)
