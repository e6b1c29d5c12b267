"""Panels: parts of figures, each drawn on axes, and the style of all figures.

Images are blue and text is orange in every figure; colour-blind readers can distinguish these. Strings from data are
never parsed as formulas.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from limoe.data import files
from limoe.model.moe import IMAGE, TEXT
from limoe.report.analysis import TopPatches, expert_modality, text_preference

MODALITIES = ("image", "text")
# Okabe and Ito's palette.
COLOURS = {"image": "#0072B2", "text": "#D55E00", "shared": "#555555", "unused": "#AAAAAA"}
_RIGHT, _NEUTRAL = "#009E73", "#999999"

_STYLE = {
    "text.parse_math": False,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "hatch.linewidth": 0.6,
}


class History(NamedTuple):
    """Figures of a run over N logged steps, with L MoE layers (0 if dense) and Z evaluations. NaN leaves a gap."""

    step: np.ndarray  # [N]
    loss: np.ndarray  # [N] total loss, nats
    contrastive: np.ndarray  # [N] contrastive part of it, nats
    success_rate: np.ndarray  # [N, 2] share of image and of text tokens that found room
    effective_experts: np.ndarray  # [N, L, 2] exp of the entropy of the mean gates
    zero_shot_step: np.ndarray  # [Z]
    zero_shot_top1: np.ndarray  # [Z]
    success_rate_bound: float = 1.0
    zero_shot_chance: float = 0.0


class LayerView(NamedTuple):
    """What the galleries show of one MoE layer and its experts."""

    moe_layer: int  # index of the block, from 0
    wanted: np.ndarray  # [2, E] tokens that chose each expert
    top: TopPatches
    words: tuple[tuple[str, ...], ...]  # favourite words of each expert; empty if there are none


@contextmanager
def open_figure(path: str | PathLike[str], width: float, height: float, layout: Any = None) -> Iterator[Figure]:
    """Open a figure of a size in inches, in the common style. The end of the block writes it to `path`."""
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        # A caption may use any script. For characters that the font lacks it shows a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width, height), dpi=120, layout=layout)
        yield figure
        with files.atomic_writer(path) as file:
            # Without matplotlib's version in the file, its bytes depend on the picture alone.
            figure.savefig(file, format="png", metadata={"Software": None})


def axes_at(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Add axes at a position in inches from the top left corner."""
    full_width, full_height = figure.get_size_inches()
    box = (left / full_width, 1 - (top + height) / full_height, width / full_width, height / full_height)
    return figure.add_axes(box)


def headline(figure: Figure, title: str) -> None:
    """Write the title of the whole figure into its top left corner."""
    width, height = figure.get_size_inches()
    figure.text(0.15 / width, 1 - 0.2 / height, title, fontsize=11, fontweight="bold", va="top")


def stack(axes: Axes, wanted: np.ndarray, kept: np.ndarray) -> None:
    """Draw the bars of one layer from shares [2, E]: kept image, kept text, then the dropped part of each."""
    expert = np.arange(wanted.shape[1])
    bottom = np.zeros(len(expert))
    for modality in (IMAGE, TEXT):
        axes.bar(expert, kept[modality], 0.8, bottom, color=COLOURS[MODALITIES[modality]])
        bottom = bottom + kept[modality]
    for modality in (IMAGE, TEXT):
        dropped = np.maximum(wanted[modality] - kept[modality], 0)
        some = dropped > 0
        colour = COLOURS[MODALITIES[modality]]
        face = _pale(colour, 0.8)
        axes.bar(
            expert[some], dropped[some], 0.8, bottom[some], facecolor=face, edgecolor=colour, hatch="////", linewidth=0
        )
        bottom = bottom + dropped
    axes.grid(True, axis="y")


def draw_loss(axes: Axes, history: History) -> None:
    """Draw the total loss and its contrastive part over training."""
    _curve(axes, history.step, history.loss, "black", "total")
    _curve(axes, history.step, history.contrastive, "#CC79A7", "contrastive part")
    _finish(axes, "Loss", "nats")


def draw_success_rate(axes: Axes, history: History) -> None:
    """Draw the success rate of each modality over training, and that of a perfect router."""
    for modality, name in enumerate(MODALITIES):
        _curve(axes, history.step, history.success_rate[:, modality], COLOURS[name], f"{name} tokens")
    bound = history.success_rate_bound
    axes.axhline(bound, color="black", linestyle="--", linewidth=1, label=f"perfect router, {bound:.1%}")
    _finish(axes, "Success rate: tokens that found room", "share of tokens")
    axes.set_ylim(max(min(axes.get_ylim()[0], 0.9), 0.0), 1.005)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def draw_effective_experts(axes: Axes, history: History) -> None:
    """Draw the effective number of experts of each modality and layer over training; later layers are darker."""
    num_layers = history.effective_experts.shape[1]
    for modality, name in enumerate(MODALITIES):
        for layer in range(num_layers):
            place = {0: ", first MoE layer", num_layers - 1: ", last MoE layer"}.get(layer)
            if num_layers == 1:
                place = " tokens"
            colour = _pale(COLOURS[name], 0.0 if num_layers == 1 else 0.6 * (1 - layer / (num_layers - 1)))
            values = history.effective_experts[:, layer, modality]
            _curve(axes, history.step, values, colour, f"{name}{place}" if place else None, raw=num_layers <= 2)
    _finish(axes, "Effective number of experts", "exp(entropy of the mean gates)")
    axes.set_ylim(bottom=0)


def draw_zero_shot(axes: Axes, history: History) -> None:
    """Draw zero-shot accuracy over training, and chance."""
    axes.plot(history.zero_shot_step, history.zero_shot_top1, color="black", marker="o", markersize=3.5, label="top-1")
    chance = history.zero_shot_chance
    axes.axhline(chance, color=_NEUTRAL, linestyle=":", linewidth=1.5, label=f"chance, {chance:.1%}")
    _finish(axes, "Zero-shot accuracy on held-out classes", "share of images")
    axes.set_xlim(0, 1.02 * float(np.max(history.step)))
    axes.set_ylim(0, 1.005)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("training step")
    axes.set_xlim(left=0)
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(True, axis="y")
    axes.legend(loc="best")


def _curve(
    axes: Axes, step: np.ndarray, value: np.ndarray, colour: Any, label: str | None, *, raw: bool = True
) -> None:
    """Draw means of up to 60 bins as a line, over a pale line of up to 2,000 single values."""
    if raw and len(step) > 60:
        every = math.ceil(len(step) / 2000)
        axes.plot(step[::every], value[::every], color=_pale(colour, 0.65), linewidth=0.6, zorder=1)
    bins = np.array_split(np.arange(len(step)), min(len(step), 60))
    middle = [float(np.mean(step[index])) for index in bins]
    mean = [_mean_of_finite(value[index]) for index in bins]
    marker = "o" if len(step) == 1 else None
    axes.plot(middle, mean, color=colour, linewidth=1.6, label=label, zorder=2, marker=marker)


def _mean_of_finite(value: np.ndarray) -> float:
    finite = value[np.isfinite(value)]
    return float(np.mean(finite)) if len(finite) else math.nan


def draw_patches(
    axes: Axes, cuts: np.ndarray, view: LayerView, experts: Sequence[int], *, words_instead: bool = False
) -> None:
    """Draw cuts [rows, count, side, side, 3] on a grid, one row for each expert, with a frame around each patch.

    With `words_instead`, the row of a text expert shows its favourite words.
    """
    names = expert_modality(view.wanted[None])[0]
    count = cuts.shape[1]
    for row, expert in enumerate(experts):
        if words_instead and names[expert] == "text" and view.words[expert]:
            text = ",\n".join(pack_words(view.words[expert], int(6.5 * count), 2))
            axes.text(-0.42, row, text, color=COLOURS["text"], fontsize=9.5, style="italic", va="center")
            continue
        here = np.flatnonzero(view.top.example[expert, :count] >= 0)
        if not len(here):
            axes.text(-0.42, row, "no image patch came here", color="#666666", fontsize=9, va="center")
        for place in here.tolist():
            x, y, half = place, row, 0.46
            axes.imshow(cuts[row, place], extent=(x - half, x + half, y + half, y - half), interpolation="nearest")
            for colour, width in (("black", 2.2), ("white", 1.0)):
                third = 2 * half / 3
                frame = Rectangle(
                    (x - third / 2, y - third / 2), third, third, fill=False, edgecolor=colour, linewidth=width
                )
                axes.add_patch(frame)
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_ylim(len(experts) - 0.5, -0.5)
    axes.set_axis_off()


def label_expert(axes: Axes, view: LayerView, expert: int, row: int) -> None:
    """Write the name, modality and shares of an expert to the left of its row."""
    name = expert_modality(view.wanted[None])[0][expert]
    share = view.wanted[:, expert] / np.maximum(view.wanted.sum(axis=1), 1e-30)
    style: dict[str, Any] = {"ha": "right", "color": COLOURS[name]}
    axes.text(-0.62, row - 0.05, f"expert {expert}: {name}", va="bottom", fontweight="bold", **style)
    takes = f"{share[IMAGE]:.0%} of image tokens\n{share[TEXT]:.0%} of text tokens"
    axes.text(-0.62, row, takes, va="top", fontsize=8, linespacing=1.1, **style)


def draw_bars(axes: Axes, view: LayerView, experts: Sequence[int], rows: int) -> None:
    """Draw for each expert its share of all image tokens to the left, and of all text tokens to the right.

    The label of an expert says how many times larger its share of one modality is than that of the other.
    """
    share = view.wanted / np.maximum(view.wanted.sum(axis=1, keepdims=True), 1e-30)
    unused = [name == "unused" for name in expert_modality(view.wanted[None])[0]]
    preference = np.where(unused, np.nan, text_preference(view.wanted[None])[0])
    place = np.arange(len(experts))
    limit = 1.35 * float(share[:, experts].max())
    for modality, (name, sign) in enumerate(zip(MODALITIES, (-1, 1), strict=True)):
        mine = share[modality, experts]
        axes.barh(place, sign * mine, 0.72, color=COLOURS[name])
        for row, value in enumerate(mine):
            side = "left" if sign > 0 else "right"
            axes.text(sign * (value + limit / 50), row, f"{value:.0%}", fontsize=8, ha=side, va="center")
        unit: dict[str, Any] = {"transform": axes.transAxes, "ha": "center", "va": "top", "fontweight": "bold"}
        axes.text(0.5 + sign / 4, -0.06, f"share of\n{name} tokens", color=COLOURS[name], **unit)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(place, [f"expert {e}\n{leaning(preference[e])}" for e in experts], linespacing=1.3)
    for label, expert in zip(axes.get_yticklabels(), experts, strict=True):
        label.set_color(_preferred_colour(preference[expert]))
        label.set_fontweight("bold")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xlim(-limit, limit)
    axes.xaxis.set_major_locator(MaxNLocator(5, symmetric=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):.0%}"))


def leaning(preference: float) -> str:
    """Say which modality an expert prefers, with the ratio of its shares, from its `text_preference`.

    >>> leaning(0.75), leaning(0.1), leaning(0.51), leaning(1.0), leaning(math.nan)
    ('text 3.0×', 'image 9.0×', 'both alike', 'text only', 'unused')
    """
    if math.isnan(preference):
        return "unused"
    name, larger = ("text", preference) if preference > 0.5 else ("image", 1 - preference)
    if larger == 1:
        return f"{name} only"
    ratio = larger / (1 - larger)
    if ratio < 1.05:
        return "both alike"
    return f"{name} >99×" if ratio > 99 else f"{name} {ratio:.{1 if ratio < 9.95 else 0}f}×"


def _preferred_colour(preference: float) -> tuple[float, float, float]:
    """Choose a colour on the scale from the colour of images over grey to that of text."""
    if math.isnan(preference):
        return to_rgb(COLOURS["unused"])
    amount = math.sqrt(abs(2 * preference - 1))
    ends = to_rgb(COLOURS["shared"]), to_rgb(COLOURS["text" if preference > 0.5 else "image"])
    red, green, blue = ((1 - amount) * grey + amount * full for grey, full in zip(*ends, strict=True))
    return red, green, blue


def draw_guesses(axes: Axes, probability: np.ndarray, names: Sequence[str], right: Sequence[bool]) -> None:
    """Draw bars of the likeliest classes with their names. The right one is green and ticked."""
    for row, (value, name, hit) in enumerate(zip(probability.tolist(), names, right, strict=True)):
        axes.barh(row, value, 0.82, color=_pale(_RIGHT if hit else _NEUTRAL, 0.5))
        axes.text(0.02, row, one_line(name, 24) + (" ✓" if hit else ""), va="center", fontsize=8)
        axes.text(0.99, row, f"{value:.0%}", va="center", ha="right", fontsize=8)
    axes.set_xlim(0, 1)
    axes.set_ylim(2.5, -0.5)
    axes.set_axis_off()


def _pale(colour: Any, amount: float) -> tuple[float, float, float]:
    red, green, blue = (channel + (1 - channel) * amount for channel in to_rgb(colour))
    return red, green, blue


def one_line(text: str, length: int) -> str:
    """Cut a text to one line of at most `length` characters. Characters that cannot be printed become spaces."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= length else line[: length - 1] + "…"


def pack_words(words: Sequence[str], length: int, count: int) -> list[str]:
    """Pack words into at most `count` lines of at most `length` characters. Words that do not fit are left out."""
    lines = [""]
    for word in (one_line(word, length) for word in words):
        longer = f"{lines[-1]}, {word}" if lines[-1] else word
        if len(longer) <= length:
            lines[-1] = longer
        elif len(lines) < count:
            lines.append(word)
        else:
            break
    return lines
