"""`limoe report`: a run as one page of HTML, which needs no network and no other file."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from limoe.config.schema import Config
from limoe.data import files, inputs
from limoe.errors import LimoeError
from limoe.evaluate.data import read_evaluation_data
from limoe.evaluate.restore import restored_encoder
from limoe.model.moe import IMAGE, TEXT
from limoe.report.analysis import expert_modality, text_preference
from limoe.report.charts import Cell, Chart, Series, draw_cells, draw_curves, number
from limoe.report.curves import Curves, Snapshot, read_curves
from limoe.report.examples import Confusion, Examples, Found, confusion, retrieved
from limoe.report.panels import MODALITIES, leaning
from limoe.report.results import bound
from limoe.workdir.folder import Workdir
from limoe.workdir.metrics import read_metrics
from limoe.workdir.versions import Since, read_versions

# With more classes a map of them is not readable; the list of confusions is.
_MOST_CLASSES = 40
_CONFUSIONS_LISTED = 12

_LAYER_FIGURES = {
    "success_rate": "Success rate",
    "effective_experts": "Effective experts",
    "largest_gate": "Largest gate",
    "local_entropy": "Entropy of a token's gates, nats",
    "mean_entropy": "Entropy of the mean gates, nats",
}
_SHARES = ("success_rate", "largest_gate")


def write_report(folder: str | Path, out: str | Path | None, *, say: Callable[[str], None]) -> Path:
    """Write the report of a work folder to `out`, or into the folder as report.html, and return where it is.

    The run may be going on. Examples are of the newest checkpoint and the run's own evaluation data; where one of them
    is missing, the page says so. Raises WorkdirError for another folder.
    """
    workdir = Workdir.existing(folder)
    curves = read_curves(workdir.config, read_metrics(workdir.metrics) if files.exists(workdir.metrics) else ())
    summary = json.loads(files.read_text(workdir.summary)) if workdir.finished else {}
    missing, examples = "", None
    try:
        examples = _examples(workdir, say)
    except (LimoeError, OSError) as error:
        missing = str(error)
    path = Path(out or workdir.path / "report.html")
    figures = {one.stem: files.read_bytes(one) for one in sorted(workdir.figures.glob("*.png")) if workdir.finished}
    files.write_bytes(path, page(workdir, curves, summary, figures, examples, missing).encode(errors="replace"))
    return path


def _examples(workdir: Workdir, say: Callable[[str], None]) -> Examples:
    model = restored_encoder(workdir.path)
    for message in model.skipped:
        say(message)
    data = read_evaluation_data(model.config, inputs.evaluation_folders(model.config, ""))
    found = retrieved(model.encoder, data.retrieval) if data.retrieval else ((), ())
    return Examples(model.step, confusion(model.encoder, data.zero_shot) if data.zero_shot else None, *found)


def page(
    workdir: Workdir,
    curves: Curves,
    summary: dict[str, Any],
    figures: dict[str, bytes],
    examples: Examples | None,
    missing: str,
) -> str:
    """Compose the page. `figures` are PNG files by name; `missing` says why there are no examples."""
    config = workdir.config
    drawn = [one for chart in charts(config, curves) if (one := draw_curves(chart))]
    sections = {
        "Curves": _grid(one.html for one in drawn) or "<p>No step is logged yet.</p>",
        "Experts over training": _specialisation(config, curves.snapshots),
        "Figures": _grid((_picture(name, content) for name, content in figures.items()), broad=True)
        or "<p>Figures are drawn at the end of a run.</p>",
        "Confusion": _confusion(examples, missing),
        "Retrieval": _retrieval(examples, missing),
        "Bad data": _bad_data(curves, summary),
        "Settings": _settings(config),
        "Versions": _versions(read_versions(workdir.versions)),
    }
    state = "finished" if summary else f"step {curves.last_step:,} of {config.train.steps:,}"
    links = "".join(f'<a href="#{_slug(name)}">{escape(name)}</a>' for name in sections)
    body = "".join(
        f'<section id="{_slug(name)}"><h2>{escape(name)}</h2>{html}</section>' for name, html in sections.items()
    )
    title = f"{escape(workdir.path.name)}: {escape(config.preset)}, {state}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        # The browser itself refuses whatever would come from elsewhere.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{title}</title><style>{_resource('page.css')}</style></head><body><h1>{title}</h1>"
        f"{_tiles(config, curves, summary)}<nav>{links}</nav>{body}"
        f'<script type="application/json" id="charts">{_json([one.data for one in drawn])}</script>'
        f"<script>{_resource('page.js')}</script></body></html>\n"
    )


def charts(config: Config, curves: Curves) -> list[Chart]:
    """List the charts of a run: the loss, what stands for the whole model, and figures by layer and modality."""

    def scalar(title: str, *names: str, percent: bool = False) -> Chart:
        styles = ("total", "other", "image", "text")
        found = [name for name in names if name in curves.scalars]
        series = zip(found, styles, strict=False)
        return Chart(
            title, tuple(Series(n, style, curves.step, curves.scalars[n]) for n, style in series), percent=percent
        )

    found = [
        scalar("Loss, nats", "total", "contrastive"),
        scalar("Zero-shot accuracy", "zero_shot_top1", percent=True),
        scalar("Gradient norm", "gradient_norm"),
        scalar("Learning rate", "learning_rate"),
        scalar("Scale of similarities", "scale"),
        scalar("Pairs per second", "pairs_per_second"),
    ]
    kept = bound(config.model, config.train.batch_size)
    for name, title in _LAYER_FIGURES.items():
        for layer, block in enumerate(config.model.moe_layers):
            if name in curves.by_layer:
                values = curves.by_layer[name][:, layer]
                series = tuple(Series(m, m, curves.step, values[:, i]) for i, m in enumerate(MODALITIES))
                chart = Chart(f"{title}, block {block}", series, percent=name in _SHARES)
                if name == "success_rate":
                    chart = chart._replace(bound=kept, bound_name="perfect router")
                found.append(chart)
    return found


def _tiles(config: Config, curves: Curves, summary: dict[str, Any]) -> str:
    shares = {
        "zero-shot top-1": "zero_shot_top1",
        "image to text, R@1": "image_to_text_r1",
        "text to image, R@1": "text_to_image_r1",
        "image choices kept": "success_rate_image",
        "text choices kept": "success_rate_text",
    }
    values = {name: number(summary[key], percent=True) for name, key in shares.items() if summary.get(key) is not None}
    if summary:
        values["parameters"] = f"{summary['parameters_total']:,}"
    values["steps"] = f"{curves.last_step:,}"
    values["pairs in a step"] = f"{config.train.batch_size:,}"
    values["time of the steps"] = f"{curves.seconds / 60:,.1f} min"
    tiles = (f'<div class="tile"><b>{value}</b><span>{escape(name)}</span></div>' for name, value in values.items())
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _specialisation(config: Config, snapshots: Sequence[Snapshot]) -> str:
    if not snapshots:
        return "<p>There are no counts of experts: the model is dense, or no step is logged yet.</p>"
    steps = [f"{one.step:,}" for one in snapshots]
    maps = []
    for layer, block in enumerate(config.model.moe_layers):
        wanted = [one.wanted[layer] for one in snapshots]
        columns = [_cells(one, step) for one, step in zip(wanted, steps, strict=True)]
        rows = list(zip(*columns, strict=True))
        maps.append(draw_cells(f"block {block}", [f"expert {e}" for e in range(len(rows))], steps, rows))
    return (
        "<p>Each column is a training step, each row an expert. <span class=image>Blue</span> takes a larger share of "
        "the image tokens, <span class=text>orange</span> of the text tokens, grey of both alike; pale cells have "
        f"little work.</p>{_grid(maps, broad=True)}"
    )


def _cells(wanted: np.ndarray, step: str) -> list[Cell]:
    """The cells of one step from counts [2, E]."""
    preference, names = text_preference(wanted[None])[0], expert_modality(wanted[None])[0]
    share = wanted / np.maximum(wanted.sum(axis=1, keepdims=True), 1e-30)
    cells = []
    for expert, (value, name) in enumerate(zip(preference.tolist(), names, strict=True)):
        takes = f"{share[IMAGE, expert]:.0%} of image tokens, {share[TEXT, expert]:.0%} of text tokens"
        side = "text-modality" if value > 0.5 else "image"
        amount = 100 * abs(2 * value - 1) ** 0.5 if np.isfinite(value) else 0
        colour = f"color-mix(in srgb, var(--{side}) {amount:.0f}%, #8a8f98)"
        cells.append(
            Cell(
                colour + ("; opacity: 0.25" if name == "unused" else ""),
                f"step {step}, expert {expert}: {leaning(value)}, {takes}",
            )
        )
    return cells


def _confusion(examples: Examples | None, missing: str) -> str:
    if examples is None or examples.confusion is None:
        return f"<p>{escape(missing or 'The evaluation data have no classes.')}</p>"
    found = examples.confusion
    wrong = sorted(
        ((int(found.times[a, b]), a, b) for a, b in np.argwhere(found.times).tolist() if a != b), reverse=True
    )
    right, total = int(np.trace(found.times)), int(found.times.sum())
    said = f"<p>Step {examples.step:,}: {right:,} of {total:,} images were given their own class.</p>"
    rows = "".join(
        f"<tr><td>{n}</td><td>{escape(found.names[a])}</td><td>{escape(found.names[b])}</td></tr>"
        for n, a, b in wrong[:_CONFUSIONS_LISTED]
    )
    table = (
        f"<div class=wide><table><tr><th>times</th><th>is</th><th>was taken for</th></tr>{rows}</table></div>"
        if rows
        else ""
    )
    return said + (_confusion_map(found) if len(found.names) <= _MOST_CLASSES else "") + table


def _confusion_map(found: Confusion) -> str:
    share = found.times / np.maximum(found.times.sum(axis=1, keepdims=True), 1)

    def cell(row: int, column: int) -> Cell:
        colour, part = "right" if row == column else "wrong", share[row, column]
        said = f"{found.names[row]} taken for {found.names[column]}: {found.times[row, column]} ({part:.0%})"
        return Cell(f"color-mix(in srgb, var(--{colour}) {100 * part:.0f}%, var(--line))", said)

    places = range(len(found.names))
    cells = [[cell(row, column) for column in places] for row in places]
    numbers = [str(place + 1) for place in places]
    rows = [f"{name} {place}" for name, place in zip(found.names, numbers, strict=True)]
    return draw_cells("rows: the class of the image; columns: the class that was said", rows, numbers, cells)


def _retrieval(examples: Examples | None, missing: str) -> str:
    if examples is None or not examples.images_of_captions:
        return f"<p>{escape(missing or 'There are no evaluation pairs.')}</p>"
    captions = (
        f"<figure><figcaption>{escape(one.caption[0])}</figcaption><div class=found>"
        f"{''.join(map(_thumbnail, one.image, one.right, one.right))}</div></figure>"
        for one in examples.images_of_captions
    )
    return (
        f"<p>Step {examples.step:,}. The best images of some captions, best first; the right ones have a frame.</p>"
        f"{_grid(captions, broad=True)}<p>The best captions of some images; the right ones are green.</p>"
        f"{_grid(map(_captions_of, examples.captions_of_images))}"
    )


def _captions_of(one: Found) -> str:
    items = "".join(
        f"<li{' class=right' * right}>{escape(caption)}</li>"
        for caption, right in zip(one.caption, one.right, strict=True)
    )
    return f"<figure><div class=found>{_thumbnail(one.image[0], False, False)}<ol>{items}</ol></div></figure>"


def _thumbnail(pixels: np.ndarray, right: bool, framed: bool) -> str:
    buffer = io.BytesIO()
    small = len(pixels) <= 64
    Image.fromarray(pixels).save(buffer, "PNG" if small else "JPEG")
    kind = "png" if small else "jpeg"
    content = base64.b64encode(buffer.getvalue()).decode()
    said = "a right image" if right else "an image"
    return f'<img alt="{said}"{" class=right" * framed} src="data:image/{kind};base64,{content}">'


def _bad_data(curves: Curves, summary: dict[str, Any]) -> str:
    rows = "".join(f"<li>{escape(one)}</li>" for one in curves.first_bad)
    left_out = summary.get("evaluation_bad_examples")
    return (
        f"<p>{curves.num_bad:,} examples of the training data could not be used and were replaced by the next good one."
        + (f" {left_out:,} of the evaluation data were left out." if left_out is not None else "")
        + f"</p><ul>{rows}</ul>"
    )


def _settings(config: Config) -> str:
    rows = []
    for section, values in dataclasses.asdict(config).items():
        for name, value in values.items() if isinstance(values, dict) else [("", values)]:
            full = f"{section}.{name}" if name else section
            rows.append(f"<tr><td>{escape(full)}</td><td>{escape(str(value))}</td></tr>")
    table = f"<div class=wide><table>{''.join(rows)}</table></div>"
    return f"<details><summary>{len(rows)} settings</summary>{table}</details>"


def _versions(kept: Sequence[Since]) -> str:
    if not kept:
        return "<p>Not recorded: an older version of limoe trained this run.</p>"
    texts = [", ".join(f"{name} {version}" for name, version in one.versions.items()) for one in kept]
    since = [f"<p>After step {one.step:,}: {escape(text)}.</p>" for one, text in zip(kept, texts, strict=True)]
    return "".join(since)


def _picture(name: str, content: bytes) -> str:
    source = base64.b64encode(content).decode()
    title = escape(name.replace("_", " "))
    return f'<figure><figcaption>{title}</figcaption><img alt="{title}" src="data:image/png;base64,{source}"></figure>'


def _grid(items: Iterable[str], *, broad: bool = False) -> str:
    inside = "".join(items)
    return f'<div class="grid{" broad" * broad}">{inside}</div>' if inside else ""


def _json(value: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _resource(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _slug(name: str) -> str:
    return name.lower().replace(" ", "-")
