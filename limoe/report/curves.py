"""The log of a run in a few hundred points a curve, however long it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from limoe.config.schema import Config
from limoe.report.results import BAD_SHOWN

POINTS = 240
"""The most points of a curve; each is a mean over steps."""
SNAPSHOTS = 16
"""The most points in training at which experts are shown."""

_EVALUATED = "zero_shot_top1"


class Snapshot(NamedTuple):
    """Who chose which expert in one step."""

    step: int
    wanted: Float64[np.ndarray, "L M E"]


class Curves(NamedTuple):
    """Figures over training. A value is NaN where a part of the steps has none."""

    step: Float64[np.ndarray, " P"]
    scalars: dict[str, Float64[np.ndarray, " P"]]
    by_layer: dict[str, Float64[np.ndarray, "P L M"]]
    snapshots: tuple[Snapshot, ...]
    last_step: int
    seconds: float
    num_bad: int
    first_bad: tuple[str, ...]


class _Means:
    """Means of one figure over parts of the steps; what is not finite does not count."""

    def __init__(self, parts: int, shape: tuple[int, ...]) -> None:
        self._sum, self._count = np.zeros((parts, *shape)), np.zeros((parts, *shape))

    def add(self, part: int, value: Any) -> None:
        array = np.asarray(value, float)  # null becomes NaN
        finite = np.isfinite(array)
        self._sum[part] += np.where(finite, array, 0)
        self._count[part] += finite

    def get(self) -> np.ndarray:
        return np.divide(self._sum, self._count, out=np.full(self._sum.shape, np.nan), where=self._count > 0)


def read_curves(config: Config, lines: Iterable[dict[str, Any]]) -> Curves:
    """Collect a log. Memory does not grow with its length.

    >>> from limoe.config.presets import preset
    >>> lines = [{"step": n, "total": 6.0 - n, "step_seconds": 1.0, "bad_examples": 0, "bad_first": []} for n in (1, 2)]
    >>> curves = read_curves(preset("tiny-dense"), lines)
    >>> curves.last_step, curves.scalars["total"][:2].tolist()
    (2, [4.5, nan])
    """
    steps, layers = config.train.steps, len(config.model.moe_layers)
    parts = min(steps, POINTS)
    means: dict[str, _Means] = {"step": _Means(parts, ())}
    snapshots: dict[int, Snapshot] = {}
    last_step, seconds, num_bad, first_bad = 0, 0.0, 0, list[str]()
    for line in lines:
        last_step = line["step"]
        part = (last_step - 1) * parts // steps
        for name, value in line.items():
            shape = (layers, 2) if isinstance(value, list) and np.shape(value) == (layers, 2) else ()
            if shape or isinstance(value, int | float) or name == _EVALUATED:
                means.setdefault(name, _Means(parts, shape)).add(part, value)
        if line.get("wanted") is not None:
            # The first step, and the last one of each part.
            place = -1 if last_step == 1 else (last_step - 1) * SNAPSHOTS // steps
            snapshots[place] = Snapshot(last_step, np.array(line["wanted"], float))
        seconds += line["step_seconds"]
        num_bad += line["bad_examples"]
        first_bad += line["bad_first"][: max(0, BAD_SHOWN - len(first_bad))]
    found = {name: mean.get() for name, mean in means.items()}
    step = found.pop("step")
    return Curves(
        step,
        {name: value for name, value in found.items() if value.ndim == 1},
        {name: value for name, value in found.items() if value.ndim == 3},
        tuple(snapshots[place] for place in sorted(snapshots)),
        last_step,
        seconds,
        num_bad,
        tuple(first_bad),
    )
