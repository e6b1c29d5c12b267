"""The expert MLP as one kernel, forward: `y = act(x w1 + b1) w2 + b2`.

The hidden layer goes to HBM only where a backward pass will want it and would take longer to compute it again (see
`hidden.py`).

Grid (core, item, chunk of F). The rows of an item stay in VMEM while chunks of its expert's weights stream through, so
each weight is read once for an item; `y` is added up in float32 and starts as the bias. The rows of the next item are
fetched, and those of the last one written, under the matmuls. Results leave from the buffer that the rows came in.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from moe_kernels.backends.base import MlpStatic
from moe_kernels.backends.tpu.common.activation import activate
from moe_kernels.backends.tpu.common.launch import (
    NUM_SCALARS,
    Grid,
    Target,
    grid_of,
    launch,
    scalars_of,
    tiles_for,
    unflatten,
)
from moe_kernels.backends.tpu.common.rows import RowCopies, Scalar, Scalars, dot, over_pieces_or_shorter
from moe_kernels.backends.tpu.common.step import ChunkCopies, this_step
from moe_kernels.backends.tpu.common.tiling import Tiles, mlp_forward_tiles
from moe_kernels.backends.tpu.mlp.hidden import keeps_hidden
from moe_kernels.types import MlpWeights, Runs


class MlpSaved(NamedTuple):
    """What the backward pass needs."""

    rows: Float[Array, "R D"]
    weights: MlpWeights
    runs: Runs
    hidden: Float[Array, "R H"] | None = None
    """Before the activation, with F rounded up; unused rows hold anything. None: it is computed again."""


def expert_mlp(
    target: Target, static: MlpStatic, rows: Float[Array, "R D"], weights: MlpWeights, runs: Runs
) -> Float[Array, "R D"]:
    """`y = act(x w1_e + b1_e) w2_e + b2_e`; unused rows hold anything."""
    if rows.shape[0] == 0:
        return rows
    tiles = tiles_for(mlp_forward_tiles, target, static.layout, rows, weights.w1)
    return run_forward(tiles, target, static, rows, weights, runs)[0]


def expert_mlp_forward(
    target: Target, static: MlpStatic, rows: Float[Array, "R D"], weights: MlpWeights, runs: Runs
) -> tuple[Float[Array, "R D"], MlpSaved]:
    """As `expert_mlp`, with what the backward pass needs."""
    if rows.shape[0] == 0:
        return rows, MlpSaved(rows, weights, runs)
    sizes = (rows.shape[1], weights.w1.shape[2], rows.dtype.itemsize, weights.w1.dtype.itemsize)
    keep = keeps_hidden(static.layout, *sizes, target.facts)
    choose = functools.partial(mlp_forward_tiles, keep=keep)
    tiles = tiles_for(choose, target, static.layout, rows, weights.w1)
    out, hidden = run_forward(tiles, target, static, rows, weights, runs, keep=keep)
    return out, MlpSaved(rows, weights, runs, hidden)


def run_forward(
    tiles: Tiles,
    target: Target,
    static: MlpStatic,
    rows: Float[Array, "R D"],
    weights: MlpWeights,
    runs: Runs,
    *,
    keep: bool = False,
) -> tuple[Float[Array, "R D"], Float[Array, "R H"] | None]:
    """The forward pass with given block sizes; also the hidden layer if it is to be kept."""
    width, chunk, held = rows.shape[1], tiles.chunk, tiles.rows.rows
    grid = grid_of(static.layout, tiles, target)
    cast = weights.w1.dtype != rows.dtype

    hbm = pl.BlockSpec(memory_space=pltpu.MemorySpace.HBM)
    w1, b1, w2, b2 = weight_specs(grid, width, chunk)
    two = pltpu.SemaphoreType.DMA((2,))
    arrays = _Forward(
        rows=hbm,
        w1=w1,
        b1=b1,
        w2=w2,
        b2=b2,
        out=hbm,
        hidden=hbm if keep else None,
        buffer=pltpu.VMEM((2, held, width), rows.dtype),
        total=pltpu.VMEM((held, width), jnp.float32),
        w1_cast=pltpu.VMEM((width, chunk) if cast else (8, 128), rows.dtype),
        w2_cast=pltpu.VMEM((chunk, width) if cast else (8, 128), rows.dtype),
        hidden_out=pltpu.VMEM((2, held, chunk), rows.dtype) if keep else None,
        fetched=two,
        written=two,
        hidden_written=two if keep else None,
    )

    def kernel(*refs: Any) -> None:
        named = jax.tree.unflatten(jax.tree.structure(arrays), refs[NUM_SCALARS:])
        _forward(tiles, static, grid, target.facts.depth, unflatten(refs[:NUM_SCALARS]), named)

    shapes = [rows.shape, (rows.shape[0], tiles.padded)] if keep else [rows.shape]
    run = launch(
        kernel,
        "expert_mlp_forward",
        grid,
        target,
        tiles,
        products=2,
        in_specs=jax.tree.leaves(arrays[:5]),
        out_specs=jax.tree.leaves(arrays[5:7]),
        out_shape=[jax.ShapeDtypeStruct(shape, rows.dtype) for shape in shapes],
        scratch=jax.tree.leaves(arrays[7:]),
    )
    out, *hidden = run(scalars_of(static.layout, runs, tiles, target), rows, *padded_weights(weights, tiles.padded))
    return out, hidden[0] if keep else None


def weight_specs(grid: Grid, width: int, chunk: int) -> list[pl.BlockSpec]:
    """Chunks of w1 `[E, D, F]`, b1 `[E, 1, F]`, w2 `[E, F, D]`, and b2 `[E, 1, D]`."""
    return [
        pl.BlockSpec((1, width, chunk), grid.columns),
        pl.BlockSpec((1, 1, chunk), grid.columns),
        pl.BlockSpec((1, chunk, width), grid.chunk_rows),
        pl.BlockSpec((1, 1, width), grid.whole),
    ]


def padded_weights(weights: MlpWeights, padded: int) -> tuple[Array, Array, Array, Array]:
    """Weights with F rounded up (zero columns of w1 meet zero rows of w2), and biases `[E, 1, ...]` in float32."""
    experts, width, expert_width = weights.w1.shape
    more = padded - expert_width
    b1 = jnp.zeros((experts, expert_width), jnp.float32) if weights.b1 is None else weights.b1.astype(jnp.float32)
    b2 = jnp.zeros((experts, width), jnp.float32) if weights.b2 is None else weights.b2.astype(jnp.float32)
    w1, w2 = weights.w1, weights.w2
    if more:
        w1, b1 = jnp.pad(w1, ((0, 0), (0, 0), (0, more))), jnp.pad(b1, ((0, 0), (0, more)))
        w2 = jnp.pad(w2, ((0, 0), (0, more), (0, 0)))
    return w1, b1[:, None], w2, b2[:, None]


class _Forward(NamedTuple):
    """Arrays of the kernel, or how they are given to it."""

    rows: Any
    w1: Any
    b1: Any
    w2: Any
    b2: Any
    out: Any
    hidden: Any
    buffer: Any
    """Two items' rows, then results."""
    total: Any
    w1_cast: Any
    w2_cast: Any
    hidden_out: Any
    """Chunks of two steps."""
    fetched: Any
    written: Any
    hidden_written: Any


def _forward(tiles: Tiles, static: MlpStatic, grid: Grid, depth: int, scalars: Scalars, refs: _Forward) -> None:
    step = this_step(grid, scalars)
    at, slot, busy = step.at, step.slot, step.busy
    rows, dtype = refs.buffer.at[slot], refs.buffer.dtype

    def copies(at: Scalar, slot: Scalar, array: Any, semaphores: Any) -> RowCopies:
        first, count = scalars.schedule.first[at], scalars.schedule.size[at]
        return RowCopies(array, refs.buffer.at[slot], semaphores.at[slot], first, count, tiles.rows.copied)

    def fetch(at: Scalar, slot: Scalar) -> None:
        copies(at, slot, refs.rows, refs.fetched).fetch()

    def results(at: Scalar, slot: Scalar) -> RowCopies:
        return copies(at, slot, refs.out, refs.written)

    pl.when(step.number == 0)(lambda: fetch(at, slot))
    pl.when(step.chunk == 0)(lambda: copies(at, slot, refs.rows, refs.fetched).fetched())
    step.swap(results, fetch)

    # Not where the first matmul adds: a branch in the loop over rows keeps the MXU waiting.
    @pl.when(busy & (step.chunk == 0))
    def _() -> None:
        refs.total[...] = jnp.broadcast_to(refs.b2[0], refs.total.shape)

    w1, w2 = refs.w1.at[0], refs.w2.at[0]
    if refs.w1.dtype != dtype:
        w1, w2 = refs.w1_cast, refs.w2_cast

        @pl.when(busy)
        def _() -> None:
            w1[...], w2[...] = refs.w1[0].astype(dtype), refs.w2[0].astype(dtype)

    kept, place = ChunkCopies(grid, tiles, scalars, refs.hidden, refs.hidden_out, refs.hidden_written), None
    if refs.hidden is not None:
        place = kept.place(step)

    def work(offset: Scalar, size: int) -> None:
        own = pl.ds(offset, size)
        hidden = (dot(rows[own], w1[...], (1, 0)) + refs.b1[0]).astype(dtype)
        if place is not None:
            place[own] = hidden
        activated = activate(hidden.astype(jnp.float32), static.activation).astype(dtype)
        refs.total[own] += dot(activated, w2[...], (1, 0))

    over_pieces_or_shorter(scalars.schedule.size[at], scalars.covers, tiles.rows, depth, work)
    if place is not None:
        kept.write(step)
    step.finish(refs.total, refs.buffer, results)
