"""Gather rows, weigh them, add them up; and, where asked, multiply the first of them with rows that lie in order.

`out[m] = sum_k weight[m, k] x[index[m, k]]` is dispatch (no weights), combine, and both of their derivatives.
Grid: one block per multiprocessor walks the tiles of 16 rows of the result. The producer fetches a piece of a row at a
time, one bulk copy each (up to 2 KB in a piece, many of them under way), with the tile's indices and weights; each
consumer weighs, adds up in float32 and stores 8 of the rows. A thread loads and stores 16 bytes at a time, the 16
threads of half a warp 256 bytes of a row. Indices past the end of `x` fetch its last row and select 0, so that nothing
that stands there reaches a result.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, DTypeLike, Float, Int

from moe_kernels.backends.gpu.common.launch import Device, Ring, launch, over_steps, ring_barriers, specialise
from moe_kernels.backends.gpu.sm90.tiling import ACCESS_BYTES, GATHER_ROWS, HALF_WARP, NUM_CONSUMERS, gather_blocks

TILE_ROWS = NUM_CONSUMERS * GATHER_ROWS
# Rows of a result that each of four warps holds, half a warp along each.
WARP_ROWS = GATHER_ROWS // 4
# Rows whose addresses the producer computes side by side: all 16 take more registers than it has.
ROWS_AT_ONCE = 4
# What an index past the end would read; none reaches that far.
_IN_BOUNDS = plgpu.OOBFillMode.PROMISE_IN_BOUNDS


class Gathered(NamedTuple):
    """The result, and the products of its first terms with other rows where those were given."""

    rows: Float[Array, "M D"]
    products: Float[Array, " M"] | None


def gather_rows(
    x: Float[Array, "N D"],
    index: Int[Array, "M K"],
    device: Device,
    *,
    weight: Float[Array, "M K"] | None = None,
    other: Float[Array, "M D"] | None = None,
) -> Gathered:
    """`out[m] = sum_k weight[m, k] x[index[m, k]]` in the dtype of `x`; an index of N or more contributes nothing.

    With `other`, products are `<x[index[m, 0]], other[m]>` without the weight, in float32.
    """
    (length, width), (count, terms) = x.shape, index.shape
    blocks = gather_blocks(width, x.dtype.itemsize, device.chip, products=other is not None)
    tiles, eights, chunks = -(-count // TILE_ROWS), -(-count // GATHER_ROWS), width // blocks.columns
    given = [a for a in (weight, other) if a is not None]

    def body(index_g: Any, x_g: Any, *refs: Any, **scratch: Any) -> None:
        weight_g = refs[0] if weight is not None else None
        other_g = refs[len(given) - 1] if other is not None else None
        out_g, product_g = refs[len(given)], refs[-1]
        ring = Ring(scratch["full"], scratch["empty"], blocks.stages)

        def produce() -> None:
            def fetch(tile: jax.Array, column: jax.Array, term: jax.Array, filled: jax.Array) -> jax.Array:
                slot, across = ring.acquire(filled), pl.ds(column, blocks.columns)
                own = term * tiles + tile

                def copy(source: Any, to: Any) -> None:
                    plgpu.copy_gmem_to_smem(source, to, ring.full.at[slot], oob_mode=_IN_BOUNDS)

                def some(step: jax.Array, _: None) -> None:
                    first = step * ROWS_AT_ONCE
                    consumer, row = lax.div(first, jnp.int32(GATHER_ROWS)), lax.rem(first, jnp.int32(GATHER_ROWS))
                    for n in range(ROWS_AT_ONCE):
                        at = jnp.minimum(index_g[own, consumer, row + n], length - 1)
                        copy(x_g.at[at, across], scratch["x_s"].at[slot, consumer, row + n])
                        if other_g is not None:
                            at = jnp.minimum(tile * TILE_ROWS + first + n, count - 1)
                            copy(other_g.at[at, across], scratch["other_s"].at[slot, consumer, row + n])

                lax.fori_loop(0, TILE_ROWS // ROWS_AT_ONCE, some, None)
                copy(index_g.at[own], scratch["index_s"].at[slot])
                if weight_g is not None:
                    copy(weight_g.at[own], scratch["weight_s"].at[slot])
                return filled + 1

            def tile(tile: jax.Array, filled: jax.Array) -> jax.Array:
                def piece(_: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                    column, filled = carry
                    filled = lax.fori_loop(0, terms, lambda term, filled: fetch(tile, column, term, filled), filled)
                    return column + blocks.columns, filled

                # A first column of which Mosaic knows no divisor: else it lays the pieces out in swizzled tiles, and a
                # row no longer goes there in one plain copy.
                return lax.fori_loop(0, chunks, piece, (jnp.minimum(filled, 0), filled))[1]

            ring.drain(over_steps(jnp.int32(tiles), device.num_sms, tile))

        def consume() -> None:
            wg = lax.axis_index("wg")

            def piece(name: str, slot: jax.Array) -> jax.Array:
                return device.cast(scratch[name][slot, wg].astype(jnp.float32), _layout(x.dtype))

            def term_of(filled: jax.Array) -> tuple[jax.Array, jax.Array | None]:
                """A weighed term, and its products before that."""
                slot = ring.wait(filled)
                value = piece("x_s", slot)
                used = scratch["index_s"][slot, wg] < length
                value = jnp.where(lax.broadcast_in_dim(used, value.shape, (0,)), value, jnp.zeros_like(value))
                product = jnp.sum(value * piece("other_s", slot), axis=1) if other is not None else None
                if weight is not None:
                    value = value * lax.broadcast_in_dim(scratch["weight_s"][slot, wg], value.shape, (0,))
                ring.release(filled)
                return value, product

            def tile(tile: jax.Array, filled: jax.Array) -> jax.Array:
                eight = tile * NUM_CONSUMERS + wg

                def column(chunk: jax.Array, products: jax.Array | None) -> jax.Array | None:
                    first = filled + chunk * terms
                    total, product = term_of(first)
                    if terms > 1:
                        total = lax.fori_loop(1, terms, lambda term, total: total + term_of(first + term)[0], total)

                    @pl.when(eight < eights)
                    def _() -> None:
                        out_g[eight, :, chunk] = total.astype(x.dtype)

                    return None if products is None or product is None else products + product

                if other is None:
                    lax.fori_loop(0, chunks, lambda chunk, _: column(chunk, None), None)
                else:
                    products = lax.fori_loop(0, chunks, column, jnp.zeros(GATHER_ROWS, jnp.float32))

                    @pl.when(eight < eights)
                    def _() -> None:
                        product_g[eight] = products

                return filled + chunks * terms

            over_steps(jnp.int32(tiles), device.num_sms, tile)

        specialise(produce, consume)

    stage = (blocks.stages, NUM_CONSUMERS, GATHER_ROWS)
    scratch: dict[str, Any] = {"x_s": plgpu.SMEM((*stage, blocks.columns), x.dtype)}
    scratch["index_s"] = plgpu.SMEM(stage, jnp.int32)
    out = [jax.ShapeDtypeStruct((eights, GATHER_ROWS, chunks, blocks.columns), x.dtype)]
    operands = [_by_tile(index, tiles, length), x]
    copies = TILE_ROWS + 1
    if weight is not None:
        scratch["weight_s"] = plgpu.SMEM(stage, jnp.float32)
        operands.append(_by_tile(weight, tiles, 0))
        copies += 1
    if other is not None:
        assert terms == 1
        scratch["other_s"] = plgpu.SMEM((*stage, blocks.columns), other.dtype)
        operands.append(other)
        out.append(jax.ShapeDtypeStruct((eights, GATHER_ROWS), jnp.float32))
        copies += TILE_ROWS
    scratch |= ring_barriers(blocks.stages, copies)
    name = "moe_gather" + ("_weighed" if weight is not None else "") + ("_products" if other is not None else "")
    rows, *products = launch(body, name, out, scratch, device, in_bounds=True)(*operands)
    # Without a copy where 8 divides the number of rows.
    rows = rows.reshape(-1, width)[:count]
    return Gathered(rows, products[0].reshape(-1)[:count] if products else None)


def _by_tile(values: Array, tiles: int, fill: int) -> Array:
    """`[M, K]` as `[K tiles, consumers, 8]`, so that what a tile needs of a term is one copy."""
    values = jnp.pad(values, ((0, tiles * TILE_ROWS - values.shape[0]), (0, 0)), constant_values=fill)
    return values.T.reshape(-1, NUM_CONSUMERS, GATHER_ROWS)


def _layout(dtype: DTypeLike) -> Any:
    """Half a warp along the columns of a row, 16 bytes of it a thread; two rows a warp, 8 a warpgroup."""
    vector = ACCESS_BYTES // jnp.dtype(dtype).itemsize
    tiling = Tiling(((GATHER_ROWS, HALF_WARP * vector), (WARP_ROWS, HALF_WARP * vector), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
