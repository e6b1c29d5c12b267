"""From the compiler's schedule to modelled seconds, for one compiled program on one chip.

An instruction takes the largest of: bundles that run / clock, multiply-adds issued to the matrix units / their rate,
and bytes copied to and from HBM / bandwidth. Instructions follow one another; what is copied at the top level
(prefetches) hides under all of them. Copies of at most a row may carry a cost for each descriptor, as one more limit.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from limoe.plan.bundles import Code, parse
from limoe.plan.hlo import kernel_name
from limoe.plan.machine import Ran, run
from limoe.plan.prices import in_bundles, on_matrix_units, through_memory
from moe_kernels.chips import Tpu

Steering = tuple[str, dict[int, list[int]]]
"""A kernel's name, and the values of its integer operands by their index."""

_TOP = "TLP"
# Bytes that the compiler counts copies in.
GRANULE = 32
# A copy of up to this many bytes is taken for one that moves a row; blocks of a pipeline are larger.
ROW_BYTES = 16 * 1024
DESCRIPTOR_NANOSECONDS = (25, 50, 100)


class Part(NamedTuple):
    """One instruction: how often it runs, and all its runs together."""

    name: str
    trips: int
    bundles: int
    bundle_seconds: float
    mxu_seconds: float
    hbm_seconds: float
    macs: float
    hbm_bytes: float
    row_copies: int
    unknown_branches: int
    matmul_bundles: int = 0
    """Those of `bundles` that lie in straight pieces of code with a matmul."""

    @property
    def seconds(self) -> float:
        """Modelled."""
        return max(self.bundle_seconds, self.mxu_seconds, self.hbm_seconds)

    @property
    def bound(self) -> str:
        """Which of the three limits it is."""
        limits = {"bundles": self.bundle_seconds, "MXU": self.mxu_seconds, "HBM": self.hbm_seconds}
        return max(limits, key=lambda name: limits[name])


class ScheduledCost(NamedTuple):
    """A whole program; parts in descending order of time."""

    parts: tuple[Part, ...]
    seconds: float
    macs: float
    hbm_bytes: float
    unknown_branches: int
    missing: tuple[str, ...]
    """Instructions without a schedule, such as work for SparseCore; they count as nothing."""

    def with_descriptors(self, nanoseconds: int | float) -> float:
        """Seconds if every copy of a row takes so long to be described, hidden under the rest of its instruction."""
        return self.seconds + sum(max(0.0, 1e-9 * nanoseconds * p.row_copies - p.seconds) for p in self.parts)


def read_codes(texts: Mapping[str, str]) -> dict[str, Code]:
    """The scalar programs of a compiled module's instructions."""
    return {name: parse(text) for name, text in texts.items()}


def module_cost(
    codes: Mapping[str, Code], steering: Sequence[Steering], chip: Tpu, trips: Mapping[str, int] | None = None
) -> ScheduledCost:
    """Model the programs of a compiled module, with what steers its kernels; `trips` of instructions where known."""
    delay = min((d for code in codes.values() if (d := code.branch_delay()) is not None), default=0)
    operands = _steering_by_instruction(codes, steering)
    top = run(codes[_TOP], delay)
    parts = [part_cost(_TOP, 1, [top], chip)]
    for name, calls in top.calls.items():
        if name in codes:
            often = calls if trips is None else trips.get(name, calls)
            parts.append(part_cost(name, often, _runs(codes[name], delay, operands.get(name), chip), chip))
    # Copies of the top level run beside the instructions.
    beside, serial = parts[0].hbm_seconds, [parts[0]._replace(hbm_seconds=0.0), *parts[1:]]
    hbm = sum(part.hbm_seconds for part in serial) + beside
    return ScheduledCost(
        parts=tuple(sorted(serial, key=lambda part: -part.seconds)),
        seconds=max(sum(part.seconds for part in serial), hbm),
        macs=sum(part.macs for part in parts),
        hbm_bytes=sum(part.hbm_bytes for part in parts),
        unknown_branches=sum(part.unknown_branches for part in parts),
        missing=tuple(sorted(name for name in top.calls if name not in codes)),
    )


class ScheduledStep(NamedTuple):
    """A step by the compiler's own schedule."""

    seconds: float | None
    """None where the schedule cannot be read."""
    note: str
    """Why it cannot, or what it leaves to the roofline."""


class OneInstruction(NamedTuple):
    """How often a step runs an instruction, and the roofline's seconds of all its runs."""

    trips: int
    seconds: float


def schedule_step(
    texts: Mapping[str, str], instructions: Mapping[str, OneInstruction], waits: float, chip: Tpu
) -> ScheduledStep:
    """Model a step from the final bundles of its instructions; `waits` are seconds of exchanges that nothing hides.

    Where a branch hangs on data, as in kernels that skip rows, or the compiler wrote no bundles, an instruction takes
    at least its time by the roofline.
    """
    if _TOP not in texts:
        return ScheduledStep(None, "the compiler wrote no schedule")
    trips = {name: one.trips for name, one in instructions.items()}
    try:
        cost = module_cost(read_codes(texts), [], chip, trips)
    except (RuntimeError, ValueError) as error:
        return ScheduledStep(None, f"the compiler's schedule cannot be run: {error}")
    unreached = (texts.keys() & instructions.keys()) - {part.name for part in cost.parts}
    if unreached:
        reached = len(texts.keys() & instructions.keys()) - len(unreached)
        return ScheduledStep(
            None, f"the top-level program was followed to {reached} instructions, not {len(unreached)}"
        )
    known = dict.fromkeys(cost.missing, 0.0) | {part.name: part.seconds for part in cost.parts if part.unknown_branches}
    longer = [instructions[name].seconds - seconds for name, seconds in known.items() if name in instructions]
    note = f"{len(longer)} of {len(cost.parts) + len(cost.missing)} instructions take the roofline's time at least"
    return ScheduledStep(cost.seconds + sum(max(0.0, seconds) for seconds in longer) + waits, note)


def _runs(code: Code, delay: int, steering: Mapping[int, Sequence[int]] | None, chip: Tpu) -> list[Ran]:
    """What each core does; one run if they are not told apart, since then the work is not split."""
    cores = chip.num_cores if code.uses_core_id else 1
    runs = [run(code, delay, steering, core) for core in range(cores)]
    first = runs[0]
    return runs if any((ran.places, ran.copies) != (first.places, first.copies) for ran in runs) else [first]


def part_cost(name: str, trips: int, runs: Sequence[Ran], chip: Tpu) -> Part:
    """Model one instruction from what each core does: the slowest core decides, copies and multiply-adds add up.

    >>> import numpy as np
    >>> from collections import Counter
    >>> import dataclasses
    >>> from moe_kernels.chips import TPUS
    >>> chip = dataclasses.replace(TPUS["v5e"], gigahertz=1.0, macs_per_cycle=1024, depth=32, hbm_bandwidth=32e9)
    >>> ran = Ran(np.array([10]), Counter({("hbm_to_vmem", 600): 1}), Counter(), 0, 8, 0)
    >>> part = part_cost("y", 2, [ran], chip)
    >>> part.macs, part.hbm_bytes, part.bound, f"{part.seconds:.2e}", part.row_copies
    (16384.0, 38400.0, 'HBM', '1.20e-06', 0)
    """
    copies = [
        (kind, granules * GRANULE, count)
        for ran in runs
        for (kind, granules), count in ran.copies.items()
        if "hbm" in kind
    ]
    copied = float(trips * sum(size * count for _, size, count in copies))
    macs = [float(trips * ran.streamed_rows * chip.depth**2) for ran in runs]
    bundles = trips * max(ran.bundles for ran in runs)
    return Part(
        name=name,
        trips=trips,
        bundles=bundles,
        bundle_seconds=in_bundles(bundles, chip),
        mxu_seconds=on_matrix_units(max(macs), chip),
        hbm_seconds=through_memory(copied, chip),
        macs=sum(macs),
        hbm_bytes=copied,
        row_copies=trips * sum(count for kind, size, count in copies if 0 < size <= ROW_BYTES and "smem" not in kind),
        unknown_branches=max(ran.unknown_branches for ran in runs),
        matmul_bundles=trips * max(ran.matmul_bundles for ran in runs),
    )


def _steering_by_instruction(
    codes: Mapping[str, Code], steering: Sequence[Steering]
) -> dict[str, Mapping[int, Sequence[int]]]:
    """Give each kernel its integer operands: those whose name (where it has one), indices and lengths fit.

    Calls of one kernel are numbered by the compiler in the order of the program; several that fit are taken in turn.
    """
    left = list(steering)
    found: dict[str, Mapping[int, Sequence[int]]] = {}
    for name in sorted(codes, key=_natural):
        integers = codes[name].integers
        fitting = [
            call for call in left if call[1] and {index: len(values) for index, values in call[1].items()} == integers
        ]
        fitting = [call for call in fitting if not call[0] or kernel_name(name) == call[0]]
        if fitting:
            call = next((call for call in fitting if call[0]), fitting[0])
            found[name] = call[1]
            left.remove(call)
    return found


def _natural(name: str) -> tuple[str, int]:
    """An instruction's name and the number that the compiler puts behind it.

    >>> _natural("gather_rows.12.refs_10_"), _natural("gather_rows")
    (('gather_rows', 12), ('gather_rows', -1))
    """
    numbers = (int(part) for part in name.split(".")[1:] if part.isdigit())
    return kernel_name(name), next(numbers, -1)
