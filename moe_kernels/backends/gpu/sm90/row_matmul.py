"""Rows times their expert's matrix, with what follows done before the result leaves the registers.

Grid: one block per multiprocessor walks the tiles of `128 x columns` that have rows, columns fastest, so that the
blocks at work at one time share an expert's matrix in the L2 cache. The producer copies 64-deep slices of rows and
matrix into the ring, ahead across tiles; each consumer holds 64 rows of the tile in its float32 accumulator, and
multiplies nothing where all of them lie past the end of the run. Results leave through two 64 x 64 buffers a consumer;
rows past the end are not stored, beyond the multiple of 8 that a run is rounded up to. A row is only ever read into
its own result, so that NaN past the end reaches nothing.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from moe_kernels.backends.gpu.common.launch import NUM_CONSUMERS, GpuTarget, Ring, launch, over_steps, specialise
from moe_kernels.backends.gpu.common.schedule import RowTiles
from moe_kernels.backends.gpu.sm90.epilogues import Epilogue, Fetched, Results, Store, TileProducts
from moe_kernels.backends.gpu.sm90.tiling import CHUNK, DEPTH, WARPGROUP_ROWS, Blocks, choose_blocks
from moe_kernels.backends.gpu.sm90.wgmma import add_products, store_rows, swizzled
from moe_kernels.types import ROW_ALIGNMENT


def row_matmul(
    rows: Float[Array, "R D"],
    weight: Float[Array, "E D F"] | Float[Array, "E F D"],
    tiles: RowTiles,
    device: GpuTarget,
    epilogue: Epilogue = Store(),  # noqa: B008 (frozen)
    *,
    transposed: bool = False,
    bias: Float[Array, "E F"] | None = None,
    hidden: Float[Array, "R F"] | None = None,
) -> Results:
    """With `z = x W_e + b_e`, or `x W_eᵀ` for a `transposed` weight `[E, F, D]`, give what the epilogue makes of it.

    `tiles` are 128 rows high; `hidden` is for an epilogue that reads the hidden layer.
    """
    columns = weight.shape[1] if transposed else weight.shape[2]
    blocks = choose_blocks(epilogue.kernel, columns, device.chip, bias=bias is not None)
    buffers = swizzled((NUM_CONSUMERS, 2, WARPGROUP_ROWS, CHUNK), rows.dtype)
    scratch = _Scratch(
        rows=swizzled((blocks.stages, blocks.rows, DEPTH), rows.dtype),
        weight=swizzled((blocks.stages, *_matrix(blocks, transposed)), rows.dtype),
        out=buffers,
        ring=Ring.of(blocks.stages, copies=2),
        bias=None if bias is None else Fetched(
            plgpu.SMEM((NUM_CONSUMERS, blocks.columns), jnp.float32), plgpu.Barrier(num_barriers=NUM_CONSUMERS)
        ),
        hidden=None if hidden is None else Fetched(buffers, plgpu.Barrier(num_barriers=2 * NUM_CONSUMERS)),
    )  # fmt: skip
    widths = epilogue.widths(columns)
    outputs = jax.tree.map(lambda width: jax.ShapeDtypeStruct((rows.shape[0], width), rows.dtype), widths)
    return launch(
        lambda *refs: _Kernel(epilogue, blocks, transposed, device.num_sms, *refs).run(),
        f"moe_rows_{epilogue.name}",
        device,
        _Inputs(tiles, rows, weight, bias, hidden),
        outputs,
        scratch,
    )


def _matrix(blocks: Blocks, transposed: bool) -> tuple[int, int]:
    """A slice of the matrix as it lies in memory."""
    return (blocks.columns, DEPTH) if transposed else (DEPTH, blocks.columns)


class _Inputs(NamedTuple):
    tiles: RowTiles
    rows: Any
    weight: Any
    bias: Any
    hidden: Any


class _Scratch(NamedTuple):
    rows: Any
    weight: Any
    out: Any
    ring: Ring
    bias: Fetched | None
    hidden: Fetched | None


class _Kernel(NamedTuple):
    """What is static, and the references."""

    epilogue: Epilogue
    blocks: Blocks
    transposed: bool
    num_sms: int
    inputs: _Inputs
    outputs: Results
    scratch: _Scratch

    @property
    def column_tiles(self) -> int:
        return self.inputs.weight.shape[1 if self.transposed else 2] // self.blocks.columns

    @property
    def slices(self) -> int:
        return self.inputs.rows.shape[1] // DEPTH

    def run(self) -> None:
        start = self.inputs.tiles.start
        total = start[start.shape[0] - 1] * self.column_tiles
        specialise(lambda: self.produce(total), lambda: self.consume(total))

    def place(self, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tile of rows, and first column."""
        across = jnp.int32(self.column_tiles)
        return lax.div(step, across), lax.rem(step, across) * self.blocks.columns

    def produce(self, total: jax.Array) -> None:
        self.scratch.ring.drain(over_steps(total, self.num_sms, self.fetch))

    def fetch(self, step: jax.Array, filled: jax.Array) -> jax.Array:
        """Copy the slices of a tile's rows and matrix."""
        m, column = self.place(step)
        tiles, scratch = self.inputs.tiles, self.scratch
        expert, own = tiles.expert[m], pl.ds(pl.multiple_of(tiles.first[m], ROW_ALIGNMENT), self.blocks.rows)
        across = pl.ds(column, self.blocks.columns)

        def copy(k: jax.Array, filled: jax.Array) -> jax.Array:
            slot, deep = scratch.ring.acquire(filled), pl.ds(k * DEPTH, DEPTH)
            full = scratch.ring.full.at[slot]
            plgpu.copy_gmem_to_smem(self.inputs.rows.at[own, deep], scratch.rows.at[slot], full)
            place = (expert, across, deep) if self.transposed else (expert, deep, across)
            plgpu.copy_gmem_to_smem(self.inputs.weight.at[place], scratch.weight.at[slot], full)
            return filled + 1

        return lax.fori_loop(0, self.slices, copy, filled)

    def consume(self, total: jax.Array) -> None:
        over_steps(total, self.num_sms, functools.partial(self.tile, lax.axis_index("wg")))
        plgpu.wait_smem_to_gmem(0)

    def tile(self, wg: jax.Array, step: jax.Array, filled: jax.Array) -> jax.Array:
        """Work on this consumer's half of a tile, if it has rows."""
        m, column = self.place(step)
        size = self.inputs.tiles.size[m] - wg * WARPGROUP_ROWS
        lax.cond(size > 0, lambda: self.work(wg, m, column, size, filled), lambda: self.skip(filled))
        return filled + self.slices

    def skip(self, filled: jax.Array) -> None:
        def pass_on(k: jax.Array, _: None) -> None:
            self.scratch.ring.wait(filled + k)
            self.scratch.ring.release(filled + k)

        lax.fori_loop(0, self.slices, pass_on, None)

    def work(self, wg: jax.Array, m: jax.Array, column: jax.Array, size: jax.Array, filled: jax.Array) -> None:
        """Multiply `size` rows or more, and store them."""
        scratch = self.scratch
        row = pl.multiple_of(self.inputs.tiles.first[m], ROW_ALIGNMENT) + wg * WARPGROUP_ROWS
        eights = lax.div(size + (ROW_ALIGNMENT - 1), jnp.int32(ROW_ALIGNMENT))
        used = jnp.minimum(eights * ROW_ALIGNMENT, WARPGROUP_ROWS)
        self.fetch_beside(wg, m, row, column)

        def multiply(acc: Any, k: jax.Array, slot: jax.Array) -> None:
            x, w = scratch.rows.at[slot, pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)], scratch.weight.at[slot]
            plgpu.wgmma(acc, x, w.transpose((1, 0)) if self.transposed else w)

        products = add_products(self.blocks.columns, scratch.ring, filled, self.slices, multiply)
        if scratch.bias is not None:
            plgpu.barrier_wait(scratch.bias.full.at[wg])
        tile = TileProducts(products, scratch.bias, scratch.hidden, self.outputs, wg, column)
        for n, (output, across, values) in enumerate(self.epilogue.results(tile)):
            # All copies of the last tile have read their buffers; in a tile, the copy before the last one.
            plgpu.wait_smem_to_gmem(1 if n else 0, wait_read_only=True)
            scratch.out[wg, n % 2] = values
            plgpu.commit_smem()
            store_rows(scratch.out.at[wg, n % 2], output, row, used, pl.ds(across, CHUNK))

    def fetch_beside(self, wg: jax.Array, m: jax.Array, row: jax.Array, column: jax.Array) -> None:
        """What the epilogue reads is fetched while the matmul runs."""
        inputs, bias, hidden = self.inputs, self.scratch.bias, self.scratch.hidden
        if bias is not None:
            source = inputs.bias.at[inputs.tiles.expert[m], pl.ds(column, self.blocks.columns)]
            plgpu.copy_gmem_to_smem(source, bias.buffer.at[wg], bias.full.at[wg])
        if hidden is not None:
            for chunk in range(self.blocks.columns // CHUNK):
                source = inputs.hidden.at[pl.ds(row, WARPGROUP_ROWS), pl.ds(column + chunk * CHUNK, CHUNK)]
                plgpu.copy_gmem_to_smem(source, hidden.buffer.at[wg, chunk], hidden.full.at[2 * wg + chunk])
