"""What a finished run shows: evaluation, figures, and the numbers of its summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from limoe.config.schema import Config
from limoe.data.tokenizer import Tokenizer
from limoe.evaluate import zero_shot
from limoe.evaluate.data import EvaluationData, Pairs
from limoe.evaluate.encode import Encoder
from limoe.model.describe import describe
from limoe.model.moe import IMAGE, TEXT
from limoe.report import pictures
from limoe.report.analysis import expert_modality, success_rate_bound, top_patches, top_tokens
from limoe.report.panels import History, LayerView

# Training steps whose mean the summary's success rates and the figure of shares are.
LAST_STEPS = 100
EXAMPLES_SHOWN = 12


def bound(config: Config) -> float | None:
    """Share of choices that a perfect router with independent tokens keeps at training capacity; None if dense.

    Padding counts as tokens here, as it does for the capacity: where it is masked, the true bound lies a little higher.
    """
    model = config.model
    if not model.moe_layers:
        return None
    group = (model.group_examples or config.train.batch_size) * model.tokens_per_example
    return success_rate_bound(model.num_experts, group, model.num_choices, model.capacity_factor)


def training_history(config: Config, metrics: Sequence[dict[str, Any]], figures: Mapping[str, Any] | None) -> History:
    """Curves of a run from the lines of its log; the final zero-shot result closes its curve."""
    sparse = bool(config.model.moe_layers)
    shots = [(line["step"], line["zero_shot_top1"]) for line in metrics if line["zero_shot_top1"] is not None]
    final, chance = (figures or {}).get("zero_shot_top1"), (figures or {}).get("zero_shot_chance")
    if final is not None and (not shots or shots[-1][0] != metrics[-1]["step"]):
        shots.append((metrics[-1]["step"], final))

    def column(name: str) -> np.ndarray:
        return np.array([line[name] for line in metrics], float)

    by_layer = column("success_rate") if sparse else np.full((len(metrics), 1, 2), np.nan)
    return History(
        step=column("step"),
        loss=column("total"),
        contrastive=column("contrastive"),
        success_rate=by_layer.mean(axis=1),
        effective_experts=column("effective_experts") if sparse else np.zeros((len(metrics), 0, 2)),
        success_rate_bound=bound(config) or 1.0,
        zero_shot_step=np.array([step for step, _ in shots], float),
        zero_shot_top1=np.array([top1 for _, top1 in shots], float),
        zero_shot_chance=chance or 0.0,
    )


class LastSteps(NamedTuple):
    """Means over the last `LAST_STEPS` steps of training: success rates over all MoE layers, choices by expert.

    A success rate is the share of a modality's choices that found room in their expert, at training capacity and with
    noise: of its tokens with `model.num_choices` 1, else of each token's K choices alike.
    """

    success_rate_image: float | None
    success_rate_text: float | None
    wanted: np.ndarray | None
    kept: np.ndarray | None


def last_steps(config: Config, metrics: Sequence[dict[str, Any]]) -> LastSteps:
    """Summarise the end of the log; None for a dense model."""
    if not config.model.moe_layers:
        return LastSteps(None, None, None, None)
    tail = metrics[-LAST_STEPS:]
    rate = np.array([line["success_rate"] for line in tail], float).mean(axis=(0, 1))
    wanted, kept = (np.array([line[name] for line in tail], float).mean(axis=0) for name in ("wanted", "kept"))
    return LastSteps(float(rate[IMAGE]), float(rate[TEXT]), wanted, kept)


def draw(
    folder: Path,
    config: Config,
    history: History,
    last: LastSteps,
    encoder: Encoder,
    data: EvaluationData,
    tokenizer: Tokenizer,
) -> None:
    """Draw every figure there is data for into `folder`."""
    pictures.draw_training(folder / "training.png", history)
    if data.zero_shot:
        chosen = np.linspace(0, len(data.zero_shot.pairs.images) - 1, EXAMPLES_SHOWN).astype(int)
        images = data.zero_shot.pairs.images[chosen]
        probability = zero_shot.probability(encoder, data.zero_shot, images)
        names, labels = data.zero_shot.classes.names, data.zero_shot.pairs.labels[chosen]
        pictures.draw_examples(folder / "examples.png", images, probability, labels, names)
    if last.wanted is None or last.kept is None:
        return
    model = config.model
    pictures.draw_expert_shares(
        folder / "expert_shares.png",
        last.wanted,
        last.kept,
        moe_layers=model.moe_layers,
        capacity_factor=_factor_of_present_tokens(config, last.wanted),
    )
    pairs = data.pairs
    if pairs is None:
        return
    views = layer_views(config, last, encoder, pairs, tokenizer)
    for view in views:
        pictures.draw_gallery(
            folder / f"gallery_block{view.moe_layer}.png", pairs.images, view, patch_size=model.patch_size
        )
    pictures.draw_overview(folder / "overview.png", pairs.images, views[-1], history, patch_size=model.patch_size)


def _factor_of_present_tokens(config: Config, wanted: np.ndarray) -> float:
    """The capacity factor in terms of the tokens that were there: padding counts for capacity, but takes no place."""
    model = config.model
    present = wanted.sum() / (len(model.moe_layers) * model.num_choices)
    return model.capacity_factor * config.train.batch_size * model.tokens_per_example / float(present)


def layer_views(
    config: Config, last: LastSteps, encoder: Encoder, pairs: Pairs, tokenizer: Tokenizer
) -> list[LayerView]:
    """For each MoE layer the patches and words with the largest gates of each expert (paper, section 6)."""
    assert last.wanted is not None
    model = config.model
    assignment, text = encoder.assignments(pairs.images, pairs.captions)
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


class Times(NamedTuple):
    """How long a run took, in seconds of wall time."""

    seconds: float
    """All commands of the run, from the start of each to the last step that it logged; the finishing one to its end."""
    train_seconds: float
    """The steps alone, waiting for data and compilation included; steps that were done twice count once."""


def summary(
    config: Config, figures: Mapping[str, Any], last: LastSteps, times: Times, *, num_bad: int
) -> dict[str, Any]:
    """The content of summary.json; `num_bad` counts the training examples that were replaced."""
    described = describe(config)
    content: dict[str, Any] = {
        "preset": config.preset,
        "steps": config.train.steps,
        **times._asdict(),
        **figures,
        "success_rate_image": last.success_rate_image,
        "success_rate_text": last.success_rate_text,
        "success_rate_bound": bound(config),
        "training_bad_examples": num_bad,
        "parameters_total": described.parameters_total,
        "parameters_per_token": described.parameters_per_token,
        "moe_layers": list(config.model.moe_layers),
    }
    if last.wanted is not None:
        content["expert_modality"] = [list(names) for names in expert_modality(last.wanted)]
    return content
