"""Rows in VMEM as 32-bit words, of which one row can be read or written alone, wherever it lies.

A row is one sublane of each of some planes of 128 lanes, `stride` sublanes apart: a single strided load fetches up to 8
of them, and a single strided store puts them down. A word holds a float32, or a bfloat16 of the left half of a row in
the low bits and one of the right half in the high bits. The stride is an odd multiple of 8 sublanes: 4 planes can then
be read at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, DTypeLike, Float, Int

from moe_kernels.chips import LANES, SUBLANES


def columns(plane: int, planes: int, dtype: DTypeLike) -> Iterator[slice]:
    """The columns of a row that the words of a plane hold, low bits first.

    >>> list(columns(1, 3, "bfloat16"))
    [slice(128, 256, None), slice(512, 640, None)]
    """
    for tile in (plane, plane + planes) if jnp.dtype(dtype) == jnp.bfloat16 else (plane,):
        yield slice(tile * LANES, (tile + 1) * LANES)


def pack(values: Sequence[Float[Array, "N L"]]) -> Int[Array, "N L"]:
    """Words of float32 numbers; of two, whose low 16 bits are zero, in one."""
    words = jax.lax.bitcast_convert_type(values[0], jnp.int32)
    if len(values) == 1:
        return words
    low = jax.lax.shift_right_logical(words, jnp.full_like(words, 16))
    return low | jax.lax.bitcast_convert_type(values[1], jnp.int32)


def unpack(words: Int[Array, "N L"], dtype: DTypeLike) -> Iterator[Float[Array, "N L"]]:
    """The float32 numbers that are in words of a dtype, low bits first."""
    if jnp.dtype(dtype) == jnp.bfloat16:
        yield jax.lax.bitcast_convert_type(jax.lax.shift_left(words, jnp.full_like(words, 16)), jnp.float32)
        words = words & jnp.int32(-65536)
    yield jax.lax.bitcast_convert_type(words, jnp.float32)


def move_row(planes: int, source: Any, at: Any, source_stride: int, target: Any, to: Any, target_stride: int) -> None:
    """Copy the row at a sublane of the first plane of `source` to one of the first plane of `target`."""
    for plane in range(0, planes, SUBLANES):
        number = min(SUBLANES, planes - plane)
        # One sublane has no stride: 7x has no code for one of 2^16 rows.
        source_step, target_step = (stride if number > 1 else None for stride in (source_stride, target_stride))
        row = source[pl.ds(plane * source_stride + at, number, stride=source_step), :]
        target[pl.ds(plane * target_stride + to, number, stride=target_step), :] = row
