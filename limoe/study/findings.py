"""What a study found: rows of means, their table as Markdown, CSV and JSON, and one picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from limoe.data import files
from limoe.report.panels import open_figure
from limoe.study.runner import Finished
from limoe.study.statistics import Mean, difference, mean_of, rank_correlation, relative
from limoe.study.studies import Study
from limoe.workdir.metrics import write_json

TITLES = {
    "zero_shot_top1": "zero-shot top-1",
    "image_to_text_r1": "image to text R@1",
    "text_to_image_r1": "text to image R@1",
    "success_rate_text": "text tokens kept",
    "success_rate_image": "image tokens kept",
    "effective_experts_text": "effective experts of text",
    "effective_experts_image": "effective experts of images",
}
# Okabe and Ito's palette, as in the figures of a run.
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


class Row(NamedTuple):
    """One arm at one size: means of each measure over seeds, and differences to the first arm, pair by pair.

    A measure is None where there is nothing to measure, as routing of a dense model; a difference also for the first
    arm itself, and where the two have no seed in common.
    """

    size: str
    arm: str
    amount: float | None
    step_seconds: Mean
    means: dict[str, Mean | None]
    differences: dict[str, Mean | None]
    relatives: dict[str, Mean | None]


def rows_of(study: Study, finished: Sequence[Finished]) -> list[Row]:
    """Summarise finished trainings, in the order of sizes and arms."""
    by_arm: dict[tuple[str, str], dict[int, Finished]] = {}
    for one in finished:
        by_arm.setdefault((one.size, one.arm), {})[one.seed] = one
    rows = []
    for size in dict.fromkeys(one.size for one in finished):
        base = by_arm.get((size, study.arms[0].name), {})
        for arm in study.arms:
            own = by_arm.get((size, arm.name), {})
            if own:
                both = [] if arm is study.arms[0] else sorted(own.keys() & base.keys())
                pairs = {name: _pairs(name, [(own[seed], base[seed]) for seed in both]) for name in study.measures}
                rows.append(
                    Row(
                        size,
                        arm.name,
                        arm.amount,
                        mean_of([one.step_seconds for one in own.values()]),
                        {name: _mean(name, list(own.values())) for name in study.measures},
                        {name: difference(*pair) if pair else None for name, pair in pairs.items()},
                        {name: relative(*pair) if pair else None for name, pair in pairs.items()},
                    )
                )
    return rows


def _mean(measure: str, finished: Sequence[Finished]) -> Mean | None:
    values = [value for one in finished if (value := one.figures[measure]) is not None]
    return mean_of(values) if values else None


def _pairs(measure: str, pairs: Sequence[tuple[Finished, Finished]]) -> tuple[list[float], list[float]] | None:
    found = [(a.figures[measure], b.figures[measure]) for a, b in pairs]
    numbers = [(a, b) for a, b in found if a is not None and b is not None]
    return ([a for a, _ in numbers], [b for _, b in numbers]) if numbers else None


def correlation(study: Study, finished: Sequence[Finished]) -> float | None:
    """Compute the rank correlation between what a numeric study varies and its first measure; None for others."""
    amounts = {arm.name: arm.amount for arm in study.arms}
    pairs = [(amounts[one.arm], one.figures[study.measures[0]]) for one in finished]
    numbers = [(a, b) for a, b in pairs if a is not None and b is not None]
    return rank_correlation([a for a, _ in numbers], [b for _, b in numbers]) if len(numbers) > 1 else None


def _text(measure: str, found: Mean | None, *, sign: bool = False) -> str:
    if found is None:
        return "-"
    plus = "+" if sign else ""
    shown, unit = (100.0, "%") if _is_share(measure) else (1.0, "")
    half = "" if found.half is None else f" ± {shown * found.half:.1f}"
    return f"{shown * found.mean:{plus}.1f}{half}{unit}"


def _is_share(measure: str) -> bool:
    return not measure.startswith("effective_experts")


def markdown(study: Study, finished: Sequence[Finished]) -> str:
    """Write the table of a study: means ± half of the 95% interval; differences of pairs for the first measure."""
    first = study.measures[0]
    head = ["size", "arm", "seeds", *(TITLES[name] for name in study.measures)]
    head += [f"{TITLES[first]}: minus that of {study.arms[0].name!r}", "relative", "s/step"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows_of(study, finished):
        count = row.step_seconds.seeds
        texts = [row.size, row.arm, str(count), *(_text(name, row.means[name]) for name in study.measures)]
        texts += [_text(first, row.differences[first], sign=True), _text("", row.relatives[first], sign=True)]
        lines.append(f"| {' | '.join([*texts, f'{row.step_seconds.mean:.3f}'])} |")
    ranks = correlation(study, finished)
    if ranks is not None:
        lines += ["", f"Rank correlation of what is varied with {TITLES[first]}, over all trainings: {ranks:.2f}."]
    return "\n".join(lines) + "\n"


def write_findings(
    folder: Path, name: str, study: Study, finished: Sequence[Finished], failed: Mapping[str, str]
) -> None:
    """Write `table.md`, `table.csv`, `table.json` and `picture.png` of a study into its folder.

    `failed` holds the reasons of the trainings that failed, by name; the Markdown and the JSON name them.
    """
    missing = f"\nFailed, so not in the table: {', '.join(failed)}.\n" if failed else ""
    files.write_bytes(folder / "table.md", (markdown(study, finished) + missing).encode())
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("size", "arm", "measure", "seeds", "mean", "half_of_95", "difference", "half_of_95", "relative"))
    for row in rows_of(study, finished):
        for measure, found in row.means.items():
            if found is not None:
                other, share = row.differences[measure], row.relatives[measure]
                values = (found.seeds, found.mean, found.half, *((other.mean, other.half) if other else (None, None)))
                table.writerow((row.size, row.arm, measure, *values, share.mean if share else None))
    files.write_bytes(folder / "table.csv", text.getvalue().encode())
    content = {
        "study": name,
        "compares": study.compares,
        "paper": study.paper,
        "rows": rows_of(study, finished),
        "failed": failed,
    }
    write_json(folder / "table.json", {**content, "rank_correlation": correlation(study, finished)})
    draw(folder / "picture.png", study, finished)


def draw(path: Path, study: Study, finished: Sequence[Finished]) -> None:
    """Draw each measure by arm with its intervals, and the curves over training."""
    rows = rows_of(study, finished)
    count = len(study.measures) + len(study.curves)
    columns = min(count, 3)
    with open_figure(path, 4.6 * columns, 3.4 * -(-count // columns), layout="constrained") as figure:
        grid = [*figure.subplots(-(-count // columns), columns, squeeze=False).flat]
        for axes, measure in zip(grid, study.measures, strict=False):
            _draw_means(axes, measure, rows)
        for axes, curve in zip(grid[len(study.measures) :], study.curves, strict=False):
            _draw_curves(axes, curve, study, finished)
        for axes in grid[count:]:
            axes.remove()


def _draw_means(axes: Axes, measure: str, rows: Sequence[Row]) -> None:
    several = len({row.size for row in rows}) > 1
    known = [(row, found) for row in rows if (found := row.means[measure]) is not None]
    mean = np.array([found.mean for _, found in known])
    half = np.array([found.half or 0.0 for _, found in known])
    numeric = all(row.amount is not None for row in rows)
    if numeric:
        axes.errorbar([row.amount or 0.0 for row, _ in known], mean, half, marker="o", capsize=3, color=_LINES[0])
        axes.set_xscale("log", base=2)
        axes.set_xlabel(rows[0].arm.partition("=")[0].replace("_", " "))
    else:
        place = np.arange(len(known))
        axes.errorbar(mean, place, xerr=half, fmt="o", capsize=3, color=_LINES[0])
        names = [f"{row.arm}, {row.size}" if several else row.arm for row, _ in known]
        axes.set_yticks(place, names)
        axes.set_ylim(max(len(known), 1) - 0.5, -0.5)
    if _is_share(measure):
        (axes.yaxis if numeric else axes.xaxis).set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_title(TITLES[measure])
    axes.grid(True)


def _draw_curves(axes: Axes, curve: str, study: Study, finished: Sequence[Finished]) -> None:
    for number, arm in enumerate(study.arms):
        own = [one for one in finished if one.arm == arm.name and None not in one.curves[curve]]
        if own:
            lines = np.array([one.curves[curve] for one in own], float).mean(axis=0)
            axes.plot(np.array(own[0].curves["step"], float), lines, color=_LINES[number % len(_LINES)], label=arm.name)
    if _is_share(curve):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_title(f"{TITLES[curve]} over training")
    axes.set_xlabel("step")
    axes.grid(True)
    if axes.lines:
        axes.legend()
