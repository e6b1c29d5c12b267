"""Call the dispatch benchmark's main in turns, with hand-made results; in a process of its own, since flags are global.

    python tests/dispatch_calls.py '[["--op=plan", "--pass=dx"], ...]'      prints [[status, stdout, stderr], ...]

A line of `moe_kernels/xla` takes tokens^1.5 microseconds, one of `dense` as many as it has tokens.
"""

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from benchmarks import estimate
from benchmarks.results import Result
from benchmarks.roofline import Device
from benchmarks.run import Options, Problem, chosen


def run_problem(problem: Problem, options: Options, device: Device) -> Iterator[Result]:
    """Instead of a measurement; at 6,656 tokens somebody presses Ctrl-C."""
    label = problem.op, problem.passes, problem.case.name, problem.distribution, problem.dtype
    for one in chosen(options.implementations, problem):
        ms = 1e-3 * problem.case.tokens ** (1.5 if one.name == "moe_kernels/xla" else 1)
        yield Result(
            *(*label, one.name, device.name, ms, ms, ms, 1.0, 1.0, None, 1.0, 1, 1.0, 1.0, {}, True, "", {}, "c", "d")
        )
        if problem.case.tokens == 6_656:
            raise KeyboardInterrupt


def call(arguments: list[str]) -> tuple[int, str, str]:
    """Status, what is printed, and errors."""
    # Not above: who looks for examples imports every file, and two programs' flags do not go together.
    from benchmarks import dispatch

    dispatch.run_problem = run_problem
    flags.FLAGS.unparse_flags()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = dispatch.main(dispatch.parse_flags(["dispatch.py", *arguments]))
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    estimate.with_rates = lambda device, dtypes: device
    print(json.dumps([call(arguments) for arguments in json.loads(sys.argv[1])]))
