"""Activations by name. The XLA back end runs every entry of the table; each kernel says which it knows."""

from __future__ import annotations

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class ClampedSwiglu:
    """The activation of gpt-oss for gated experts: `g sigmoid(alpha g) (u + shift)` with `g = min(x gate, limit)`, `u =
    clip(x up, -limit, limit)`.

    At the limits themselves the derivative is that of the inside. XLA works it, between matmuls of any back end.

    >>> float(ClampedSwiglu()(jnp.float32(0), jnp.float32(9)))
    0.0
    """

    alpha: float = 1.702
    limit: float = 7.0
    shift: float = 1.0

    def __call__(self, gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
        """Compute it element by element, in the dtype of its arguments."""
        # Selects, unlike minimum and clip, let NaN through and have the slope 1 at the limit.
        gate = jnp.where(gate > self.limit, self.limit, gate)
        up = jnp.where(up > self.limit, self.limit, jnp.where(up < -self.limit, -self.limit, up))
        return gate * jax.nn.sigmoid(self.alpha * gate) * (up + self.shift)


def gated(gate: Float[Array, "..."], up: Float[Array, "..."], activation: str | ClampedSwiglu) -> Float[Array, "..."]:
    """Compute `act(gate) * up` in float32, rounded to the dtype of `gate`.

    >>> float(gated(jnp.float32(2), jnp.float32(3), "relu"))
    6.0
    """
    wide = gate.astype(jnp.float32), up.astype(jnp.float32)
    if isinstance(activation, ClampedSwiglu):
        return activation(*wide).astype(gate.dtype)
    return (function_of(activation)(wide[0]) * wide[1]).astype(gate.dtype)


def function_of(activation: str) -> ActivationFunction:
    """Look up an activation by name. Raises ValueError for a name that is not in `ACTIVATIONS`.

    >>> float(function_of("silu")(jnp.zeros(())))
    0.0
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[activation]
