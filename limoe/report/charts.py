"""Charts of the report as SVG: curves, and maps of cells. Their colours are those of page.css, in both themes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator

_WIDTH, _HEIGHT = 400.0, 210.0
# The plot inside, in the same units.
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 392.0, 8.0, 184.0


class Series(NamedTuple):
    """A curve [P]; points that are not finite are left out. `style` is a class of page.css."""

    name: str
    style: str
    step: np.ndarray
    value: np.ndarray


class Chart(NamedTuple):
    """Curves in one frame."""

    title: str
    series: tuple[Series, ...]
    percent: bool = False
    bound: float | None = None
    """A dashed line, and what is known about it as text."""
    bound_name: str = ""


class Drawn(NamedTuple):
    """A chart as HTML, and what page.js needs to show the values under a pointer."""

    html: str
    data: dict[str, Any]


def number(value: float, *, percent: bool = False) -> str:
    """Write a number for a person.

    >>> number(0.98333, percent=True), number(12345.6), number(0.000123), number(2.5)
    ('98.3%', '12,346', '0.000123', '2.5')
    """
    if percent:
        return f"{value:.1%}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def draw_curves(chart: Chart) -> Drawn | None:
    """Draw curves over the training step; None if there is nothing to draw.

    >>> one = Series("total", "total", np.arange(3.0), np.array([3.0, np.nan, 1.0]))
    >>> drawn = draw_curves(Chart("Loss", (one,)))
    >>> drawn.html.count("<path"), drawn.data["series"][0]["value"]
    (1, [3.0, 1.0])
    """
    series = [_finite(one) for one in chart.series]
    series = [one for one in series if len(one.step)]
    if not series:
        return None
    values = np.concatenate([one.value for one in series] + ([[chart.bound]] if chart.bound is not None else []))
    y_ticks = _ticks(float(values.min()), float(values.max()), 5)
    if chart.percent:
        y_ticks = [tick for tick in y_ticks if tick < 1] + [1.0] * (y_ticks[-1] >= 1)
    last = max(float(one.step[-1]) for one in series)
    x_ticks = [tick for tick in _ticks(0.0, last, 4) if tick <= last]
    x, y = _scale(0.0, last, _LEFT, _RIGHT), _scale(y_ticks[0], y_ticks[-1], _BOTTOM, _TOP)
    parts = []
    for tick in y_ticks:
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{_RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        text = number(tick, percent=chart.percent).replace(".0%", "%")
        parts.append(f'<text x="{_LEFT - 5}" y="{y(tick) + 4:.1f}" text-anchor="end">{text}</text>')
    for tick in x_ticks:
        parts.append(f'<text x="{x(tick):.1f}" y="{_BOTTOM + 17}" text-anchor="middle">{tick:,.0f}</text>')
    if chart.bound is not None:
        place = f'x1="{_LEFT}" x2="{_RIGHT}" y1="{y(chart.bound):.1f}" y2="{y(chart.bound):.1f}"'
        parts.append(f'<line class="bound" {place}/>')
    for one in series:
        points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(one.step.tolist(), one.value.tolist(), strict=True))
        parts.append(f'<path class="curve {one.style}" d="M{points}"/>')
        if len(one.step) <= 12:
            parts += [
                f'<circle class="{one.style}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.5"/>'
                for a, b in zip(one.step.tolist(), one.value.tolist(), strict=True)
            ]
    legend = "".join(f'<span class="key {one.style}">{escape(one.name)}</span>' for one in series)
    if chart.bound is not None:
        legend += f'<span class="key bound">{escape(chart.bound_name)}</span>'
    html = (
        f'<figure class="chart"><figcaption>{escape(chart.title)}<br>{legend}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" aria-label="{escape(chart.title)}">{"".join(parts)}'
        f'<line class="cursor" y1="{_TOP}" y2="{_BOTTOM}"/></svg></figure>'
    )
    shown = [{"name": one.name, "step": one.step.round(1).tolist(), "value": _digits(one.value)} for one in series]
    frame = {"left": _LEFT, "right": _RIGHT, "width": _WIDTH, "last": last, "percent": chart.percent}
    return Drawn(html, {**frame, "series": shown})


class Cell(NamedTuple):
    """A cell of a map: its colour in CSS, and the text under the pointer."""

    colour: str
    text: str


def draw_cells(title: str, rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[Cell]]) -> str:
    """Draw a map of cells, with names of rows to the left and of some columns below.

    >>> draw_cells("map", ["expert 0"], ["1"], [[Cell("#fff", "a")]]).count("<rect")
    1
    """
    left = 7.0 * max(map(len, rows)) + 8
    side = max(9.0, min(26.0, (_WIDTH - left) / len(columns)))
    height = max(13.0, min(side, 20.0))
    bottom = height * len(rows)
    parts = []
    for number_, (name, row) in enumerate(zip(rows, cells, strict=True)):
        top = number_ * height
        parts.append(f'<text x="{left - 5:.0f}" y="{top + height / 2 + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        for place, cell in enumerate(row):
            size = f'x="{left + place * side:.1f}" y="{top:.1f}" width="{side - 1:.1f}" height="{height - 1:.1f}"'
            parts.append(f'<rect {size} style="fill:{cell.colour}"><title>{escape(cell.text)}</title></rect>')
    shown = 0.0
    for place, name in enumerate(columns):
        middle = left + (place + 0.5) * side
        if name and middle >= shown:
            parts.append(f'<text x="{middle:.1f}" y="{bottom + 13:.1f}" text-anchor="middle">{escape(name)}</text>')
            shown = middle + 8.0 * len(name) + 6
    width = max(left + side * len(columns) + 12, _WIDTH)
    return (
        f'<figure class="map"><figcaption>{escape(title)}</figcaption><div class="wide">'
        f'<svg viewBox="0 0 {width:.0f} {bottom + 18:.0f}" role="img" '
        f'style="min-width:{width:.0f}px;max-width:{1.4 * width:.0f}px" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg></div></figure>'
    )


def _finite(series: Series) -> Series:
    kept = np.isfinite(series.value) & np.isfinite(series.step)
    return series._replace(step=series.step[kept], value=series.value[kept])


def _digits(values: np.ndarray) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round places that reach from `low` to `high`."""
    if high - low < 1e-12 * max(abs(high), 1e-30):
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    return [float(tick) for tick in MaxNLocator(count).tick_values(low, high)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / ((high - low) or 1.0) * (end - start)
