"""Gradient of the experts' matrices, `dW_e = X_eᵀ dY_e`, with both factors as they lie in memory.

Grid: one block per multiprocessor walks the tiles of `128 x columns` of every expert's matrix, an expert without rows
included (it stores zeros). The producer copies 64 rows of X and dY at a time; wgmma reads X transposed. Each consumer
holds 64 of the tile's rows. Where a copy of 64 rows reaches past the end of a run, the consumers first put zeros there,
in both factors, whatever stood there: X by the consumer that reads it, dY one half each, with a barrier between.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, DTypeLike, Float

from moe_kernels.backends.gpu.common.launch import Device, Ring, launch, over_steps, ring_barriers, specialise, swizzled
from moe_kernels.backends.gpu.common.schedule import RowTiles
from moe_kernels.backends.gpu.sm90.tiling import DEPTH, NUM_CONSUMERS, SWIZZLE_BYTES, WARPGROUP_ROWS, choose_blocks
from moe_kernels.types import ROW_ALIGNMENT


def weight_gradient(
    rows: Float[Array, "R D"],
    drows: Float[Array, "R F"],
    tiles: RowTiles,
    device: Device,
    *,
    dtype: DTypeLike,
) -> Float[Array, "E D F"]:
    """`dW_e = X_eᵀ dY_e` in the given dtype (16 bits or float32), exactly 0 without rows; `tiles` are 64 rows high."""
    (_, width), columns, num_experts = rows.shape, drows.shape[1], tiles.start.shape[0] - 1
    blocks = choose_blocks("weight_gradient", columns, device.chip)
    row_tiles, column_tiles = width // blocks.rows, columns // blocks.columns
    total = num_experts * row_tiles * column_tiles
    chunk, half = SWIZZLE_BYTES // jnp.dtype(dtype).itemsize, blocks.columns // NUM_CONSUMERS

    def body(first_g: Any, size_g: Any, start_g: Any, x_g: Any, dy_g: Any, dw_g: Any, **scratch: Any) -> None:
        x_s, dy_s, out_s, clean = scratch["x_s"], scratch["dy_s"], scratch["out_s"], scratch["clean"]
        ring = Ring(scratch["full"], scratch["empty"], blocks.stages)

        def place(step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            """Expert, first row and first column of the tile."""
            pair, n = lax.div(step, jnp.int32(column_tiles)), lax.rem(step, jnp.int32(column_tiles))
            expert, m = lax.div(pair, jnp.int32(row_tiles)), lax.rem(pair, jnp.int32(row_tiles))
            return expert, m * blocks.rows, n * blocks.columns

        def produce() -> None:
            def tile(step: jax.Array, filled: jax.Array) -> jax.Array:
                expert, row, column = place(step)

                def copy(i: jax.Array, filled: jax.Array) -> jax.Array:
                    slot, own = ring.acquire(filled), pl.ds(pl.multiple_of(first_g[i], ROW_ALIGNMENT), DEPTH)
                    plgpu.copy_gmem_to_smem(x_g.at[own, pl.ds(row, blocks.rows)], x_s.at[slot], ring.full.at[slot])
                    part = dy_g.at[own, pl.ds(column, blocks.columns)]
                    plgpu.copy_gmem_to_smem(part, dy_s.at[slot], ring.full.at[slot])
                    return filled + 1

                return lax.fori_loop(start_g[expert], start_g[expert + 1], copy, filled)

            ring.drain(over_steps(jnp.int32(total), device.num_sms, tile))

        def consume() -> None:
            wg = lax.axis_index("wg")

            def select(ref: Any, slot: jax.Array, columns: slice, size: jax.Array) -> None:
                """Zero past the end, whatever stood there."""
                value = ref[slot, :, columns]
                row = lax.broadcasted_iota(jnp.int32, value.shape, 0)
                ref[slot, :, columns] = jnp.where(row < size, value, jnp.zeros_like(value))

            def mask(slot: jax.Array, size: jax.Array) -> None:
                # What a warpgroup reads and writes itself must be a static slice: one branch for each.
                for i in range(NUM_CONSUMERS):

                    @pl.when(wg == i)
                    def _(i: int = i) -> None:
                        select(x_s, slot, slice(i * WARPGROUP_ROWS, (i + 1) * WARPGROUP_ROWS), size)
                        select(dy_s, slot, slice(i * half, (i + 1) * half), size)

                plgpu.commit_smem()
                plgpu.barrier_arrive(clean)
                plgpu.barrier_wait(clean)

            def accumulate(acc: Any, begin: jax.Array, end: jax.Array, filled: jax.Array) -> Any:
                def multiply(i: jax.Array, _: None) -> None:
                    fill = filled + i - begin
                    slot, size = ring.wait(fill), size_g[i]

                    @pl.when(size < DEPTH)
                    def _() -> None:
                        mask(slot, size)

                    x = x_s.at[slot, :, pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)]
                    plgpu.wgmma(acc, x.transpose((1, 0)), dy_s.at[slot])
                    # One product stays in flight; the one before it has read its stage.
                    plgpu.wgmma_wait(1)

                    @pl.when(i > begin)
                    def _() -> None:
                        ring.release(fill - 1)

                lax.fori_loop(begin, end, multiply, None)
                plgpu.wgmma_wait(0)

                @pl.when(end > begin)
                def _() -> None:
                    ring.release(filled + end - begin - 1)

                return acc[...]

            def tile(step: jax.Array, filled: jax.Array) -> jax.Array:
                expert, row, column = place(step)
                begin, end = start_g[expert], start_g[expert + 1]
                accumulator = plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, blocks.columns))
                dw = pl.run_scoped(lambda acc: accumulate(acc, begin, end, filled), accumulator)
                for n in range(blocks.columns // chunk):
                    # The copy before the last one read this buffer.
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    out_s[wg, n % 2] = dw[:, n * chunk : (n + 1) * chunk].astype(dtype)
                    plgpu.commit_smem()
                    own = pl.ds(row + wg * WARPGROUP_ROWS, WARPGROUP_ROWS)
                    plgpu.copy_smem_to_gmem(out_s.at[wg, n % 2], dw_g.at[expert, own, pl.ds(column + n * chunk, chunk)])
                return filled + (end - begin)

            over_steps(jnp.int32(total), device.num_sms, tile)
            plgpu.wait_smem_to_gmem(0)

        specialise(produce, consume)

    scratch = {
        "x_s": swizzled((blocks.stages, DEPTH, blocks.rows), rows.dtype),
        "dy_s": swizzled((blocks.stages, DEPTH, blocks.columns), rows.dtype),
        "out_s": swizzled((NUM_CONSUMERS, 2, WARPGROUP_ROWS, chunk), dtype),
        "clean": plgpu.Barrier(num_arrivals=NUM_CONSUMERS),
        **ring_barriers(blocks.stages, copies=2),
    }
    out = jax.ShapeDtypeStruct((num_experts, width, columns), dtype)
    kernel = launch(body, "moe_weight_gradient", out, scratch, device)
    return kernel(tiles.first, tiles.size, tiles.start, rows, drows)
