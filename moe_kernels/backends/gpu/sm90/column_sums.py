"""Sums over the rows of every expert, the gradient of its bias.

Grid: one block per multiprocessor walks stripes of 128 columns of every expert. The producer copies 64 rows at a time,
each consumer adds up 64 of the columns in float32 in a fixed order, rows past the end of a run left out by selection.
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
from moe_kernels.backends.gpu.sm90.tiling import CHUNK, DEPTH, SUM_STAGES, WARPGROUP_ROWS
from moe_kernels.backends.gpu.sm90.wgmma import swizzled
from moe_kernels.types import ROW_ALIGNMENT


def column_sums(rows: Float[Array, "R F"], tiles: RowTiles, device: GpuTarget) -> Float[Array, "E F"]:
    """`s_e = sum of the rows of expert e`, float32; `tiles` are 64 rows high. Exactly 0 without rows."""
    scratch = _Scratch(
        rows=swizzled((SUM_STAGES, NUM_CONSUMERS, DEPTH, CHUNK), rows.dtype),
        sums=plgpu.SMEM((NUM_CONSUMERS, CHUNK), jnp.float32),
        ring=Ring.of(SUM_STAGES, NUM_CONSUMERS),
    )
    return launch(
        lambda *refs: _Kernel(device.num_sms, *refs).run(),
        "moe_column_sums",
        device,
        _Inputs(tiles.first, tiles.size, tiles.start, rows),
        jax.ShapeDtypeStruct((tiles.start.shape[0] - 1, rows.shape[1]), jnp.float32),
        scratch,
    )


class _Inputs(NamedTuple):
    first: Any
    size: Any
    start: Any
    rows: Any


class _Scratch(NamedTuple):
    rows: Any
    sums: Any
    ring: Ring


class _Kernel(NamedTuple):
    """What is static, and the references."""

    num_sms: int
    inputs: _Inputs
    sums: Any
    scratch: _Scratch

    @property
    def stripes(self) -> int:
        return self.sums.shape[1] // (NUM_CONSUMERS * CHUNK)

    def run(self) -> None:
        total = self.sums.shape[0] * self.stripes
        specialise(lambda: self.produce(total), lambda: self.consume(total))

    def column(self, step: jax.Array, consumer: Any) -> Any:
        return pl.ds((lax.rem(step, jnp.int32(self.stripes)) * NUM_CONSUMERS + consumer) * CHUNK, CHUNK)

    def produce(self, total: int) -> None:
        self.scratch.ring.drain(over_steps(jnp.int32(total), self.num_sms, self.fetch))

    def fetch(self, step: jax.Array, filled: jax.Array) -> jax.Array:
        """Copy a stripe of an expert's rows, 64 at a time."""
        inputs, ring, expert = self.inputs, self.scratch.ring, lax.div(step, jnp.int32(self.stripes))

        def copy(i: jax.Array, filled: jax.Array) -> jax.Array:
            slot = ring.acquire(filled)
            own = pl.ds(pl.multiple_of(inputs.first[i], ROW_ALIGNMENT), DEPTH)
            for consumer in range(NUM_CONSUMERS):
                source = inputs.rows.at[own, self.column(step, consumer)]
                plgpu.copy_gmem_to_smem(source, self.scratch.rows.at[slot, consumer], ring.full.at[slot])
            return filled + 1

        return lax.fori_loop(inputs.start[expert], inputs.start[expert + 1], copy, filled)

    def consume(self, total: int) -> None:
        over_steps(jnp.int32(total), self.num_sms, functools.partial(self.stripe, lax.axis_index("wg")))
        plgpu.wait_smem_to_gmem(0)

    def stripe(self, wg: jax.Array, step: jax.Array, filled: jax.Array) -> jax.Array:
        """Add up this consumer's half of a stripe, and store it."""
        inputs, scratch, expert = self.inputs, self.scratch, lax.div(step, jnp.int32(self.stripes))
        begin = inputs.start[expert]

        def add(i: jax.Array, partial: jax.Array) -> jax.Array:
            slot = scratch.ring.wait(filled + i - begin)
            value = scratch.rows[slot, wg].astype(jnp.float32)
            # These are plain reads, and the next copy into the stage is not: all of them are done before it.
            plgpu.commit_smem()
            scratch.ring.release(filled + i - begin)
            row = lax.broadcasted_iota(jnp.int32, value.shape, 0)
            return partial + jnp.where(row < inputs.size[i], value, jnp.zeros_like(value))

        zeros = jnp.zeros((WARPGROUP_ROWS, CHUNK), jnp.float32)
        partial = lax.fori_loop(begin, inputs.start[expert + 1], add, zeros)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        scratch.sums[wg] = jnp.sum(partial, axis=0)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scratch.sums.at[wg], self.sums.at[expert, self.column(step, wg)])
        return filled + inputs.start[expert + 1] - begin
