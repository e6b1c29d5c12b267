"""What the routing kernels share: operands with tokens along the lanes, exact products, softmax over experts."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_kernels.backends.base import RouteInputs
from moe_kernels.backends.tpu.common.rows import dot
from moe_kernels.backends.tpu.route.tiles import LANES, RouteTiles

# The modality of padding.
NEVER = -1
FAR = float("-inf")


def by_group(values: Array, groups: int, tiles: RouteTiles) -> Array:
    """`[T, ...]` as `[G, S, ...]`, with S rounded up to a tile where it is shorter than one."""
    values = values.reshape(groups, -1, *values.shape[1:])
    more = max(0, tiles.tokens - values.shape[1])
    return jnp.pad(values, ((0, 0), (0, more), *[(0, 0)] * (values.ndim - 2))) if more else values


def by_lane(values: Array, groups: int, tiles: RouteTiles, rows: int) -> Array:
    """`[T, N]` as `[G, rows, S]`, N rounded up to `rows`."""
    turned = jnp.swapaxes(by_group(values, groups, tiles), 1, 2)
    return jnp.pad(turned, ((0, 0), (0, rows - turned.shape[1]), (0, 0)))


def by_token(values: Array, size: int) -> Array:
    """`[G, N, S]` as `[T, N]`, without what lies behind the `size` tokens of each group."""
    return jnp.swapaxes(values, 1, 2)[:, :size].reshape(-1, values.shape[1])


def members(num_tokens: int, inputs: RouteInputs) -> Int[Array, "T 1"] | None:
    """The modality of each token, and NEVER for padding; None where all are of modality 0."""
    if inputs.mask is None and inputs.modality is None:
        return None
    member = jnp.zeros(num_tokens, jnp.int32) if inputs.modality is None else inputs.modality.astype(jnp.int32)
    # An id that does not exist is in no sum, but padding it is not.
    member = jnp.where(member == NEVER, NEVER - 1, member)
    return (member if inputs.mask is None else jnp.where(inputs.mask, member, NEVER))[:, None]


def split(values: Float[Array, "..."], count: int) -> list[Float[Array, "..."]]:
    """Float32 as the sum of so many bfloat16 numbers; three hold all its digits.

    By bits and not by casts there and back, which a compiler may drop.

    >>> [float(piece) for piece in split(jnp.float32(1 + 2**-20), 3)]
    [1.0, 9.5367431640625e-07, 0.0]
    """
    found = []
    for _ in range(count):
        high = jax.lax.bitcast_convert_type(values, jnp.uint32) & jnp.uint32(0xFFFF0000)
        piece = jax.lax.bitcast_convert_type(high, jnp.float32)
        found.append(piece.astype(jnp.bfloat16))
        values = values - piece
    return found


def turned_router(router: Float[Array, "D E"], padded: int) -> Float[Array, "P D"]:
    """The router transposed, in float32, its experts rounded up with zeros."""
    return jnp.pad(router.astype(jnp.float32).T, ((0, padded - router.shape[1]), (0, 0)))


def logit_factor(router: Float[Array, "D E"], dtype: Any, padded: int) -> Float[Array, "P D"]:
    """The factor of `logits`: for bfloat16 tokens the pieces of the router one below the other, else the router.

    The product of bfloat16 tokens with all pieces, in one pass over the tokens, is that of float32 factors.
    """
    turned = turned_router(router, padded)
    if dtype != jnp.bfloat16:
        return turned
    return jnp.concatenate(split(turned, 1 if router.dtype == jnp.bfloat16 else 3))


def add_pieces(products: Float[Array, "P C"], rows: int) -> Float[Array, "E C"]:
    """The sum of what was multiplied piece by piece, the small ones first."""
    pieces = [products[at : at + rows] for at in range(0, products.shape[0], rows)]
    return functools.reduce(jnp.add, reversed(pieces))


def logits_of(
    factor: Float[Array, "P D"], tokens: Float[Array, "C D"], padded: int, member: Int[Array, "1 C"] | None
) -> Float[Array, "E C"]:
    """Logits in float32; 0 for padding, whatever it holds (by selection)."""
    clean = add_pieces(dot(factor, tokens, (1, 1)), padded)
    return clean if member is None else jnp.where(member != NEVER, clean, 0.0)


class Experts(NamedTuple):
    """The axis of experts of a step: index of each row, and which rows are experts (None if all are)."""

    ids: Float[Array, "E C"]
    """As float32, which they are exact in: integers are not reduced on every chip."""
    real: Bool[Array, "E C"] | None

    @classmethod
    def of(cls, shape: tuple[int, ...], num_experts: int) -> "Experts":
        """For `[E, C]` values."""
        ids = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        return cls(ids.astype(jnp.float32), None if num_experts == shape[0] else ids < num_experts)

    def only(self, values: Float[Array, "E C"], other: float) -> Float[Array, "E C"]:
        """Something else in rows that are no experts."""
        return values if self.real is None else jnp.where(self.real, values, other)

    def finite(self, logits: Float[Array, "E C"]) -> Bool[Array, "1 C"]:
        """Whether all logits of a token are."""
        broken = jnp.where(jnp.abs(logits) < -FAR, 0.0, 1.0)
        return over_experts(jnp.max, self.only(broken, 0.0)) == 0

    def softmax(self, logits: Float[Array, "E C"]) -> "Softmax":
        """Over the experts."""
        top = over_experts(jnp.max, self.only(logits, FAR))
        distance = self.only(logits - top, 0.0)
        power = self.only(jnp.exp(distance), 0.0)
        total = over_experts(jnp.sum, power)
        return Softmax(top, distance, power, jnp.log(total), 1.0 / total)


class Softmax(NamedTuple):
    """A softmax and its parts: `power = exp(distance)`, `distance = logits - top`; 0 in rows that are no experts."""

    top: Float[Array, "1 C"]
    distance: Float[Array, "E C"]
    power: Float[Array, "E C"]
    log_total: Float[Array, "1 C"]
    inverse: Float[Array, "1 C"]

    @property
    def probability(self) -> Float[Array, "E C"]:
        """`exp(logits) / sum`."""
        return self.power * self.inverse

    @property
    def log_partition(self) -> Float[Array, "1 C"]:
        """Log of the sum of all exponentials."""
        return self.top + self.log_total

    @property
    def entropy(self) -> Float[Array, "1 C"]:
        """`-sum(p log p)`: its two terms have one sign, so nothing cancels."""
        return self.log_total - over_experts(jnp.sum, self.power * self.distance) * self.inverse


def over_experts(reduce: Any, values: Float[Array, "E C"]) -> Float[Array, "1 C"]:
    """A reduction that leaves one row."""
    return reduce(values, axis=0, keepdims=True)


def lanes_of(values: Float[Array, "N C"]) -> list[Float[Array, "N L"]]:
    """The registers along the lanes."""
    return [values[:, at : at + LANES] for at in range(0, values.shape[1], LANES)]
