"""Results of a finished run: figures, and the numbers of its summary."""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from limoe.config.schema import Config, ModelConfig
from limoe.data.tokenizer import Tokenizer
from limoe.evaluate import zero_shot
from limoe.evaluate.data import EvaluationData
from limoe.evaluate.encode import Encoder
from limoe.model.describe import describe
from limoe.model.moe import IMAGE, TEXT
from limoe.report import pictures
from limoe.report.analysis import expert_modality, success_rate_bound, top_patches, top_tokens
from limoe.report.panels import History, LayerView
from limoe.workdir.metrics import skipped_in_row

# The summary's success rates and the figure of shares are means over this many training steps.
LAST_STEPS = 100
EXAMPLES_SHOWN = 12
# Pairs among which patches and words of the experts are searched: their pictures are in memory for the figures.
GALLERY_PAIRS = 512
# Bad examples that the end of a run names.
BAD_SHOWN = 5


class Log(NamedTuple):
    """Everything that the end of a run needs from its log."""

    history: History
    last: LastSteps
    train_seconds: float
    num_skipped: int
    num_bad: int
    first_bad: tuple[str, ...]


class LastSteps(NamedTuple):
    """Means over the last `LAST_STEPS` training steps: success rates over all MoE layers, and choices by expert.

    A success rate is the share of a modality's choices that found room in their expert, at training capacity and with
    noise. All K choices of a token count alike. `wanted` and `kept` are [L, 2, E]: choices, and those that found room.
    All fields are None for a dense model.
    """

    success_rate_image: float | None
    success_rate_text: float | None
    wanted: np.ndarray | None
    kept: np.ndarray | None


def read_log(model: ModelConfig, lines: Iterable[dict[str, Any]]) -> Log:
    """Collect the lines of a log. A number takes 8 bytes, so 700,000 steps of H/14 take 0.2 GB.

    Success rates of the history are means over layers, or NaN for a dense model.
    """
    names = ("step", "loss", "contrastive", "success_rate", "effective_experts", "zero_shot_step", "zero_shot_top1")
    column = {name: array("d") for name in names}
    tail: deque[dict[str, Any]] = deque(maxlen=LAST_STEPS)
    seconds, num_skipped, num_bad, first_bad = 0.0, 0, 0, []
    for line in lines:
        for name, figure in (("step", "step"), ("loss", "total"), ("contrastive", "contrastive")):
            # Null, in a step that was skipped or for a modality without tokens, becomes NaN.
            column[name].append(math.nan if line[figure] is None else line[figure])
        if model.moe_layers:
            column["success_rate"].frombytes(np.array(line["success_rate"], float).mean(axis=0).tobytes())
            column["effective_experts"].frombytes(np.array(line["effective_experts"], float).tobytes())
        if line["zero_shot_top1"] is not None:
            column["zero_shot_step"].append(line["step"])
            column["zero_shot_top1"].append(line["zero_shot_top1"])
        tail.append(line)
        seconds += line["step_seconds"]
        num_skipped += skipped_in_row(line) > 0
        num_bad += line["bad_examples"]
        first_bad += line["bad_first"][: max(0, BAD_SHOWN - len(first_bad))]
    found: dict[str, Any] = {name: np.frombuffer(values) for name, values in column.items()}
    steps, layers = len(found["step"]), len(model.moe_layers)
    found["success_rate"] = found["success_rate"].reshape(-1, 2) if layers else np.full((steps, 2), np.nan)
    found["effective_experts"] = found["effective_experts"].reshape(steps, layers, 2)
    return Log(History(**found), last_steps(model, tail), seconds, num_skipped, num_bad, tuple(first_bad))


def last_steps(model: ModelConfig, tail: Iterable[dict[str, Any]]) -> LastSteps:
    """Compute means over these lines; those of counts by expert are over the lines that have counts."""
    if not model.moe_layers:
        return LastSteps(None, None, None, None)
    lines = list(tail)
    rate = np.array([line["success_rate"] for line in lines], float).mean(axis=(0, 1))
    counted = [line for line in lines if line["wanted"] is not None]
    wanted, kept = (np.array([line[name] for line in counted], float).mean(axis=0) for name in ("wanted", "kept"))
    return LastSteps(float(rate[IMAGE]), float(rate[TEXT]), wanted, kept)


def bound(model: ModelConfig, batch_size: int) -> float | None:
    """Compute the share of choices that a perfect router with independent tokens keeps in training; None if dense.

    Padding counts as tokens here, as it does for the capacity. If padding is masked, the true bound is a little higher.
    """
    if not model.moe_layers:
        return None
    group = (model.group_examples or batch_size) * model.tokens_per_example
    return success_rate_bound(model.num_experts, group, model.num_choices, model.capacity_factor)


def training_history(log: Log, figures: Mapping[str, Any], success_rate_bound: float | None) -> History:
    """Complete the history of a run by its final zero-shot result, chance, and what a perfect router keeps."""
    history = log.history._replace(
        success_rate_bound=success_rate_bound or 1.0, zero_shot_chance=figures.get("zero_shot_chance") or 0.0
    )
    final = figures.get("zero_shot_top1")
    if final is None or history.step[-1] in history.zero_shot_step[-1:]:
        return history
    return history._replace(
        zero_shot_step=np.append(history.zero_shot_step, history.step[-1]),
        zero_shot_top1=np.append(history.zero_shot_top1, final),
    )


def draw(
    folder: Path,
    model: ModelConfig,
    batch_size: int,
    history: History,
    last: LastSteps,
    encoder: Encoder,
    data: EvaluationData,
    tokenizer: Tokenizer,
) -> None:
    """Draw all figures for which there are data into `folder`."""
    pictures.draw_training(folder / "training.png", history)
    if data.zero_shot:
        chosen = np.linspace(0, len(data.zero_shot.pairs.images) - 1, EXAMPLES_SHOWN).astype(int)
        images = data.zero_shot.pairs.images[chosen]
        candidates = zero_shot.embed_classes(encoder, data.zero_shot.classes)
        probability = zero_shot.probability(encoder.images(images), candidates, encoder.scale)
        names, labels = data.zero_shot.classes.names, data.zero_shot.pairs.labels[chosen]
        pictures.draw_examples(folder / "examples.png", images, probability, labels, names)
    if last.wanted is None or last.kept is None:
        return
    pictures.draw_expert_shares(
        folder / "expert_shares.png",
        last.wanted,
        last.kept,
        moe_layers=model.moe_layers,
        capacity_factor=factor_of_present_tokens(model, batch_size, last.wanted),
    )
    if data.retrieval is None:
        return
    pairs = data.retrieval.pairs
    images, captions = pairs.images[:GALLERY_PAIRS], pairs.captions[:GALLERY_PAIRS]
    views = layer_views(model, last, encoder, images, captions, tokenizer)
    for view in views:
        pictures.draw_gallery(folder / f"gallery_block{view.moe_layer}.png", images, view, patch_size=model.patch_size)
    pictures.draw_overview(folder / "overview.png", images, views[-1], history, patch_size=model.patch_size)


def factor_of_present_tokens(model: ModelConfig, batch_size: int, wanted: np.ndarray) -> float:
    """Compute the capacity factor relative to routed tokens: padding counts for capacity, but may not be routed."""
    present = wanted.sum() / (len(model.moe_layers) * model.num_choices)
    return model.capacity_factor * batch_size * model.tokens_per_example / float(present)


def layer_views(
    model: ModelConfig,
    last: LastSteps,
    encoder: Encoder,
    images: UInt8[np.ndarray, "N H W 3"],
    captions: Sequence[str],
    tokenizer: Tokenizer,
) -> list[LayerView]:
    """Find the patches and words with the largest gates of each expert of each MoE layer (paper, section 6)."""
    assert last.wanted is not None
    text = encoder.tokenize(captions)
    assignment = encoder.assignments(images, text)
    patches = model.num_image_tokens
    views = []
    for number, block in enumerate(model.moe_layers):
        expert, gate = np.asarray(assignment.expert[number]), np.asarray(assignment.gate[number])
        top = top_patches(
            gate[:, :patches].reshape(-1),
            expert[:, :patches].reshape(-1),
            num_experts=model.num_experts,
            patches_per_image=patches,
        )
        said = text.reshape(-1)
        words = top_tokens(
            np.where(said > 0, gate[:, patches:].reshape(-1), 0.0),
            expert[:, patches:].reshape(-1),
            said,
            num_experts=model.num_experts,
        )
        named = tuple(tuple(tokenizer.piece(int(i)) for i in row if i >= 0) for row in words)
        views.append(LayerView(block, last.wanted[number], top, named))
    return views


def summary(config: Config, figures: Mapping[str, Any], log: Log, seconds: float) -> dict[str, Any]:
    """Make the content of summary.json.

    `seconds` are the wall time of all commands of the run: each from its start to the last step that it logged, the
    last one to its end. `train_seconds` are the time of the steps, with waiting for data and compilation; a step that
    was repeated counts once. `training_skipped_steps` is the number of steps whose update was left out because loss or
    gradient was not finite, `training_bad_examples` that of replaced examples.
    """
    described = describe(config)
    content: dict[str, Any] = {
        "preset": config.preset,
        "steps": config.train.steps,
        "seconds": seconds,
        "train_seconds": log.train_seconds,
        **figures,
        "success_rate_image": log.last.success_rate_image,
        "success_rate_text": log.last.success_rate_text,
        "success_rate_bound": bound(config.model, config.train.batch_size),
        "training_skipped_steps": log.num_skipped,
        "training_bad_examples": log.num_bad,
        "parameters_total": described.parameters_total,
        "parameters_per_token": described.parameters_per_token,
        "moe_layers": list(config.model.moe_layers),
    }
    if log.last.wanted is not None:
        content["expert_modality"] = [list(names) for names in expert_modality(log.last.wanted)]
    return content
