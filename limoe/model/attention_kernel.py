"""Attention within short spans of tokens, as one Pallas kernel for TPUs with a derivative.

A span is the patches of an image or the words of a caption. It fits in VMEM, so its scores never leave the chip; the
backward pass recomputes them. Tokens `[T, D]` keep the layout of the projections. A step of the grid processes some
examples, and as many heads as fill whole lanes. A span rarely starts at a tile of rows, and a head rarely fills whole
lanes. The kernel therefore loads the window of whole tiles around them. Before a matmul it replaces the foreign values
by 0 with a select; a product with 0 would spread a NaN of another example. It writes only its own part of a window.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from moe_kernels.chips import LANES, find_tpu
from moe_kernels.precision import dot

TILE_ROWS = 16
"""Rows of a bfloat16 tile. A float32 tile has half as many."""
MOST_EXAMPLES, MOST_PERIODS = 8, 2
"""The most examples that a kernel's program unrolls, and the most repeats of that in a step of the grid."""
BLOCKS_BYTES, VMEM_LIMIT = 8 * 2**20, 15 * 2**20
"""Bytes of VMEM for the double-buffered blocks of all arrays, and for the whole kernel (v4 has 16 MiB)."""


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The layout of tokens: the spans of an example, adjacent from 0 on, and the heads of a token.

    >>> b16 = Geometry(((0, 196), (196, 212)), 768, 12)
    >>> b16.period, b16.lanes, Geometry(((0, 256), (256, 272)), 1280, 16).lanes
    (4, 128, 640)
    """

    spans: tuple[tuple[int, int], ...]
    width: int
    num_heads: int

    @property
    def length(self) -> int:
        """Number of tokens of an example."""
        return self.spans[-1][1]

    @property
    def period(self) -> int:
        """Number of examples after which an example starts at a tile of rows again."""
        return TILE_ROWS // math.gcd(self.length, TILE_ROWS)

    @property
    def head_width(self) -> int:
        """Number of lanes of a head."""
        return self.width // self.num_heads

    @property
    def lanes(self) -> int:
        """Number of lanes after which a head starts at a tile of lanes again."""
        return math.lcm(self.head_width, LANES)


class Window(NamedTuple):
    """The whole tiles around a range, from `start` to `end`, and the range itself, from `first` to `last`."""

    start: int
    end: int
    first: int
    last: int

    @property
    def size(self) -> int:
        """Number of tokens in the window."""
        return self.end - self.start

    def only(self, shape: tuple[int, ...], axis: int) -> Bool[Array, "..."] | None:
        """Mark the positions of the window that belong to the range; None if all do."""
        if (self.start, self.end) == (self.first, self.last):
            return None
        place = jax.lax.broadcasted_iota(jnp.int32, shape, axis) + self.start
        return (place >= self.first) & (place < self.last)


def window(first: int, last: int, tile: int) -> Window:
    """Find the whole tiles around a range.

    >>> window(196, 212, 16)
    Window(start=192, end=224, first=196, last=212)
    """
    return Window(first // tile * tile, -(-last // tile) * tile, first, last)


def misfit(geometry: Geometry, num_tokens: int, dtype: Any) -> str | None:
    """Say why the kernel cannot process whole examples with this number of tokens; None if it can.

    >>> misfit(Geometry(((0, 49), (49, 65)), 768, 12), 65 * 256, "bfloat16")
    'would unroll 16 examples of 65 tokens, more than 8'
    """
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"dtype {dtype} is neither bfloat16 nor float32"
    if geometry.width % geometry.lanes:
        return f"heads of {geometry.head_width} do not fill whole lanes in a width of {geometry.width}"
    if geometry.period > MOST_EXAMPLES:
        return f"would unroll {geometry.period} examples of {geometry.length} tokens, more than {MOST_EXAMPLES}"
    rows = geometry.period * geometry.length
    if num_tokens % rows or num_tokens == 0:
        return f"{num_tokens} tokens are not a multiple of {rows}"
    longest = max(window(0, end - start + TILE_ROWS, LANES).size for start, end in geometry.spans)
    itemsize = jnp.dtype(dtype).itemsize
    scores = 4 * 4 * longest**2  # float32, in the backward pass
    if _blocks_bytes(geometry, rows, itemsize) > BLOCKS_BYTES or BLOCKS_BYTES + scores > VMEM_LIMIT:
        return f"spans of {longest} tokens with {geometry.lanes} lanes do not fit {VMEM_LIMIT >> 20} MiB of VMEM"
    return None


def forward(
    geometry: Geometry, kind: str, interpret: bool, query: Float[Array, "T D"], *others: Float[Array, "T D"]
) -> Float[Array, "T D"]:
    """Compute `softmax(q kᵀ / sqrt(head width)) v` of every head within every span. The arrays are q, k, v."""
    body = functools.partial(_forward, geometry)
    (out,) = _launch("attention_forward", body, geometry, kind, interpret, 2, 1, query, *others)
    return out


def backward(
    geometry: Geometry, kind: str, interpret: bool, query: Float[Array, "T D"], *others: Float[Array, "T D"]
) -> tuple[Float[Array, "T D"], Float[Array, "T D"], Float[Array, "T D"]]:
    """Compute the cotangents of q, k and v. The arrays are q, k, v and the cotangent of the result."""
    body = functools.partial(_backward, geometry)
    dquery, dkey, dvalue = _launch("attention_backward", body, geometry, kind, interpret, 5, 3, query, *others)
    return dquery, dkey, dvalue


def _blocks_bytes(geometry: Geometry, rows: int, itemsize: int) -> int:
    """Compute the bytes of the double-buffered blocks of the backward pass, which has seven arrays."""
    return 2 * 7 * rows * geometry.lanes * itemsize


def _launch(
    name: str,
    body: Callable[..., None],
    geometry: Geometry,
    kind: str,
    interpret: bool,
    products: int,
    num_results: int,
    *arrays: Float[Array, "T D"],
) -> Sequence[Float[Array, "T D"]]:
    """Run a kernel over a grid of blocks of examples and blocks of heads."""
    (num_tokens, width), dtype = arrays[0].shape, arrays[0].dtype
    rows = geometry.period * geometry.length
    periods = num_tokens // rows
    most = min(MOST_PERIODS, BLOCKS_BYTES // _blocks_bytes(geometry, rows, dtype.itemsize))
    repeats = max(n for n in range(1, most + 1) if periods % n == 0)
    heads = width // geometry.lanes

    def kernel(*refs: Any) -> None:
        def one(n: Any, carry: None) -> None:
            body(pl.multiple_of(n * rows, TILE_ROWS), refs)

        jax.lax.fori_loop(0, repeats, one, None)

    block = pl.BlockSpec((repeats * rows, geometry.lanes), lambda i, j: (i, j))
    call = pl.pallas_call(
        kernel,
        grid=(periods // repeats, heads),
        in_specs=[block] * len(arrays),
        out_specs=[block] * num_results,
        out_shape=[jax.ShapeDtypeStruct((num_tokens, width), dtype)] * num_results,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=periods * heads * issued_flops(geometry, products, _array_side(kind)),
            transcendentals=num_tokens * geometry.num_heads * max(end - start for start, end in geometry.spans),
            bytes_accessed=(len(arrays) + num_results) * num_tokens * width * dtype.itemsize,
        ),
        interpret=interpret,
        name=name,
    )
    return call(*arrays)


def _array_side(kind: str) -> int:
    """Get the number of rows and columns of the chip's matrix unit; 128 for interpreted kernels."""
    tpu = find_tpu(kind)
    return tpu.depth if tpu else 128


def issued_flops(geometry: Geometry, products: int, side: int) -> int:
    """Count the FLOPs of the matrix unit for one period of one block of heads, with padding.

    >>> issued_flops(Geometry(((0, 128),), 128, 1), 2, 128) == 2 * 2 * 128**3
    True
    """
    up = lambda size: -(-size // side) * side  # noqa: E731
    total = 0
    for rows, lanes in _windows(geometry):
        # The sizes of each product are rows, rows and lanes.
        total += 2 * products * rows.size * up(rows.size) * up(lanes.size)
    return total


def _windows(geometry: Geometry) -> Iterator[tuple[Window, Window]]:
    """List the windows of rows and lanes of each span and head of a period, relative to the block."""
    for example in range(geometry.period):
        for start, end in geometry.spans:
            at = example * geometry.length
            rows = window(at + start, at + end, TILE_ROWS)
            for head in range(geometry.lanes // geometry.head_width):
                yield rows, window(head * geometry.head_width, (head + 1) * geometry.head_width, LANES)


class _Piece(NamedTuple):
    """One head of one span in a block."""

    base: Any
    rows: Window
    lanes: Window

    def where(self) -> tuple[Any, slice]:
        """Index the window in a block."""
        own = pl.ds(pl.multiple_of(self.base + self.rows.start, TILE_ROWS), self.rows.size)
        return own, slice(self.lanes.start, self.lanes.end)

    def mask(self, *axes: int) -> Bool[Array, "N L"] | None:
        """Mark the piece's own rows (axis 0) and lanes (axis 1) in its window; None for the whole window."""
        shape = (self.rows.size, self.lanes.size)
        masks = [(self.rows, self.lanes)[axis].only(shape, axis) for axis in axes]
        found = [mask for mask in masks if mask is not None]
        return functools.reduce(jnp.logical_and, found) if found else None

    def read(self, ref: Any, *axes: int) -> Float[Array, "N L"]:
        """Read the window with zeros outside the piece's own rows (axis 0) and lanes (axis 1)."""
        values, mask = ref[self.where()], self.mask(*axes)
        return values if mask is None else jnp.where(mask, values, jnp.zeros((), values.dtype))

    def write(self, ref: Any, values: Float[Array, "N L"]) -> None:
        """Write a result to the piece's own rows and lanes, and leave the rest of the window as it is."""
        values, mask = values.astype(ref.dtype), self.mask(0, 1)
        ref[self.where()] = values if mask is None else jnp.where(mask, values, ref[self.where()])

    def hide(self, scores: Float[Array, "N N"], axis: int) -> Float[Array, "N N"]:
        """Set the scores of other spans' keys to minus infinity. `axis` is the axis of the keys."""
        mask = self.rows.only(scores.shape, axis)
        return scores if mask is None else jnp.where(mask, scores, -jnp.inf)


class _ForwardRefs(NamedTuple):
    query: Any
    key: Any
    value: Any
    out: Any


def _forward(geometry: Geometry, base: Any, refs: tuple[Any, ...]) -> None:
    at, scale = _ForwardRefs(*refs), geometry.head_width**-0.5
    for rows, lanes in _windows(geometry):
        piece = _Piece(base, rows, lanes)
        scores = piece.hide(dot(piece.read(at.query, 0, 1), piece.read(at.key), (1, 1)), axis=1)
        weight = jnp.exp((scores - jnp.max(scores, axis=1, keepdims=True)) * scale)
        total = jnp.sum(weight, axis=1, keepdims=True)
        piece.write(at.out, dot(weight.astype(at.out.dtype), piece.read(at.value, 0), (1, 0)) / total)


class _BackwardRefs(NamedTuple):
    query: Any
    key: Any
    value: Any
    dout: Any
    dquery: Any
    dkey: Any
    dvalue: Any


def _backward(geometry: Geometry, base: Any, refs: tuple[Any, ...]) -> None:
    """Compute the scores with keys along the first axis, so that only one product needs them transposed."""
    at, scale = _BackwardRefs(*refs), geometry.head_width**-0.5
    for rows, lanes in _windows(geometry):
        piece = _Piece(base, rows, lanes)
        q, dy = (piece.read(ref, 0, 1) for ref in (at.query, at.dout))
        k, v = (piece.read(ref, 0) for ref in (at.key, at.value))
        scores = piece.hide(dot(k, q, (1, 1)), axis=0)
        weight = jnp.exp((scores - jnp.max(scores, axis=0, keepdims=True)) * scale)
        weight = weight / jnp.sum(weight, axis=0, keepdims=True)
        dweight = dot(v, dy, (1, 1))
        dscores = weight * (dweight - jnp.sum(weight * dweight, axis=0, keepdims=True)) * scale
        weight, dscores = weight.astype(q.dtype), dscores.astype(q.dtype)
        piece.write(at.dvalue, dot(weight, dy, (1, 0)))
        piece.write(at.dkey, dot(dscores, q, (1, 0)))
        piece.write(at.dquery, dot(dscores, k, (0, 0)))
