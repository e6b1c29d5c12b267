"""Mixture-of-experts implementations on a TPU that nobody has here: modelled, from the real compiler's schedules.

    python benchmarks/tpu_model.py --chip=v6e --case=b16
    python benchmarks/tpu_model.py --chip=v5e --chip=7x --case=h14 --distribution=zipf --json=lines.jsonl
    python benchmarks/tpu_model.py --chip=v5p --case=l16 --op=expert_mlp --pass=forward --parts=10

All distributions are modelled from one compilation; after a problem's tables stands how the layer compares with its
peers.

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
count as taken where that is slower; loops whose length is not known count once, copies whose guard is not known as
made, and those of unknown size as empty; all of these are reported. Uneven routing can therefore show in kernels that
are told the sizes of their groups, and nowhere else. The clocks are assumed (see moe_kernels/chips.py), so shares of
a floor and ratios say more than microseconds. XLA's own estimate is a column of its own; nothing uses it.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import app, flags, logging  # noqa: E402

from benchmarks.cases import CASES, DISTRIBUTIONS, DTYPES  # noqa: E402
from benchmarks.results import commit, versions  # noqa: E402
from benchmarks.roofline import OPS, Pass  # noqa: E402
from benchmarks.tpu_compile import CompileError, Request, compile_for_tpu  # noqa: E402
from benchmarks.tpu_implementations import IMPLEMENTATIONS, OURS  # noqa: E402
from benchmarks.tpu_report import HEADER, Modelled, against_peers, line, part_line, summarise  # noqa: E402
from limoe.plan.scheduled import module_cost, read_codes  # noqa: E402
from moe_kernels.chips import TPUS  # noqa: E402

_PASSES: tuple[Pass, ...] = ("forward", "both")
_CHIP = flags.DEFINE_multi_enum("chip", ["v6e"], list(TPUS), "TPU; this and the next five may be given several times.")
_CASE = flags.DEFINE_multi_enum("case", ["b16"], list(CASES), "Size.")
_OP = flags.DEFINE_multi_enum(
    "op", None, OPS, "Operation. Default: the layer of everybody, and the operations of ours."
)
_PASS = flags.DEFINE_multi_enum("pass", list(_PASSES), _PASSES, "Forward, or forward and backward.")
_DISTRIBUTION = flags.DEFINE_multi_enum("distribution", list(DISTRIBUTIONS), DISTRIBUTIONS, "Tokens over experts.")
_IMPLEMENTATION = flags.DEFINE_multi_enum("implementation", None, list(IMPLEMENTATIONS), "Default: all that can run.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", DTYPES, "Of tokens and weights.")
_PARTS = flags.DEFINE_integer("parts", 0, "Also print this many of the slowest instructions.", lower_bound=0)
_JSON = flags.DEFINE_string("json", None, "File to which one JSON object a line is appended.")


def problems() -> Iterator[list[Request]]:
    """What the flags ask for, a list of programs of one problem at a time; the layer of everybody first."""
    ours = {implementation.name for implementation in OURS}
    for chip in _CHIP.value:
        for case in _CASE.value:
            for op in _OP.value or ("layer", *(op for op in OPS if op != "layer")):
                for passes in _PASS.value if op != "plan" else ["forward"]:
                    yield [
                        Request(chip, name, op, passes, case, _DTYPE.value)
                        for name, implementation in IMPLEMENTATIONS.items()
                        if name in (_IMPLEMENTATION.value or IMPLEMENTATIONS)
                        and (_OP.value or op == "layer" or name in ours)
                        and op in implementation.operations
                    ]


def model(request: Request) -> dict[str, Modelled]:
    """Compile one program and model it for every distribution.

    Raises CompileError if it does not compile, and RuntimeError if its scalar program hangs on what nobody knows here
    (XLA's own kernel for a ragged dot computes its tiles inside the compiled program).
    """
    compiled = compile_for_tpu(request, _DISTRIBUTION.value)
    codes = read_codes(compiled.texts)
    return {
        distribution: summarise(
            request, distribution, module_cost(codes, compiled.steering[distribution], TPUS[request.chip]), compiled
        )
        for distribution in _DISTRIBUTION.value
    }


def report(requests: list[Request], json_file: TextIO | None) -> list[Modelled]:
    """Model a problem's programs and print a table for each distribution, the first one as its lines come."""
    made: dict[str, dict[str, Modelled] | RuntimeError] = {}
    for distribution in _DISTRIBUTION.value:
        first = requests[0]
        words = ", ".join((first.case, distribution, first.dtype, first.chip))
        print(f"\n{first.op} {first.passes}, {words} (modelled)\n{HEADER}")
        for request in requests:
            name = request.implementation
            if name not in made:
                try:
                    made[name] = model(request)
                except RuntimeError as error:
                    made[name] = error
            results = made[name]
            if isinstance(results, RuntimeError):
                stage = "compiled" if isinstance(results, CompileError) else "modelled"
                print(f"{name:16s} not {stage}: {results}", flush=True)
                continue
            _show(results[distribution], json_file)
    done = [result for result in made.values() if not isinstance(result, RuntimeError)]
    for distribution in _DISTRIBUTION.value:
        if text := against_peers([results[distribution] for results in done]):
            print(text, flush=True)
    return [result for results in done for result in results.values()]


def _show(result: Modelled, json_file: TextIO | None) -> None:
    print(line(result), flush=True)
    for part in result.parts[: _PARTS.value]:
        print(part_line(part), flush=True)
    if json_file is not None:
        json_file.write(result.to_json() + "\n")
        json_file.flush()


def main(argv: list[str]) -> int:
    """Model what was asked for; 1 if nothing compiled."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(f"modelled, nothing ran on a TPU; {packages}; commit {commit()}")
    results = []
    with contextlib.ExitStack() as stack:
        json_file = stack.enter_context(open(_JSON.value, "a", encoding="utf-8")) if _JSON.value else None
        for requests in problems():
            if requests:
                results += report(requests, json_file)
    return int(not results)


if __name__ == "__main__":
    app.run(main)
