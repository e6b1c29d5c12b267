"""Retrieval: find the captions of an image among all captions, and the image of a caption among all (section 7)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from limoe.evaluate.data import EvaluationData
from limoe.evaluate.embeddings import blocks, check_width, checked, checked_ids, scores_of
from limoe.evaluate.encode import Encoder
from limoe.evaluate.evaluator import Evaluator


class Retrieval(NamedTuple):
    """Recall at k = 1, 5 and 10: the share of queries with a right answer among the first k candidates."""

    image_to_text_r1: float
    image_to_text_r5: float
    image_to_text_r10: float
    text_to_image_r1: float
    text_to_image_r5: float
    text_to_image_r10: float


class Figures(NamedTuple):
    """Figures of retrieval in a summary; None without data."""

    image_to_text_r1: float | None = None
    image_to_text_r5: float | None = None
    image_to_text_r10: float | None = None
    text_to_image_r1: float | None = None
    text_to_image_r5: float | None = None
    text_to_image_r10: float | None = None
    retrieval_pairs: int = 0
    retrieval_images: int = 0
    retrieval_rule: str | None = None
    """How images were identified, and which captions are right for them."""


def retrieval(image: np.ndarray, text: np.ndarray, caption_id: np.ndarray, image_id: np.ndarray) -> Retrieval:
    """Compute recall both ways over N pairs of embeddings `image` and `text` [N, P], as COCO counts it (section 7).

    Row i pairs the image `image_id[i]` with the caption `caption_id[i]` (any integers). Rows with the same `image_id`
    are one image with several captions. It is one query and one candidate, with the embedding of its first row. Rows
    with the same `caption_id` have equal captions; each of these captions is right for each of their images. A wrong
    candidate that scores as high as the best right one ranks before it. Scores are computed in blocks, never as a whole
    N x N matrix. Raises ValueError for shapes that do not fit, no pairs, or values that are not finite.

    >>> eye = np.eye(3)
    >>> result = retrieval(eye[[0, 0, 1, 2]], eye[[0, 2, 1, 2]], np.array([0, 1, 2, 3]), np.array([0, 0, 1, 2]))
    >>> result.image_to_text_r1, result.text_to_image_r1  # image 2 is beaten by the equal score of a caption of image 0
    (0.6666666666666666, 0.75)
    """
    image, text = checked("image", image), checked("text", text)
    check_width("image", image, "text", text)
    num_pairs = len(image)
    if len(text) != num_pairs:
        raise ValueError(f"image has {num_pairs} rows and text {len(text)}; row i of both must be one pair")
    _, first_row, image_index = np.unique(
        checked_ids("image_id", image_id, num_pairs), return_index=True, return_inverse=True
    )
    _, caption_index = np.unique(checked_ids("caption_id", caption_id, num_pairs), return_inverse=True)
    images = image[first_row]
    image_rank = _rank_of_best(images, text, np.arange(len(images)), caption_index, image_index, caption_index)
    text_rank = _rank_of_best(text, images, caption_index, np.arange(len(images)), caption_index, image_index)
    return Retrieval(*(float(np.mean(rank < k)) for rank in (image_rank, text_rank) for k in (1, 5, 10)))


def _rank_of_best(
    query: np.ndarray,
    candidate: np.ndarray,
    query_key: np.ndarray,
    candidate_key: np.ndarray,
    pair_query_key: np.ndarray,
    pair_candidate_key: np.ndarray,
) -> np.ndarray:
    """Count for every query the wrong candidates that score at least as high as the best right one.

    Candidate j is right for query i if some pair holds both their keys. Keys count from 0.
    """
    order = np.argsort(pair_query_key, kind="stable")
    right_keys = np.split(pair_candidate_key[order], np.cumsum(np.bincount(pair_query_key))[:-1])
    num_keys = int(candidate_key.max()) + 1
    rank = np.zeros(len(query), np.int64)
    for block in blocks(len(query), len(candidate)):
        scores = scores_of(query[block], candidate)
        right_key = np.zeros((len(scores), num_keys), bool)
        for row, key in enumerate(query_key[block]):
            right_key[row, right_keys[key]] = True
        right = right_key[:, candidate_key]
        best = np.max(scores, axis=1, where=right, initial=-np.inf)
        rank[block] = np.sum(~right & ~(scores < best[:, None]), axis=1)
    return rank


def _measure(encoder: Encoder, data: EvaluationData) -> Figures:
    assert data.retrieval is not None
    pairs, image_id, caption_id, rule = data.retrieval
    _, first, index = np.unique(image_id, return_index=True, return_inverse=True)
    images = encoder.images(pairs.images.take(first))[index]  # each image once
    found = retrieval(images, encoder.texts(pairs.captions), caption_id, image_id)
    return Figures(*found, len(pairs.images), len(first), rule)


def _text(found: Figures) -> str:
    lines = []
    for way in ("image_to_text", "text_to_image"):
        recalls = ", ".join(f"R@{k} {getattr(found, f'{way}_r{k}'):.1%}" for k in (1, 5, 10))
        lines.append(f"{way.replace('_', ' ')}, {found.retrieval_pairs:,} pairs: {recalls}")
    return "\n".join(lines)


EVALUATOR = Evaluator(name="retrieval", needs=("retrieval",), measure=_measure, nothing=Figures(), text=_text)
