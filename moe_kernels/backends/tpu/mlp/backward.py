"""The expert MLP as one kernel, backward: for each chunk of F five matmuls, or four where the hidden layer was kept.

With `h = x w1 + b1`, `a = act(h)`: `dh = (dy w2ᵀ) act'(h)`, `dx = dh w1ᵀ`, `dw1 = xᵀ dh`, `dw2 = aᵀ dy`, `db1 = Σ dh`,
`db2 = Σ dy`. Grid (core, item, chunk of F) as in the forward pass; `dx` is added up in float32 over chunks and leaves
from the buffer that `dy` came in. Where an expert is one item of one piece, weight gradients leave straight from the
MXU, and of pieces that fill its depth the shortest that holds the rows is taken; else they are added up in float32 over
pieces and, for an expert of several items, over items through HBM. Rows that belong to no run are zeroed in `x` (or
`h`) and in `dy` before any matmul. Biases' gradients leave as one sum an item.
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
from moe_kernels.backends.tpu.common.gradients import Gradient, Gradients, by_expert, gradient_dtype, gradient_slots
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
from moe_kernels.backends.tpu.common.products import Products
from moe_kernels.backends.tpu.common.rows import RowCopies, Scalar, Scalars, over_pieces, pieces_of, used_rows
from moe_kernels.backends.tpu.common.schedule import STARTS
from moe_kernels.backends.tpu.common.step import ChunkCopies, this_step
from moe_kernels.backends.tpu.common.tiling import Tiles, mlp_backward_tiles, one_item, straight, straight_pieces
from moe_kernels.backends.tpu.mlp.forward import MlpSaved, padded_weights, weight_specs
from moe_kernels.types import MlpWeights, Runs


def expert_mlp_backward(
    target: Target, static: MlpStatic, saved: MlpSaved, dout: Float[Array, "R D"]
) -> tuple[Float[Array, "R D"], MlpWeights]:
    """Gradients of rows and weights; an expert without rows gets exactly 0."""
    rows, weights, runs, hidden = saved
    if rows.shape[0] == 0:
        return rows, jax.tree.map(jnp.zeros_like, weights)
    choose = functools.partial(mlp_backward_tiles, keep=hidden is not None)
    tiles = tiles_for(choose, target, static.layout, rows, weights.w1)
    return run_backward(tiles, target, static, rows, weights, runs, dout, hidden)


def run_backward(
    tiles: Tiles,
    target: Target,
    static: MlpStatic,
    rows: Float[Array, "R D"],
    weights: MlpWeights,
    runs: Runs,
    dout: Float[Array, "R D"],
    hidden: Float[Array, "R H"] | None = None,
) -> tuple[Float[Array, "R D"], MlpWeights]:
    """The backward pass with given block sizes, and with the hidden layer if it was kept."""
    layout, width, chunk, held = static.layout, rows.shape[1], tiles.chunk, tiles.rows.rows
    grid = grid_of(layout, tiles, target)
    cast = weights.w1.dtype != rows.dtype
    once = one_item(layout, tiles.rows)
    dtype, slots = gradient_dtype(weights.w1.dtype, once), gradient_slots(grid, once)
    summed = dtype != jnp.float32 and not straight(layout, tiles.rows)

    hbm = pl.BlockSpec(memory_space=pltpu.MemorySpace.HBM)
    w1, b1, w2, _ = padded_weights(weights, tiles.padded)
    w1_spec, b1_spec, w2_spec, _ = weight_specs(grid, width, chunk)
    num_items, small, two = grid.cores * grid.items, (8, 128), pltpu.SemaphoreType.DMA((2,))
    kept = None if hidden is None else _padded_columns(hidden, tiles.padded)
    arrays = _Refs(
        rows=hbm,
        dout=hbm,
        w1=w1_spec,
        b1=b1_spec,
        w2=w2_spec,
        hidden=None if kept is None else hbm,
        drows=hbm,
        dw1=hbm,
        dw2=hbm,
        db1=pl.BlockSpec((1, 1, chunk), grid.item_columns),
        db2=pl.BlockSpec((1, 1, width), grid.item_whole),
        x=pltpu.VMEM((2, held, width), rows.dtype),
        dy=pltpu.VMEM((2, held, width), rows.dtype),
        dx=pltpu.VMEM((held, width), jnp.float32),
        w1_cast=pltpu.VMEM((width, chunk) if cast else small, rows.dtype),
        w2_cast=pltpu.VMEM((chunk, width) if cast else small, rows.dtype),
        dw1_out=pltpu.VMEM((slots, width, chunk), dtype),
        dw2_out=pltpu.VMEM((slots, chunk, width), dtype),
        dw1_sum=pltpu.VMEM((width, chunk) if summed else small, jnp.float32),
        dw2_sum=pltpu.VMEM((chunk, width) if summed else small, jnp.float32),
        hidden_in=None if kept is None else pltpu.VMEM((2, held, chunk), rows.dtype),
        fetched=two,
        written=two,
        dw_written=two,
        dw_fetched=pltpu.SemaphoreType.DMA,
        hidden_fetched=None if kept is None else two,
    )

    def kernel(*refs: Any) -> None:
        named = jax.tree.unflatten(jax.tree.structure(arrays), refs[NUM_SCALARS:])
        scalars = unflatten(refs[:NUM_SCALARS])
        _Backward(tiles, static, grid, once, target.facts.depth, scalars, named).run()

    run = launch(
        kernel,
        "expert_mlp_backward",
        grid,
        target,
        tiles,
        products=5 if kept is None else 4,
        in_specs=jax.tree.leaves(arrays[:6]),
        out_specs=jax.tree.leaves(arrays[6:11]),
        out_shape=[
            jax.ShapeDtypeStruct(rows.shape, rows.dtype),
            jax.ShapeDtypeStruct(w1.shape, dtype),
            jax.ShapeDtypeStruct(w2.shape, dtype),
            jax.ShapeDtypeStruct((num_items, 1, tiles.padded), jnp.float32),
            jax.ShapeDtypeStruct((num_items, 1, width), jnp.float32),
        ],
        scratch=jax.tree.leaves(arrays[11:]),
        aliases={1: 0},
    )
    scalars = scalars_of(layout, runs, tiles, target)
    drows, dw1, dw2, db1, db2 = run(scalars, rows, dout, w1, b1, w2, *([] if kept is None else [kept]))
    db1, db2 = (by_expert(db[:, 0], scalars.schedule, layout, once) for db in (db1, db2))
    expert_width = weights.w1.shape[2]
    return drows, MlpWeights(
        dw1[:, :, :expert_width].astype(weights.w1.dtype),
        None if weights.b1 is None else db1[:, :expert_width].astype(weights.b1.dtype),
        dw2[:, :expert_width].astype(weights.w2.dtype),
        None if weights.b2 is None else db2.astype(weights.b2.dtype),
    )


def _padded_columns(hidden: Float[Array, "R H"], padded: int) -> Float[Array, "R P"]:
    """As wide as this pass has it: the forward pass may have rounded F up to another chunk."""
    more = padded - hidden.shape[1]
    return jnp.pad(hidden, ((0, 0), (0, more))) if more > 0 else hidden[:, :padded]


class _Refs(NamedTuple):
    """Arrays of the kernel, or how they are given to it."""

    rows: Any
    dout: Any
    w1: Any
    b1: Any
    w2: Any
    hidden: Any
    drows: Any
    dw1: Any
    dw2: Any
    db1: Any
    db2: Any
    x: Any
    dy: Any
    """Two items' rows of dy, then of dx."""
    dx: Any
    w1_cast: Any
    w2_cast: Any
    dw1_out: Any
    dw2_out: Any
    dw1_sum: Any
    dw2_sum: Any
    hidden_in: Any
    """Chunks of two steps."""
    fetched: Any
    written: Any
    dw_written: Any
    dw_fetched: Any
    hidden_fetched: Any


class _Backward(NamedTuple):
    """The kernel: its static facts, scalars and arrays."""

    tiles: Tiles
    static: MlpStatic
    grid: Grid
    once: bool
    depth: int
    scalars: Scalars
    refs: _Refs

    def run(self) -> None:
        """One step of the grid."""
        refs, step, gradients = self.refs, this_step(self.grid, self.scalars), self._gradients()
        at, slot, chunk = step.at, step.slot, step.chunk

        def idle() -> None:
            refs.db1[...] = jnp.zeros(refs.db1.shape, jnp.float32)
            pl.when(chunk == 0)(self._no_db2)

        pl.when(step.number == 0)(lambda: self._fetch(at, slot))
        pl.when((chunk == 0) & step.busy)(lambda: self._begin(at, slot))
        step.swap(self._results, self._fetch)
        hidden = None
        if refs.hidden is not None:
            chunks = ChunkCopies(self.grid, self.tiles, self.scalars, refs.hidden, refs.hidden_in, refs.hidden_fetched)
            hidden = chunks.fetch(step)
        gradients.fill(step, lambda out_slot: self._work(at, slot, chunk, out_slot, hidden), idle)
        step.finish(refs.dx, refs.dy, self._results)
        gradients.drain(step)

    def _no_db2(self) -> None:
        self.refs.db2[...] = jnp.zeros(self.refs.db2.shape, jnp.float32)

    def _copies(self, at: Scalar, slot: Scalar, array: Any, buffer: Any, semaphores: Any) -> RowCopies:
        schedule = self.scalars.schedule
        first, count = schedule.first[at], schedule.size[at]
        return RowCopies(array, buffer.at[slot], semaphores.at[slot], first, count, self.tiles.rows.copied)

    def _results(self, at: Scalar, slot: Scalar) -> RowCopies:
        return self._copies(at, slot, self.refs.drows, self.refs.dy, self.refs.written)

    def _fetch(self, at: Scalar, slot: Scalar) -> None:
        self._copies(at, slot, self.refs.rows, self.refs.x, self.refs.fetched).fetch()
        self._copies(at, slot, self.refs.dout, self.refs.dy, self.refs.fetched).fetch()

    def _begin(self, at: Scalar, slot: Scalar) -> None:
        """Rows are there: zero those of no run, and what is added up over chunks."""
        refs = self.refs
        self._copies(at, slot, refs.rows, refs.x, refs.fetched).fetched()
        self._copies(at, slot, refs.dout, refs.dy, refs.fetched).fetched()
        used = used_rows(self.scalars, at, self.static.layout, refs.dx.shape)
        zero = jnp.zeros((), refs.x.dtype)
        refs.x[slot] = jnp.where(used, refs.x[slot], zero)
        dy = jnp.where(used, refs.dy[slot], zero)
        refs.dy[slot] = dy
        refs.db2[0] = jnp.sum(dy.astype(jnp.float32), axis=0, keepdims=True)
        refs.dx[...] = jnp.zeros(refs.dx.shape, jnp.float32)

    def _gradients(self) -> Gradients:
        refs = self.refs
        weights = (
            Gradient(refs.dw1, refs.dw1_out, refs.dw1_sum, columns=True),
            Gradient(refs.dw2, refs.dw2_out, refs.dw2_sum, columns=False),
        )
        return Gradients(
            self.grid, self.scalars, self.tiles.chunk, self.once, weights, refs.dw_written, refs.dw_fetched
        )

    def _work(self, at: Scalar, slot: Scalar, chunk: Scalar, out_slot: Scalar, kept: Any) -> None:
        refs, rows = self.refs, self.tiles.rows
        w1, w2 = refs.w1.at[0], refs.w2.at[0]
        if refs.w1.dtype != refs.x.dtype:
            w1, w2 = refs.w1_cast, refs.w2_cast
            w1[...], w2[...] = refs.w1[0].astype(w1.dtype), refs.w2[0].astype(w2.dtype)
        dw1, dw2 = refs.dw1_out.at[out_slot], refs.dw2_out.at[out_slot]

        def kept_hidden(offset: Scalar, size: int) -> Array:
            used = used_rows(self.scalars, at, self.static.layout, (size, self.tiles.chunk), offset)
            return jnp.where(used, kept[pl.ds(offset, size)], jnp.zeros((), refs.x.dtype))

        operands = (refs.x.at[slot], refs.dy.at[slot], w1, refs.b1, w2, refs.dx)
        products = Products(*operands, self.static.activation, None if kept is None else kept_hidden)

        def at_once(size: int) -> None:
            g1, g2, db1 = products.of(0, size)
            dw1[...], dw2[...], refs.db1[0] = g1.astype(dw1.dtype), g2.astype(dw2.dtype), db1

        if straight(self.static.layout, rows):
            count, shorter = self.scalars.schedule.size[at], 0
            for size in straight_pieces(rows, self.depth):
                pl.when((count > shorter) & (count <= size))(lambda size=size: at_once(size))
                shorter = size
            return
        repeats, bits = pieces_of(self.scalars.schedule.size[at], self.scalars.covers, rows)
        chunks = self._gradients()
        sum1, sum2 = (weight.sums(out_slot) for weight in chunks.weights)

        def piecewise() -> None:
            chunks.begin(at, chunk, out_slot)
            refs.db1[...] = jnp.zeros(refs.db1.shape, jnp.float32)

            def add(offset: Scalar, size: int) -> None:
                g1, g2, db1 = products.of(offset, size)
                sum1[...] += g1
                sum2[...] += g2
                refs.db1[0] += db1

            over_pieces(repeats, bits, rows, add)
            chunks.finish(out_slot)

        if rows.rows != rows.pieces[0]:
            piecewise()
            return
        # One piece, and the first of its expert: nothing to add up.
        single = (self.scalars.schedule.part[at] == STARTS) & (repeats == 1) & (bits <= 1)
        pl.when(single)(lambda: at_once(rows.pieces[0]))
        pl.when(jnp.logical_not(single))(piecewise)
