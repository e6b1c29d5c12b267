"""What a finished run shows: evaluation, figures, and the numbers of its summary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from limoe import evaluate, report
from limoe.analysis import expert_modality, success_rate_bound, top_patches, top_tokens
from limoe.config import Config
from limoe.data.files import DataError
from limoe.data.source import ShardSource
from limoe.describe import describe
from limoe.encode import Encoder, Pairs, read_pairs
from limoe.inputs import DataFolders
from limoe.moe import IMAGE, TEXT
from limoe.panels import History, LayerView
from limoe.tokenizer import Tokenizer

# Training steps whose mean the summary's success rates and the figure of shares are.
LAST_STEPS = 100
EXAMPLES_SHOWN = 12
# Training images of a class in the linear probe (paper, section 7).
PROBE_SHOTS = 10


class ZeroShotData(NamedTuple):
    """Images with labels, and the classes among which to choose."""

    pairs: Pairs
    classes: evaluate.Classes


class EvaluationData(NamedTuple):
    """What is evaluated; None where there is no such data."""

    zero_shot: ZeroShotData | None
    retrieval: Pairs | None
    num_bad: int
    """Examples that could not be read and are left out."""


class Scores(NamedTuple):
    """Results of an evaluation; None where there is no data for it. The fields of `limoe eval --json`."""

    zero_shot_top1: float | None
    zero_shot_top5: float | None
    zero_shot_chance: float | None
    image_to_text_r1: float | None
    image_to_text_r5: float | None
    image_to_text_r10: float | None
    text_to_image_r1: float | None
    text_to_image_r5: float | None
    text_to_image_r10: float | None
    zero_shot_images: int
    retrieval_pairs: int
    evaluation_bad_examples: int


def read_evaluation_data(config: Config, folders: DataFolders) -> EvaluationData:
    """Read the evaluation shards into memory; bad examples are left out and counted.

    Raises DataError if a folder has no usable example, or if one in a folder with classes.json has no valid class.
    """
    zero_shot = None
    if folders.zero_shot:
        classes = evaluate.read_classes(folders.zero_shot)
        zero_shot = ZeroShotData(read_labelled(config, folders.zero_shot, len(classes.names)), classes)
    if zero_shot and folders.retrieval == folders.zero_shot:
        return EvaluationData(zero_shot, zero_shot.pairs, zero_shot.pairs.num_bad)
    retrieval = _read(config, folders.retrieval, metadata=False) if folders.retrieval else None
    num_bad = sum(read.num_bad for read in (zero_shot and zero_shot.pairs, retrieval) if read is not None)
    return EvaluationData(zero_shot, retrieval, num_bad)


def read_labelled(config: Config, folder: str, num_classes: int) -> Pairs:
    """Read shards whose examples all have a class; raises DataError as `read_evaluation_data`."""
    labelled = _read(config, folder, metadata=True)
    wrong = np.flatnonzero((labelled.labels < 0) | (labelled.labels >= num_classes))
    if len(wrong):
        raise DataError(
            f"{len(wrong)} examples in {folder} have no class between 0 and {num_classes - 1}; "
            'give each a .json with {"class": index}, or evaluate without classes.json'
        )
    return labelled


def _read(config: Config, folder: str, *, metadata: bool) -> Pairs:
    size, cache = config.model.image_size, config.data.cache_dir
    found = read_pairs(ShardSource(folder, image_size=size, metadata=metadata, cache_dir=cache))
    if not found.captions:
        raise DataError(f"none of the {found.num_bad} examples in {folder} is usable, {found.first_bad}; repair them")
    return found


def zero_shot_probability(encoder: Encoder, data: ZeroShotData, images: np.ndarray) -> np.ndarray:
    """Softmax over classes [N, Q] of scaled similarities: how sure the model is of each class."""
    logits = encoder.scale * encoder.images(images) @ class_embeddings(encoder, data.classes).T
    exponential = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponential / exponential.sum(axis=1, keepdims=True)


def class_embeddings(encoder: Encoder, classes: evaluate.Classes) -> np.ndarray:
    """One embedding [Q, P] for each class, from all its prompts."""
    return evaluate.class_embeddings(encoder.texts(evaluate.prompts(classes)), num_templates=len(classes.templates))


def zero_shot(encoder: Encoder, data: ZeroShotData) -> evaluate.ZeroShot:
    """Zero-shot classification of all images (paper, section 7)."""
    return evaluate.zero_shot(
        encoder.images(data.pairs.images), class_embeddings(encoder, data.classes), data.pairs.labels
    )


def score(encoder: Encoder, data: EvaluationData) -> Scores:
    """Evaluate everything there is data for: zero-shot classification and retrieval both ways (paper, section 7)."""
    shot = zero_shot(encoder, data.zero_shot) if data.zero_shot else None
    found = None
    if data.retrieval:
        ids = {caption: number for number, caption in enumerate(dict.fromkeys(data.retrieval.captions))}
        found = evaluate.retrieval(
            encoder.images(data.retrieval.images),
            encoder.texts(data.retrieval.captions),
            np.array([ids[caption] for caption in data.retrieval.captions]),
            np.arange(len(data.retrieval.captions)),
        )
    return Scores(
        zero_shot_top1=shot.top1 if shot else None,
        zero_shot_top5=shot.top5 if shot else None,
        zero_shot_chance=shot.chance if shot else None,
        **(found._asdict() if found else dict.fromkeys(evaluate.Retrieval._fields)),
        zero_shot_images=len(data.zero_shot.pairs.images) if data.zero_shot else 0,
        retrieval_pairs=len(data.retrieval.images) if data.retrieval else 0,
        evaluation_bad_examples=data.num_bad,
    )


def probe(encoder: Encoder, config: Config, data: EvaluationData, folder: str) -> evaluate.Probe:
    """`PROBE_SHOTS`-shot linear probe of the frozen image representation before its projection (paper, section 7).

    Learned from the labelled shards in `folder`, tested on the images of the zero-shot evaluation. Raises DataError
    where there is none, or where `folder` lacks examples of a class.
    """
    if data.zero_shot is None:
        raise DataError("a probe needs evaluation data with classes.json; give its folder with --data")
    names = data.zero_shot.classes.names
    shots = read_labelled(config, folder, len(names))
    count = np.bincount(shots.labels, minlength=len(names))
    if count.min() < PROBE_SHOTS:
        scarce = int(count.argmin())
        raise DataError(
            f"{folder} has {count[scarce]} examples of class {scarce} ({names[scarce]!r}); "
            f"a linear probe needs {PROBE_SHOTS} of every class"
        )
    test = data.zero_shot.pairs
    train_features, test_features = (encoder.image_features(pairs.images) for pairs in (shots, test))
    return evaluate.ridge_probe(train_features, shots.labels, test_features, test.labels, shots=PROBE_SHOTS)


def bound(config: Config) -> float | None:
    """Share of choices that a perfect router with independent tokens keeps at training capacity; None if dense.

    Padding counts as tokens here, as it does for the capacity: where it is masked, the true bound lies a little higher.
    """
    model = config.model
    if not model.moe_layers:
        return None
    group = (model.group_examples or config.train.batch_size) * model.tokens_per_example
    return success_rate_bound(model.num_experts, group, model.num_choices, model.capacity_factor)


def training_history(config: Config, metrics: Sequence[dict[str, Any]], scores: Scores | None) -> History:
    """Curves of a run from the lines of its log; the final zero-shot result closes its curve."""
    sparse = bool(config.model.moe_layers)
    shots = [(line["step"], line["zero_shot_top1"]) for line in metrics if line["zero_shot_top1"] is not None]
    if scores is not None and scores.zero_shot_top1 is not None and (not shots or shots[-1][0] != metrics[-1]["step"]):
        shots.append((metrics[-1]["step"], scores.zero_shot_top1))

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
        zero_shot_chance=(scores.zero_shot_chance or 0.0) if scores else 0.0,
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
    report.draw_training(folder / "training.png", history)
    if data.zero_shot:
        chosen = np.linspace(0, len(data.zero_shot.pairs.images) - 1, EXAMPLES_SHOWN).astype(int)
        images = data.zero_shot.pairs.images[chosen]
        probability = zero_shot_probability(encoder, data.zero_shot, images)
        names, labels = data.zero_shot.classes.names, data.zero_shot.pairs.labels[chosen]
        report.draw_examples(folder / "examples.png", images, probability, labels, names)
    if last.wanted is None or last.kept is None:
        return
    model = config.model
    report.draw_expert_shares(
        folder / "expert_shares.png",
        last.wanted,
        last.kept,
        moe_layers=model.moe_layers,
        capacity_factor=_factor_of_present_tokens(config, last.wanted),
    )
    pairs = data.retrieval or (data.zero_shot.pairs if data.zero_shot else None)
    if pairs is None:
        return
    views = layer_views(config, last, encoder, pairs, tokenizer)
    for view in views:
        report.draw_gallery(
            folder / f"gallery_block{view.moe_layer}.png", pairs.images, view, patch_size=model.patch_size
        )
    report.draw_overview(folder / "overview.png", pairs.images, views[-1], history, patch_size=model.patch_size)


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


def summary(config: Config, scores: Scores, last: LastSteps, times: Times, *, num_bad: int) -> dict[str, Any]:
    """The content of summary.json; `num_bad` counts the training examples that were replaced."""
    described = describe(config)
    content: dict[str, Any] = {
        "preset": config.preset,
        "steps": config.train.steps,
        **times._asdict(),
        **scores._asdict(),
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
