"""A linear probe: a linear map, learned from few images, from frozen features to classes (paper, section 7)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from limoe.data.files import DataError
from limoe.evaluate.data import EvaluationData
from limoe.evaluate.embeddings import check_width, checked, checked_labels
from limoe.evaluate.encode import Encoder
from limoe.evaluate.evaluator import Evaluator

# Training images for each class (paper, section 7).
PROBE_SHOTS = 10


class Probe(NamedTuple):
    """Result of a k-shot probe: the share of test images whose class the linear map finds."""

    top1: float
    chance: float
    shots: int


class Figures(NamedTuple):
    """Figures of the probe in a summary; None without training data."""

    probe_top1: float | None = None
    probe_chance: float | None = None
    probe_shots: int | None = None


def ridge_probe(
    train_features: np.ndarray,
    train_label: np.ndarray,
    test_features: np.ndarray,
    test_label: np.ndarray,
    *,
    shots: int = 10,
    ridge: float = 1.0,
    seed: int = 0,
) -> Probe:
    """Fit frozen features [N, D] to one-hot targets by ridge regression, `shots` examples of each class (section 7).

    Q is the largest training label + 1. Features and targets are centred by their training mean, which is an intercept
    without penalty. W = (X'X + a I)^-1 X'Y, where a is `ridge` times the mean eigenvalue of X'X; so the scale of the
    features does not matter. `seed` chooses the examples of each class. Ties count as in `zero_shot`. Raises ValueError
    for shapes or labels that do not fit, and for a class with fewer than `shots` training examples.

    >>> features, label = np.array([[0.0], [0.1], [1.0], [1.1]]), np.array([0, 0, 1, 1])
    >>> ridge_probe(features, label, np.array([[0.2], [0.9]]), np.array([0, 1]), shots=2)
    Probe(top1=1.0, chance=0.5, shots=2)
    """
    train, test = checked("train_features", train_features), checked("test_features", test_features)
    check_width("train_features", train, "test_features", test)
    if shots < 1 or not ridge > 0:
        raise ValueError(f"shots={shots} and ridge={ridge} must be at least 1 and above 0")
    train_label = checked_labels("train_label", train_label, len(train), None)
    num_classes = int(train_label.max()) + 1
    test_label = checked_labels("test_label", test_label, len(test), num_classes)
    count = np.bincount(train_label, minlength=num_classes)
    if count.min() < shots:
        scarce = int(count.argmin())
        raise ValueError(
            f"class {scarce} has {count[scarce]} training examples; {shots} shots need {shots} of every class"
        )
    order = np.random.default_rng(seed).permutation(len(train))
    order = order[np.argsort(train_label[order], kind="stable")]
    place = np.arange(len(order)) - np.repeat(np.cumsum(count) - count, count)
    chosen = order[place < shots]

    targets = np.eye(num_classes)[train_label[chosen]]
    mean = train[chosen].mean(axis=0)
    x, y = train[chosen] - mean, targets - targets.mean(axis=0)
    penalty = max(ridge * float(np.sum(x * x)) / x.shape[1], np.finfo(np.float64).tiny)
    # The dual form gives the same map. Its matrix has one row for each example, which is smaller for wide features.
    if len(x) < x.shape[1]:
        weight = x.T @ np.linalg.solve(x @ x.T + penalty * np.eye(len(x)), y)
    else:
        weight = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)
    scores = ((test - mean) @ weight).astype(np.float32)
    right = scores[np.arange(len(test)), test_label]
    before = np.sum(~(scores < right[:, None]), axis=1) - 1
    return Probe(float(np.mean(before == 0)), 1 / num_classes, shots)


def _measure(encoder: Encoder, data: EvaluationData) -> Figures:
    """Fit a probe to `PROBE_SHOTS` images of each class, before the projection, and test it on the zero-shot images.

    Raises DataError if the training shards have too few examples of a class.
    """
    assert data.zero_shot is not None and data.probe is not None
    shots, test, names = data.probe.pairs, data.zero_shot.pairs, data.zero_shot.classes.names
    count = np.bincount(shots.labels, minlength=len(names))
    if count.min() < PROBE_SHOTS:
        scarce = int(count.argmin())
        raise DataError(
            f"{data.probe.folder} has {count[scarce]} examples of class {scarce} ({names[scarce]!r}); "
            f"a linear probe needs {PROBE_SHOTS} of every class"
        )
    train_features, test_features = (encoder.image_features(pairs.images) for pairs in (shots, test))
    return Figures(*ridge_probe(train_features, shots.labels, test_features, test.labels, shots=PROBE_SHOTS))


def _text(found: Figures) -> str:
    return f"linear probe, {found.probe_shots} shots: top-1 {found.probe_top1:.1%}, chance {found.probe_chance:.1%}"


EVALUATOR = Evaluator(name="probe", needs=("zero_shot", "probe"), measure=_measure, nothing=Figures(), text=_text)
