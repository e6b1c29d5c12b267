"""Means over seeds with intervals, differences between pairs, and rank correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Student's t that 97.5% of draws stay below, with 1 to 9 degrees of freedom: for 2 to 10 seeds.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MAX_SEEDS = len(_T) + 1


class Mean(NamedTuple):
    """A mean over `seeds` seeds and half the width of its 95% interval, which is None for one seed."""

    mean: float
    half: float | None
    seeds: int


def mean_of(values: Sequence[float]) -> Mean:
    """Compute the mean of 1 to 10 values and its 95% interval by Student's t.

    >>> mean, half, count = mean_of([1.0, 2.0, 3.0])
    >>> mean, round(half, 3), count
    (2.0, 2.484, 3)
    """
    count = len(values)
    assert 1 <= count <= MAX_SEEDS
    half = None
    if count > 1:
        half = _T[count - 2] * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Mean(float(np.mean(values)), half, count)


def difference(values: Sequence[float], base: Sequence[float]) -> Mean:
    """Compute the mean difference of pairs, those of the same seed, and its interval.

    >>> round(difference([0.5, 0.7], [0.4, 0.5]).mean, 3)
    0.15
    """
    return mean_of([a - b for a, b in zip(values, base, strict=True)])


def relative(values: Sequence[float], base: Sequence[float]) -> Mean | None:
    """Compute the mean of each value over that of its pair, minus 1, and its interval; None if a pair has 0.

    >>> round(relative([0.6, 0.9], [0.5, 0.75]).mean, 3)
    0.2
    """
    if not all(base):
        return None
    return mean_of([a / b - 1 for a, b in zip(values, base, strict=True)])


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Compute Spearman's rank correlation; equal values share their mean rank. None if all values of one are equal.

    >>> rank_correlation([1.0, 2.0, 3.0], [1.0, 4.0, 9.0]), rank_correlation([1.0, 2.0, 3.0], [3.0, 1.0, 1.0])
    (1.0, -0.866)
    """
    ranks = [_ranks(values) for values in (first, second)]
    if not all(np.ptp(rank) for rank in ranks):
        return None
    return round(float(np.corrcoef(np.stack(ranks))[0, 1]), 3)


def _ranks(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values)
    return (array[:, None] > array).sum(axis=1) + ((array[:, None] == array).sum(axis=1) - 1) / 2
