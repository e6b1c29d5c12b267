"""What the matmuls of experts have in common, for some rows of an expert and a chunk of F: forward, and all gradients.

With `h = x w1 + b1`, `a = act(h)`: `dh = (dy w2ᵀ) act'(h)`, `dx = dh w1ᵀ`, `dw1 = xᵀ dh`, `dw2 = aᵀ dy`, `db1 = Σ dh`.
Gated, with `u = x up` and `a = act(h) u`: `dh = (dy w2ᵀ) u act'(h)`, `du = (dy w2ᵀ) act(h)`, `dup = xᵀ du`, and `dx` is
the sum of both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from moe_kernels.backends.tpu.common.activation import activate, activate_and_slope
from moe_kernels.backends.tpu.common.rows import Scalar
from moe_kernels.precision import dot
from moe_kernels.types import Activation


def parts_of(x: Float[Array, "P D"], weights: Sequence[Any], bias: Any) -> list[Float[Array, "P C"]]:
    """The rows times each matrix, in float32, the first with its bias."""
    first, *others = (dot(x, weight[...], (1, 0)) for weight in weights)
    return [first if bias is None else first + bias[0], *others]


def rounded(value: Float[Array, "P C"], dtype: Any) -> Float[Array, "P C"]:
    """In float32, but of another dtype's precision."""
    return value.astype(dtype).astype(jnp.float32)


def result_of(parts: Sequence[Float[Array, "P C"]], activation: Activation, dtype: Any) -> Float[Array, "P C"]:
    """What follows: the activation of the first part, times the other if there is one; both are rounded before."""
    before, *gated = (rounded(part, dtype) for part in parts)
    activated = activate(before, activation)
    return (activated * gated[0] if gated else activated).astype(dtype)


class Back(NamedTuple):
    """A gradient taken back through an activation and a gate, in float32."""

    result: Float[Array, "P C"]
    """What the activation, times the gate, was."""
    dparts: list[Float[Array, "P C"]]


def taken_back(dresult: Float[Array, "P C"], parts: Sequence[Float[Array, "P C"]], activation: Activation) -> Back:
    """Gradients of the parts, which were rounded, from that of the result; all in float32."""
    before, *gated = parts
    activated, slope = activate_and_slope(before, activation)
    if not gated:
        return Back(activated, [dresult * slope])
    return Back(activated * gated[0], [dresult * (gated[0] * slope), dresult * activated])


def times_transposed(dparts: Sequence[Float[Array, "P C"]], weights: Sequence[Any]) -> Float[Array, "P D"]:
    """The gradient of the rows, in float32: `Σ dh wᵀ`."""
    first, *others = (dot(part, weight[...], (1, 1)) for part, weight in zip(dparts, weights, strict=True))
    return sum(others, start=first)


class PieceGradients(NamedTuple):
    """What some rows add to the gradients of the weights and of the first bias, in float32."""

    weights: tuple[Float[Array, "..."], ...]
    """Those of the first matrices, `[D, C]`, then of the second, `[C, D]`."""
    b1: Float[Array, "1 C"]


class Products(NamedTuple):
    """An item's operands in VMEM, zero in rows that are not used; weights in the dtype of the rows."""

    x: Any
    dy: Any
    weights: tuple[Any, ...]
    """The first matrices, then the second."""
    b1: Any
    dx: Any
    """Where the input's gradient is added up."""
    activation: Activation
    kept: Callable[[Scalar, int], Float[Array, "P C"]] | None = None
    """The hidden layer of some rows, if it is not computed again."""

    def of(self, offset: Scalar, size: int) -> PieceGradients:
        """Gradients from `size` rows."""
        own, (*first, second) = pl.ds(offset, size), self.weights
        x, dy = self.x[own], self.dy[own]
        parts = parts_of(x, first, self.b1) if self.kept is None else [self.kept(offset, size)]
        back = taken_back(dot(dy, second[...], (1, 1)), [rounded(part, x.dtype) for part in parts], self.activation)
        dparts = [part.astype(x.dtype) for part in back.dparts]
        self.dx[own] += times_transposed(dparts, first)
        db1 = jnp.sum(dparts[0].astype(jnp.float32), axis=0, keepdims=True)
        dfirst = [dot(x, part, (0, 0)) for part in dparts]
        return PieceGradients((*dfirst, dot(back.result.astype(x.dtype), dy, (0, 0))), db1)
