"""Price a compiled program on one chip by the compiler's own schedule, in modelled seconds.

One run of an instruction takes the longest of three: its bundles at one a clock cycle, its multiply-adds at the rate of
the matrix units, and its copies at the bandwidth of HBM. `module_cost` prices a single layer and follows the top-level
program of the schedule. `schedule_step` prices a train step in the order of its HLO program, beside the roofline.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from limoe.plan.bundles import Code, parse
from limoe.plan.hlo import COPIES, Run, kernel_name
from limoe.plan.machine import Ran, run
from limoe.plan.overlap import Cost, Times, schedule
from limoe.plan.prices import in_bundles, on_matrix_units, through_memory
from moe_kernels.chips import Tpu

Steering = tuple[str, dict[int, list[int]]]
"""A kernel's name, and the values of its integer operands by their index."""

_TOP = "TLP"
# The compiler counts copies in units of this many bytes.
GRANULE = 32
# A copy of at most this many bytes counts as the copy of a row. Blocks of a pipeline are larger.
ROW_BYTES = 16 * 1024
DESCRIPTOR_NANOSECONDS = (25, 50, 100)


class Part(NamedTuple):
    """An instruction: how often it runs, and the totals of all its runs."""

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
    """Those of `bundles` in straight pieces of code with a matmul."""

    @property
    def seconds(self) -> float:
        """The modelled time."""
        return max(self.bundle_seconds, self.mxu_seconds, self.hbm_seconds)

    @property
    def bound(self) -> str:
        """The name of the longest of the three limits."""
        limits = {"bundles": self.bundle_seconds, "MXU": self.mxu_seconds, "HBM": self.hbm_seconds}
        return max(limits, key=lambda name: limits[name])


class ScheduledCost(NamedTuple):
    """A whole program. Its parts are in descending order of time."""

    parts: tuple[Part, ...]
    seconds: float
    macs: float
    hbm_bytes: float
    unknown_branches: int
    missing: tuple[str, ...]
    """Instructions without bundles, such as work for SparseCore. They count as nothing."""

    def with_descriptors(self, nanoseconds: int | float) -> float:
        """Compute the seconds if issuing each copy of a row takes so long, beside the rest of its instruction."""
        return self.seconds + sum(max(0.0, 1e-9 * nanoseconds * p.row_copies - p.seconds) for p in self.parts)


def read_codes(texts: Mapping[str, str]) -> dict[str, Code]:
    """Read the scalar programs of a compiled program, by instruction."""
    return {name: parse(text) for name, text in texts.items()}


def module_cost(codes: Mapping[str, Code], steering: Sequence[Steering], chip: Tpu) -> ScheduledCost:
    """Price a compiled program, given the integer operands that steer its kernels.

    Instructions follow one another. Copies of the top level (prefetches) run beside all of them.
    """
    delay = _branch_delay(codes)
    operands = _steering_by_instruction(codes, steering)
    top = run(codes[_TOP], delay)
    parts = [part_cost(_TOP, 1, [top], chip)]
    for name, calls in top.calls.items():
        if name in codes:
            parts.append(part_cost(name, calls, _runs(codes[name], delay, operands.get(name), chip), chip))
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
    """A train step priced by the compiler's own schedule."""

    times: Times | None
    """None where there is no schedule or it cannot be read."""
    note: str
    """How many instructions were priced by their bundles, or why none was."""


NOT_ASKED = ScheduledStep(None, "not asked for; --schedule prices the step by the compiler's own schedule, too")


def schedule_step(texts: Mapping[str, str], costs: Sequence[tuple[Run, Cost]], chip: Tpu) -> ScheduledStep:
    """Price a train step by the final bundles of its instructions.

    `texts` are the bundles by instruction; `costs` are the instructions in order, each with the cost of one run by the
    roofline. Order, trips and overlap come from the program, as for the roofline. Only the cost of one run comes from
    the bundles, and it is at least the roofline's. The roofline also prices exchanges, asynchronous copies and
    instructions without bundles. The scalar program that starts the instructions counts as nothing.
    """
    try:
        codes = read_codes({name: texts[name] for one, _ in costs if (name := one.instruction.name) in texts})
    except ValueError as error:
        return ScheduledStep(None, f"the compiler's schedule cannot be read: {error}")
    if not codes:
        return ScheduledStep(None, "the compiler wrote no schedule of the step's instructions")
    delay = _branch_delay(codes)
    prices: dict[str, Cost] = {}
    unknown = 0
    left: list[float] = []
    for one, cost in costs:
        name = one.instruction.name
        if one.instruction.opcode in COPIES or _waits_for_devices(one, cost) or name in prices:
            continue
        if part := _one_run(name, codes.get(name), delay, chip):
            prices[name] = _by_bundles(part, cost, codes[name].uses_core_id, chip)
            unknown += part.unknown_branches > 0
        elif seconds := max(cost.compute, cost.hbm):
            left.append(one.trips * seconds)
    note = (
        f"{len(prices)} instructions by their bundles ({unknown} with branches that hang on data), "
        f"{len(left)} without bundles by the roofline ({1e6 * sum(left):.3g} us)"
    )
    return ScheduledStep(schedule((one, prices.get(one.instruction.name, cost)) for one, cost in costs), note)


def _waits_for_devices(one: Run, cost: Cost) -> bool:
    """Tell if an instruction is an exchange and nothing else. Its bundles wait for other devices."""
    return cost.exchange > 0 and one.instruction.opcode != "fusion"


def _one_run(name: str, code: Code | None, delay: int, chip: Tpu) -> Part | None:
    """Price one run of an instruction; None if it has no bundles or its scalar program does not end here."""
    if code is None:
        return None
    try:
        return part_cost(name, 1, _runs(code, delay, None, chip), chip)
    except RuntimeError:
        return None


def _by_bundles(part: Part, roofline: Cost, is_split: bool, chip: Tpu) -> Cost:
    """Compute the cost of one run by the schedule. It is never less than the roofline's.

    Branches that hang on data make the counts of a kernel wrong: a loop counts one trip, and every region counts as
    run. Its code with matmuls is then taken to run as often as the roofline's FLOPs need, spread over the chip's cores
    if the kernel asks which core it runs on. Its traffic is then the roofline's.
    """
    scale, hbm = 1.0, max(roofline.hbm, part.hbm_seconds)
    if part.unknown_branches:
        hbm = roofline.hbm
        if roofline.compute and part.mxu_seconds:
            scale = roofline.compute * (1 if is_split else chip.num_cores) / part.mxu_seconds
    bundles = part.bundle_seconds + (scale - 1) * in_bundles(part.matmul_bundles, chip)
    return roofline._replace(compute=max(roofline.compute, scale * part.mxu_seconds, bundles), hbm=hbm)


def _branch_delay(codes: Mapping[str, Code]) -> int:
    """Count the bundles that still run after a branch on this chip."""
    return min((d for code in codes.values() if (d := code.branch_delay()) is not None), default=0)


def _runs(code: Code, delay: int, steering: Mapping[int, Sequence[int]] | None, chip: Tpu) -> list[Ran]:
    """Run a program on each core. If the cores do the same, the work is not split, and one run is returned."""
    cores = chip.num_cores if code.uses_core_id else 1
    runs = [run(code, delay, steering, core) for core in range(cores)]
    first = runs[0]
    return runs if any((ran.places, ran.copies) != (first.places, first.copies) for ran in runs) else [first]


def part_cost(name: str, trips: int, runs: Sequence[Ran], chip: Tpu) -> Part:
    """Price one instruction from its runs on each core. The slowest core decides; copies and multiply-adds add up.

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
    """Find the integer operands of each kernel. The kernel's name (if known), indices and lengths must match.

    The compiler numbers calls of one kernel in the order of the program, so calls that match are taken in turn.
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
    """Split an instruction's name from the number that the compiler puts behind it.

    >>> _natural("gather_rows.12.refs_10_"), _natural("gather_rows")
    (('gather_rows', 12), ('gather_rows', -1))
    """
    numbers = (int(part) for part in name.split(".")[1:] if part.isdigit())
    return kernel_name(name), next(numbers, -1)
