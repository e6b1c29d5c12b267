"""Grouped matmul for TPU, forward: `y = x W_e`, with a bias and an activation, or times a second matmul (gated MLPs).

Grid (core, item, chunk of F), as in the expert MLP: the rows `x` of an item stay in VMEM while chunks of its expert's
weights stream through, each read once for an item; a chunk of `y` leaves at every step. What an activation was of is
not kept: the backward pass has rows and weights in VMEM anyway, and computes it again.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from moe_kernels.backends.base import MatmulStatic, MatmulWeights, epilogue_of
from moe_kernels.backends.tpu.common.grid import Grid, grid_of, scalars_of, sizes_of
from moe_kernels.backends.tpu.common.launch import Call, Operand, Target, launch, result
from moe_kernels.backends.tpu.common.products import parts_of, result_of
from moe_kernels.backends.tpu.common.rows import RowCopies, Scalar, Scalars, over_pieces, pieces_of
from moe_kernels.backends.tpu.common.step import ChunkCopies, this_step
from moe_kernels.backends.tpu.common.tiling import Tiles
from moe_kernels.backends.tpu.common.weights import cast_weights, room_for_casts
from moe_kernels.backends.tpu.matmul.tiles import matmul_forward_tiles
from moe_kernels.types import Runs


class MatmulSaved(NamedTuple):
    """What the backward pass needs."""

    rows: Float[Array, "R D"]
    weights: MatmulWeights
    runs: Runs


def grouped_matmul_forward(
    target: Target,
    static: MatmulStatic,
    rows: Float[Array, "R D"],
    weights: MatmulWeights,
    runs: Runs,
    *,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "R F"], MatmulSaved]:
    """`y = x W_e` and what follows it, for the rows of every expert e; unused rows hold anything."""
    saved = MatmulSaved(rows, weights, runs)
    if rows.shape[0] == 0:
        return jnp.zeros((0, weights.weight.shape[2]), rows.dtype), saved
    tiles = tiles or matmul_forward_tiles(
        sizes_of(target, static.layout, rows, weights.weight), epilogue=epilogue_of(weights, static.activation)
    )
    assert tiles is not None, "refused by why_not"
    return run_forward(tiles, target, static, rows, weights, runs), saved


def run_forward(
    tiles: Tiles, target: Target, static: MatmulStatic, rows: Float[Array, "R D"], weights: MatmulWeights, runs: Runs
) -> Float[Array, "R F"]:
    """The forward pass with given block sizes."""
    width, chunk, held = rows.shape[1], tiles.chunk, tiles.rows.rows
    grid = grid_of(static.layout, tiles, target)
    inputs = _MatmulForwardInputs(Operand(rows), *weight_blocks(weights, grid, tiles))
    flops = 2 * len(inputs.weights) * rows.size * tiles.padded
    outputs = launch(
        functools.partial(_forward, tiles, static, grid),
        Call("grouped_matmul_forward", grid.axes, tiles.vmem, flops),
        target,
        scalars=scalars_of(static.layout, runs, tiles, target),
        inputs=inputs,
        outputs=_MatmulForwardOutputs(result((rows.shape[0], tiles.padded), rows.dtype)),
        scratch=_MatmulForwardScratch(
            x=pltpu.VMEM((2, held, width), rows.dtype),
            y=pltpu.VMEM((2, held, chunk), rows.dtype),
            casts=room_for_casts(inputs.weights, rows.dtype),
            fetched=pltpu.SemaphoreType.DMA((2,)),
            written=pltpu.SemaphoreType.DMA((2,)),
        ),
    )
    return outputs.out[:, : weights.weight.shape[2]]


def weight_blocks(weights: MatmulWeights, grid: Grid, tiles: Tiles) -> tuple[tuple[Operand, ...], Operand | None]:
    """Chunks of each matrix, with F rounded up, and of the bias `[E, 1, F]` in float32."""
    _, width, expert_width = weights.weight.shape
    more = tiles.padded - expert_width
    columns = pl.BlockSpec((1, width, tiles.chunk), grid.columns)
    matrices = tuple(
        Operand(jnp.pad(w, ((0, 0), (0, 0), (0, more))) if more else w, columns)
        for w in (weights.weight, weights.up)
        if w is not None
    )
    if weights.bias is None:
        return matrices, None
    bias = jnp.pad(weights.bias.astype(jnp.float32), ((0, 0), (0, more)))[:, None]
    return matrices, Operand(bias, pl.BlockSpec((1, 1, tiles.chunk), grid.columns))


class _MatmulForwardInputs(NamedTuple):
    rows: Any
    weights: tuple[Any, ...]
    bias: Any


class _MatmulForwardOutputs(NamedTuple):
    out: Any


class _MatmulForwardScratch(NamedTuple):
    x: Any
    """Two items' rows."""
    y: Any
    """Chunks of two steps."""
    casts: tuple[Any, ...] | None
    fetched: Any
    written: Any


def _forward(
    tiles: Tiles,
    static: MatmulStatic,
    grid: Grid,
    scalars: Scalars,
    inputs: _MatmulForwardInputs,
    outputs: _MatmulForwardOutputs,
    scratch: _MatmulForwardScratch,
) -> None:
    step, schedule = this_step(grid, scalars), scalars.schedule
    at, slot = step.at, step.slot
    results = ChunkCopies(grid, tiles, scalars, outputs.out, scratch.y, scratch.written)

    def rows(at: Scalar, slot: Scalar) -> RowCopies:
        place = (scratch.x.at[slot], scratch.fetched.at[slot], schedule.first[at], schedule.size[at])
        return RowCopies(inputs.rows, *place, tiles.rows.copied)

    pl.when(step.number == 0)(lambda: rows(at, slot).fetch())

    @pl.when(step.chunk == 0)
    def _() -> None:
        pl.when(step.item + 1 < grid.items)(lambda: rows(at + 1, 1 - slot).fetch())
        rows(at, slot).fetched()

    y = results.place(step)
    weights = cast_weights(inputs.weights, scratch.casts, step.busy)
    x, activation = scratch.x.at[slot], static.activation

    def work(offset: Scalar, size: int) -> None:
        own = pl.ds(offset, size)
        parts = parts_of(x[own], weights, inputs.bias)
        y[own] = parts[0].astype(y.dtype) if activation is None else result_of(parts, activation, y.dtype)

    over_pieces(*pieces_of(scalars.schedule.size[at], scalars.covers, tiles.rows), tiles.rows, work)
    results.write(step)
