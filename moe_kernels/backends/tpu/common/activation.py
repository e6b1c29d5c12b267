"""Activations and their slopes in float32, written for a kernel: one transcendental shared between both.

A kernel that knows another one needs its share here, and its name in `KERNEL_ACTIVATIONS` of backends/base.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_SCALE = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


class Form(NamedTuple):
    """How kernels work an activation: its value, and its value with its derivative."""

    value: Callable[[Float[Array, "..."]], Float[Array, "..."]]
    with_slope: Callable[[Float[Array, "..."]], tuple[Float[Array, "..."], Float[Array, "..."]]]


def _gelu_tanh(h: Float[Array, "..."]) -> Float[Array, "..."]:
    half = 0.5 * h
    return half + half * jnp.tanh(h * (_SCALE + _SCALE * _CUBIC * (h * h)))


def _gelu_tanh_slope(h: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """With t = tanh(u), u = c (h + a h^3): `(1 + t) / 2 + h (1 - t^2) c (1 + 3 a h^2) / 2`."""
    half, square = 0.5 * h, h * h
    t = jnp.tanh(h * (_SCALE + _SCALE * _CUBIC * square))
    slope = 0.5 + 0.5 * t + half * (1 - t * t) * (_SCALE + 3 * _SCALE * _CUBIC * square)
    return half + half * t, slope


def _gelu_erf(h: Float[Array, "..."]) -> Float[Array, "..."]:
    half = 0.5 * h
    return half + half * jax.lax.erf(h * math.sqrt(0.5))


def _gelu_erf_slope(h: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """`Phi(h) + h phi(h)`."""
    half, square = 0.5 * h, h * h
    t = jax.lax.erf(h * math.sqrt(0.5))
    slope = 0.5 + 0.5 * t + h * (jnp.exp(-0.5 * square) / math.sqrt(2 * math.pi))
    return half + half * t, slope


def _silu_slope(h: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """With s = 1 / (1 + exp(-h)): `s + h s (1 - s)`."""
    s = jax.lax.logistic(h)
    return h * s, s + h * s * (1 - s)


def _relu(h: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.maximum(h, 0.0)


def _relu_slope(h: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    return _relu(h), jnp.where(h > 0, 1.0, 0.0)


def _relu_squared_slope(h: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    positive = _relu(h)
    return positive * positive, 2 * positive


FORMS = {
    "gelu_tanh": Form(_gelu_tanh, _gelu_tanh_slope),
    "gelu_erf": Form(_gelu_erf, _gelu_erf_slope),
    "silu": Form(lambda h: h * jax.lax.logistic(h), _silu_slope),
    "relu": Form(_relu, _relu_slope),
    "relu_squared": Form(lambda h: _relu(h) * _relu(h), _relu_squared_slope),
}


def _form(activation: str) -> Form:
    if activation not in FORMS:
        raise ValueError(f"activation={activation!r} is not one of {', '.join(FORMS)}, which TPU kernels know")
    return FORMS[activation]


def activate(h: Float[Array, "..."], activation: str) -> Float[Array, "..."]:
    """The activation. Raises ValueError for a name that kernels do not know.

    >>> float(activate(jnp.float32(0), "gelu_tanh"))
    0.0
    """
    return _form(activation).value(h)


def activate_and_slope(h: Float[Array, "..."], activation: str) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Activation and its derivative. Raises ValueError for a name that kernels do not know.

    >>> [float(value) for value in activate_and_slope(jnp.float32(0), "gelu_erf")]
    [0.0, 0.5]
    """
    return _form(activation).with_slope(h)
