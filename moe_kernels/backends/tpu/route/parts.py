"""What the routing kernels share: operands with tokens along the lanes, exact products."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_kernels.backends.base import RouteInputs
from moe_kernels.backends.route_parts import NEVER, split
from moe_kernels.backends.tpu.route.tiles import RouteTiles
from moe_kernels.chips import LANES
from moe_kernels.precision import dot


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


def over_experts(reduce: Any, values: Float[Array, "E C"]) -> Float[Array, "1 C"]:
    """A reduction that leaves one row."""
    return reduce(values, axis=0, keepdims=True)


def lanes_of(values: Float[Array, "N C"]) -> list[Float[Array, "N L"]]:
    """The registers along the lanes."""
    return [values[:, at : at + LANES] for at in range(0, values.shape[1], LANES)]
