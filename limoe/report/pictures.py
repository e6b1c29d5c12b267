"""Figures (PNG) of a run, and the table at its end.

A figure is written completely or not at all. The same input gives the same bytes with the same version of matplotlib.
"""

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from limoe.report import panels
from limoe.report.analysis import cut_patches, expert_modality, expert_shares, text_preference
from limoe.report.panels import COLOURS, MODALITIES, History, LayerView

_SUMMARY_KEYS = (
    *("preset", "steps", "seconds", "zero_shot_top1", "zero_shot_chance", "image_to_text_r1", "text_to_image_r1"),
    *("success_rate_image", "success_rate_text", "success_rate_bound", "parameters_total", "parameters_per_token"),
)


def draw_expert_shares(
    path: str | PathLike[str],
    wanted: np.ndarray,
    kept: np.ndarray,
    *,
    moe_layers: Sequence[int],
    capacity_factor: float,
) -> None:
    """Draw the share of all tokens that each expert got, image and text stacked, one panel for each MoE layer.

    `wanted` and `kept` are counts [L, 2, E]. Tokens that found no room are hatched. A dashed line shows the capacity.
    Raises ValueError for shapes that do not fit, or without MoE layers (paper, section 6).

    >>> import tempfile
    >>> counts = np.array([[[6.0, 2.0], [0.0, 2.0]]])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     draw_expert_shares(f"{folder}/shares.png", counts, counts, moe_layers=[1], capacity_factor=1.05)
    """
    shares = expert_shares(wanted, kept)
    names = expert_modality(wanted)
    num_layers, _, num_experts = shares.wanted.shape
    if len(moe_layers) != num_layers:
        raise ValueError(f"{len(moe_layers)} MoE layers {tuple(moe_layers)} do not name the {num_layers} of the counts")
    columns = 1 if num_layers == 1 else 2 if num_experts > 12 or num_layers <= 4 else 3
    rows = math.ceil(num_layers / columns)
    width = max(0.24 * num_experts + 1.0, 3.6)
    with panels.open_figure(path, max(width * columns, 7.5), 2.3 * rows + 1.2, layout="constrained") as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for index, axes in enumerate(grid.flat):
            if index >= num_layers:
                axes.remove()
                continue
            panels.stack(axes, shares.wanted[index], shares.kept[index])
            axes.axhline(capacity_factor / num_experts, color="black", linestyle="--", linewidth=1)
            axes.set_title(f"block {moe_layers[index]}: {_census(names[index])}", fontsize=10)
            axes.set_xticks(range(num_experts), [str(e) for e in range(num_experts)], fontsize=8)
            for label, name in zip(axes.get_xticklabels(), names[index], strict=True):
                label.set_color(COLOURS[name])
                label.set_fontweight("bold" if name in MODALITIES else "normal")
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.set_xlim(-0.6, num_experts - 0.4)
            axes.set_ylim(0, 1.06 * max(float(shares.wanted.sum(axis=1).max()), capacity_factor / num_experts))
        figure.supxlabel("expert (coloured by the modality that prefers it)", fontsize=10)
        figure.supylabel("share of all tokens of the layer", fontsize=10)
        handles: list[Any] = [Patch(color=COLOURS[name], label=f"{name} tokens") for name in MODALITIES]
        handles.append(Patch(facecolor="white", edgecolor="#444444", hatch="////", label="chose it, found no room"))
        handles.append(Line2D([], [], color="black", linewidth=1, linestyle="--", label="capacity"))
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))


def draw_training(path: str | PathLike[str], history: History) -> None:
    """Draw loss, success rates with their bound, effective number of experts and zero-shot accuracy over training.

    Panels without data are left out, such as experts of a dense model. Raises ValueError for shapes that do not fit, or
    without steps.

    >>> import tempfile
    >>> one = np.ones(1)
    >>> history = History(one, one, one, np.ones((1, 2)), np.ones((1, 1, 2)), one[:0], one[:0])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     draw_training(f"{folder}/training.png", history)
    """
    _check_history(history)
    drawings = [panels.draw_loss]
    if history.effective_experts.shape[1]:
        drawings += [panels.draw_success_rate, panels.draw_effective_experts]
    if len(history.zero_shot_step):
        drawings.append(panels.draw_zero_shot)
    columns = min(len(drawings), 2)
    rows = math.ceil(len(drawings) / columns)
    with panels.open_figure(path, 5.2 * columns, 3.3 * rows, layout="constrained") as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, draw in zip(grid.flat, drawings, strict=False):
            draw(axes, history)
        for axes in grid.flat[len(drawings) :]:
            axes.remove()


def draw_gallery(path: str | PathLike[str], images: np.ndarray, view: LayerView, *, patch_size: int) -> None:
    """Draw the image patches with the largest gates of each expert of one MoE layer, with their surroundings.

    `view.top` has numbers of the uint8 images [N, height, width, 3]. `patch_size` is in pixels. Raises ValueError for
    shapes that do not fit (paper, section 6).

    >>> import tempfile
    >>> from limoe.report.analysis import TopPatches
    >>> images = np.zeros((1, 4, 4, 3), np.uint8)
    >>> top = TopPatches(np.array([[0], [-1]]), np.array([[3], [-1]]), np.array([[0.9], [0.0]]))
    >>> view = LayerView(1, np.array([[4.0, 0.0], [1.0, 3.0]]), top, ((), ("red", "a")))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     draw_gallery(f"{folder}/gallery.png", images, view, patch_size=2)
    """
    num_experts, count = _check_view(view)
    cuts = cut_patches(images, view.top.example, view.top.patch, patch_size=patch_size)
    columns = 1 if num_experts <= 8 else 2
    rows = math.ceil(num_experts / columns)
    cell, label, words = 0.72, 1.75, 1.9 if any(view.words) else 0.0
    width, height = label + cell * count + words + 0.2, cell * rows + 0.65
    with panels.open_figure(path, width * columns, height) as figure:
        for column in range(columns):
            experts = list(range(column * rows, min((column + 1) * rows, num_experts)))
            left = width * column + label
            axes = panels.axes_at(figure, left, 0.5, cell * count, cell * len(experts))
            panels.draw_patches(axes, cuts[experts], view, experts)
            for row, expert in enumerate(experts):
                panels.label_expert(axes, view, expert, row)
                if any(view.words):
                    text = ",\n".join(panels.pack_words(view.words[expert], 24, 3))
                    axes.text(count - 0.42, row, text, color=COLOURS["text"], fontsize=8.5, va="center", style="italic")
        title = f"What the experts of block {view.moe_layer} like best: image patches with the largest gates"
        panels.headline(figure, title + (", words on the right" if any(view.words) else ""))


def draw_examples(
    path: str | PathLike[str], images: np.ndarray, probability: np.ndarray, label: np.ndarray, names: Sequence[str]
) -> None:
    """Draw uint8 images [N, height, width, 3], each above the three classes of largest `probability` [N, Q].

    The right class, `label` [N], is the title of an image, and is green and ticked below it. Raises ValueError
    for shapes that do not fit, or without images.

    >>> import tempfile
    >>> images, probability = np.zeros((1, 4, 4, 3), np.uint8), np.array([[0.2, 0.8]])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     draw_examples(f"{folder}/examples.png", images, probability, np.array([1]), ["cat", "dog"])
    """
    images, probability, label = np.asarray(images), np.asarray(probability), np.asarray(label)
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] != 3 or not len(images):
        raise ValueError(f"images must be uint8 [N, height, width, 3], at least one, not {images.dtype} {images.shape}")
    if probability.shape != (len(images), len(names)) or label.shape != (len(images),):
        raise ValueError(
            f"probability {probability.shape} and label {label.shape} do not fit {len(images)} images and {len(names)} "
            "names"
        )
    if label.min() < 0 or label.max() >= len(names):
        raise ValueError(f"label must lie in 0 to {len(names) - 1}, but ranges from {label.min()} to {label.max()}")
    columns = min(len(images), 6)
    rows = math.ceil(len(images) / columns)
    with panels.open_figure(path, 2.15 * max(columns, 3) + 0.15, 3.15 * rows + 0.5) as figure:
        for index, image in enumerate(images):
            left, top = 0.15 + 2.15 * (index % columns), 0.75 + 3.15 * (index // columns)
            axes = panels.axes_at(figure, left, top, 2.0, 2.0)
            axes.imshow(image, interpolation="nearest")
            axes.set_axis_off()
            axes.set_title(panels.one_line(names[int(label[index])], 28), fontsize=9, fontweight="normal")
            axes = panels.axes_at(figure, left, top + 2.05, 2.0, 0.7)
            best = np.argsort(-probability[index], kind="stable")[:3]
            panels.draw_guesses(
                axes, probability[index, best], [names[int(q)] for q in best], (best == label[index]).tolist()
            )
        found = int(np.sum(np.argmax(probability, axis=1) == label))
        panels.headline(figure, f"Held-out images and the three likeliest classes: {found} of {len(images)} right")


def draw_overview(
    path: str | PathLike[str], images: np.ndarray, view: LayerView, history: History, *, patch_size: int
) -> None:
    """Draw one picture of a run: which expert got which modality, favourite patches of experts, and the training.

    If there are more than eight experts, it shows eight, spread evenly from the strongest preference for text to that
    for images. Arguments and errors are those of `draw_gallery` and `draw_training`.

    >>> import tempfile
    >>> from limoe.report.analysis import TopPatches
    >>> images, one = np.zeros((1, 4, 4, 3), np.uint8), np.ones(1)
    >>> top = TopPatches(np.array([[0]]), np.array([[3]]), np.ones((1, 1)))
    >>> view = LayerView(1, np.array([[4.0], [1.0]]), top, ((),))
    >>> history = History(one, one, one, np.ones((1, 2)), np.ones((1, 1, 2)), one[:0], one[:0])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     draw_overview(f"{folder}/overview.png", images, view, history, patch_size=2)
    """
    num_experts, most = _check_view(view)
    _check_history(history)
    preference = text_preference(view.wanted[None])[0]
    experts = np.argsort(-preference, kind="stable")
    title = f"Block {view.moe_layer}: who takes what"
    if num_experts > 8:
        used = experts[~np.isnan(preference[experts])]
        experts = used[np.unique(np.linspace(0, len(used) - 1, 8).round().astype(int))]
        title = f"Block {view.moe_layer}: {len(experts)} of {num_experts} experts"
    rows = max(len(experts), 4)
    cell, bars, top = 5 / max(rows, 5), 2.3, 0.45
    count = min(int(4.4 / cell), most)
    example, patch = view.top.example[experts, :count], view.top.patch[experts, :count]
    cuts = cut_patches(images, example, patch, patch_size=patch_size)
    height = cell * rows
    patches_left = 1.75 + bars + 0.35
    curves_left = patches_left + cell * count + 0.85
    with panels.open_figure(path, curves_left + 4.0, top + height + 0.65) as figure:
        axes = panels.axes_at(figure, 1.75, top, bars, height)
        panels.draw_bars(axes, view, experts.tolist(), rows)
        axes.set_title(title)
        axes = panels.axes_at(figure, patches_left, top, cell * count, cell * len(experts))
        panels.draw_patches(axes, cuts, view, experts.tolist(), words_instead=True)
        axes.set_title("What they like best")
        drawings = [
            panels.draw_zero_shot if len(history.zero_shot_step) else panels.draw_loss,
            panels.draw_success_rate,
        ]
        for index, draw in enumerate(drawings):
            each = (height - 0.75) / 2
            axes = panels.axes_at(figure, curves_left, top + index * (each + 0.75), 3.8, each)
            draw(axes, history)
            if index == 0:
                axes.set_xlabel("")


def summary_table(summary: Mapping[str, Any]) -> str:
    """Format the result of a run for the terminal, from the content of `summary.json`. None becomes a dash.

    A dense model has None for the success rates, and no lines for them. Two entries are optional: `expert_modality`
    (the names of the experts of each layer in `moe_layers`) and `figures` (their folder). Raises ValueError if another
    entry is missing.

    >>> rates = dict.fromkeys(("zero_shot_chance", "image_to_text_r1", "text_to_image_r1"), 0.25)
    >>> rates |= dict.fromkeys(("success_rate_image", "success_rate_text", "success_rate_bound"), None)
    >>> run = {"preset": "tiny", "steps": 10, "seconds": 75.4, "parameters_total": 5.6e9, "parameters_per_token": None}
    >>> for line in summary_table(run | rates | {"zero_shot_top1": 0.9}).splitlines()[:3]:
    ...     print(line or "-")
    tiny: 10 steps in 1 min 15 s
    -
      zero-shot top-1                90.0%   chance 25.0%
    """

    named = ("moe_layers",) if "expert_modality" in summary else ()
    if absent := [key for key in (*_SUMMARY_KEYS, *named) if key not in summary]:
        raise ValueError(f"the summary has no {', '.join(absent)}; was it written by another version?")

    def rate(name: str) -> str:
        return "-" if summary[name] is None else f"{summary[name]:.1%}"

    bound = f"a perfect router keeps {rate('success_rate_bound')}"
    routing = [(f"{name} tokens that found room", rate(f"success_rate_{name}"), bound) for name in MODALITIES]
    rows = [
        ("zero-shot top-1", rate("zero_shot_top1"), f"chance {rate('zero_shot_chance')}"),
        ("retrieval image to text R@1", rate("image_to_text_r1"), ""),
        ("retrieval text to image R@1", rate("text_to_image_r1"), ""),
        *([] if summary["success_rate_image"] is None else routing),
        ("parameters", _amount(summary["parameters_total"]), f"{_amount(summary['parameters_per_token'])} per token"),
    ]
    lines = [f"{summary['preset']}: {summary['steps']:,} steps in {_duration(summary['seconds'])}", ""]
    lines += [f"  {name:<29} {value:>6}   {note}".rstrip() for name, value, note in rows]
    if "expert_modality" in summary:
        lines += ["", "  experts by modality"]
        for layer, names in zip(summary["moe_layers"], summary["expert_modality"], strict=True):
            lines.append(f"    block {layer:<3} {_roll(names)}")
    if "figures" in summary:
        lines += ["", f"  figures: {summary['figures']}"]
    return "\n".join(lines)


def _check_history(history: History) -> None:
    steps = np.shape(history.step)
    effective = np.shape(history.effective_experts)
    fits = len(steps) == 1 and np.shape(history.loss) == np.shape(history.contrastive) == steps
    fits = fits and np.shape(history.success_rate) == (*steps, 2)
    fits = fits and len(effective) == 3 and (effective[0], effective[2]) == (*steps, 2)
    if not fits or np.shape(history.zero_shot_step) != np.shape(history.zero_shot_top1):
        shapes = {name: np.shape(value) for name, value in history._asdict().items()}
        raise ValueError(f"the history's shapes do not fit each other: {shapes}; see the fields of History")
    if steps == (0,):
        raise ValueError("the history has no steps; draw it after at least one")


def _check_view(view: LayerView) -> tuple[int, int]:
    shape = np.shape(view.top.example)
    if len(shape) != 2 or np.shape(view.wanted) != (2, shape[0]) or len(view.words) != shape[0]:
        raise ValueError(
            f"wanted {np.shape(view.wanted)}, top patches {shape} and the words of {len(view.words)} experts do not "
            "fit; they must be [2, E], [E, count] and E"
        )
    if not np.sum(view.wanted) > 0:
        raise ValueError(f"block {view.moe_layer} routed no tokens; pass sums of at least one step")
    return shape


def _census(names: Sequence[str]) -> str:
    return ", ".join(f"{names.count(name)} {name}" for name in COLOURS if name in names)


def _roll(names: Sequence[str]) -> str:
    groups = {name: [str(e) for e, other in enumerate(names) if other == name] for name in COLOURS}
    return "   ".join(f"{name}: {' '.join(experts)}" for name, experts in groups.items() if experts)


def _amount(value: float | int | None) -> str:
    if value is None:
        return "-"
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.0f}"


def _duration(seconds: float | int) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
