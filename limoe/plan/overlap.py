"""Which work covers which in the schedule of a compiled program: from the costs of its instructions to a step's time.

The order of instructions in the program is that in which they run. Between the start and the done of an exchange other
instructions cover it with all of their time; a copy to or from the memory on the chip they cover with the time in which
they leave the main memory alone. A second covers one second of exchanges and one of copies, never two of a kind. A
fusion with an exchange inside covers that one first. What nothing covers counts in full.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from limoe.plan.hlo import COPIES, HloError, Run


class Cost(NamedTuple):
    """Modelled seconds of one run of an instruction, and the FLOPs of its matmuls."""

    compute: float = 0.0
    hbm: float = 0.0
    exchange: float = 0.0
    flops: int = 0


class Times(NamedTuple):
    """Modelled seconds of a step."""

    compute: float
    """Matmuls at peak, padded to the matrix unit."""
    hbm: float
    """Traffic of the main memory at full bandwidth."""
    busy: float
    """Instruction by instruction the longer of the two."""
    exchange: float
    """All exchanges between devices."""
    hidden: float
    """The part of exchanges that other work covers in the compiled schedule."""

    @property
    def step(self) -> float:
        """The whole step."""
        return self.busy + self.exchange - self.hidden


@dataclass
class _Pending:
    """Something asynchronous between its start and its done: its seconds in a step, and those not covered yet."""

    seconds: float
    is_copy: bool
    left: float

    def cover(self, spare: float) -> float:
        """Use spare time of an instruction that runs meanwhile; what remains of it."""
        used = min(spare, self.left)
        self.left -= used
        return spare - used


def schedule(costs: Iterable[tuple[Run, Cost]]) -> Times:
    """The times of a step whose instructions run in this order, each as often as its trips say.

    Raises HloError where a start has no done or a done no start.
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
