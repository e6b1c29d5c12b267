"""A measured line: what it says, as JSON and as a table that a person reads."""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.roofline import Device, Work, percent
from benchmarks.timing import Program, paired_ratio

_ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Result:
    """One line. Figures are None where nothing was timed: a wrong result, or a run that only checks.

    `tflops` and `gbytes_per_s` are of the work by definition (see roofline.py), `useful_rows` is the share of rows that
    hold a choice among those that were computed. `ratios` has this line's time over that of each implementation beside
    it, paired round by round; `ratio_to_dense` is one of them.
    """

    op: str
    passes: str
    case: str
    distribution: str
    dtype: str
    implementation: str
    device: str
    ms_median: float | None
    ms_p10: float | None
    ms_p90: float | None
    tflops: float | None
    gbytes_per_s: float | None
    roofline_percent: float | None
    useful_rows: float | None
    temp_bytes: int | None
    compile_seconds: float | None
    ratio_to_dense: float | None
    ratios: dict[str, float]
    correct: bool
    fault: str
    """What is wrong, in words; empty for a correct line."""
    versions: dict[str, str]
    commit: str
    date: str
    peak_bytes: int | None = None
    """Arguments + results - aliased + temporary; not part of the JSON."""
    needed_bytes: int | None = None
    """Inputs, outputs, gradients and routed rows of a layer forward and backward; not part of the JSON."""

    def to_json(self) -> str:
        """One line, with all fields above but the last two (`passes` is called `pass` there)."""
        fields = dataclasses.asdict(self)
        for name in ("peak_bytes", "needed_bytes"):
            del fields[name]
        return json.dumps({{"passes": "pass"}.get(name, name): value for name, value in fields.items()})


@dataclasses.dataclass(frozen=True)
class Label:
    """What a line is about."""

    op: str
    passes: str
    case: str
    distribution: str
    dtype: str
    implementation: str


def make_result(
    label: Label,
    program: Program | None,
    beside: Mapping[str, Program | None],
    work: Work,
    device: Device,
    useful_rows: float | None,
    needed_bytes: int | None,
    fault: str | None,
) -> Result:
    """Sum up the repetitions of a program; None for one that is wrong before it was compiled at the full size.

    `beside` has the programs that ran in turns with it, by the names of their implementations.
    """
    ratios = {} if program is None else _paired_ratios(program, beside)
    seconds = np.array([] if program is None else sorted(program.seconds.values()))
    median = float(np.median(seconds)) if seconds.size else None

    def milliseconds(quantile: float) -> float | None:
        return 1e3 * float(np.quantile(seconds, quantile)) if seconds.size else None

    return Result(
        **dataclasses.asdict(label),
        device=device.name,
        ms_median=milliseconds(0.5),
        ms_p10=milliseconds(0.1),
        ms_p90=milliseconds(0.9),
        tflops=None if median is None else work.flops / median / 1e12,
        gbytes_per_s=None if median is None else work.bytes / median / 1e9,
        roofline_percent=None if median is None else percent(work, median, device, label.dtype),
        useful_rows=useful_rows,
        temp_bytes=None if program is None else program.temp_bytes,
        compile_seconds=None if program is None else program.compile_seconds,
        ratio_to_dense=ratios.get("dense"),
        ratios=ratios,
        correct=fault is None,
        fault=fault or "",
        versions=versions(),
        commit=commit(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        peak_bytes=None if program is None else program.peak_bytes,
        needed_bytes=needed_bytes,
    )


def _paired_ratios(program: Program, beside: Mapping[str, Program | None]) -> dict[str, float]:
    ratios = {name: other and paired_ratio(program.seconds, other.seconds) for name, other in beside.items()}
    return {name: ratio for name, ratio in ratios.items() if ratio is not None}


@functools.cache
def versions() -> dict[str, str]:
    """Versions that a figure depends on."""
    names = ("jax", "jaxlib", "tokamax", "libtpu", "jax-cuda13-plugin")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def commit() -> str:
    """The commit of the checkout, with -dirty if it was changed; "unknown" outside one."""
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


_COLUMNS = f"{'implementation':16s} {'ms':>9s} {'p10 - p90':>17s} {'TFLOP/s':>8s} {'GB/s':>7s} {'% roofl.':>8s}"
HEADER = f"{_COLUMNS} {'useful rows':>11s} {'x dense':>8s} {'temp MB':>8s} {'compile s':>9s}"


def title(result: Result) -> str:
    """The line above all results of one problem."""
    return f"{result.op} {result.passes}, {result.case}, {result.distribution}, {result.dtype}"


def line(result: Result) -> str:
    """A line of the table."""
    if not result.correct:
        return f"{result.implementation:16s}     WRONG: {result.fault}; not timed"
    if result.ms_median is None or result.temp_bytes is None or result.compile_seconds is None:
        return f"{result.implementation:16s}   correct"
    spread = f"{result.ms_p10:.2f} - {result.ms_p90:.2f}"
    tflops = f"{result.tflops:.4f}" if result.tflops else ""
    share = "" if result.roofline_percent is None else f"{result.roofline_percent:.1f}"
    useful = "" if result.useful_rows is None else f"{100 * result.useful_rows:.1f}%"
    ratio = "" if result.ratio_to_dense is None else f"{result.ratio_to_dense:.2f}"
    return (
        f"{result.implementation:16s} {result.ms_median:9.2f} {spread:>17s} {tflops:>8s} {result.gbytes_per_s:7.2f} "
        f"{share:>8s} {useful:>11s} {ratio:>8s} {result.temp_bytes / 1e6:8.1f} {result.compile_seconds:9.2f}"
    )


def machine(device: Device) -> str:
    """Where and with what it is measured, in two lines."""
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    date = datetime.datetime.now(datetime.UTC)
    peaks = ", ".join(f"{dtype} {rate / 1e12:.4g} TFLOP/s" for dtype, rate in device.flops.items())
    figures = f"{peaks}, memory {device.bandwidth / 1e9:.4g} GB/s, " if peaks else ""
    return f"{device.name}; {packages}; commit {commit()}; {date:%Y-%m-%d}\nroofline: {figures}{device.source}"
