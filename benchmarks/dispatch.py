"""Time mixture-of-experts implementations side by side, and compare them with a dense MLP and the roofline.

    python benchmarks/dispatch.py                                  the quick suite, under 3 minutes on 2 CPU cores;
                                                                   on a GPU the suite for GPUs
    python benchmarks/dispatch.py --suite=full --json=lines.jsonl --plot=bars.png
    python benchmarks/dispatch.py --case=b16 --op=layer --dtype=bfloat16 --distribution=zipf
    python benchmarks/dispatch.py --sweep=tokens
    python benchmarks/dispatch.py --check                          only compares with the reference

--case, --op, --pass, --distribution, --dtype and --sweep name problems instead of a suite. The default of each is
issue, layer, both, balanced, float32, and no sweep. Each but --sweep may be given several times.

Every implementation is first compared with `reference` (float64 loops). On a small twin of the problem, all values and
gradients are compared; at the full size, results and token gradients of sampled tokens, and weight gradients of two
experts. A wrong implementation is reported but never timed, and the exit status is 1. It is also 1 if nothing could be
measured. Then all run in turns, round by round, so that a drift of the machine affects all alike. Ratios are paired by
round. FLOPs and bytes follow from the definition: only useful rows, every array once.

Each call gets its last result as a donated argument, like a train step with its old gradients, and reuses its memory.
Without donation, 268 MB of gradients (32 experts of 512 x 2048, twice) would be new memory in every call. On two CPU
cores their page faults take about half the time of the dense MLP, which itself has only 8 MB of gradients. With
donation, the ratio to dense is as it would be in training.
"""

import dataclasses
import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
from absl import app, flags, logging  # noqa: E402

from benchmarks import estimate, selection, summary, timing  # noqa: E402
from benchmarks.cases import CASES, DISTRIBUTIONS, DTYPES  # noqa: E402
from benchmarks.implementations import OURS  # noqa: E402
from benchmarks.markdown import write_section  # noqa: E402
from benchmarks.results import HEADER, Result, append, line, machine, title  # noqa: E402
from benchmarks.roofline import OPS, PASSES, Load, Op, Pass, Problem, this_device, work  # noqa: E402
from benchmarks.run import IMPLEMENTATIONS, Options, run_problem  # noqa: E402

_SUITE = flags.DEFINE_enum(
    "suite",
    None,
    list(selection.SUITES),
    "Problems to run if none are named (default: gpu on a GPU, else quick).",
)
_CASE = flags.DEFINE_multi_enum(
    "case", None, list(CASES), "Sizes to run (default: issue, if other flags name problems)."
)
_OP = flags.DEFINE_multi_enum("op", None, OPS, "Operations to run (default: layer).")
_PASS = flags.DEFINE_multi_enum(
    "pass",
    None,
    PASSES,
    "Passes to run (default: both). dx and dw are the halves of a grouped matmul's backward pass.",
)
_DISTRIBUTION = flags.DEFINE_multi_enum(
    "distribution", None, DISTRIBUTIONS, "Distributions of tokens over experts (default: balanced)."
)
_DTYPE = flags.DEFINE_multi_enum("dtype", None, DTYPES, "Dtypes to run (default: float32).")
_IMPLEMENTATION = flags.DEFINE_multi_enum(
    "implementation",
    None,
    list(IMPLEMENTATIONS),
    "Implementations to run (default: all that can).",
)
_SWEEP = flags.DEFINE_enum(
    "sweep", None, ["tokens", "experts", "width"], "Double one axis up to the case, and fit the exponent of the time."
)
_REPETITIONS = flags.DEFINE_integer(
    "repetitions", 5, "Timed rounds. An implementation that takes over 5 s is timed once.", lower_bound=1
)
_CHECK = flags.DEFINE_bool("check", False, "Compare with the reference, without timing.")
_JSON = flags.DEFINE_string("json", None, "File to which each result is appended as a line of JSON.")
_PLOT = flags.DEFINE_string("plot", None, "PNG file for a bar chart.")
_MARKDOWN = flags.DEFINE_string(
    "markdown", None, "Markdown file in which this program replaces its section, or appends it."
)


class Report:
    """Collects results, and writes each one at once to the screen and as a line of JSON."""

    def __init__(self, path: str | None) -> None:
        self.results: list[Result] = []
        self.text: list[str] = []
        self._path = path
        self._title = ""

    def say(self, text: str) -> None:
        """Print a text, and keep it for the Markdown file."""
        self.text.append(text)
        print(text, flush=True)

    def note(self, text: str) -> None:
        """Print a text, but only once."""
        if text not in self.text:
            self.say(text)

    def add(self, result: Result) -> None:
        """Print and write a result."""
        self.results.append(result)
        if title(result) != self._title:
            self._title = title(result)
            self.say(f"\n{self._title}\n{HEADER}")
        self.say(line(result))
        append(self._path, result.to_json())


def say_summary(report: Report) -> None:
    """Print comparisons of our layer with the others, the share of routing, and memory."""
    report.say("")
    for implementation in OURS:
        for summarise in summary.SUMMARIES:
            for text in summarise(report.results, implementation.name):
                report.say(text)


def say_exponents(problems: Sequence[Problem], axis: str, report: Report) -> None:
    """Print the fitted exponent of every implementation's time, beside that of the useful work."""
    first = problems[0]
    sizes = [getattr(problem.case, axis) for problem in problems]
    useful = [work(p.op, p.passes, p.case, Load(p.case.tokens * p.case.choices, p.case.experts), 4) for p in problems]
    # An operation without FLOPs moves bytes.
    grows = summary.exponent(sizes, [amount.flops or amount.bytes for amount in useful]) if len(sizes) > 1 else 0.0
    report.say(f"\ntime of {first.op} {first.passes} as a power of {axis} ({sizes[0]} to {sizes[-1]})")
    for name in dict.fromkeys(result.implementation for result in report.results):
        times = {r.case: r.ms_median for r in report.results if r.implementation == name and r.ms_median}
        points = [(getattr(p.case, axis), times[p.case.name]) for p in problems if p.case.name in times]
        if len(points) > 1:
            report.say(f"{name:16s} {summary.exponent(*zip(*points, strict=True)):5.2f}   (useful work: {grows:.2f})")


def chosen_problems() -> list[Problem]:
    """Make the problems that the flags name. Raises UsageError for flags that do not fit together."""
    named = [flag.name for flag in (_OP, _PASS, _CASE, _DISTRIBUTION, _DTYPE, _SWEEP) if flag.value]
    if named and _SUITE.value:
        raise app.UsageError(f"--suite={_SUITE.value} has its own problems; remove it, or --{', --'.join(named)}")
    if not named:
        return selection.SUITES[_SUITE.value or ("gpu" if jax.default_backend() == "gpu" else "quick")]()
    for op in _OP.value or ["layer"]:
        for a_pass in _PASS.value or []:
            if not selection.has_pass(op, a_pass):
                passes = ", ".join(known for known in PASSES if selection.has_pass(op, known))
                raise app.UsageError(f"--op={op} has no pass {a_pass}, only {passes}")
    # absl has checked the names.
    problems = selection.product(
        cast(Sequence[Op], _OP.value or ["layer"]),
        cast(Sequence[Pass], _PASS.value or ["both"]),
        _CASE.value or ["issue"],
        _DISTRIBUTION.value or ["balanced"],
        _DTYPE.value or ["float32"],
    )
    if _SWEEP.value is None:
        return problems
    if len(problems) != 1:
        raise app.UsageError("--sweep needs exactly one case, operation, pass, distribution and dtype")
    cases = selection.sweep(cast(selection.Axis, _SWEEP.value), problems[0].case)
    return [dataclasses.replace(problems[0], case=case) for case in cases]


def check_files() -> None:
    """Raise UsageError for an output file that cannot be written."""
    for flag in (_JSON, _PLOT, _MARKDOWN):
        if flag.value:
            file = Path(flag.value)
            if not file.parent.is_dir():
                raise app.UsageError(f"--{flag.name}={file}: there is no folder {file.parent}; create it first")
            if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
                raise app.UsageError(f"--{flag.name}={file} cannot be written")
    if _PLOT.value and Path(_PLOT.value).suffix != ".png":
        raise app.UsageError(f"--plot={_PLOT.value} must end in .png")
    if _PLOT.value and importlib.util.find_spec("matplotlib") is None:
        raise app.UsageError("--plot needs matplotlib, which is not installed; run pip install '.[train]'")


def main(argv: list[str]) -> int:
    """Run the benchmark. Returns 1 if a result is wrong or there is none, 2 for bad arguments, 130 after Ctrl-C."""
    # JAX logs at length which platforms it did not find.
    logging.set_verbosity(logging.WARNING)
    try:
        if len(argv) > 1:
            raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
        check_files()
        problems = chosen_problems()
    except app.UsageError as error:
        return refuse(error)
    # Background commands of a non-interactive shell, and their children, ignore Ctrl-C unless it is set.
    signal.signal(signal.SIGINT, timing.interrupt)
    names = _IMPLEMENTATION.value or list(IMPLEMENTATIONS)
    report = Report(_JSON.value)
    options = Options(tuple(IMPLEMENTATIONS[name] for name in names), _REPETITIONS.value, _CHECK.value, report.note)
    status = 0
    try:
        device = this_device()
        report.say(machine(device))
        rates = device if len(problems) == 1 else estimate.with_rates(device, {p.dtype for p in problems})
        repetitions = 0 if options.check_only else options.repetitions
        problems, remarks = estimate.plan_run(problems, options.implementations, repetitions, rates)
        for remark in remarks:
            report.say(remark)
        for problem in problems:
            for result in run_problem(problem, options, device):
                report.add(result)
    except KeyboardInterrupt:
        timing.caught()
        report.say("\nstopped; results so far:")
        status = 130
    say_summary(report)
    if _SWEEP.value is not None and problems:
        say_exponents(problems, _SWEEP.value, report)
    if _PLOT.value and report.results:
        from benchmarks.plot import save_plot  # needs matplotlib, which the layer does not

        save_plot(report.results, _PLOT.value)
    # A partial run must not replace a complete one.
    if _MARKDOWN.value and not status:
        # Leave paths of files out of the document.
        words = [word for word in sys.argv[1:] if not word.startswith(("--json", "--plot", "--markdown"))]
        command = " ".join(["python benchmarks/dispatch.py", *words])
        write_section(_MARKDOWN.value, f"Printed by `{command}`:\n\n```text\n{chr(10).join(report.text).strip()}\n```")
    wrong = [result for result in report.results if not result.correct]
    if wrong:
        print(f"\n{len(wrong)} wrong; the first: {wrong[0].implementation}, {title(wrong[0])}", file=sys.stderr)
    if not report.results and not status:
        print("nothing was measured: none of the chosen implementations runs these problems here", file=sys.stderr)
    return status or int(bool(wrong) or not report.results)


def refuse(error: Exception) -> int:
    """Print one line instead of absl's page of help. Returns the exit status."""
    print(f"dispatch.py: {error}", file=sys.stderr)
    return 2


def parse_flags(argv: list[str]) -> list[str]:
    """Parse flags as absl does, but report an error in one line."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(refuse(error))


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
