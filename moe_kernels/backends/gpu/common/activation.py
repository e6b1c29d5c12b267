"""Activations and their derivatives in the operations that Mosaic GPU has, in float32."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_kernels.types import MatmulActivation

CUBIC = 0.044715
SCALE = 2 * math.sqrt(2 / math.pi)
# Mosaic GPU has no erf. erfc(z) = t P(t) exp(-z²) for z >= 0 with t = SHIFT / (z + SHIFT); P, from the
# lowest power up, is fitted to the function in float64 with a relative error of at most 6.2e-8 for z up to 10.
SHIFT = 2.5
ERFC = (
    *(0.22563423216342926, 0.22644303739070892, 0.2018880993127823, 0.1933911144733429, 0.07976158708333969),
    *(0.0879567340016365, 0.08399410545825958, -0.14032261073589325, 0.041253745555877686),
)


def activate(x: Float[Array, "..."], activation: MatmulActivation) -> Float[Array, "..."]:
    """`x` times the share of it that passes: for the tanh form `(1 + tanh u) / 2 = sigmoid(2 u)`."""
    if activation == "gelu_erf":
        return x * normal(x, jnp.exp(-0.5 * x * x))
    if activation in ("relu", "relu_squared"):
        positive = jnp.maximum(x, 0.0)
        return positive if activation == "relu" else positive * positive
    return x * _sigmoid(x, activation)


def activate_and_slope(
    x: Float[Array, "..."], activation: MatmulActivation
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Activation and its derivative, sharing the exponential."""
    if activation == "gelu_erf":
        bell = jnp.exp(-0.5 * x * x)
        share = normal(x, bell)
        return x * share, share + x * bell * (1 / math.sqrt(2 * math.pi))
    if activation == "relu":
        return jnp.maximum(x, 0.0), jnp.where(x > 0, jnp.ones_like(x), jnp.zeros_like(x))
    if activation == "relu_squared":
        positive = jnp.maximum(x, 0.0)
        return positive * positive, 2.0 * positive
    s = _sigmoid(x, activation)
    inner = 1.0 if activation == "silu" else SCALE + 3 * SCALE * CUBIC * x * x
    return x * s, s + x * s * (1.0 - s) * inner


def _sigmoid(x: Float[Array, "..."], activation: MatmulActivation) -> Float[Array, "..."]:
    """Of `x` for SiLU, of `2 u = SCALE (x + CUBIC x³)` for the tanh form of GELU."""
    argument = x if activation == "silu" else SCALE * x * (1.0 + CUBIC * x * x)
    return 1.0 / (1.0 + jnp.exp(-argument))


def normal(x: Float[Array, "..."], bell: Float[Array, "..."]) -> Float[Array, "..."]:
    """The normal distribution function of the standard deviation 1; `bell` is `exp(-x² / 2)`."""
    t = SHIFT / (jnp.maximum(x, -x) * math.sqrt(0.5) + SHIFT)
    series = jnp.zeros_like(t) + ERFC[-1]
    for coefficient in ERFC[-2::-1]:
        series = series * t + coefficient
    tail = 0.5 * t * series * bell
    return jnp.where(x < 0, tail, 1.0 - tail)
