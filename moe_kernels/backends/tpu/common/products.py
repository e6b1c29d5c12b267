"""The matmuls of the backward pass of an expert MLP, for some rows of an expert and a chunk of F.

With `h = x w1 + b1`, `a = act(h)`: `dh = (dy w2ᵀ) act'(h)`, `dx = dh w1ᵀ`, `dw1 = xᵀ dh`, `dw2 = aᵀ dy`, `db1 = Σ dh`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from moe_kernels.backends.tpu.common.activation import activate_and_slope
from moe_kernels.backends.tpu.common.rows import Scalar
from moe_kernels.precision import dot
from moe_kernels.types import Activation


class Products(NamedTuple):
    """An item's operands in VMEM, zero in rows that are not used; weights in the dtype of the rows."""

    x: Any
    dy: Any
    w1: Any
    b1: Any
    w2: Any
    dx: Any
    """Where the input's gradient is added up."""
    activation: Activation
    kept: Callable[[Scalar, int], Float[Array, "P C"]] | None = None
    """The hidden layer of some rows, if it is not computed again."""

    def of(self, offset: Scalar, size: int) -> tuple[Float[Array, "D C"], Float[Array, "C D"], Float[Array, "1 C"]]:
        """Gradients of the weights and of the first bias from `size` rows."""
        own = pl.ds(offset, size)
        x, dy = self.x[own], self.dy[own]
        if self.kept is None:
            hidden = (dot(x, self.w1[...], (1, 0)) + self.b1[0]).astype(x.dtype)
        else:
            hidden = self.kept(offset, size)
        activated, slope = activate_and_slope(hidden.astype(jnp.float32), self.activation)
        dhidden = (dot(dy, self.w2[...], (1, 1)) * slope).astype(x.dtype)
        self.dx[own] += dot(dhidden, self.w1[...], (1, 1))
        db1 = jnp.sum(dhidden.astype(jnp.float32), axis=0, keepdims=True)
        return dot(x, dhidden, (0, 0)), dot(activated.astype(x.dtype), dy, (0, 0)), db1
