"""Activations and their slopes in float32, written for a kernel: one transcendental shared between both."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_kernels.types import MatmulActivation

_SCALE = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


def activate(h: Float[Array, "..."], activation: MatmulActivation) -> Float[Array, "..."]:
    """GELU `h Phi(h)`, exactly or in the tanh form, or SiLU `h / (1 + exp(-h))`.

    >>> float(activate(jnp.float32(0), "gelu_tanh"))
    0.0
    """
    if activation == "silu":
        return h * jax.lax.logistic(h)
    half = 0.5 * h
    if activation == "gelu_tanh":
        return half + half * jnp.tanh(h * (_SCALE + _SCALE * _CUBIC * (h * h)))
    return half + half * jax.lax.erf(h * math.sqrt(0.5))


def activate_and_slope(
    h: Float[Array, "..."], activation: MatmulActivation
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Activation and its derivative.

    tanh form, t = tanh(u), u = c (h + a h^3): (1 + t) / 2 + h (1 - t^2) c (1 + 3 a h^2) / 2; erf: Phi(h) + h phi(h);
    SiLU, s = 1 / (1 + exp(-h)): s + h s (1 - s).

    >>> [float(value) for value in activate_and_slope(jnp.float32(0), "gelu_erf")]
    [0.0, 0.5]
    """
    if activation == "silu":
        s = jax.lax.logistic(h)
        return h * s, s + h * s * (1 - s)
    half, square = 0.5 * h, h * h
    if activation == "gelu_tanh":
        t = jnp.tanh(h * (_SCALE + _SCALE * _CUBIC * square))
        slope = 0.5 + 0.5 * t + half * (1 - t * t) * (_SCALE + 3 * _SCALE * _CUBIC * square)
    else:
        t = jax.lax.erf(h * math.sqrt(0.5))
        slope = 0.5 + 0.5 * t + h * (jnp.exp(-0.5 * square) / math.sqrt(2 * math.pi))
    return half + half * t, slope
