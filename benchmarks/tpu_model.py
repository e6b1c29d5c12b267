"""Model the time of mixture-of-experts implementations on a TPU that is not here, from the compiler's schedules.

    python benchmarks/tpu_model.py --chip=v6e --case=b16
    python benchmarks/tpu_model.py --chip=v5e --chip=7x --case=h14 --distribution=zipf --json=lines.jsonl
    python benchmarks/tpu_model.py --chip=v5p --case=l16 --op=expert_mlp --pass=forward --parts=10

One compilation serves all distributions. After a problem's tables, a line compares our layer with the others.

Needs `pip install 'jax[tpu]'` but no TPU. libtpu compiles every implementation ahead of time for the named chip, and
all are modelled in the same way. The compiler dumps the final bundles of every instruction: Pallas kernels, and XLA's
fusions, sorts and gathers. We run the scalar part of these programs on the host, with the real integer operands of the
kernels. So trip counts, pipeline stages, skipped tiles and copies are those of the chip:

    seconds of an instruction = max(bundles run / clock, multiply-adds issued / MXU rate, bytes copied / HBM bandwidth)

The time of a program is the sum over its instructions. The floor of the layer is
max(4 N D F / peak, (4 E D F + 4 N D) / HBM) forward and 12 N D F / peak forward and backward (bfloat16; N = T K). The
floor of another operation is the roofline of its definition.

The model leaves out
- waiting for copies that are not hidden: each instruction is as fast as its tightest limit
- conflicts of memory banks
- the latency of a copy; three columns show a time of 25, 50 and 100 ns for each row's copy
- the losses of two cores that share HBM and wait for each other
- the time and bytes of work on SparseCore; such instructions are named
- clock changes under load, and the host

Some data is not known, because it is no integer operand. A branch on it counts as taken if that is slower. A loop of
unknown length counts once, a copy with an unknown guard counts as made, and one of unknown size as empty. The table
reports all of these. Therefore uneven routing affects only kernels that get the sizes of their groups as operands. The
clocks are assumed (see moe_kernels/chips.py), so ratios and multiples of a floor mean more than microseconds. XLA's own
estimate has its own column, which nothing else uses.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import app, flags, logging  # noqa: E402

from benchmarks.cases import CASES, DISTRIBUTIONS, DTYPES  # noqa: E402
from benchmarks.results import append, commit, versions  # noqa: E402
from benchmarks.roofline import OPS, Pass  # noqa: E402
from benchmarks.tpu_compile import CompileError, Request, compile_for_tpu  # noqa: E402
from benchmarks.tpu_implementations import IMPLEMENTATIONS, OURS  # noqa: E402
from benchmarks.tpu_report import HEADER, Modelled, against_peers, line, part_line, summarise  # noqa: E402
from limoe.plan.scheduled import module_cost, read_codes  # noqa: E402
from moe_kernels.chips import TPUS  # noqa: E402

_PASSES: tuple[Pass, ...] = ("forward", "both")
_CHIP = flags.DEFINE_multi_enum(
    "chip", ["v6e"], list(TPUS), "TPU. This flag and the next five may be given several times."
)
_CASE = flags.DEFINE_multi_enum("case", ["b16"], list(CASES), "Size.")
_OP = flags.DEFINE_multi_enum(
    "op", None, OPS, "Operation (default: the layer of all implementations, and the other operations of ours)."
)
_PASS = flags.DEFINE_multi_enum("pass", list(_PASSES), _PASSES, "Forward, or forward and backward.")
_DISTRIBUTION = flags.DEFINE_multi_enum(
    "distribution", list(DISTRIBUTIONS), DISTRIBUTIONS, "Distribution of tokens over experts."
)
_IMPLEMENTATION = flags.DEFINE_multi_enum(
    "implementation", None, list(IMPLEMENTATIONS), "Implementation (default: all that can run)."
)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", DTYPES, "Dtype of tokens and weights.")
_LIMIT = flags.DEFINE_integer(
    "compile_limit", 900, "Seconds after which a program counts as one that does not compile.", lower_bound=1
)
_PARTS = flags.DEFINE_integer("parts", 0, "Also print this many of the slowest instructions.", lower_bound=0)
_JSON = flags.DEFINE_string("json", None, "File to which each result is appended as a line of JSON.")


def problems() -> Iterator[list[Request]]:
    """Make the programs that the flags name, one list for each problem, with the layer first."""
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
    """Compile a program and model it for every distribution.

    Raises CompileError if it does not compile, and RuntimeError if its scalar program depends on unknown data, as with
    XLA's own kernel for a ragged dot, which computes its tiles inside the compiled program.
    """
    compiled = compile_for_tpu(request, _DISTRIBUTION.value, _LIMIT.value)
    codes = read_codes(compiled.texts)
    return {
        distribution: summarise(
            request, distribution, module_cost(codes, compiled.steering[distribution], TPUS[request.chip]), compiled
        )
        for distribution in _DISTRIBUTION.value
    }


def report(requests: list[Request]) -> list[Modelled]:
    """Model a problem's programs, and print a table for each distribution. The first table grows line by line."""
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
            _show(results[distribution])
    done = [result for result in made.values() if not isinstance(result, RuntimeError)]
    for distribution in _DISTRIBUTION.value:
        if text := against_peers([results[distribution] for results in done]):
            print(text, flush=True)
    return [result for results in done for result in results.values()]


def _show(result: Modelled) -> None:
    print(line(result), flush=True)
    for part in result.parts[: _PARTS.value]:
        print(part_line(part), flush=True)
    append(_JSON.value, result.to_json())


def main(argv: list[str]) -> int:
    """Model the programs that the flags name. Returns 1 if nothing compiled."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(f"modelled, nothing ran on a TPU; {packages}; commit {commit()}")
    results = [result for requests in problems() if requests for result in report(requests)]
    return int(not results)


if __name__ == "__main__":
    app.run(main)
