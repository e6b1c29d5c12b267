"""Activations in float32, and their slopes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_kernels.activations import ClampedSwiglu, function_of, gated


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


def glu_forward(
    activation: str | ClampedSwiglu, gate: Float[Array, "R F"], up: Float[Array, "R F"]
) -> tuple[Float[Array, "R F"], tuple[Float[Array, "R F"], Float[Array, "R F"]]]:
    """`act(gate) * up` of two products that are kept for the backward pass.

    >>> float(glu_forward("silu", jnp.zeros((1, 1)), jnp.ones((1, 1)))[0][0, 0])
    0.0
    """
    return gated(gate, up, activation), (gate, up)


def glu_backward(
    activation: str | ClampedSwiglu, saved: tuple[Float[Array, "R F"], Float[Array, "R F"]], dout: Float[Array, "R F"]
) -> tuple[Float[Array, "R F"], Float[Array, "R F"]]:
    """Cotangents of both products."""
    return jax.vjp(lambda gate, up: gated(gate, up, activation), *saved)[1](dout)
