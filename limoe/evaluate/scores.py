"""Scores of a model on the evaluation data of a run: zero-shot classification, retrieval, a linear probe."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from limoe.config.schema import Config
from limoe.data.files import DataError
from limoe.data.inputs import DataFolders
from limoe.data.source import ShardSource
from limoe.evaluate import metrics
from limoe.evaluate.encode import Encoder, Pairs, read_pairs

# Training images of a class in the linear probe (paper, section 7).
PROBE_SHOTS = 10


class ZeroShotData(NamedTuple):
    """Images with labels, and the classes among which to choose."""

    pairs: Pairs
    classes: metrics.Classes


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
        classes = metrics.read_classes(folders.zero_shot)
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


def class_embeddings(encoder: Encoder, classes: metrics.Classes) -> np.ndarray:
    """One embedding [Q, P] for each class, from all its prompts."""
    return metrics.class_embeddings(encoder.texts(metrics.prompts(classes)), num_templates=len(classes.templates))


def zero_shot(encoder: Encoder, data: ZeroShotData) -> metrics.ZeroShot:
    """Zero-shot classification of all images (paper, section 7)."""
    return metrics.zero_shot(
        encoder.images(data.pairs.images), class_embeddings(encoder, data.classes), data.pairs.labels
    )


def score(encoder: Encoder, data: EvaluationData) -> Scores:
    """Evaluate everything there is data for: zero-shot classification and retrieval both ways (paper, section 7)."""
    shot = zero_shot(encoder, data.zero_shot) if data.zero_shot else None
    found = None
    if data.retrieval:
        ids = {caption: number for number, caption in enumerate(dict.fromkeys(data.retrieval.captions))}
        found = metrics.retrieval(
            encoder.images(data.retrieval.images),
            encoder.texts(data.retrieval.captions),
            np.array([ids[caption] for caption in data.retrieval.captions]),
            np.arange(len(data.retrieval.captions)),
        )
    return Scores(
        zero_shot_top1=shot.top1 if shot else None,
        zero_shot_top5=shot.top5 if shot else None,
        zero_shot_chance=shot.chance if shot else None,
        **(found._asdict() if found else dict.fromkeys(metrics.Retrieval._fields)),
        zero_shot_images=len(data.zero_shot.pairs.images) if data.zero_shot else 0,
        retrieval_pairs=len(data.retrieval.images) if data.retrieval else 0,
        evaluation_bad_examples=data.num_bad,
    )


def probe(encoder: Encoder, config: Config, data: EvaluationData, folder: str) -> metrics.Probe:
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
    return metrics.ridge_probe(train_features, shots.labels, test_features, test.labels, shots=PROBE_SHOTS)
