"""Activations in float32, and their slopes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_kernels.types import MatmulActivation


def function_of(activation: MatmulActivation) -> Callable[[Float[Array, "..."]], Float[Array, "..."]]:
    """The function, which computes in the dtype of its argument.

    >>> float(function_of("silu")(jnp.zeros(())))
    0.0
    """
    if activation == "silu":
        return jax.nn.silu
    return functools.partial(jax.nn.gelu, approximate=activation == "gelu_tanh")


def activate(hidden: Float[Array, "..."], activation: MatmulActivation) -> Float[Array, "..."]:
    """Computed in float32, rounded to the dtype of its input.

    >>> float(activate(jnp.zeros(()), "gelu_tanh"))
    0.0
    """
    return function_of(activation)(hidden.astype(jnp.float32)).astype(hidden.dtype)


def activate_and_slope(
    hidden: Float[Array, "..."], activation: MatmulActivation
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Value and derivative, both in float32.

    >>> [float(value) for value in activate_and_slope(jnp.zeros(()), "silu")]
    [0.0, 0.5]
    """
    return jax.jvp(function_of(activation), (hidden.astype(jnp.float32),), (jnp.ones(hidden.shape, jnp.float32),))
