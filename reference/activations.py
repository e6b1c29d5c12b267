"""Activations and their derivatives in float64, each from its definition."""

import math
from typing import Literal

import numpy as np

from reference.routing import normal_cdf

Activation = Literal["gelu_tanh", "gelu_erf", "silu", "relu", "relu_squared"]


def sigmoid(value: np.ndarray) -> np.ndarray:
    """Compute 1 / (1 + exp(-x)).

    >>> sigmoid(np.array([0.0]))
    array([0.5])
    """
    return np.exp(-np.logaddexp(0.0, -np.asarray(value, np.float64)))


def activate(value: np.ndarray, activation: Activation | None) -> np.ndarray:
    """GELU; SiLU x / (1 + exp(-x)); max(x, 0) and its square; None leaves the value as it is.

    >>> activate(np.array([1.0]), "silu").round(6), activate(np.array([-1.0, 3.0]), "relu_squared")
    (array([0.731059]), array([0., 9.]))
    """
    if activation is None:
        return value
    if activation == "silu":
        return value * sigmoid(value)
    if activation in ("relu", "relu_squared"):
        positive = np.maximum(value, 0.0)
        return positive if activation == "relu" else positive**2
    return gelu(value, activation)


def activate_derivative(value: np.ndarray, activation: Activation | None) -> np.ndarray:
    """Derivative of `activate`; of SiLU, with s = 1 / (1 + exp(-x)):  s + x s (1 - s); of max(x, 0) at 0 it is 0.

    >>> activate_derivative(np.array([0.0]), "silu"), activate_derivative(np.array([3.0]), "relu_squared")
    (array([0.5]), array([6.]))
    """
    if activation is None:
        return np.ones(np.shape(value))
    if activation == "silu":
        s = sigmoid(value)
        return s + value * s * (1.0 - s)
    if activation == "relu":
        return np.where(value > 0, 1.0, 0.0)
    if activation == "relu_squared":
        return 2.0 * np.maximum(value, 0.0)
    return gelu_derivative(value, activation)


def gelu(value: np.ndarray, activation: str = "gelu_tanh") -> np.ndarray:
    """Compute x Phi(x), exactly (gelu_erf) or in the tanh form (gelu_tanh); ValueError for another name.

    >>> gelu(np.array([1.0]), "gelu_tanh").round(6), gelu(np.array([1.0]), "gelu_erf").round(6)
    (array([0.841192]), array([0.841345]))
    """
    if activation == "gelu_tanh":
        return 0.5 * value * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (value + 0.044715 * value**3)))
    if activation == "gelu_erf":
        return value * np.vectorize(normal_cdf, otypes=[float])(value)
    raise ValueError(f"activation {activation!r} is not gelu_tanh or gelu_erf")


def gelu_derivative(value: np.ndarray, activation: str = "gelu_tanh") -> np.ndarray:
    """Compute the derivative of `gelu`.

    tanh form, h = tanh(u), u = c (x + a x^3):  (1 + h) / 2 + x (1 - h^2) c (1 + 3 a x^2) / 2.
    erf form:  Phi(x) + x phi(x).

    >>> gelu_derivative(np.array([0.0]))
    array([0.5])
    """
    if activation == "gelu_tanh":
        scale = math.sqrt(2.0 / math.pi)
        h = np.tanh(scale * (value + 0.044715 * value**3))
        return 0.5 * (1.0 + h) + 0.5 * value * (1.0 - h**2) * scale * (1.0 + 3.0 * 0.044715 * value**2)
    if activation == "gelu_erf":
        density = np.exp(-0.5 * value**2) / math.sqrt(2.0 * math.pi)
        return np.vectorize(normal_cdf, otypes=[float])(value) + value * density
    raise ValueError(f"activation {activation!r} is not gelu_tanh or gelu_erf")
