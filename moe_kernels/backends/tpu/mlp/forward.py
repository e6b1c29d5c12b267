"""The expert MLP as one kernel, forward: `y = act(x w1 + b1) w2 + b2`, or gated, `y = (act(x gate) (x up)) down`.

The hidden layer goes to HBM only where a backward pass will want it and would take longer to compute it again (see
`hidden.py`).

Grid (core, item, chunk of F). The rows of an item stay in VMEM while chunks of its expert's weights stream through, so
each weight is read once for an item; `y` is added up in float32 and starts as the bias. The rows of the next item are
fetched, and those of the last one written, under the matmuls. Results leave from the buffer that the rows came in.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from moe_kernels.backends.base import MlpStatic
from moe_kernels.backends.mlp_parts import matmuls_of
from moe_kernels.backends.tpu.common.grid import Grid, WeightMaps, grid_of, scalars_of, sizes_of
from moe_kernels.backends.tpu.common.launch import Call, Operand, Target, launch, result
from moe_kernels.backends.tpu.common.products import parts_of, result_of
from moe_kernels.backends.tpu.common.rows import RowCopies, Scalar, Scalars, over_pieces_or_shorter
from moe_kernels.backends.tpu.common.step import ChunkCopies, this_step
from moe_kernels.backends.tpu.common.tiling import Sizes, Tiles
from moe_kernels.backends.tpu.common.weights import cast_weights, room_for_casts
from moe_kernels.backends.tpu.mlp.hidden import keeps_hidden
from moe_kernels.backends.tpu.mlp.tiles import mlp_forward_tiles
from moe_kernels.precision import dot
from moe_kernels.types import GluWeights, MlpWeights, Runs


class MlpSaved(NamedTuple):
    """What the backward pass needs."""

    rows: Float[Array, "R D"]
    weights: MlpWeights | GluWeights
    runs: Runs
    hidden: Float[Array, "R H"] | None = None
    """Before the activation, with F rounded up; unused rows hold anything. None: it is computed again."""


def expert_mlp(
    target: Target,
    static: MlpStatic,
    rows: Float[Array, "R D"],
    weights: MlpWeights | GluWeights,
    runs: Runs,
    *,
    tiles: Tiles | None = None,
) -> Float[Array, "R D"]:
    """`y = act(x w1_e + b1_e) w2_e + b2_e`, or gated; unused rows hold anything."""
    if rows.shape[0] == 0:
        return rows
    tiles = tiles or mlp_forward_tiles(mlp_sizes(target, static, rows, weights))
    assert tiles is not None, "refused by why_not"
    return run_forward(tiles, target, static, rows, weights, runs)[0]


def expert_mlp_forward(
    target: Target,
    static: MlpStatic,
    rows: Float[Array, "R D"],
    weights: MlpWeights | GluWeights,
    runs: Runs,
    *,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "R D"], MlpSaved]:
    """As `expert_mlp`, with what the backward pass needs."""
    if rows.shape[0] == 0:
        return rows, MlpSaved(rows, weights, runs)
    sizes = mlp_sizes(target, static, rows, weights)
    keep = keeps_hidden(sizes)
    tiles = tiles or mlp_forward_tiles(sizes, keep=keep)
    assert tiles is not None, "refused by why_not"
    out, hidden = run_forward(tiles, target, static, rows, weights, runs, keep=keep)
    return out, MlpSaved(rows, weights, runs, hidden)


def run_forward(
    tiles: Tiles,
    target: Target,
    static: MlpStatic,
    rows: Float[Array, "R D"],
    weights: MlpWeights | GluWeights,
    runs: Runs,
    *,
    keep: bool = False,
) -> tuple[Float[Array, "R D"], Float[Array, "R H"] | None]:
    """The forward pass with given block sizes; also the hidden layer if it is to be kept."""
    width, held, two = rows.shape[1], tiles.rows.rows, pltpu.SemaphoreType.DMA((2,))
    grid = grid_of(static.layout, tiles, target)
    inputs = _MlpForwardInputs(Operand(rows), *weight_blocks(weights, grid, tiles))
    matrices = (*inputs.first, inputs.second)
    outputs = launch(
        functools.partial(_forward, tiles, static, grid, target.facts.depth),
        Call("expert_mlp_forward", grid.axes, tiles.vmem, flops=2 * len(matrices) * rows.size * tiles.padded),
        target,
        scalars=scalars_of(static.layout, runs, tiles, target),
        inputs=inputs,
        outputs=_MlpForwardOutputs(
            out=result(rows.shape, rows.dtype),
            hidden=result((rows.shape[0], tiles.padded), rows.dtype) if keep else None,
        ),
        scratch=_MlpForwardScratch(
            buffer=pltpu.VMEM((2, held, width), rows.dtype),
            total=pltpu.VMEM((held, width), jnp.float32),
            casts=room_for_casts(matrices, rows.dtype),
            hidden_out=pltpu.VMEM((2, held, tiles.chunk), rows.dtype) if keep else None,
            fetched=two,
            written=two,
            hidden_written=two if keep else None,
        ),
    )
    return outputs.out, outputs.hidden


def mlp_sizes(target: Target, static: MlpStatic, rows: Float[Array, "N D"], weights: MlpWeights | GluWeights) -> Sizes:
    """What block sizes are chosen by."""
    gated = isinstance(weights, GluWeights)
    return sizes_of(target, static.layout, rows, matmuls_of(weights).first.weight, gated=gated)


class PaddedWeights(NamedTuple):
    """Weights as kernels take them: F rounded up, biases in float32 and there; or blocks of them."""

    first: tuple[Any, ...]
    """The first matrix of a plain MLP, gate and up of a gated one."""
    b1: Any
    second: Any
    b2: Any


def weight_blocks(weights: MlpWeights | GluWeights, grid: WeightMaps, tiles: Tiles) -> PaddedWeights:
    """An expert's weights, a chunk of F at a time."""
    chunk, padded = tiles.chunk, padded_weights(weights, tiles.padded)
    width = padded.second.shape[2]
    return PaddedWeights(
        first=tuple(Operand(array, pl.BlockSpec((1, width, chunk), grid.columns)) for array in padded.first),
        b1=Operand(padded.b1, pl.BlockSpec((1, 1, chunk), grid.columns)),
        second=Operand(padded.second, pl.BlockSpec((1, chunk, width), grid.chunk_rows)),
        b2=Operand(padded.b2, pl.BlockSpec((1, 1, width), grid.whole)),
    )


def padded_weights(weights: MlpWeights | GluWeights, padded: int) -> PaddedWeights:
    """Weights with F rounded up (zero columns of the first matrices meet zero rows of the second), and biases
    `[E, 1, ...]` in float32."""
    (w1, b1, up), (second, b2, _) = matmuls_of(weights)
    experts, width, expert_width = w1.shape
    more = padded - expert_width
    b1 = jnp.zeros((experts, expert_width), jnp.float32) if b1 is None else b1.astype(jnp.float32)
    b2 = jnp.zeros((experts, width), jnp.float32) if b2 is None else b2.astype(jnp.float32)
    first = (w1,) if up is None else (w1, up)
    if more:
        first = tuple(jnp.pad(array, ((0, 0), (0, 0), (0, more))) for array in first)
        second, b1 = jnp.pad(second, ((0, 0), (0, more), (0, 0))), jnp.pad(b1, ((0, 0), (0, more)))
    return PaddedWeights(first, b1[:, None], second, b2[:, None])


class _MlpForwardInputs(NamedTuple):
    rows: Any
    first: tuple[Any, ...]
    b1: Any
    second: Any
    b2: Any


class _MlpForwardOutputs(NamedTuple):
    out: Any
    hidden: Any


class _MlpForwardScratch(NamedTuple):
    buffer: Any
    """Two items' rows, then results."""
    total: Any
    casts: tuple[Any, ...] | None
    hidden_out: Any
    """Chunks of two steps."""
    fetched: Any
    written: Any
    hidden_written: Any


def _forward(
    tiles: Tiles,
    static: MlpStatic,
    grid: Grid,
    depth: int,
    scalars: Scalars,
    inputs: _MlpForwardInputs,
    outputs: _MlpForwardOutputs,
    scratch: _MlpForwardScratch,
) -> None:
    step = this_step(grid, scalars)
    at, slot, busy = step.at, step.slot, step.busy
    rows, dtype = scratch.buffer.at[slot], scratch.buffer.dtype

    def copies(at: Scalar, slot: Scalar, array: Any, semaphores: Any) -> RowCopies:
        first, count = scalars.schedule.first[at], scalars.schedule.size[at]
        return RowCopies(array, scratch.buffer.at[slot], semaphores.at[slot], first, count, tiles.rows.copied)

    def fetch(at: Scalar, slot: Scalar) -> None:
        copies(at, slot, inputs.rows, scratch.fetched).fetch()

    def results(at: Scalar, slot: Scalar) -> RowCopies:
        return copies(at, slot, outputs.out, scratch.written)

    pl.when(step.number == 0)(lambda: fetch(at, slot))
    pl.when(step.chunk == 0)(lambda: copies(at, slot, inputs.rows, scratch.fetched).fetched())
    step.swap(results, fetch)

    # Not where the first matmul adds: a branch in the loop over rows keeps the MXU waiting.
    @pl.when(busy & (step.chunk == 0))
    def _() -> None:
        scratch.total[...] = jnp.broadcast_to(inputs.b2[0], scratch.total.shape)

    *first, second = cast_weights((*inputs.first, inputs.second), scratch.casts, busy)
    kept, place = ChunkCopies(grid, tiles, scalars, outputs.hidden, scratch.hidden_out, scratch.hidden_written), None
    if outputs.hidden is not None:
        place = kept.place(step)

    def work(offset: Scalar, size: int) -> None:
        own = pl.ds(offset, size)
        parts = parts_of(rows[own], first, inputs.b1)
        if place is not None:
            place[own] = parts[0].astype(dtype)
        scratch.total[own] += dot(result_of(parts, static.activation, dtype), second[...], (1, 0))

    over_pieces_or_shorter(scalars.schedule.size[at], scalars.covers, tiles.rows, depth, work)
    if place is not None:
        kept.write(step)
    step.finish(scratch.total, scratch.buffer, results)
