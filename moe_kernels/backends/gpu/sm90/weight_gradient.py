"""Gradient of the experts' matrices, `dW_e = X_eᵀ dY_e`, with both factors as they lie in memory.

Grid: one block per multiprocessor walks the tiles of `128 x columns` of every expert's matrix, an expert without rows
included (it stores zeros). The producer copies 64 rows of X and dY at a time; wgmma reads X transposed. Each consumer
holds 64 of the tile's rows. Where a copy of 64 rows reaches past the end of a run, the consumers first put zeros there,
in both factors, whatever stood there: X by the consumer that reads it, dY one half each, with a barrier between.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, DTypeLike, Float

from moe_kernels.backends.gpu.common.launch import NUM_CONSUMERS, GpuTarget, Ring, launch, over_steps, specialise
from moe_kernels.backends.gpu.common.schedule import RowTiles
from moe_kernels.backends.gpu.sm90.tiling import DEPTH, SWIZZLE_BYTES, WARPGROUP_ROWS, Blocks, choose_blocks
from moe_kernels.backends.gpu.sm90.wgmma import add_products, swizzled
from moe_kernels.types import ROW_ALIGNMENT


def weight_gradient(
    rows: Float[Array, "R D"],
    drows: Float[Array, "R F"],
    tiles: RowTiles,
    device: GpuTarget,
    *,
    dtype: DTypeLike,
) -> Float[Array, "E D F"]:
    """`dW_e = X_eᵀ dY_e` in the given dtype (16 bits or float32), exactly 0 without rows; `tiles` are 64 rows high."""
    columns, chunk = drows.shape[1], SWIZZLE_BYTES // jnp.dtype(dtype).itemsize
    blocks = choose_blocks("weight_gradient", columns, device.chip)
    scratch = _Scratch(
        rows=swizzled((blocks.stages, DEPTH, blocks.rows), rows.dtype),
        drows=swizzled((blocks.stages, DEPTH, blocks.columns), rows.dtype),
        out=swizzled((NUM_CONSUMERS, 2, WARPGROUP_ROWS, chunk), dtype),
        clean=plgpu.Barrier(num_arrivals=NUM_CONSUMERS),
        ring=Ring.of(blocks.stages, copies=2),
    )
    return launch(
        lambda *refs: _Kernel(blocks, device.num_sms, *refs).run(),
        "moe_weight_gradient",
        device,
        _Inputs(tiles.first, tiles.size, tiles.start, rows, drows),
        jax.ShapeDtypeStruct((tiles.start.shape[0] - 1, rows.shape[1], columns), dtype),
        scratch,
    )


class _Inputs(NamedTuple):
    first: Any
    size: Any
    start: Any
    rows: Any
    drows: Any


class _Scratch(NamedTuple):
    rows: Any
    drows: Any
    out: Any
    clean: Any
    """Whether both consumers have put zeros past the end of a run."""
    ring: Ring


class _Kernel(NamedTuple):
    """What is static, and the references."""

    blocks: Blocks
    num_sms: int
    inputs: _Inputs
    gradient: Any
    scratch: _Scratch

    @property
    def tiles(self) -> tuple[int, int, int]:
        """Of experts, of an expert's rows, and of their columns."""
        num_experts, width, columns = self.gradient.shape
        return num_experts, width // self.blocks.rows, columns // self.blocks.columns

    def run(self) -> None:
        experts, rows, columns = self.tiles
        total = experts * rows * columns
        specialise(lambda: self.produce(total), lambda: self.consume(total))

    def place(self, step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Expert, first row and first column of the tile."""
        _, row_tiles, column_tiles = self.tiles
        pair, n = lax.div(step, jnp.int32(column_tiles)), lax.rem(step, jnp.int32(column_tiles))
        expert, m = lax.div(pair, jnp.int32(row_tiles)), lax.rem(pair, jnp.int32(row_tiles))
        return expert, m * self.blocks.rows, n * self.blocks.columns

    def produce(self, total: int) -> None:
        self.scratch.ring.drain(over_steps(jnp.int32(total), self.num_sms, self.fetch))

    def fetch(self, step: jax.Array, filled: jax.Array) -> jax.Array:
        """Copy an expert's rows, 64 at a time."""
        expert, row, column = self.place(step)
        inputs, scratch = self.inputs, self.scratch

        def copy(i: jax.Array, filled: jax.Array) -> jax.Array:
            slot, own = scratch.ring.acquire(filled), pl.ds(pl.multiple_of(inputs.first[i], ROW_ALIGNMENT), DEPTH)
            full = scratch.ring.full.at[slot]
            plgpu.copy_gmem_to_smem(inputs.rows.at[own, pl.ds(row, self.blocks.rows)], scratch.rows.at[slot], full)
            part = inputs.drows.at[own, pl.ds(column, self.blocks.columns)]
            plgpu.copy_gmem_to_smem(part, scratch.drows.at[slot], full)
            return filled + 1

        return lax.fori_loop(inputs.start[expert], inputs.start[expert + 1], copy, filled)

    def consume(self, total: int) -> None:
        over_steps(jnp.int32(total), self.num_sms, functools.partial(self.tile, lax.axis_index("wg")))
        plgpu.wait_smem_to_gmem(0)

    def tile(self, wg: jax.Array, step: jax.Array, filled: jax.Array) -> jax.Array:
        """Add up this consumer's half of a tile, and store it."""
        expert, row, column = self.place(step)
        begin, end = self.inputs.start[expert], self.inputs.start[expert + 1]
        scratch, chunk = self.scratch, self.scratch.out.shape[-1]

        def multiply(acc: Any, k: jax.Array, slot: jax.Array) -> None:
            size = self.inputs.size[begin + k]
            pl.when(size < DEPTH)(lambda: self.mask(wg, slot, size))
            x = scratch.rows.at[slot, :, pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)]
            plgpu.wgmma(acc, x.transpose((1, 0)), scratch.drows.at[slot])

        dw = add_products(self.blocks.columns, scratch.ring, filled, end - begin, multiply)
        for n in range(self.blocks.columns // chunk):
            # The copy before the last one read this buffer.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            scratch.out[wg, n % 2] = dw[:, n * chunk : (n + 1) * chunk].astype(self.gradient.dtype)
            plgpu.commit_smem()
            own = pl.ds(row + wg * WARPGROUP_ROWS, WARPGROUP_ROWS)
            place = self.gradient.at[expert, own, pl.ds(column + n * chunk, chunk)]
            plgpu.copy_smem_to_gmem(scratch.out.at[wg, n % 2], place)
        return filled + (end - begin)

    def mask(self, wg: jax.Array, slot: jax.Array, size: jax.Array) -> None:
        """Put zeros past the end of a run, and wait for the other consumer."""
        scratch, half = self.scratch, self.blocks.columns // NUM_CONSUMERS

        def halves(consumer: int) -> None:
            select(scratch.rows, slot, slice(consumer * WARPGROUP_ROWS, (consumer + 1) * WARPGROUP_ROWS), size)
            select(scratch.drows, slot, slice(consumer * half, (consumer + 1) * half), size)

        # What a warpgroup reads and writes itself must be a static slice: one branch for each.
        for consumer in range(NUM_CONSUMERS):
            pl.when(wg == consumer)(functools.partial(halves, consumer))
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch.clean)
        plgpu.barrier_wait(scratch.clean)


def select(ref: Any, slot: jax.Array, columns: slice, size: jax.Array) -> None:
    """Zero past the end, whatever stood there."""
    value = ref[slot, :, columns]
    row = lax.broadcasted_iota(jnp.int32, value.shape, 0)
    ref[slot, :, columns] = jnp.where(row < size, value, jnp.zeros_like(value))
