"""Activations by name. The XLA back end runs every entry of the table; each kernel says which it knows."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ActivationFunction = Callable[[Float[Array, "..."]], Float[Array, "..."]]

ACTIVATIONS: dict[str, ActivationFunction] = {
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_erf": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
}
"""Each function works element by element, keeps the dtype of its argument, and is differentiable by JAX. A program may
add its own."""


def function_of(activation: str) -> ActivationFunction:
    """Look up an activation by name. Raises ValueError for a name that is not in `ACTIVATIONS`.

    >>> float(function_of("silu")(jnp.zeros(())))
    0.0
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[activation]
