"""Zero-shot classification: an image gets the class whose prompts are nearest to it (paper, section 7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from limoe.data.classes import Classes
from limoe.evaluate.data import EvaluationData, Labelled
from limoe.evaluate.embeddings import blocks, check_width, checked, checked_labels, scores_of
from limoe.evaluate.encode import Encoder
from limoe.evaluate.evaluator import Evaluator


class ZeroShot(NamedTuple):
    """Result of zero-shot classification: shares of the images, and the confusion matrix."""

    top1: float
    top5: float
    chance: float
    mean_per_class: float
    """Top-1 of each class that has images, and then their mean."""
    num_doubled: int
    """Images of classes whose name stands more than once."""
    confusion: np.ndarray  # [Q, Q] int64: number of images of the row's class that got the column's class


class Figures(NamedTuple):
    """Figures of zero-shot classification in a summary; None without data."""

    zero_shot_top1: float | None = None
    zero_shot_top5: float | None = None
    zero_shot_chance: float | None = None
    zero_shot_mean_per_class: float | None = None
    zero_shot_images: int = 0
    zero_shot_doubled: int = 0
    """Images of classes whose name stands twice in the list: they get the first of the two."""


def prompts(classes: Classes) -> tuple[str, ...]:
    """Make the lower-case sentences of all classes: all templates of class 0, then of class 1, and so on (section 7).

    >>> prompts(Classes(("a {}", "A photo of a {}."), ("Cat", "dog")))
    ('a cat', 'a photo of a cat.', 'a dog', 'a photo of a dog.')
    """
    return tuple(template.replace("{}", name).lower() for name in classes.names for template in classes.templates)


def class_embeddings(text_embedding: np.ndarray, *, num_templates: int) -> np.ndarray:
    """Averages the embeddings [Q * num_templates, P] of `prompts` over the templates and L2-normalises: [Q, P] float32.

    Raises ValueError if the number of rows is not a multiple of `num_templates`, or a value is not finite (section 7).

    >>> class_embeddings(np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 4.0]]), num_templates=2).round(3)
    array([[0.707, 0.707],
           [0.   , 1.   ]], dtype=float32)
    """
    embedding = checked("text_embedding", text_embedding)
    if num_templates < 1 or len(embedding) % num_templates:
        raise ValueError(
            f"{len(embedding)} prompt embeddings cannot be split into classes of {num_templates} templates each; "
            "pass the embeddings of all prompts(classes) and num_templates=len(classes.templates)"
        )
    mean = embedding.reshape(-1, num_templates, embedding.shape[1]).mean(axis=1)
    norm = np.linalg.norm(mean, axis=1, keepdims=True)
    # If prompts cancel out, the result is the zero vector, not NaN.
    return (mean / np.maximum(norm, np.finfo(np.float32).tiny)).astype(np.float32)


def first_of_name(names: Sequence[str]) -> np.ndarray:
    """Number each class by the first one of the same name [Q], in lower case.

    >>> first_of_name(["missile", "cat", "Missile"]).tolist()
    [0, 1, 0]
    """
    lower = [name.lower() for name in names]
    return np.array([lower.index(name) for name in lower])


def zero_shot(image: np.ndarray, classes: np.ndarray, label: np.ndarray, first: np.ndarray | None = None) -> ZeroShot:
    """Classifies image embeddings [N, P] by the largest dot product with class embeddings [Q, P].

    `label` [N] is the right class of every image (paper, section 7). A class that scores as high as the right one ranks
    before it, so a tie is an error. `confusion` follows the same rule; among wrong classes with equal scores it takes
    the lowest index. Its diagonal sums to `top1 * N`. Of classes with one name (`first_of_name`) the lowest is
    predicted. With at most five classes `top5` is 1. Raises ValueError for
    shapes that do not fit, labels outside 0 to Q - 1, no images, or values that are not finite.

    >>> result = zero_shot(np.eye(3)[[0, 1, 2, 2]], np.eye(3), np.array([0, 1, 2, 0]))
    >>> result.top1, round(result.chance, 3), result.confusion.tolist()
    (0.75, 0.333, [[1, 0, 1], [0, 1, 0], [0, 0, 1]])
    """
    image, classes = checked("image", image), checked("classes", classes)
    check_width("image", image, "classes", classes)
    num_classes = len(classes)
    label = checked_labels("label", label, len(image), num_classes)
    first = np.arange(num_classes) if first is None else first
    confusion = np.zeros((num_classes, num_classes), np.int64)
    hits1 = hits5 = 0
    for block in blocks(len(image), num_classes):
        scores = scores_of(image[block], classes)
        row = np.arange(len(scores))
        right = scores[row, label[block]]
        twins = first[None] == first[label[block], None]
        scores[twins & (np.arange(num_classes) >= label[block, None])] = -np.inf
        before = np.sum(~(scores < right[:, None]), axis=1)
        predicted = np.where(before == 0, label[block], np.argmax(scores, axis=1))
        np.add.at(confusion, (label[block], predicted), 1)
        hits1 += int(np.sum(before < 1))
        hits5 += int(np.sum(before < 5))
    count = confusion.sum(axis=1)
    mean_per_class = float(np.mean(np.diagonal(confusion)[count > 0] / count[count > 0]))
    doubled = int(np.sum(np.bincount(first, minlength=num_classes)[first[label]] > 1))
    return ZeroShot(hits1 / len(image), hits5 / len(image), 1 / num_classes, mean_per_class, doubled, confusion)


def probability(image: np.ndarray, classes: np.ndarray, scale: float) -> np.ndarray:
    """Compute how sure the model is of each class [N, Q]: the softmax of scaled similarities of image embeddings [N, P]
    and class embeddings [Q, P].

    >>> probability(np.eye(2), np.eye(2), 2.0).round(2).tolist()
    [[0.88, 0.12], [0.12, 0.88]]
    """
    logits = scale * image @ classes.T
    exponential = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponential / exponential.sum(axis=1, keepdims=True)


def of_images(encoder: Encoder, data: Labelled) -> ZeroShot:
    """Classify all images of a data set."""
    candidates, first = embed_classes(encoder, data.classes), first_of_name(data.classes.names)
    return zero_shot(encoder.images(data.pairs.images), candidates, data.pairs.labels, first)


def embed_classes(encoder: Encoder, classes: Classes) -> np.ndarray:
    """Compute one embedding for each class from all its prompts, [Q, P]."""
    return class_embeddings(encoder.texts(prompts(classes)), num_templates=len(classes.templates))


def _measure(encoder: Encoder, data: EvaluationData) -> Figures:
    assert data.zero_shot is not None
    found = of_images(encoder, data.zero_shot)
    images = len(data.zero_shot.pairs.images)
    return Figures(found.top1, found.top5, found.chance, found.mean_per_class, images, found.num_doubled)


def _text(found: Figures) -> str:
    doubled = f"; {found.zero_shot_doubled:,} images are of classes whose name stands twice" * bool(
        found.zero_shot_doubled
    )
    return (
        f"zero-shot, {found.zero_shot_images:,} images: top-1 {found.zero_shot_top1:.1%}, "
        f"top-5 {found.zero_shot_top5:.1%}, mean per class {found.zero_shot_mean_per_class:.1%}, "
        f"chance {found.zero_shot_chance:.1%}{doubled}"
    )


EVALUATOR = Evaluator(name="zero_shot", needs=("zero_shot",), measure=_measure, nothing=Figures(), text=_text)
