"""Mixture-of-experts implementations side by side: what they cost, against a dense MLP and against the roofline.

    python benchmarks/dispatch.py                                  the quick suite, under 3 minutes on 2 CPU cores;
                                                                   on a GPU the suite that is made for one
    python benchmarks/dispatch.py --suite=full --json=lines.jsonl --plot=bars.png
    python benchmarks/dispatch.py --case=b16 --op=layer --dtype=bfloat16 --distribution=zipf
    python benchmarks/dispatch.py --sweep=tokens
    python benchmarks/dispatch.py --check                          only compares with the reference

With any of --case, --op, --pass, --distribution, --dtype and --sweep no suite is run but what they name; those not
given are: issue, layer, both, balanced, float32. Each but --sweep may be given several times.

Every implementation is first compared with `reference` (float64 loops): all values and gradients on a small twin of
the problem; then, at the full size, results and token gradients of sampled tokens and weight gradients of two experts.
A wrong one is reported as wrong and never timed, and the exit status is 1, as it is if nothing could be measured. Then
all run in turns, round by round, so that a drift of the machine hits all alike; ratios are paired by round. FLOPs and
bytes are counted from the definition: useful rows only, every array once.

What donation changes: each call gets its last result as a donated argument, as a train step hands over its old
gradients, so that results are written where they lay before. Without it, 268 MB of gradients (32 experts of 512 x 2048,
twice) are fresh memory in every call, whose first touch costs page faults that take about half the time of the dense
MLP on two CPU cores; and the dense MLP, whose gradients are 8 MB, hardly pays them. So donation is what makes the ratio
to dense mean what it would in training. Both are measured with it.
"""

import contextlib
import dataclasses
import importlib.util
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO, cast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
from absl import app, flags, logging  # noqa: E402

from benchmarks import estimate, selection, summary, timing  # noqa: E402
from benchmarks.cases import CASES, DISTRIBUTIONS, DTYPES  # noqa: E402
from benchmarks.implementations import OURS  # noqa: E402
from benchmarks.markdown import write_section  # noqa: E402
from benchmarks.results import HEADER, Result, line, machine, title  # noqa: E402
from benchmarks.roofline import OPS, PASSES, Device, Load, Op, Pass, this_device, work  # noqa: E402
from benchmarks.run import IMPLEMENTATIONS, Options, Problem, run_problem  # noqa: E402

_SUITE = flags.DEFINE_enum(
    "suite",
    None,
    list(selection.SUITES),
    "Problems to run instead of naming some; default: gpu where there is one, else quick.",
)
_CASE = flags.DEFINE_multi_enum("case", None, list(CASES), "Sizes to run; issue if only other things are named.")
_OP = flags.DEFINE_multi_enum("op", None, OPS, "Operations to run; layer if only other things are named.")
_PASS = flags.DEFINE_multi_enum(
    "pass",
    None,
    PASSES,
    "Passes to run; both if only other things are named. dx and dw are the halves of a grouped matmul's backward pass.",
)
_DISTRIBUTION = flags.DEFINE_multi_enum(
    "distribution", None, DISTRIBUTIONS, "How tokens spread over experts; balanced if only other things are named."
)
_DTYPE = flags.DEFINE_multi_enum("dtype", None, DTYPES, "Dtypes to run; float32 if only other things are named.")
_IMPLEMENTATION = flags.DEFINE_multi_enum(
    "implementation",
    None,
    list(IMPLEMENTATIONS),
    "Implementation; may be given several times. Default: all that can run.",
)
_SWEEP = flags.DEFINE_enum(
    "sweep", None, ["tokens", "experts", "width"], "Double one axis up to the case, and fit the exponent of its cost."
)
_REPETITIONS = flags.DEFINE_integer(
    "repetitions", 5, "Timed rounds; an implementation that takes over 5 s is timed once.", lower_bound=1
)
_CHECK = flags.DEFINE_bool("check", False, "Only compare with the reference; time nothing.")
_JSON = flags.DEFINE_string("json", None, "File to which one JSON object a line is appended as it is measured.")
_PLOT = flags.DEFINE_string("plot", None, "PNG file for bars.")
_MARKDOWN = flags.DEFINE_string(
    "markdown", None, "Markdown file whose section between the marks of this program is replaced, or added at the end."
)


class Report:
    """Collects results, and writes them as they come: to the screen, and as JSON lines."""

    def __init__(self, json_file: TextIO | None) -> None:
        self.results: list[Result] = []
        self.text: list[str] = []
        self._json_file = json_file
        self._title = ""

    def say(self, text: str) -> None:
        """Print some text, and keep it for the Markdown file."""
        self.text.append(text)
        print(text, flush=True)

    def note(self, text: str) -> None:
        """Say something that is worth one line however often it happens."""
        if text not in self.text:
            self.say(text)

    def add(self, result: Result) -> None:
        """Print and write a result."""
        self.results.append(result)
        if title(result) != self._title:
            self._title = title(result)
            self.say(f"\n{self._title}\n{HEADER}")
        self.say(line(result))
        if self._json_file is not None:
            self._json_file.write(result.to_json() + "\n")
            self._json_file.flush()


def run_all(problems: Iterable[Problem], options: Options, device: Device, report: Report) -> None:
    """Run problem after problem; Ctrl-C passes through once everything that was timed is reported."""
    for problem in problems:
        for result in run_problem(problem, options, device):
            report.add(result)


def say_summary(report: Report) -> None:
    """What the lines mean: our layer against the others, the share of routing, and memory."""
    report.say("")
    for implementation in OURS:
        for figures in (
            summary.against_peers,
            summary.of_dense_matmul,
            summary.share_around_experts,
            summary.peak_memory,
        ):
            for text in figures(report.results, implementation.name):
                report.say(text)


def say_exponents(problems: Sequence[Problem], axis: str, report: Report) -> None:
    """The fitted exponent of every implementation's time, beside that of the work."""
    first = problems[0]
    sizes = [getattr(problem.case, axis) for problem in problems]
    useful = [work(p.op, p.passes, p.case, Load(p.case.tokens * p.case.choices, p.case.experts), 4) for p in problems]
    # An operation that computes nothing moves bytes.
    grows = summary.exponent(sizes, [amount.flops or amount.bytes for amount in useful]) if len(sizes) > 1 else 0.0
    report.say(f"\ntime of {first.op} {first.passes} as a power of {axis} ({sizes[0]} to {sizes[-1]})")
    for name in dict.fromkeys(result.implementation for result in report.results):
        times = {r.case: r.ms_median for r in report.results if r.implementation == name and r.ms_median}
        points = [(getattr(p.case, axis), times[p.case.name]) for p in problems if p.case.name in times]
        if len(points) > 1:
            report.say(f"{name:16s} {summary.exponent(*zip(*points, strict=True)):5.2f}   (useful work: {grows:.2f})")


def chosen_problems() -> list[Problem]:
    """The problems that the flags ask for. Raises UsageError if they do not go together."""
    named = [flag.name for flag in (_OP, _PASS, _CASE, _DISTRIBUTION, _DTYPE, _SWEEP) if flag.value]
    if named and _SUITE.value:
        raise app.UsageError(f"--suite={_SUITE.value} has its own problems; leave it out, or --{', --'.join(named)}")
    if not named:
        return selection.SUITES[_SUITE.value or ("gpu" if jax.default_backend() == "gpu" else "quick")]()
    for op in _OP.value or ["layer"]:
        for a_pass in _PASS.value or []:
            if not selection.has_pass(op, a_pass):
                passes = ", ".join(known for known in PASSES if selection.has_pass(op, known))
                raise app.UsageError(f"--op={op} has no pass {a_pass}, only {passes}")
    # absl has checked that each is one of the names.
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
        raise app.UsageError("--sweep takes one case, operation, pass, distribution and dtype")
    cases = selection.sweep(cast(selection.Axis, _SWEEP.value), problems[0].case)
    return [dataclasses.replace(problems[0], case=case) for case in cases]


def check_files() -> None:
    """Raise UsageError for a file that cannot be written, before anything runs."""
    for flag in (_JSON, _PLOT, _MARKDOWN):
        if flag.value:
            file = Path(flag.value)
            if not file.parent.is_dir():
                raise app.UsageError(f"--{flag.name}={file}: there is no folder {file.parent}; make it first")
            if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
                raise app.UsageError(f"--{flag.name}={file} cannot be written")
    if _PLOT.value and Path(_PLOT.value).suffix != ".png":
        raise app.UsageError(f"--plot={_PLOT.value} must end in .png")
    if _PLOT.value and importlib.util.find_spec("matplotlib") is None:
        raise app.UsageError("--plot needs matplotlib, which is not installed; pip install '.[train]' does that")


def main(argv: list[str]) -> int:
    """Run what was asked for; 1 if any result is wrong or there is none, 2 for bad arguments, 130 after Ctrl-C."""
    # JAX tells at length which platforms it did not find.
    logging.set_verbosity(logging.WARNING)
    try:
        if len(argv) > 1:
            raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
        check_files()
        problems = chosen_problems()
    except app.UsageError as error:
        return refuse(error)
    # A shell that is not interactive starts background commands with Ctrl-C ignored, and children inherit that.
    signal.signal(signal.SIGINT, timing.interrupt)
    names = _IMPLEMENTATION.value or list(IMPLEMENTATIONS)
    with contextlib.ExitStack() as stack:
        json_file = stack.enter_context(open(_JSON.value, "a", encoding="utf-8")) if _JSON.value else None
        report = Report(json_file)
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
            run_all(problems, options, device, report)
        except KeyboardInterrupt:
            timing.caught()
            report.say("\nstopped; what was measured until then:")
            status = 130
        say_summary(report)
        if _SWEEP.value is not None and problems:
            say_exponents(problems, _SWEEP.value, report)
    if _PLOT.value and report.results:
        from benchmarks.plot import save_plot  # with matplotlib, which the layer does without

        save_plot(report.results, _PLOT.value)
    # Part of a run must not take the place of a whole one.
    if _MARKDOWN.value and not status:
        # Where somebody's files lie is no business of a document.
        words = [word for word in sys.argv[1:] if not word.startswith(("--json", "--plot", "--markdown"))]
        command = " ".join(["python benchmarks/dispatch.py", *words])
        write_section(_MARKDOWN.value, f"Printed by `{command}`:\n\n```text\n{chr(10).join(report.text).strip()}\n```")
    wrong = [result for result in report.results if not result.correct]
    if wrong:
        print(f"\n{len(wrong)} wrong, first of all {wrong[0].implementation}: {title(wrong[0])}", file=sys.stderr)
    if not report.results and not status:
        print("nothing was measured: no implementation that was asked for runs any of this here", file=sys.stderr)
    return status or int(bool(wrong) or not report.results)


def refuse(error: Exception) -> int:
    """One line instead of absl's page of help; the exit status."""
    print(f"dispatch.py: {error}", file=sys.stderr)
    return 2


def parse_flags(argv: list[str]) -> list[str]:
    """As absl does, but an error is one line."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(refuse(error))


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
