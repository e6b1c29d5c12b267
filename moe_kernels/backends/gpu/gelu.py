"""GELU and its derivative in the operations that Mosaic GPU has, in float32."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moe_kernels.types import Activation

CUBIC = 0.044715
SCALE = 2 * math.sqrt(2 / math.pi)


def gelu(x: Float[Array, "..."], activation: Activation) -> Float[Array, "..."]:
    """The tanh form as `x sigmoid(2 u)`, since `(1 + tanh u) / 2 = sigmoid(2 u)`; or the erf form."""
    if activation == "gelu_erf":
        return x * _normal(x)
    return x * _sigmoid(x)


def gelu_and_slope(x: Float[Array, "..."], activation: Activation) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """GELU and its derivative, sharing what they have in common."""
    if activation == "gelu_erf":
        normal = _normal(x)
        density = jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
        return x * normal, normal + x * density
    s = _sigmoid(x)
    return x * s, s + x * s * (1.0 - s) * (SCALE + 3 * SCALE * CUBIC * x * x)


def _sigmoid(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return 1.0 / (1.0 + jnp.exp(-SCALE * x * (1.0 + CUBIC * x * x)))


def _normal(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return 0.5 + 0.5 * lax.erf(x * math.sqrt(0.5))
