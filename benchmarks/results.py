"""The result of one implementation on one problem, as a line of JSON and a line of a table."""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

from benchmarks.roofline import Device

_ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of one implementation on one problem.

    Figures are None if nothing was timed: the result is wrong, or the run only checks. `tflops` and `gbytes_per_s`
    count the work by definition (see roofline.py). `useful_rows` is the share of useful rows among the computed ones.
    `ratios` has this time over that of each other implementation, paired by round; `ratio_to_dense` is one of them.
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
    """The first fault, in words; empty for a correct result."""
    versions: dict[str, str]
    commit: str
    date: str
    peak_bytes: int | None = None
    """Arguments + results - aliased + temporary. Not in the JSON."""
    needed_bytes: int | None = None
    """Inputs, outputs, gradients and routed rows of a layer, forward and backward. Not in the JSON."""

    def to_json(self) -> str:
        """Write one line with all fields above but the last two. `passes` is called `pass` there."""
        fields = {{"passes": "pass"}.get(name, name): value for name, value in dataclasses.asdict(self).items()}
        del fields["peak_bytes"], fields["needed_bytes"]
        return json.dumps(fields)


def append(path: str | None, line: str) -> None:
    """Append a line to a file, if there is a path."""
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")


@functools.cache
def versions() -> dict[str, str]:
    """Find the versions of Python and of the packages that a figure depends on."""
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
    """Find the commit of the checkout, with -dirty if it was changed; "unknown" outside one."""
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


_COLUMNS = f"{'implementation':16s} {'ms':>9s} {'p10 - p90':>17s} {'TFLOP/s':>8s} {'GB/s':>7s} {'% roofl.':>8s}"
HEADER = f"{_COLUMNS} {'useful rows':>11s} {'x dense':>8s} {'temp MB':>8s} {'compile s':>9s}"


def title(result: Result) -> str:
    """Format the line above the results of one problem."""
    return f"{result.op} {result.passes}, {result.case}, {result.distribution}, {result.dtype}"


def line(result: Result) -> str:
    """Format a line of the table."""
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
    """Describe the device, versions, commit and date in two lines."""
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    date = datetime.datetime.now(datetime.UTC)
    peaks = ", ".join(f"{dtype} {rate / 1e12:.4g} TFLOP/s" for dtype, rate in device.flops.items())
    figures = f"{peaks}, memory {device.bandwidth / 1e9:.4g} GB/s, " if peaks else ""
    return f"{device.name}; {packages}; commit {commit()}; {date:%Y-%m-%d}\nroofline: {figures}{device.source}"
