"""Parts shared by the routing kernels of TPUs and GPUs: float32 in exact pieces, softmax over the axis of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

# The modality of padding.
NEVER = -1
FAR = float("-inf")


def split(values: Float[Array, "..."], count: int) -> list[Float[Array, "..."]]:
    """Split float32 into a sum of `count` bfloat16 numbers, the largest first; three hold all its digits.

    It splits the bits, because a compiler may drop a cast to bfloat16 and back.

    >>> [float(piece) for piece in split(jnp.float32(1 + 2**-20), 3)]
    [1.0, 9.5367431640625e-07, 0.0]
    """
    found = []
    for _ in range(count):
        high = lax.bitcast_convert_type(values, jnp.uint32) & jnp.uint32(0xFFFF0000)
        piece = lax.bitcast_convert_type(high, jnp.float32)
        found.append(piece.astype(jnp.bfloat16))
        values = values - piece
    return found


class Experts(NamedTuple):
    """The axis of experts of a block of logits, `[E, C]` or `[S, E]`."""

    ids: Float[Array, "A B"]
    """The index of each expert, as exact float32, because some chips cannot reduce integers."""
    real: Bool[Array, "A B"] | None
    """Which entries are experts; None if all are."""
    axis: int
    keepdims: bool
    """Whether a reduction keeps the reduced axis."""

    @classmethod
    def of(cls, shape: tuple[int, ...], num_experts: int, *, axis: int = 0, keepdims: bool = True) -> Experts:
        """Describe the axis of experts of a block with this shape."""
        ids = lax.broadcasted_iota(jnp.int32, shape, axis)
        real = None if num_experts == shape[axis] else ids < num_experts
        return cls(ids.astype(jnp.float32), real, axis, keepdims)

    def over(self, reduce: Callable[..., jax.Array], values: Array) -> Array:
        """Reduce over the experts."""
        return reduce(values, axis=self.axis, keepdims=self.keepdims)

    def spread(self, values: Array) -> Array:
        """Broadcast one value for each token to all experts."""
        return values if self.keepdims else lax.broadcast_in_dim(values, self.ids.shape, (1 - self.axis,))

    def only(self, values: Float[Array, "A B"], other: float) -> Float[Array, "A B"]:
        """Put `other` where there is no expert."""
        return values if self.real is None else jnp.where(self.real, values, jnp.full_like(values, other))

    def finite(self, logits: Float[Array, "A B"]) -> Bool[Array, "..."]:
        """Say for each token whether all its logits are finite."""
        broken = jnp.where(jnp.abs(logits) < -FAR, jnp.zeros_like(logits), jnp.ones_like(logits))
        return self.over(jnp.max, self.only(broken, 0.0)) == 0

    def softmax(self, logits: Float[Array, "A B"]) -> Softmax:
        """Compute the softmax over the experts."""
        top = self.over(jnp.max, self.only(logits, FAR))
        distance = self.only(logits - self.spread(top), 0.0)
        power = self.only(jnp.exp(distance), 0.0)
        total = self.over(jnp.sum, power)
        return Softmax(self, top, distance, power, jnp.log(total), 1.0 / total)


class Softmax(NamedTuple):
    """A softmax and its parts: `power = exp(distance)`, `distance = logits - top`; 0 where there is no expert."""

    experts: Experts
    top: Float[Array, "..."]
    distance: Float[Array, "A B"]
    power: Float[Array, "A B"]
    log_total: Float[Array, "..."]
    inverse: Float[Array, "..."]

    @property
    def probability(self) -> Float[Array, "A B"]:
        """`exp(logits) / sum`."""
        return self.power * self.experts.spread(self.inverse)

    @property
    def log_partition(self) -> Float[Array, "..."]:
        """The logarithm of the sum of all exponentials."""
        return self.top + self.log_total

    @property
    def entropy(self) -> Float[Array, "..."]:
        """`-sum(p log p)`: its two terms have one sign, so nothing cancels."""
        return self.log_total - self.experts.over(jnp.sum, self.power * self.distance) * self.inverse
