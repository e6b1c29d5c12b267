"""Sums over the rows of every expert, the gradient of its bias.

Grid: one block per multiprocessor walks stripes of 128 columns of every expert. The producer copies 64 rows at a time,
each consumer adds up 64 of the columns in float32 in a fixed order, rows past the end of a run left out by selection.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from moe_kernels.backends.gpu.common.launch import Device, Ring, launch, over_steps, ring_barriers, specialise, swizzled
from moe_kernels.backends.gpu.common.schedule import RowTiles
from moe_kernels.backends.gpu.sm90.tiling import CHUNK, DEPTH, NUM_CONSUMERS, SUM_STAGES, WARPGROUP_ROWS
from moe_kernels.types import ROW_ALIGNMENT


def column_sums(rows: Float[Array, "R F"], tiles: RowTiles, device: Device) -> Float[Array, "E F"]:
    """`s_e = sum of the rows of expert e`, float32; `tiles` are 64 rows high. Exactly 0 without rows."""
    columns, num_experts = rows.shape[1], tiles.start.shape[0] - 1
    stripes = columns // (NUM_CONSUMERS * CHUNK)
    total = num_experts * stripes

    def body(
        first_g: Any, size_g: Any, start_g: Any, x_g: Any, sum_g: Any, *, x_s: Any, sum_s: Any, **rest: Any
    ) -> None:
        ring = Ring(rest["full"], rest["empty"], SUM_STAGES)

        def column(step: jax.Array, consumer: Any) -> Any:
            return pl.ds((lax.rem(step, jnp.int32(stripes)) * NUM_CONSUMERS + consumer) * CHUNK, CHUNK)

        def produce() -> None:
            def stripe(step: jax.Array, filled: jax.Array) -> jax.Array:
                expert = lax.div(step, jnp.int32(stripes))

                def copy(i: jax.Array, filled: jax.Array) -> jax.Array:
                    slot = ring.acquire(filled)
                    own = pl.ds(pl.multiple_of(first_g[i], ROW_ALIGNMENT), DEPTH)
                    for consumer in range(NUM_CONSUMERS):
                        source = x_g.at[own, column(step, consumer)]
                        plgpu.copy_gmem_to_smem(source, x_s.at[slot, consumer], ring.full.at[slot])
                    return filled + 1

                return lax.fori_loop(start_g[expert], start_g[expert + 1], copy, filled)

            ring.drain(over_steps(jnp.int32(total), device.num_sms, stripe))

        def consume() -> None:
            wg = lax.axis_index("wg")

            def stripe(step: jax.Array, filled: jax.Array) -> jax.Array:
                expert = lax.div(step, jnp.int32(stripes))
                begin = start_g[expert]

                def add(i: jax.Array, partial: jax.Array) -> jax.Array:
                    slot = ring.wait(filled + i - begin)
                    value = x_s[slot, wg].astype(jnp.float32)
                    # These are plain reads, and the next copy into the stage is not: all of them are done before it.
                    plgpu.commit_smem()
                    ring.release(filled + i - begin)
                    row = lax.broadcasted_iota(jnp.int32, value.shape, 0)
                    return partial + jnp.where(row < size_g[i], value, jnp.zeros_like(value))

                zeros = jnp.zeros((WARPGROUP_ROWS, CHUNK), jnp.float32)
                partial = lax.fori_loop(begin, start_g[expert + 1], add, zeros)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                sum_s[wg] = jnp.sum(partial, axis=0)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(sum_s.at[wg], sum_g.at[expert, column(step, wg)])
                return filled + start_g[expert + 1] - begin

            over_steps(jnp.int32(total), device.num_sms, stripe)
            plgpu.wait_smem_to_gmem(0)

        specialise(produce, consume)

    scratch = {
        "x_s": swizzled((SUM_STAGES, NUM_CONSUMERS, DEPTH, CHUNK), rows.dtype),
        "sum_s": plgpu.SMEM((NUM_CONSUMERS, CHUNK), jnp.float32),
        **ring_barriers(SUM_STAGES, NUM_CONSUMERS),
    }
    out = jax.ShapeDtypeStruct((num_experts, columns), jnp.float32)
    return launch(body, "moe_column_sums", out, scratch, device)(tiles.first, tiles.size, tiles.start, rows)
