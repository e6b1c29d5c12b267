"""Gather rows, weigh them, add them up; and, where asked, multiply the first of them with rows that lie in order.

`out[m] = sum_k weight[m, k] x[index[m, k]]` is dispatch (no weights), combine, and both of their derivatives.
Grid: one block per multiprocessor walks the tiles of 16 rows of the result. The producer fetches a piece of a row at a
time, one bulk copy each (up to 2 KB in a piece, many of them under way), with the tile's indices and weights; each
consumer weighs, adds up in float32 and stores 8 of the rows. A thread loads and stores 16 bytes at a time, the 16
threads of half a warp 256 bytes of a row. Indices past the end of `x` fetch its last row and select 0, so that nothing
that stands there reaches a result.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, DTypeLike, Float, Int

from moe_kernels.backends.gpu.common.launch import NUM_CONSUMERS, GpuTarget, Ring, launch, over_steps, specialise
from moe_kernels.backends.gpu.permute.tiles import ACCESS_BYTES, GATHER_ROWS, HALF_WARP, gather_blocks

TILE_ROWS = NUM_CONSUMERS * GATHER_ROWS
# Rows of a result that each of four warps holds, half a warp along each.
WARP_ROWS = GATHER_ROWS // 4
# Rows whose addresses the producer computes side by side: all 16 take more registers than it has.
ROWS_AT_ONCE = 4


class Gathered(NamedTuple):
    """The result, and the products of its first terms with other rows where those were given."""

    rows: Float[Array, "M D"]
    products: Float[Array, " M"] | None


def gather_rows(
    x: Float[Array, "N D"],
    index: Int[Array, "M K"],
    device: GpuTarget,
    *,
    weight: Float[Array, "M K"] | None = None,
    other: Float[Array, "M D"] | None = None,
) -> Gathered:
    """`out[m] = sum_k weight[m, k] x[index[m, k]]` in the dtype of `x`; an index of N or more contributes nothing.

    With `other`, products are `<x[index[m, 0]], other[m]>` without the weight, in float32.
    """
    (length, width), (count, terms) = x.shape, index.shape
    assert other is None or terms == 1
    blocks = gather_blocks(width, x.dtype.itemsize, device.chip, products=other is not None)
    tiles, eights = -(-count // TILE_ROWS), -(-count // GATHER_ROWS)
    by_tile = functools.partial(_by_tile, tiles=tiles)
    inputs = _Inputs(by_tile(index, fill=length), x, None if weight is None else by_tile(weight, fill=0), other)
    outputs = _Outputs(
        jax.ShapeDtypeStruct((eights, GATHER_ROWS, width // blocks.columns, blocks.columns), x.dtype),
        None if other is None else jax.ShapeDtypeStruct((eights, GATHER_ROWS), jnp.float32),
    )
    stage = (blocks.stages, NUM_CONSUMERS, GATHER_ROWS)
    copies = TILE_ROWS + 1 + (weight is not None) + TILE_ROWS * (other is not None)
    scratch = _Scratch(
        x=plgpu.SMEM((*stage, blocks.columns), x.dtype),
        index=plgpu.SMEM(stage, jnp.int32),
        weight=None if weight is None else plgpu.SMEM(stage, jnp.float32),
        other=None if other is None else plgpu.SMEM((*stage, blocks.columns), other.dtype),
        ring=Ring.of(blocks.stages, copies),
    )
    name = "moe_gather" + "_weighed" * (weight is not None) + "_products" * (other is not None)
    kernel = lambda *refs: _Kernel(device, terms, *refs).run()  # noqa: E731
    found = launch(kernel, name, device, inputs, outputs, scratch, in_bounds=True)
    # Without a copy where 8 divides the number of rows.
    products = None if other is None else found.products.reshape(-1)[:count]
    return Gathered(found.rows.reshape(-1, width)[:count], products)


def _by_tile(values: Array, tiles: int, fill: int) -> Array:
    """`[M, K]` as `[K tiles, consumers, 8]`, so that what a tile needs of a term is one copy."""
    values = jnp.pad(values, ((0, tiles * TILE_ROWS - values.shape[0]), (0, 0)), constant_values=fill)
    return values.T.reshape(-1, NUM_CONSUMERS, GATHER_ROWS)


def _layout(dtype: DTypeLike) -> Any:
    """Half a warp along the columns of a row, 16 bytes of it a thread; two rows a warp, 8 a warpgroup."""
    vector = ACCESS_BYTES // jnp.dtype(dtype).itemsize
    tiling = Tiling(((GATHER_ROWS, HALF_WARP * vector), (WARP_ROWS, HALF_WARP * vector), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


class _Inputs(NamedTuple):
    index: Any
    x: Any
    weight: Any
    other: Any


class _Outputs(NamedTuple):
    rows: Any
    products: Any


class _Scratch(NamedTuple):
    x: Any
    index: Any
    weight: Any
    other: Any
    ring: Ring


class _Term(NamedTuple):
    """A weighed term, and its products before that."""

    value: Float[Array, "8 C"]
    product: Float[Array, " 8"] | None


def _copy(source: Any, to: Any, full: Any) -> None:
    # What an index past the end would read; none reaches that far.
    plgpu.copy_gmem_to_smem(source, to, full, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)


class _Kernel(NamedTuple):
    """What is static, and the references."""

    device: GpuTarget
    terms: int
    inputs: _Inputs
    outputs: _Outputs
    scratch: _Scratch

    @property
    def tiles(self) -> int:
        return self.inputs.index.shape[0] // self.terms

    @property
    def chunks(self) -> int:
        """Pieces of a row."""
        return self.outputs.rows.shape[2]

    def run(self) -> None:
        specialise(self.produce, self.consume)

    def produce(self) -> None:
        self.scratch.ring.drain(over_steps(jnp.int32(self.tiles), self.device.num_sms, self.fetch_tile))

    def fetch_tile(self, tile: jax.Array, filled: jax.Array) -> jax.Array:
        def piece(_: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            column, filled = carry
            fetch = functools.partial(self.fetch, tile, column)
            return column + self.scratch.x.shape[-1], lax.fori_loop(0, self.terms, fetch, filled)

        # A first column of which Mosaic knows no divisor: else it lays the pieces out in swizzled tiles, and a row no
        # longer goes there in one plain copy.
        return lax.fori_loop(0, self.chunks, piece, (jnp.minimum(filled, 0), filled))[1]

    def fetch(self, tile: jax.Array, column: jax.Array, term: jax.Array, filled: jax.Array) -> jax.Array:
        """Copy a piece of the rows of a term, with their indices and weights."""
        inputs, scratch = self.inputs, self.scratch
        slot, across = scratch.ring.acquire(filled), pl.ds(column, scratch.x.shape[-1])
        own, full = term * self.tiles + tile, scratch.ring.full.at[slot]

        def some(step: jax.Array, _: None) -> None:
            first = step * ROWS_AT_ONCE
            consumer, row = lax.div(first, jnp.int32(GATHER_ROWS)), lax.rem(first, jnp.int32(GATHER_ROWS))
            for n in range(ROWS_AT_ONCE):
                at = jnp.minimum(inputs.index[own, consumer, row + n], inputs.x.shape[0] - 1)
                _copy(inputs.x.at[at, across], scratch.x.at[slot, consumer, row + n], full)
                if inputs.other is not None:
                    at = jnp.minimum(tile * TILE_ROWS + first + n, inputs.other.shape[0] - 1)
                    _copy(inputs.other.at[at, across], scratch.other.at[slot, consumer, row + n], full)

        lax.fori_loop(0, TILE_ROWS // ROWS_AT_ONCE, some, None)
        _copy(inputs.index.at[own], scratch.index.at[slot], full)
        if inputs.weight is not None:
            _copy(inputs.weight.at[own], scratch.weight.at[slot], full)
        return filled + 1

    def consume(self) -> None:
        tile = functools.partial(self.tile, lax.axis_index("wg"))
        over_steps(jnp.int32(self.tiles), self.device.num_sms, tile)

    def term(self, wg: jax.Array, filled: jax.Array) -> _Term:
        """What the next stage holds."""
        scratch, slot = self.scratch, self.scratch.ring.wait(filled)

        def piece(ref: Any) -> jax.Array:
            return self.device.cast(ref[slot, wg].astype(jnp.float32), _layout(self.inputs.x.dtype))

        value = piece(scratch.x)
        used = scratch.index[slot, wg] < self.inputs.x.shape[0]
        value = jnp.where(lax.broadcast_in_dim(used, value.shape, (0,)), value, jnp.zeros_like(value))
        product = None if scratch.other is None else jnp.sum(value * piece(scratch.other), axis=1)
        if scratch.weight is not None:
            value = value * lax.broadcast_in_dim(scratch.weight[slot, wg], value.shape, (0,))
        scratch.ring.release(filled)
        return _Term(value, product)

    def tile(self, wg: jax.Array, tile: jax.Array, filled: jax.Array) -> jax.Array:
        """Add up this consumer's rows of a tile, piece by piece."""
        eight, outputs = tile * NUM_CONSUMERS + wg, self.outputs

        def column(chunk: jax.Array, products: jax.Array | None) -> jax.Array | None:
            first = filled + chunk * self.terms
            total, product = self.term(wg, first)
            if self.terms > 1:
                add = lambda term, total: total + self.term(wg, first + term).value  # noqa: E731
                total = lax.fori_loop(1, self.terms, add, total)

            @pl.when(eight < outputs.rows.shape[0])
            def _() -> None:
                outputs.rows[eight, :, chunk] = total.astype(outputs.rows.dtype)

            return None if products is None or product is None else products + product

        zeros = None if outputs.products is None else jnp.zeros(GATHER_ROWS, jnp.float32)
        products = lax.fori_loop(0, self.chunks, column, zeros)
        if outputs.products is not None:

            @pl.when(eight < outputs.rows.shape[0])
            def _() -> None:
                outputs.products[eight] = products

        return filled + self.chunks * self.terms
