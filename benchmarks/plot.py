"""Bars that a person reads at a glance: for each problem the time of every implementation, against the dense MLP."""

from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.results import Result, title


def save_plot(results: Sequence[Result], path: str) -> None:
    """Write a PNG; problems without a dense MLP are shown in milliseconds. Wrong results are named, without a bar."""
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
        relative = any(result.ratio_to_dense is not None for result in lines)
        for place, result in enumerate(reversed(lines)):
            value = result.ratio_to_dense if relative else result.ms_median
            if value is None:
                axis.text(0, place, " wrong" if not result.correct else " not timed", va="center")
                continue
            axis.barh(place, value, color=colours[result.implementation])
            share = "" if result.roofline_percent is None else f", {result.roofline_percent:.0f}% of roofline"
            times = f"{value:.2f}x, " if relative else ""
            axis.text(value, place, f" {times}{result.ms_median:.1f} ms{share}", va="center", fontsize=8)
        axis.set_yticks(range(len(lines)), [result.implementation for result in reversed(lines)], fontsize=8)
        axis.set_title(f"{name}: {'time / dense MLP' if relative else 'milliseconds'}", loc="left", fontsize=9)
        axis.margins(x=0.35)
        axis.spines[["top", "right"]].set_visible(False)
        if relative:
            axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    figure.savefig(path, dpi=130)
    plt.close(figure)
