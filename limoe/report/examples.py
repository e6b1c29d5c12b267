"""What a model of a run gets right and wrong: who is taken for whom, and the best of each retrieval."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from limoe.evaluate.data import Labelled, Matched
from limoe.evaluate.embeddings import scores_of
from limoe.evaluate.encode import Encoder
from limoe.evaluate.zero_shot import embed_classes, probability

SHOWN = 6
"""Captions, and images, whose best matches are shown."""
BEST = 5
"""Matches of each."""


class Confusion(NamedTuple):
    """How often an image of each class (row) was taken for each class (column)."""

    names: tuple[str, ...]
    times: Int[np.ndarray, "Q Q"]


class Found(NamedTuple):
    """A caption and its best images, or an image and its best captions; `right` says which of them belong to it."""

    caption: tuple[str, ...]
    image: UInt8[np.ndarray, "N H W 3"]
    right: tuple[bool, ...]


class Examples(NamedTuple):
    """What the report shows of a model."""

    step: int
    confusion: Confusion | None
    images_of_captions: tuple[Found, ...]
    captions_of_images: tuple[Found, ...]


def confusion(encoder: Encoder, data: Labelled) -> Confusion:
    """Classify the images of the evaluation without training on them (paper, section 4)."""
    names = data.classes.names
    guess = probability(encoder.images(data.pairs.images), embed_classes(encoder, data.classes), encoder.scale)
    times = np.zeros((len(names), len(names)), int)
    np.add.at(times, (data.pairs.labels, guess.argmax(axis=1)), 1)
    return Confusion(names, times)


def retrieved(encoder: Encoder, data: Matched) -> tuple[tuple[Found, ...], tuple[Found, ...]]:
    """Find the best images of some captions, and the best captions of some images, spread over the data."""
    pairs = data.pairs
    # Each image and each caption stands once among the candidates.
    images, captions = (np.unique(ids, return_index=True)[1] for ids in (data.image_id, data.caption_id))
    image = encoder.images(pairs.images.take(images))
    text = encoder.texts([pairs.captions[number] for number in captions])
    belong = {(int(a), int(b)) for a, b in zip(data.image_id, data.caption_id, strict=True)}

    def right(image_row: Any, caption_row: Any) -> bool:
        return (int(data.image_id[image_row]), int(data.caption_id[caption_row])) in belong

    def best(query: np.ndarray, candidate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chosen = np.unique(np.linspace(0, len(query) - 1, SHOWN).astype(int))
        return chosen, np.argsort(-scores_of(query[chosen], candidate), axis=1, kind="stable")[:, :BEST]

    of_captions = [
        Found(
            (pairs.captions[captions[one]],),
            pairs.images[images[row]],
            tuple(right(i, captions[one]) for i in images[row]),
        )
        for one, row in zip(*best(text, image), strict=True)
    ]
    of_images = [
        Found(
            tuple(pairs.captions[number] for number in captions[row]),
            pairs.images[images[one]][None],
            tuple(right(images[one], number) for number in captions[row]),
        )
        for one, row in zip(*best(image, text), strict=True)
    ]
    return tuple(of_captions), tuple(of_images)
