"""Activations in float32, and their slopes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_kernels.activations import function_of


def activate(hidden: Float[Array, "..."], activation: str) -> Float[Array, "..."]:
    """Computed in float32, rounded to the dtype of its input.

    >>> float(activate(jnp.zeros(()), "gelu_tanh"))
    0.0
    """
    return function_of(activation)(hidden.astype(jnp.float32)).astype(hidden.dtype)


def activate_and_slope(hidden: Float[Array, "..."], activation: str) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Value and derivative, both in float32.

    >>> [float(value) for value in activate_and_slope(jnp.zeros(()), "silu")]
    [0.0, 0.5]
    """
    return jax.jvp(function_of(activation), (hidden.astype(jnp.float32),), (jnp.ones(hidden.shape, jnp.float32),))
