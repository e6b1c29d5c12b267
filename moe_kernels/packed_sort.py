"""Sort by several whole numbers at once, packed into as few words as hold their bits.

What a sort costs goes with the arrays that it moves and compares, on a CPU as on a TPU: an expert, the bits of a
priority and a token are two words of 31 bits, a token and its row mostly one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped, UInt32

WORD = 31  # bits of an int32 that is not negative


class Field(NamedTuple):
    """Whole numbers from 0 to `limit - 1`, at most 2^32."""

    values: Shaped[Array, "..."]
    limit: int

    @property
    def bits(self) -> int:
        """Bits that hold any of the numbers."""
        return max(1, (self.limit - 1).bit_length())


def descending(values: Float[Array, "..."]) -> Field:
    """Float32 numbers as a field that ascends where they descend; zeros of both signs are equal, NaN comes last.

    >>> field = descending(jnp.array([1.0, jnp.inf, -0.0, 0.0, -jnp.inf, jnp.nan]))
    >>> [int(rank) for rank in jnp.argsort(field.values, stable=True)], bool(field.values[2] == field.values[3])
    ([1, 0, 2, 3, 4, 5], True)
    """
    values = -values.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, jnp.float32(0), values), jnp.uint32)
    top = jnp.uint32(1 << 31)
    rising = jnp.where(bits >= top, ~bits, bits | top)
    return Field(jnp.where(jnp.isnan(values), ~jnp.uint32(0), rising), 1 << 32)


def sort_fields(fields: Sequence[Field]) -> tuple[Array, ...]:
    """Sort along the last axis by the first field, then the next one and so on; all fields are keys, so ties are equal.

    >>> [field.tolist() for field in sort_fields([Field(jnp.array([1, 0, 1]), 2), Field(jnp.array([7, 8, 6]), 9)])]
    [[0, 1, 1], [8, 6, 7]]
    """
    words = _pack(fields)
    plain = len(words) >= len(fields)
    operands = tuple(field.values for field in fields) if plain else words
    found = jax.lax.sort(operands, dimension=-1, num_keys=len(operands), is_stable=False)
    return tuple(found) if plain else _unpack(found, fields)


def _places(fields: Sequence[Field]) -> list[list[tuple[int, int, int]]]:
    """For each field its parts, high bits first: the word, the bits of the part, and the bits of the word below it."""
    word, room, places = 0, WORD, []
    for field in fields:
        left, parts = field.bits, []
        while left:
            if not room:
                word, room = word + 1, WORD
            taken = min(left, room)
            left, room = left - taken, room - taken
            parts.append((word, taken, room))
        places.append(parts)
    return places


def _pack(fields: Sequence[Field]) -> tuple[Array, ...]:
    words: dict[int, UInt32[Array, "..."]] = {}
    for field, parts in zip(fields, _places(fields), strict=True):
        values, below = field.values.astype(jnp.uint32), field.bits
        for word, bits, shift in parts:
            below -= bits
            part = ((values >> below) & jnp.uint32((1 << bits) - 1)) << shift
            words[word] = words[word] | part if word in words else part
    return tuple(jax.lax.bitcast_convert_type(words[n], jnp.int32) for n in sorted(words))


def _unpack(words: Sequence[Array], fields: Sequence[Field]) -> tuple[Array, ...]:
    found = []
    for field, parts in zip(fields, _places(fields), strict=True):
        values = jnp.zeros((), jnp.uint32)
        for word, bits, shift in parts:
            part = jax.lax.bitcast_convert_type(words[word], jnp.uint32) >> shift
            values = (values << bits) | (part & jnp.uint32((1 << bits) - 1))
        found.append(values.astype(field.values.dtype))
    return tuple(found)
