"""A bar chart for each problem: the time of every implementation relative to the dense MLP."""

from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.results import Result, title

# Multiple of the dense MLP (or of the fastest line) at which a bar is cut off, to keep the others readable.
_CUT = 5.0


def save_plot(results: Sequence[Result], path: str) -> None:
    """Write a PNG. Problems without a dense MLP are in milliseconds. Wrong results have a name but no bar."""
    problems: dict[str, list[Result]] = {}
    for result in results:
        problems.setdefault(title(result), []).append(result)
    names = list(dict.fromkeys(result.implementation for result in results))
    colours = {name: f"C{number % 10}" for number, name in enumerate(names)}
    heights = [len(lines) for lines in problems.values()]
    figure, axes = plt.subplots(
        len(problems),
        1,
        figsize=(9, 1.0 + sum(0.32 * height + 0.55 for height in heights)),
        height_ratios=[height + 1.2 for height in heights],
        squeeze=False,
        layout="constrained",
    )
    for axis, (name, lines) in zip(axes[:, 0], problems.items(), strict=True):
        _draw(axis, name, lines, colours)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw(axis: Axes, name: str, lines: Sequence[Result], colours: dict[str, str]) -> None:
    """Draw one problem. A bar that is cut off ends in an arrow, with its length as a number."""
    relative = any(result.ratio_to_dense is not None for result in lines)
    values = [result.ratio_to_dense if relative else result.ms_median for result in lines]
    known = [value for value in values if value is not None]
    cut = _CUT * (1 if relative else min(known, default=1))
    for place, (result, value) in enumerate(zip(reversed(lines), reversed(values), strict=True)):
        if value is None:
            axis.text(0, place, " wrong" if not result.correct else " not timed", va="center", fontsize=8)
            continue
        length = min(value, cut)
        colour = colours[result.implementation]
        axis.barh(place, length, color=colour)
        if value > cut:
            axis.plot(length, place, marker=">", markersize=9, color=colour, clip_on=False)
        share = "" if result.roofline_percent is None else f", {result.roofline_percent:.0f}% of roofline"
        times = f"{value:.2f}x, " if relative else ""
        text = f"{times}{result.ms_median:.1f} ms{share}"
        axis.annotate(text, (length, place), (9, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(range(len(lines)), [result.implementation for result in reversed(lines)], fontsize=8)
    axis.set_ylim(-0.6, len(lines) - 0.4)
    axis.set_title(f"{name}: {'time / dense MLP' if relative else 'milliseconds'}", loc="left", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    if not known:
        axis.xaxis.set_visible(False)
        axis.spines["bottom"].set_visible(False)
        return
    axis.set_xlim(0, 1.4 * min(max(known), cut))
    if relative:
        axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
