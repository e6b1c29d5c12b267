"""The modelled cost of a program relative to its definition, as a line of JSON and a line of a table."""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from benchmarks.cases import CASES, Case, draw_experts
from benchmarks.implementations import Counts, Setting
from benchmarks.results import commit, versions
from benchmarks.roofline import EXPERT_MATMULS, Load, Op, Pass, work
from benchmarks.tpu_compile import Compiled, Request
from benchmarks.tpu_implementations import CHOSEN, IMPLEMENTATIONS
from limoe.plan.scheduled import DESCRIPTOR_NANOSECONDS, ScheduledCost
from moe_kernels.chips import FLOAT32_PASSES, TPUS, Tpu


@dataclasses.dataclass(frozen=True)
class Modelled:
    """A modelled program. All figures are modelled except bytes of memory and compile seconds."""

    op: Op
    passes: Pass
    case: str
    distribution: str
    dtype: str
    implementation: str
    chip: str
    modelled_us: float
    modelled_us_by_descriptor_ns: dict[int, float]
    xla_estimate_us: float
    times_floor: float
    useful_macs: float | None
    useful_rows: float | None
    times_least_bytes: float
    row_copies: int
    temp_bytes: int
    compile_seconds: float
    unknown_branches: int
    missing: tuple[str, ...]
    parts: list[dict[str, float | int | str]]
    """The instructions in descending order of time."""

    def to_json(self) -> str:
        """Write one line, with versions, commit and date."""
        fields = dataclasses.asdict(self)
        fields["pass"] = fields.pop("passes")
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return json.dumps(fields | {"versions": versions(), "commit": commit(), "date": date})


def floor_seconds(op: Op, passes: Pass, case: Case, load: Load, chip: Tpu, dtype: str) -> float:
    """Compute the least time that the chip could need. The docstring of tpu_model.py has the formulas.

    >>> chip, case = TPUS["v6e"], CASES["b16"]
    >>> load = Load(case.tokens, case.experts)
    >>> [round(1e6 * floor_seconds("layer", p, case, load, chip, "bfloat16")) for p in ("forward", "both")]
    [215, 506]
    """
    itemsize = jnp.dtype(dtype).itemsize
    peak, bandwidth = chip.clocked_flops / (FLOAT32_PASSES if dtype == "float32" else 1), chip.hbm_bandwidth
    if op != "layer":
        least = work(op, passes, case, load, itemsize)
        return max(least.flops / peak, least.bytes / bandwidth)
    rows, width, expert_width = case.tokens * case.choices, case.width, case.expert_width
    if passes == "both":
        return 12.0 * rows * width * expert_width / peak
    moved = 2.0 * itemsize * (load.experts * width * expert_width + rows * width)
    return max(4.0 * rows * width * expert_width / peak, moved / bandwidth)


def summarise(request: Request, distribution: str, cost: ScheduledCost, compiled: Compiled) -> Modelled:
    """Compare a modelled program with its definition."""
    case, chip = CASES[request.case], TPUS[request.chip]
    implementation = IMPLEMENTATIONS[request.implementation]
    op: Op = request.op  # type: ignore[assignment]
    passes: Pass = request.passes  # type: ignore[assignment]
    load, counts = load_of(case, distribution)
    if implementation.is_dense:
        load = Load(case.tokens * case.choices, 1)
    floor_op: Op = "expert_mlp" if implementation.is_dense and op == "layer" else op
    least = work(floor_op, passes, case, load, jnp.dtype(request.dtype).itemsize)
    computed = implementation.computed_rows(case, counts, Setting("tpu", chip.kind, request.dtype))
    useful = None
    if op in EXPERT_MATMULS:
        products = EXPERT_MATMULS[op] * (3 if passes == "both" else 1)
        useful = float(products * load.rows * case.width * case.expert_width)
    return Modelled(
        op=op,
        passes=passes,
        case=case.name,
        distribution=distribution,
        dtype=request.dtype,
        implementation=implementation.name,
        chip=chip.name,
        modelled_us=1e6 * cost.seconds,
        modelled_us_by_descriptor_ns={ns: 1e6 * cost.with_descriptors(ns) for ns in DESCRIPTOR_NANOSECONDS},
        xla_estimate_us=1e6 * compiled.estimated_seconds,
        times_floor=cost.seconds / floor_seconds(floor_op, passes, case, load, chip, request.dtype),
        useful_macs=useful / cost.macs if useful is not None and cost.macs else None,
        useful_rows=load.rows / computed if computed is not None and op in EXPERT_MATMULS else None,
        times_least_bytes=cost.hbm_bytes / least.bytes,
        row_copies=sum(part.row_copies for part in cost.parts),
        temp_bytes=compiled.temp_bytes,
        compile_seconds=compiled.compile_seconds,
        unknown_branches=cost.unknown_branches,
        missing=cost.missing,
        parts=[
            {
                "name": part.name,
                "trips": part.trips,
                "bound": part.bound,
                "bundles": part.bundles,
                "us": 1e6 * part.seconds,
                "mxu_us": 1e6 * part.mxu_seconds,
                "hbm_us": 1e6 * part.hbm_seconds,
                "hbm_bytes": part.hbm_bytes,
                "matmul_us": part.matmul_bundles / (1e3 * chip.gigahertz),
            }
            for part in cost.parts
        ],
    )


def load_of(case: Case, distribution: str) -> tuple[Load, Counts]:
    """Count the choices that find room, in all and for each expert."""
    groups = draw_experts(case, distribution).reshape(case.groups, -1)
    wanted = np.stack([np.bincount(group, minlength=case.experts) for group in groups])
    kept = np.minimum(wanted, case.capacity).sum(axis=0)
    return Load(int(kept.sum()), int((kept > 0).sum())), Counts(kept, wanted.sum(axis=0))


def against_peers(results: Sequence[Modelled]) -> str:
    """Compare our layer, with its default back ends, with the others, fastest first. Empty if ours or all others fail.

    >>> against_peers([])
    ''
    """
    ours = next((result for result in results if result.implementation == CHOSEN.name), None)
    dense = {name for name, implementation in IMPLEMENTATIONS.items() if implementation.is_dense}
    others = sorted((r for r in results if r is not ours), key=lambda r: (r.implementation in dense, r.modelled_us))
    if ours is None or not others:
        return ""
    ratios = ", ".join(f"{ours.modelled_us / other.modelled_us:.2f} of {other.implementation}" for other in others)
    words = f"{ours.op} {ours.passes}, {ours.case}, {ours.distribution}, {ours.chip}"
    return f"{words}: {ours.implementation} takes {ratios} (modelled)"


def part_line(part: Mapping[str, float | int | str]) -> str:
    """Format an instruction with its limits and, for matmuls, the cycles of its matmul code over the MXU's floor.

    >>> limits = {"us": 9.0, "mxu_us": 4.0, "hbm_us": 2.0, "matmul_us": 5.0}
    >>> part_line({"name": "x", "trips": 1, "bound": "bundles"} | limits)
    '          9.0 us  x (x 1), bound by bundles; MXU 4.0, HBM 2.0; its matmul code 1.25 of the MXU floor'
    """
    text = f"    {part['us']:9.1f} us  {part['name']} (x {part['trips']}), bound by {part['bound']}"
    text += f"; MXU {part['mxu_us']:.1f}, HBM {part['hbm_us']:.1f}"
    if isinstance(mxu := part["mxu_us"], float) and isinstance(code := part["matmul_us"], float) and mxu:
        text += f"; its matmul code {code / mxu:.2f} of the MXU floor"
    return text


HEADER = (
    f"{'implementation':16s} {'modelled us':>11s} {'x floor':>8s} {'25/50/100 ns a row copy':>24s} {'XLA says':>9s} "
    f"{'MACs':>6s} {'rows':>6s} {'x bytes':>8s} {'temp MB':>8s} {'compile s':>9s}"
)


def line(result: Modelled) -> str:
    """Format a line of the table."""
    macs = "" if result.useful_macs is None else f"{100 * result.useful_macs:.0f}%"
    rows = "" if result.useful_rows is None else f"{100 * result.useful_rows:.0f}%"
    copies = " / ".join(f"{us:.0f}" for us in result.modelled_us_by_descriptor_ns.values()) if result.row_copies else ""
    text = (
        f"{result.implementation:16s} {result.modelled_us:11.1f} {result.times_floor:8.2f} {copies:>24s} "
        f"{result.xla_estimate_us:9.0f} {macs:>6s} {rows:>6s} {result.times_least_bytes:8.2f} "
        f"{result.temp_bytes / 1e6:8.1f} {result.compile_seconds:9.1f}"
    )
    if result.unknown_branches:
        text += f"  {result.unknown_branches} branches or copies depend on unknown data"
    if result.missing:
        text += f"  without a schedule: {', '.join(result.missing)}"
    return text
