"""Attention within short spans of tokens as one Pallas kernel for TPUs, with its derivative.

A span (the patches of an image, the words of a caption) fits in VMEM whole, so its scores never leave the chip, and the
backward pass computes them again. Tokens `[T, D]` stay as the projections write them: a step of the grid works on some
examples and on as many heads as fill whole lanes. A span rarely starts at a tile of rows, and a head rarely fills whole
lanes: what is loaded is the window of whole tiles around them, and what does not belong to them is selected away (never
multiplied by 0: a NaN of one example stays there) before it meets a matmul. Results are put beside what neighbours
wrote into the same tiles.
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
"""Of a tile of bfloat16; one of float32 has half of the rows."""
MOST_EXAMPLES, MOST_PERIODS = 8, 2
"""Examples that are written out in the program of a kernel, and how often a step of the grid repeats that."""
BLOCKS_BYTES, VMEM_LIMIT = 8 * 2**20, 15 * 2**20
"""Of VMEM: for the blocks of all arrays twice (one is fetched while one is worked on), and all; v4 has 16 MiB."""


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How tokens lie: the spans of an example, which are adjacent from 0 on, and the heads of a token.

    >>> b16 = Geometry(((0, 196), (196, 212)), 768, 12)
    >>> b16.period, b16.lanes, Geometry(((0, 256), (256, 272)), 1280, 16).lanes
    (4, 128, 640)
    """

    spans: tuple[tuple[int, int], ...]
    width: int
    num_heads: int

    @property
    def length(self) -> int:
        """Tokens of an example."""
        return self.spans[-1][1]

    @property
    def period(self) -> int:
        """Examples after which one starts at a tile of rows again."""
        return TILE_ROWS // math.gcd(self.length, TILE_ROWS)

    @property
    def head_width(self) -> int:
        """Lanes of a head."""
        return self.width // self.num_heads

    @property
    def lanes(self) -> int:
        """Lanes after which a head starts at a tile of lanes again."""
        return math.lcm(self.head_width, LANES)


class Window(NamedTuple):
    """Whole tiles around a range: where they start and end, and the range."""

    start: int
    end: int
    first: int
    last: int

    @property
    def size(self) -> int:
        """Number of tokens in the window."""
        return self.end - self.start

    def only(self, shape: tuple[int, ...], axis: int) -> Bool[Array, "..."] | None:
        """Which of a window's places belong to the range; None for all."""
        if (self.start, self.end) == (self.first, self.last):
            return None
        place = jax.lax.broadcasted_iota(jnp.int32, shape, axis) + self.start
        return (place >= self.first) & (place < self.last)


def window(first: int, last: int, tile: int) -> Window:
    """The tiles around a range.

    >>> window(196, 212, 16)
    Window(start=192, end=224, first=196, last=212)
    """
    return Window(first // tile * tile, -(-last // tile) * tile, first, last)


def misfit(geometry: Geometry, num_tokens: int, dtype: Any) -> str | None:
    """Why the kernel does not take whole examples of so many tokens; None if it does.

    >>> misfit(Geometry(((0, 49), (49, 65)), 768, 12), 65 * 256, "bfloat16")
    '16 examples of 65 tokens would be written out, at most 8 are'
    """
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"dtype {dtype} is neither bfloat16 nor float32"
    if geometry.width % geometry.lanes:
        return f"heads of {geometry.head_width} do not fill whole lanes in a width of {geometry.width}"
    if geometry.period > MOST_EXAMPLES:
        return (
            f"{geometry.period} examples of {geometry.length} tokens would be written out, at most {MOST_EXAMPLES} are"
        )
    rows = geometry.period * geometry.length
    if num_tokens % rows or num_tokens == 0:
        return f"{num_tokens} tokens are no multiple of {rows}"
    longest = max(window(0, end - start + TILE_ROWS, LANES).size for start, end in geometry.spans)
    itemsize = jnp.dtype(dtype).itemsize
    scores = 4 * 4 * longest**2  # of the backward pass, float32
    if _blocks_bytes(geometry, rows, itemsize) > BLOCKS_BYTES or BLOCKS_BYTES + scores > VMEM_LIMIT:
        return f"spans of {longest} tokens with {geometry.lanes} lanes do not fit {VMEM_LIMIT >> 20} MiB of VMEM"
    return None


def forward(
    geometry: Geometry, kind: str, interpret: bool, query: Float[Array, "T D"], *others: Float[Array, "T D"]
) -> Float[Array, "T D"]:
    """`softmax(q kᵀ / sqrt(head width)) v` of every head within every span, for queries, keys and values."""
    body = functools.partial(_forward, geometry)
    (out,) = _launch("attention_forward", body, geometry, kind, interpret, 2, 1, query, *others)
    return out


def backward(
    geometry: Geometry, kind: str, interpret: bool, query: Float[Array, "T D"], *others: Float[Array, "T D"]
) -> tuple[Float[Array, "T D"], Float[Array, "T D"], Float[Array, "T D"]]:
    """Cotangents of queries, keys and values, given these and the cotangent of the result."""
    body = functools.partial(_backward, geometry)
    dquery, dkey, dvalue = _launch("attention_backward", body, geometry, kind, interpret, 5, 3, query, *others)
    return dquery, dkey, dvalue


def _blocks_bytes(geometry: Geometry, rows: int, itemsize: int) -> int:
    """Of the seven arrays of the backward pass, each twice."""
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
    """Run a kernel over blocks of examples and of heads."""
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
    """Rows and columns of the chip's matrix unit; 128 where kernels are interpreted."""
    tpu = find_tpu(kind)
    return tpu.depth if tpu else 128


def issued_flops(geometry: Geometry, products: int, side: int) -> int:
    """What the matrix unit does for one period of one block of heads, with all that pads its arrays.

    >>> issued_flops(Geometry(((0, 128),), 128, 1), 2, 128) == 2 * 2 * 128**3
    True
    """
    up = lambda size: -(-size // side) * side  # noqa: E731
    total = 0
    for rows, lanes in _windows(geometry):
        # Forward and backward each product has the rows twice and the lanes once.
        total += 2 * products * rows.size * up(rows.size) * up(lanes.size)
    return total


def _windows(geometry: Geometry) -> Iterator[tuple[Window, Window]]:
    """The rows and lanes of each span and head of a period, in a block's own numbers."""
    for example in range(geometry.period):
        for start, end in geometry.spans:
            at = example * geometry.length
            rows = window(at + start, at + end, TILE_ROWS)
            for head in range(geometry.lanes // geometry.head_width):
                yield rows, window(head * geometry.head_width, (head + 1) * geometry.head_width, LANES)


class _Piece(NamedTuple):
    """One head of one span inside a block: how to read and write it."""

    base: Any
    rows: Window
    lanes: Window

    def where(self) -> tuple[Any, slice]:
        own = pl.ds(pl.multiple_of(self.base + self.rows.start, TILE_ROWS), self.rows.size)
        return own, slice(self.lanes.start, self.lanes.end)

    def mine(self, *windows: tuple[Window, int]) -> Bool[Array, "N L"] | None:
        masks = [part.only((self.rows.size, self.lanes.size), axis) for part, axis in windows]
        found = [mask for mask in masks if mask is not None]
        return functools.reduce(jnp.logical_and, found) if found else None

    def rows_of(self, ref: Any) -> Float[Array, "N L"]:
        """The window with the rows of other spans 0."""
        return self._only(self.mine((self.rows, 0)), ref)

    def of(self, ref: Any) -> Float[Array, "N L"]:
        """The window with other spans and other heads 0."""
        return self._only(self.mine((self.rows, 0), (self.lanes, 1)), ref)

    def _only(self, mask: Bool[Array, "N L"] | None, ref: Any) -> Float[Array, "N L"]:
        values = ref[self.where()]
        return values if mask is None else jnp.where(mask, values, jnp.zeros((), values.dtype))

    def write(self, ref: Any, values: Float[Array, "N L"]) -> None:
        """Put a result in its place and leave its neighbours'."""
        mask = self.mine((self.rows, 0), (self.lanes, 1))
        values = values.astype(ref.dtype)
        ref[self.where()] = values if mask is None else jnp.where(mask, values, ref[self.where()])

    def hide(self, scores: Float[Array, "N N"], axis: int) -> Float[Array, "N N"]:
        """Scores with those of other spans' keys at minus infinity; keys lie along that axis."""
        mask = self.rows.only(scores.shape, axis)
        return scores if mask is None else jnp.where(mask, scores, -jnp.inf)


def _pieces(geometry: Geometry, base: Any) -> Iterator[_Piece]:
    for rows, lanes in _windows(geometry):
        yield _Piece(base, rows, lanes)


class _ForwardRefs(NamedTuple):
    query: Any
    key: Any
    value: Any
    out: Any


def _forward(geometry: Geometry, base: Any, refs: tuple[Any, ...]) -> None:
    at, scale = _ForwardRefs(*refs), geometry.head_width**-0.5
    for piece in _pieces(geometry, base):
        scores = piece.hide(dot(piece.of(at.query), at.key[piece.where()], (1, 1)), axis=1)
        weight = jnp.exp((scores - jnp.max(scores, axis=1, keepdims=True)) * scale)
        total = jnp.sum(weight, axis=1, keepdims=True)
        piece.write(at.out, dot(weight.astype(at.out.dtype), piece.rows_of(at.value), (1, 0)) / total)


class _BackwardRefs(NamedTuple):
    query: Any
    key: Any
    value: Any
    dout: Any
    dquery: Any
    dkey: Any
    dvalue: Any


def _backward(geometry: Geometry, base: Any, refs: tuple[Any, ...]) -> None:
    """With keys along the first axis of the scores, so that only one of the products needs them turned."""
    at, scale = _BackwardRefs(*refs), geometry.head_width**-0.5
    for piece in _pieces(geometry, base):
        q, k, v, dy = piece.of(at.query), piece.rows_of(at.key), piece.rows_of(at.value), piece.of(at.dout)
        scores = piece.hide(dot(k, q, (1, 1)), axis=0)
        weight = jnp.exp((scores - jnp.max(scores, axis=0, keepdims=True)) * scale)
        weight = weight / jnp.sum(weight, axis=0, keepdims=True)
        dweight = dot(v, dy, (1, 1))
        dscores = weight * (dweight - jnp.sum(weight * dweight, axis=0, keepdims=True)) * scale
        weight, dscores = weight.astype(q.dtype), dscores.astype(q.dtype)
        piece.write(at.dvalue, dot(weight, dy, (1, 0)))
        piece.write(at.dkey, dot(dscores, q, (1, 0)))
        piece.write(at.dquery, dot(dscores, k, (0, 0)))
