"""Shapes, patterns and bounds that the tests of the kernels share; every back end is held against the same table."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import reference
from moe_kernels import MlpWeights, Routing, RoutingSums, make_plan

# Of XLA's two ways to emit fusions the older one, which tests/conftest.py asks for, takes a third of the time. With it
# vmap of a kernel has not the bits of one call after the other; this is for comparing the bits of two programs.
SAME_BITS = {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else {}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A static problem. Few of them, so that Hypothesis draws values and patterns and compiles next to nothing."""

    tokens: int
    groups: int
    width: int
    hidden: int
    experts: int
    choices: int
    capacity_factor: float | None

    @property
    def capacity(self) -> int | None:
        if self.capacity_factor is None:
            return None
        return reference.expert_capacity(self.tokens // self.groups, self.choices, self.experts, self.capacity_factor)


# The nasty ones first: one row, one expert, sizes one off a multiple of 8, 16 and 128, several tiles of the loop.
SHAPES = [
    Shape(1, 1, 1, 1, 1, 1, None),
    Shape(1, 1, 3, 5, 4, 2, 1.0),
    Shape(17, 1, 7, 9, 3, 1, 1.1),
    Shape(24, 2, 5, 33, 4, 2, 1.05),
    Shape(32, 4, 8, 16, 8, 1, 0.5),
    Shape(30, 3, 6, 4, 5, 5, None),
    Shape(24, 2, 12, 8, 4, 2, 4.0),
    Shape(290, 1, 4, 6, 2, 1, None),
    Shape(260, 2, 4, 6, 3, 2, 2.0),
]


def gates(shape: Shape, seed: int, pattern: str) -> tuple[np.ndarray, np.ndarray]:
    """Distinct experts [T, K] and descending gates [T, K] that hold ties, by a named pattern of load."""
    rng = np.random.default_rng(seed)
    scores = rng.random((shape.tokens, shape.experts))
    if pattern == "one expert":
        scores[:, rng.integers(shape.experts)] += 1
    elif pattern == "few experts":
        scores[:, rng.permutation(shape.experts)[: max(shape.choices, shape.experts // 3)]] += 1
    elif pattern == "zipf":
        scores += 1.5 / np.arange(1, shape.experts + 1)
    expert = np.argsort(-scores, axis=1, kind="stable")[:, : shape.choices].astype(np.int32)
    # Eighths: exact in every dtype, and often equal.
    gate = -np.sort(-rng.integers(1, 9, (shape.tokens, shape.choices)) / 8, axis=1)
    return expert, gate.astype(np.float32)


PATTERNS = ["uniform", "one expert", "few experts", "zipf"]


def weights(shape: Shape, rng: np.random.Generator) -> MlpWeights:
    e, d, f = shape.experts, shape.width, shape.hidden
    return MlpWeights(
        *(
            rng.normal(size=size).astype(np.float32) / np.sqrt(size[-2] if len(size) == 3 else 1)
            for size in ((e, d, f), (e, f), (e, f, d), (e, d))
        )
    )


def no_sums(shape: Shape) -> RoutingSums:
    """Sums that a plan made from hand-made gates does not need."""
    zero = reference.zero_sums(num_groups=shape.groups, num_modalities=1, num_experts=shape.experts)
    return RoutingSums(*(jnp.asarray(field, jnp.float32) for field in zero))


@functools.partial(jax.jit, static_argnums=0)
def plan_of(shape: Shape, expert, gate, priority):
    return make_plan(
        Routing(expert, gate, no_sums(shape)),
        num_experts=shape.experts,
        num_groups=shape.groups,
        capacity=shape.capacity,
        priority=priority,
    )


class Magnitudes(NamedTuple):
    """What each entry of a result is a sum of, all terms as absolute values: what rounding is measured against."""

    y: np.ndarray
    tokens: np.ndarray
    weights: MlpWeights


def magnitudes(tokens, dy, expert, gate, kept, w: MlpWeights) -> Magnitudes:
    """The layer and its gradients over absolute values, for the choices `kept` [T, K].

    `|gelu(h)| <= |h|`, its slope is at most 1.13 and errs by at most its argument's error.
    """
    tokens, dy = np.abs(np.asarray(tokens, np.float64)), np.abs(np.asarray(dy, np.float64))
    w = MlpWeights(*(np.abs(np.asarray(x, np.float64)) for x in w))
    y, dx, dw = np.zeros_like(tokens), np.zeros_like(tokens), MlpWeights(*(np.zeros_like(x) for x in w))
    for t, k in np.argwhere(kept):
        w1, b1, w2, b2 = (x[expert[t, k]] for x in w)
        hidden = tokens[t] @ w1 + b1
        y[t] += gate[t, k] * (hidden @ w2 + b2)
        dout = gate[t, k] * dy[t]
        dhidden = 1.13 * (dout @ w2.T) * (1 + hidden)
        dx[t] += dhidden @ w1.T
        parts = np.outer(tokens[t], dhidden), dhidden, np.outer(hidden, dout), dout
        for total, part in zip(dw, parts, strict=True):
            total[expert[t, k]] += part
    return Magnitudes(y, dx, dw)


def assert_close(
    actual,
    expected,
    *,
    length: int,
    name: str,
    roundings: float = 4,
    eps: float = 2.0**-23,
    scale=None,
) -> None:
    """Compare row by row: each row within `roundings * 2 eps sqrt(length)` of its largest entry (or of `scale`).

    `length` is the longest sum that an entry goes through and `roundings` how many such sums follow on each other; a
    row of zeros must be exactly zero. `scale`, by row or by entry, is the size of what was added up, for entries that
    may cancel.
    """
    expected = np.asarray(expected, np.float64)
    if scale is None:
        scale = np.abs(expected).max(axis=-1, initial=0) if expected.ndim else np.abs(expected)
    assert_within(actual, expected, roundings * 2 * eps * np.sqrt(max(length, 1)) * np.asarray(scale), name=name)


def assert_within(actual, expected, allowed, *, name: str) -> None:
    """Compare by what each entry, or each row, may be off; a row of zeros must be exactly zero."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    if actual.size == 0:
        return
    rows = expected.reshape(-1, expected.shape[-1]) if expected.ndim else expected.reshape(1, 1)
    error = np.abs(actual.reshape(rows.shape) - rows)
    bound = np.broadcast_to(np.asarray(allowed).reshape(len(rows), -1), rows.shape)
    bound = np.where(rows.any(axis=1, keepdims=True), bound, 0)
    worst = np.unravel_index(np.argmax(error - bound), error.shape)
    assert np.isfinite(error).all() and (error <= bound).all(), (
        f"{name}: row {worst[0]} is off by {error[worst]:.3g}, allowed {bound[worst]:.3g}"
    )
