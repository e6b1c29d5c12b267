"""Rows times their expert's matrix, with what follows done before the result leaves the registers.

Grid: one block per multiprocessor walks the tiles of `128 x columns` that have rows, columns fastest, so that the
blocks at work at one time share an expert's matrix in the L2 cache. The producer copies 64-deep slices of rows and
matrix into the ring, ahead across tiles; each consumer holds 64 rows of the tile in its float32 accumulator, and
multiplies nothing where all of them lie past the end of the run. Results leave through two 64 x 64 buffers a consumer;
rows past the end are not stored, beyond the multiple of 8 that a run is rounded up to. A row is only ever read into
its own result, so that NaN past the end reaches nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from moe_kernels.backends.gpu.common.activation import activate, activate_and_slope
from moe_kernels.backends.gpu.common.launch import (
    Device,
    Ring,
    launch,
    over_steps,
    ring_barriers,
    specialise,
    store_rows,
    swizzled,
)
from moe_kernels.backends.gpu.common.schedule import RowTiles
from moe_kernels.backends.gpu.sm90.tiling import CHUNK, DEPTH, NUM_CONSUMERS, WARPGROUP_ROWS, Kernel, choose_blocks
from moe_kernels.types import ROW_ALIGNMENT, MatmulActivation

RowEpilogue = Literal["store", "activate", "gated", "activate_backward"]


def row_matmul(
    rows: Float[Array, "R D"],
    weight: Float[Array, "E D F"] | Float[Array, "E F D"],
    tiles: RowTiles,
    device: Device,
    *,
    epilogue: RowEpilogue = "store",
    transposed: bool = False,
    bias: Float[Array, "E F"] | None = None,
    hidden: Float[Array, "R F"] | None = None,
    activation: MatmulActivation = "gelu_tanh",
    keep: bool = True,
) -> tuple[Float[Array, "R _"], ...]:
    """With `z = x W_e + b_e`, or `x W_eᵀ` for a `transposed` weight `[E, F, D]`, give what the epilogue asks for.

    "store": z; "activate": z and act(z), both rounded to the dtype of the rows, the second computed from the rounded
    first; "gated": z, in which 64 columns of the gate and 64 of what it lets pass take turns, and the product
    act(gate) up `[R, F / 2]`, computed from rounded factors; "activate_backward": z act'(hidden) and act(hidden).
    Where no gradient is wanted, "activate" and "gated" leave z out (`keep=False`). `tiles` are 128 rows high.
    """
    num_rows, depth = rows.shape
    columns = weight.shape[1] if transposed else weight.shape[2]
    kernel: Kernel = "gated_erf" if (epilogue, activation) == ("gated", "gelu_erf") else epilogue
    blocks = choose_blocks(kernel, columns, device.chip, bias=bias is not None)
    # An epilogue that reads the hidden layer has registers for two chunks, and a buffer for each.
    assert hidden is None or blocks.columns == 2 * CHUNK
    column_tiles, slices, chunks = columns // blocks.columns, depth // DEPTH, blocks.columns // CHUNK
    dtype, kept = rows.dtype, keep or epilogue not in ("activate", "gated")
    # A gate and what it lets pass lie in one tile, and a bias would have to take turns with another.
    assert epilogue != "gated" or (chunks % 2 == 0 and bias is None)
    widths = [columns] if kept else []
    if epilogue != "store":
        widths.append(columns // 2 if epilogue == "gated" else columns)
    last = len(widths) - 1
    extra = [a for a in (bias, hidden) if a is not None]

    def body(
        expert_g: Any, first_g: Any, size_g: Any, start_g: Any, x_g: Any, w_g: Any, *refs: Any, **scratch: Any
    ) -> None:
        extra_g, out_g = refs[: len(extra)], refs[len(extra) :]
        x_s, w_s, out_s = scratch["x_s"], scratch["w_s"], scratch["out_s"]
        ring = Ring(scratch["full"], scratch["empty"], blocks.stages)
        total = start_g[tiles.start.shape[0] - 1] * column_tiles

        def place(step: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Tile of rows, and first column."""
            return lax.div(step, jnp.int32(column_tiles)), lax.rem(step, jnp.int32(column_tiles)) * blocks.columns

        def produce() -> None:
            def tile(step: jax.Array, filled: jax.Array) -> jax.Array:
                m, column = place(step)
                expert, own = expert_g[m], pl.ds(pl.multiple_of(first_g[m], ROW_ALIGNMENT), blocks.rows)
                across = pl.ds(column, blocks.columns)

                def copy(k: jax.Array, filled: jax.Array) -> jax.Array:
                    slot, deep = ring.acquire(filled), pl.ds(k * DEPTH, DEPTH)
                    plgpu.copy_gmem_to_smem(x_g.at[own, deep], x_s.at[slot], ring.full.at[slot])
                    part = w_g.at[expert, across, deep] if transposed else w_g.at[expert, deep, across]
                    plgpu.copy_gmem_to_smem(part, w_s.at[slot], ring.full.at[slot])
                    return filled + 1

                return lax.fori_loop(0, slices, copy, filled)

            ring.drain(over_steps(total, device.num_sms, tile))

        def consume() -> None:
            wg = lax.axis_index("wg")

            def accumulate(acc: Any, filled: jax.Array) -> Any:
                def multiply(k: jax.Array, _: None) -> None:
                    slot = ring.wait(filled + k)
                    x = x_s.at[slot, pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)]
                    w = w_s.at[slot].transpose((1, 0)) if transposed else w_s.at[slot]
                    plgpu.wgmma(acc, x, w)
                    # One product stays in flight; the one before it has read its stage.
                    plgpu.wgmma_wait(1)

                    @pl.when(k > 0)
                    def _() -> None:
                        ring.release(filled + k - 1)

                lax.fori_loop(0, slices, multiply, None)
                plgpu.wgmma_wait(0)
                ring.release(filled + slices - 1)
                return acc[...]

            def work(m: jax.Array, column: jax.Array, size: jax.Array, filled: jax.Array) -> None:
                row = pl.multiple_of(first_g[m], ROW_ALIGNMENT) + wg * WARPGROUP_ROWS
                used = jnp.minimum(
                    lax.div(size + (ROW_ALIGNMENT - 1), jnp.int32(ROW_ALIGNMENT)) * ROW_ALIGNMENT, WARPGROUP_ROWS
                )

                def fetch_hidden(chunk: int) -> None:
                    source = extra_g[-1].at[pl.ds(row, WARPGROUP_ROWS), pl.ds(column + chunk * CHUNK, CHUNK)]
                    barrier = scratch["hidden_full"].at[2 * wg + chunk]
                    plgpu.copy_gmem_to_smem(source, scratch["hidden_s"].at[wg, chunk], barrier)

                # What the epilogue reads is fetched while the matmul runs.
                if bias is not None:
                    source = extra_g[0].at[expert_g[m], pl.ds(column, blocks.columns)]
                    plgpu.copy_gmem_to_smem(source, scratch["bias_s"].at[wg], scratch["bias_full"].at[wg])
                if hidden is not None:
                    for chunk in range(chunks):
                        fetch_hidden(chunk)

                z = pl.run_scoped(
                    lambda acc: accumulate(acc, filled), plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, blocks.columns))
                )
                if bias is not None:
                    plgpu.barrier_wait(scratch["bias_full"].at[wg])

                def before(chunk: int) -> jax.Array:
                    across = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
                    value = z[:, across]
                    if bias is None:
                        return value
                    return value + lax.broadcast_in_dim(scratch["bias_s"][wg, across], value.shape, (1,))

                for n, (i, across, result) in enumerate(results(before, wg, column)):
                    # All copies of the last tile have read their buffers; in a tile, the copy before the last one.
                    plgpu.wait_smem_to_gmem(1 if n else 0, wait_read_only=True)
                    out_s[wg, n % 2] = result
                    plgpu.commit_smem()
                    store_rows(out_s.at[wg, n % 2], out_g[i], row, used, pl.ds(across, CHUNK))

            def results(before: Any, wg: Any, column: jax.Array) -> Iterator[tuple[int, jax.Array, jax.Array]]:
                """What is stored, chunk by chunk: in which output, from which column on, the values."""
                for chunk in range(0, chunks, 2 if epilogue == "gated" else 1):
                    own, value = column + chunk * CHUNK, before(chunk)
                    if epilogue == "activate_backward":
                        plgpu.barrier_wait(scratch["hidden_full"].at[2 * wg + chunk])
                        h = scratch["hidden_s"][wg, chunk].astype(jnp.float32)
                        activated, slope = activate_and_slope(h, activation)
                        yield 0, own, (value * slope).astype(dtype)
                        yield 1, own, activated.astype(dtype)
                        continue
                    rounded = value.astype(dtype)
                    if kept:
                        yield 0, own, rounded
                    if epilogue == "activate":
                        yield last, own, activate(rounded.astype(jnp.float32), activation).astype(dtype)
                    if epilogue == "gated":
                        up = before(chunk + 1).astype(dtype)
                        if kept:
                            yield 0, own + CHUNK, up
                        half = pl.multiple_of(lax.div(own, jnp.int32(2)), CHUNK)
                        # Only now, so that no float32 value is live while factors are stored.
                        activated = activate(rounded.astype(jnp.float32), activation)
                        yield last, half, (activated * up.astype(jnp.float32)).astype(dtype)

            def skip(filled: jax.Array) -> None:
                def pass_on(k: jax.Array, _: None) -> None:
                    ring.wait(filled + k)
                    ring.release(filled + k)

                lax.fori_loop(0, slices, pass_on, None)

            def tile(step: jax.Array, filled: jax.Array) -> jax.Array:
                m, column = place(step)
                size = size_g[m] - wg * WARPGROUP_ROWS
                lax.cond(size > 0, lambda: work(m, column, size, filled), lambda: skip(filled))
                return filled + slices

            over_steps(total, device.num_sms, tile)
            plgpu.wait_smem_to_gmem(0)

        specialise(produce, consume)

    matrix = (blocks.columns, DEPTH) if transposed else (DEPTH, blocks.columns)
    buffers = (NUM_CONSUMERS, 2, WARPGROUP_ROWS, CHUNK)
    scratch = {
        "x_s": swizzled((blocks.stages, blocks.rows, DEPTH), dtype),
        "w_s": swizzled((blocks.stages, *matrix), dtype),
        "out_s": swizzled(buffers, dtype),
        **ring_barriers(blocks.stages, copies=2),
    }
    if bias is not None:
        scratch["bias_s"] = plgpu.SMEM((NUM_CONSUMERS, blocks.columns), jnp.float32)
        scratch["bias_full"] = plgpu.Barrier(num_barriers=NUM_CONSUMERS)
    if hidden is not None:
        scratch["hidden_s"] = swizzled(buffers, dtype)
        scratch["hidden_full"] = plgpu.Barrier(num_barriers=2 * NUM_CONSUMERS)
    out = tuple(jax.ShapeDtypeStruct((num_rows, width), dtype) for width in widths)
    name = f"moe_rows_{kernel}" if kept else f"moe_rows_{kernel}_alone"
    return tuple(
        launch(body, name, out, scratch, device)(
            tiles.expert, tiles.first, tiles.size, tiles.start, rows, weight, *extra
        )
    )
