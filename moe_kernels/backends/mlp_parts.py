"""Expert MLPs, plain and gated, as two grouped matmuls: their weights, their problems, and a span made of both."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, TypeVar

import jax
from jaxtyping import Array, Float

from moe_kernels.backends.base import MatmulStatic, MatmulWeights, MlpStatic, Problem, Span
from moe_kernels.types import GluWeights, MlpWeights, Runs

Experts = TypeVar("Experts", MlpWeights, GluWeights, MlpWeights | GluWeights)


class Matmuls(NamedTuple):
    """The weights of both matmuls. An activation follows the first, and for gated experts a product with `x up`."""

    first: MatmulWeights
    second: MatmulWeights


def matmuls_of(weights: MlpWeights | GluWeights) -> Matmuls:
    """Read experts as two matmuls. Gated ones have no bias of gate and up.

    >>> import jax.numpy as jnp
    >>> matmuls_of(GluWeights(jnp.ones((2, 4, 8)), jnp.ones((2, 4, 8)), jnp.ones((2, 8, 4)))).second.weight.shape
    (2, 8, 4)
    """
    if isinstance(weights, GluWeights):
        assert weights.gate_bias is None and weights.up_bias is None, "are two matmuls of their own"
        return Matmuls(MatmulWeights(weights.gate, up=weights.up), MatmulWeights(weights.down, weights.down_bias))
    return Matmuls(MatmulWeights(weights.w1, weights.b1), MatmulWeights(weights.w2, weights.b2))


def experts_of(matmuls: Matmuls) -> MlpWeights | GluWeights:
    """Read two matmuls as experts; the inverse of `matmuls_of`.

    >>> import jax.numpy as jnp
    >>> experts_of(Matmuls(MatmulWeights(jnp.ones((2, 4, 8))), MatmulWeights(jnp.ones((2, 8, 4)))))._fields
    ('w1', 'b1', 'w2', 'b2')
    """
    first, second = matmuls
    if first.up is not None:
        return GluWeights(first.weight, first.up, second.weight, down_bias=second.bias)
    return MlpWeights(first.weight, first.bias, second.weight, second.bias)


def gradients_like(weights: Experts, gradients: Matmuls) -> Experts:
    """Read gradients as those of `weights`, in their dtypes; a bias that is not there gets none.

    >>> import jax.numpy as jnp
    >>> plain = MlpWeights(jnp.ones((2, 4, 8)), None, jnp.ones((2, 8, 4)), None)
    >>> found = Matmuls(MatmulWeights(plain.w1, jnp.ones((2, 8))), MatmulWeights(plain.w2, jnp.ones((2, 4))))
    >>> gradients_like(plain, found).b1 is None
    True
    """

    def like(weight: Array | None, gradient: Array | None) -> Array | None:
        return None if weight is None or gradient is None else gradient.astype(weight.dtype)

    return jax.tree.map(like, weights, experts_of(gradients), is_leaf=lambda weight: weight is None)


def problems_of(problem: Problem) -> tuple[Problem, Problem]:
    """Describe gated experts as two grouped matmuls; the epilogue of the problem is that of the second.

    >>> [part.epilogue for part in problems_of(Problem("expert_glu", "cpu", "float32", (16, 8), 2, 32))]
    ['gated', 'none']
    """
    rows, width = problem.shape
    first = dataclasses.replace(problem, span="grouped_matmul", epilogue="gated")
    second = dataclasses.replace(
        first, shape=(rows, problem.expert_width), expert_width=width, epilogue=problem.epilogue, activation=""
    )
    return first, second


class TwoSaved(NamedTuple):
    """What the backward passes of both matmuls need."""

    first: Any
    second: Any


@functools.lru_cache
def in_two_matmuls(first: Span, second: Span) -> Span:
    """Make a span for gated experts from those of both matmuls; the hidden layer goes through memory."""

    def forward(
        static: MlpStatic, rows: Float[Array, "R D"], weights: GluWeights, runs: Runs
    ) -> tuple[Float[Array, "R D"], TwoSaved]:
        before, after, matmuls = _first(static), MatmulStatic(static.layout), matmuls_of(weights)
        hidden, first_saved = first.forward(before, rows, matmuls.first, runs)
        out, second_saved = second.forward(after, hidden, matmuls.second, runs)
        return out, TwoSaved(first_saved, second_saved)

    def backward(
        static: MlpStatic, saved: TwoSaved, dout: Float[Array, "R D"]
    ) -> tuple[Float[Array, "R D"], MlpWeights | GluWeights]:
        dhidden, dsecond = second.backward(MatmulStatic(static.layout), saved.second, dout)
        drows, dfirst = first.backward(_first(static), saved.first, dhidden)
        return drows, experts_of(Matmuls(dfirst, dsecond))

    if first.value is None or second.value is None:
        return Span(forward, backward)
    values = first.value, second.value

    def value(static: MlpStatic, rows: Float[Array, "R D"], weights: GluWeights, runs: Runs) -> Float[Array, "R D"]:
        matmuls = matmuls_of(weights)
        hidden = values[0](_first(static), rows, matmuls.first, runs)
        return values[1](MatmulStatic(static.layout), hidden, matmuls.second, runs)

    return Span(forward, backward, value)


def _first(static: MlpStatic) -> MatmulStatic:
    return MatmulStatic(static.layout, static.activation)
