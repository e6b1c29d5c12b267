"""Mixture-of-experts implementations on a TPU that nobody has here: modelled, from the real compiler's schedules.

    python benchmarks/tpu_model.py --chip=v6e --case=b16
    python benchmarks/tpu_model.py --chip=v5e --chip=7x --case=h14 --distribution=zipf --json=lines.jsonl
    python benchmarks/tpu_model.py --chip=v5p --case=l16 --op=expert_mlp --pass=forward --parts=10

Needs `pip install 'jax[tpu]'` and no TPU. Every implementation is compiled ahead of time by libtpu for the named chip,
and all are read with one yardstick. The scalar program of every instruction (Pallas kernels and XLA's fusions, sorts
and gathers alike) is taken from the compiler's dump of final bundles and run on the host, with the values of the
kernels' integer operands, so that trip counts, pipeline stages, skipped tiles and copies come out as on the chip:

    seconds of an instruction = max(bundles run / clock, multiply-adds issued / MXU rate, bytes copied / HBM bandwidth)

and of a program the sum over its instructions. The floor of the layer is max(4 N D F / peak, (4 E D F + 4 N D) / HBM)
forward and 12 N D F / peak forward and backward (bfloat16; N = T K), of other operations the roofline of their
definition.

What the model leaves out: waiting for copies that are not hidden (each instruction is as fast as its tightest limit),
conflicts of memory banks, the latency of a copy (three columns show each row's copy at 25, 50 and 100 ns: no choice may
hang on it), what two cores lose by sharing HBM and waiting for each other, work given to SparseCore (its bytes and
time; such instructions are named), clock changes under load, and the host. Branches on data that is no integer operand
count as taken where that is slower; loops whose length is not known count once and are reported. Uneven routing can
therefore show in kernels that are told the sizes of their groups, and nowhere else. The clocks are assumed (see
tpu_chips.py), so shares of a floor and ratios say more than microseconds. XLA's own estimate is a column of its own;
nothing uses it.
"""

import contextlib
import dataclasses
import datetime
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from absl import app, flags, logging  # noqa: E402

from benchmarks.cases import CASES, DISTRIBUTIONS, DTYPES, Case, draw_experts  # noqa: E402
from benchmarks.results import commit, versions  # noqa: E402
from benchmarks.roofline import OPS, Load, Op, Pass, work  # noqa: E402
from benchmarks.tpu_chips import CHIPS, Chip  # noqa: E402
from benchmarks.tpu_compile import CompileError, Request, compile_for_tpu  # noqa: E402
from benchmarks.tpu_cost import DESCRIPTOR_NANOSECONDS, Cost, module_cost  # noqa: E402
from benchmarks.tpu_implementations import IMPLEMENTATIONS, OURS  # noqa: E402

_PASSES: tuple[Pass, ...] = ("forward", "both")
_WITH_MATMULS = ("grouped_matmul", "expert_mlp", "layer")

_CHIP = flags.DEFINE_multi_enum("chip", ["v6e"], list(CHIPS), "TPU; this and the next five may be given several times.")
_CASE = flags.DEFINE_multi_enum("case", ["b16"], list(CASES), "Size.")
_OP = flags.DEFINE_multi_enum(
    "op", None, OPS, "Operation. Default: the layer of everybody, and the operations of ours."
)
_PASS = flags.DEFINE_multi_enum("pass", list(_PASSES), _PASSES, "Forward, or forward and backward.")
_DISTRIBUTION = flags.DEFINE_multi_enum("distribution", ["balanced"], DISTRIBUTIONS, "Spread of tokens over experts.")
_IMPLEMENTATION = flags.DEFINE_multi_enum("implementation", None, list(IMPLEMENTATIONS), "Default: all that can run.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", DTYPES, "Of tokens and weights.")
_PARTS = flags.DEFINE_integer("parts", 0, "Also print this many of the slowest instructions.", lower_bound=0)
_JSON = flags.DEFINE_string("json", None, "File to which one JSON object a line is appended.")


@dataclasses.dataclass(frozen=True)
class Modelled:
    """One line; every figure is modelled except bytes of memory and compile seconds."""

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
    unknown_loops: int
    missing: tuple[str, ...]
    parts: list[dict[str, float | int | str]]
    """Instructions in descending order of time."""

    def to_json(self) -> str:
        """One line, with versions, commit and date."""
        fields = dataclasses.asdict(self)
        fields["pass"] = fields.pop("passes")
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return json.dumps(fields | {"versions": versions(), "commit": commit(), "date": date})


def floor_seconds(op: Op, passes: Pass, case: Case, load: Load, chip: Chip, dtype: str) -> float:
    """The least time that the chip could need; the docstring of this program has the formulas.

    >>> chip, case = CHIPS["v6e"], CASES["b16"]
    >>> load = Load(case.tokens, case.experts)
    >>> [round(1e6 * floor_seconds("layer", p, case, load, chip, "bfloat16")) for p in ("forward", "both")]
    [215, 506]
    """
    itemsize = 4 if dtype == "float32" else 2
    peak, bandwidth = chip.device.flops[dtype], chip.device.bandwidth
    if op != "layer":
        least = work(op, passes, case, load, itemsize)
        return max(least.flops / peak, least.bytes / bandwidth)
    rows, width, expert_width = case.tokens * case.choices, case.width, case.expert_width
    if passes == "both":
        return 12.0 * rows * width * expert_width / peak
    moved = 2.0 * itemsize * (load.experts * width * expert_width + rows * width)
    return max(4.0 * rows * width * expert_width / peak, moved / bandwidth)


def summarise(request: Request, cost: Cost, temp_bytes: int, compile_seconds: float, estimate: float) -> Modelled:
    """Set a modelled program against its definition."""
    case, chip = CASES[request.case], CHIPS[request.chip]
    implementation = IMPLEMENTATIONS[request.implementation]
    op: Op = request.op  # type: ignore[assignment]
    passes: Pass = request.passes  # type: ignore[assignment]
    load, kept = _load(case, request.distribution)
    if implementation.is_dense:
        load = Load(case.tokens * case.choices, 1)
    floor_op: Op = "expert_mlp" if implementation.is_dense else op
    least = work(floor_op, passes, case, load, 4 if request.dtype == "float32" else 2)
    matmuls = {"grouped_matmul": 1.0, "expert_mlp": 2.0, "layer": 2.0}.get(op, 0.0)
    useful = matmuls * load.rows * case.width * case.expert_width * (3 if passes == "both" else 1)
    return Modelled(
        op=op,
        passes=passes,
        case=case.name,
        distribution=request.distribution,
        dtype=request.dtype,
        implementation=implementation.name,
        chip=chip.name,
        modelled_us=1e6 * cost.seconds,
        modelled_us_by_descriptor_ns={ns: 1e6 * cost.with_descriptors(ns) for ns in DESCRIPTOR_NANOSECONDS},
        xla_estimate_us=1e6 * estimate,
        times_floor=cost.seconds / floor_seconds(floor_op, passes, case, load, chip, request.dtype),
        useful_macs=useful / cost.macs if useful and cost.macs else None,
        useful_rows=load.rows / implementation.computed_rows(case, kept) if op in _WITH_MATMULS else None,
        times_least_bytes=cost.hbm_bytes / least.bytes,
        row_copies=sum(part.row_copies for part in cost.parts),
        temp_bytes=temp_bytes,
        compile_seconds=compile_seconds,
        unknown_loops=cost.unknown_loops,
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
            }
            for part in cost.parts
        ],
    )


def _load(case: Case, distribution: str) -> tuple[Load, np.ndarray]:
    """What finds room, and how much of it each expert gets."""
    groups = draw_experts(case, distribution).reshape(case.groups, -1)
    wanted = np.stack([np.bincount(group, minlength=case.experts) for group in groups])
    kept = np.minimum(wanted, case.capacity).sum(axis=0)
    return Load(int(kept.sum()), int((kept > 0).sum())), kept


HEADER = (
    f"{'implementation':16s} {'modelled us':>11s} {'x floor':>8s} {'25/50/100 ns a row copy':>24s} {'XLA says':>9s} "
    f"{'MACs':>6s} {'rows':>6s} {'x bytes':>8s} {'temp MB':>8s} {'compile s':>9s}"
)


def line(result: Modelled) -> str:
    """A line of the table."""
    macs = "" if result.useful_macs is None else f"{100 * result.useful_macs:.0f}%"
    rows = "" if result.useful_rows is None else f"{100 * result.useful_rows:.0f}%"
    copies = " / ".join(f"{us:.0f}" for us in result.modelled_us_by_descriptor_ns.values()) if result.row_copies else ""
    text = (
        f"{result.implementation:16s} {result.modelled_us:11.1f} {result.times_floor:8.2f} {copies:>24s} "
        f"{result.xla_estimate_us:9.0f} {macs:>6s} {rows:>6s} {result.times_least_bytes:8.2f} "
        f"{result.temp_bytes / 1e6:8.1f} {result.compile_seconds:9.1f}"
    )
    if result.unknown_loops:
        text += f"  {result.unknown_loops} loops of unknown length counted once"
    if result.missing:
        text += f"  without a schedule: {', '.join(result.missing)}"
    return text


def requests() -> Iterator[Request]:
    """What the flags ask for, one problem after the other; the layer of everybody first."""
    ours = {implementation.name for implementation in OURS}
    for chip in _CHIP.value:
        for case in _CASE.value:
            for distribution in _DISTRIBUTION.value:
                for op in _OP.value or ("layer", *(op for op in OPS if op != "layer")):
                    for passes in _PASS.value if op != "plan" else ["forward"]:
                        for name, implementation in IMPLEMENTATIONS.items():
                            chosen = name in (_IMPLEMENTATION.value or IMPLEMENTATIONS)
                            shown = _OP.value or op == "layer" or name in ours
                            if chosen and shown and op in implementation.operations:
                                yield Request(chip, name, op, passes, case, distribution, _DTYPE.value)


def model(request: Request) -> Modelled:
    """Compile one program and model it. Raises CompileError if it does not compile."""
    compiled = compile_for_tpu(request)
    cost = module_cost(compiled, CHIPS[request.chip])
    return summarise(request, cost, compiled.temp_bytes, compiled.compile_seconds, compiled.estimated_seconds)


def report(request: Request, json_file: TextIO | None) -> Modelled | None:
    """Model one program and print it; None, with the reason printed, if it does not compile."""
    try:
        result = model(request)
    except CompileError as error:
        print(f"{request.implementation:16s} not compiled: {error}", flush=True)
        return None
    print(line(result), flush=True)
    for part in result.parts[: _PARTS.value]:
        print(f"    {part['us']:9.1f} us  {part['name']} (x {part['trips']}), bound by {part['bound']}", flush=True)
    if json_file is not None:
        json_file.write(result.to_json() + "\n")
        json_file.flush()
    return result


def main(argv: list[str]) -> int:
    """Model what was asked for; 1 if nothing compiled."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(f"modelled, nothing ran on a TPU; {packages}; commit {commit()}")
    title, results = "", []
    with contextlib.ExitStack() as stack:
        json_file = stack.enter_context(open(_JSON.value, "a", encoding="utf-8")) if _JSON.value else None
        for request in requests():
            words = (request.case, request.distribution, request.dtype, request.chip)
            new = f"{request.op} {request.passes}, {', '.join(words)}"
            if new != title:
                title = new
                print(f"\n{title} (modelled)\n{HEADER}")
            results.append(report(request, json_file))
    return int(not any(results))


if __name__ == "__main__":
    app.run(main)
