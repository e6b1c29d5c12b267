"""Sort by several integers at once, packed into as few words as possible.

On a CPU and on a TPU, the cost of a sort grows with the number of arrays that it moves and compares. An expert, the
bits of a priority and a token fit in two words of 31 bits; a token and its row mostly fit in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped, UInt32

WORD = 31  # bits of an int32 that is not negative


class Field(NamedTuple):
    """Integers from 0 to `limit - 1`; `limit` is at most 2^32."""

    values: Shaped[Array, "..."]
    limit: int

    @property
    def bits(self) -> int:
        """The number of bits that hold any of the values."""
        return max(1, (self.limit - 1).bit_length())


def descending(values: Float[Array, "..."]) -> Field:
    """Make a field that sorts float32 numbers in descending order. Zeros of both signs are equal; NaN comes last.

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
    """Sort along the last axis by the first field, then by the next, and so on.

    All fields are keys, so tied entries are equal in every field.

    >>> [field.tolist() for field in sort_fields([Field(jnp.array([1, 0, 1]), 2), Field(jnp.array([7, 8, 6]), 9)])]
    [[0, 1, 1], [8, 6, 7]]
    """
    words = _pack(fields)
    plain = len(words) >= len(fields)
    operands = tuple(field.values for field in fields) if plain else words
    found = jax.lax.sort(operands, dimension=-1, num_keys=len(operands), is_stable=False)
    return tuple(found) if plain else _unpack(found, fields)


def _places(fields: Sequence[Field]) -> list[list[tuple[int, int, int]]]:
    """Give the parts of each field, high bits first: the word, the part's bits, and how many bits of the word are below
    it."""
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
