"""The expert MLP as one kernel, backward: for each chunk of F five matmuls, or four where the hidden layer was kept.

Gated there are eight, of which two compute the hidden layer again. The products are those of `common/products.py`, and
`db2 = Σ dy`. Grid (core, item, chunk of F) as in the forward pass; `dx` is added up in float32 over chunks and leaves
from the buffer that `dy` came in. Where an expert is one item of one piece, weight gradients leave straight from the
MXU, and of pieces that fill its depth the shortest that holds the rows is taken; else they are added up in float32 over
pieces and, for an expert of several items, over items through HBM. Rows that belong to no run are zeroed in `x` (or
`h`) and in `dy` before any matmul. Biases' gradients leave as one sum an item.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from moe_kernels.backends.base import MatmulWeights, MlpStatic
from moe_kernels.backends.mlp_parts import Matmuls, gradients_like, matmuls_of
from moe_kernels.backends.tpu.common.gradients import (
    Gradients,
    WeightGradient,
    by_expert,
    gradient_dtype,
    gradient_slots,
)
from moe_kernels.backends.tpu.common.grid import Grid, grid_of, scalars_of
from moe_kernels.backends.tpu.common.launch import Call, Operand, Target, launch, result
from moe_kernels.backends.tpu.common.products import Products
from moe_kernels.backends.tpu.common.rows import RowCopies, Scalar, Scalars, over_pieces, pieces_of, used_rows
from moe_kernels.backends.tpu.common.schedule import STARTS
from moe_kernels.backends.tpu.common.step import ChunkCopies, this_step
from moe_kernels.backends.tpu.common.tiling import Tiles, one_item, straight, straight_pieces
from moe_kernels.backends.tpu.common.weights import cast_weights, room_for_casts
from moe_kernels.backends.tpu.mlp.forward import MlpSaved, mlp_sizes, weight_blocks
from moe_kernels.backends.tpu.mlp.tiles import mlp_backward_tiles
from moe_kernels.types import GluWeights, MlpWeights, Runs


def expert_mlp_backward(
    target: Target, static: MlpStatic, saved: MlpSaved, dout: Float[Array, "R D"], *, tiles: Tiles | None = None
) -> tuple[Float[Array, "R D"], MlpWeights | GluWeights]:
    """Gradients of rows and weights; an expert without rows gets exactly 0."""
    rows, weights, runs, hidden = saved
    if rows.shape[0] == 0:
        return rows, jax.tree.map(jnp.zeros_like, weights)
    tiles = tiles or mlp_backward_tiles(mlp_sizes(target, static, rows, weights), keep=hidden is not None)
    assert tiles is not None, "refused by why_not"
    return run_backward(tiles, target, static, rows, weights, runs, dout, hidden)


def run_backward(
    tiles: Tiles,
    target: Target,
    static: MlpStatic,
    rows: Float[Array, "R D"],
    weights: MlpWeights | GluWeights,
    runs: Runs,
    dout: Float[Array, "R D"],
    hidden: Float[Array, "R H"] | None = None,
) -> tuple[Float[Array, "R D"], MlpWeights | GluWeights]:
    """The backward pass with given block sizes, and with the hidden layer if it was kept."""
    layout, grid, once = static.layout, grid_of(static.layout, tiles, target), one_item(static.layout, tiles.rows)
    kept = None if hidden is None else _padded_columns(hidden, tiles.padded)
    first, b1, second, _ = weight_blocks(weights, grid, tiles)
    kept_block = None if kept is None else Operand(kept)
    inputs = _MlpBackwardInputs(Operand(rows), Operand(dout), (*first, second), b1, kept_block)
    # Of each first matrix its product again, dx and dW; the hidden layer's gradient, and dW of the second matrix.
    matmuls = 3 * len(first) + 2 - (kept is not None)
    scalars = scalars_of(layout, runs, tiles, target)
    found = launch(
        lambda *refs: _MlpBackward(tiles, static, grid, once, target.facts.depth, *refs).run(),
        Call(
            "expert_mlp_backward",
            grid.axes,
            tiles.vmem,
            flops=2 * matmuls * rows.size * tiles.padded,
            aliases=(("dout", "drows"),),
        ),
        target,
        scalars=scalars,
        inputs=inputs,
        outputs=_outputs(tiles, inputs, grid, once),
        scratch=_scratch(tiles, inputs, grid, summed=not straight(layout, tiles.rows), once=once),
    )
    db1, db2 = (by_expert(db[:, 0], scalars.schedule, layout, once) for db in (found.db1, found.db2))
    expert_width, (*dfirst, dsecond) = matmuls_of(weights).first.weight.shape[2], found.dweights
    gate, *up = (dweight[:, :, :expert_width] for dweight in dfirst)
    dfirst = MatmulWeights(gate, db1[:, :expert_width], *up)
    return found.drows, gradients_like(weights, Matmuls(dfirst, MatmulWeights(dsecond[:, :expert_width], db2)))


def _padded_columns(hidden: Float[Array, "R H"], padded: int) -> Float[Array, "R P"]:
    """As wide as this pass has it: the forward pass may have rounded F up to another chunk."""
    more = padded - hidden.shape[1]
    return jnp.pad(hidden, ((0, 0), (0, more))) if more > 0 else hidden[:, :padded]


class _MlpBackwardInputs(NamedTuple):
    rows: Any
    dout: Any
    weights: tuple[Any, ...]
    """The first matrices, then the second."""
    b1: Any
    hidden: Any


class _MlpBackwardOutputs(NamedTuple):
    drows: Any
    dweights: tuple[Any, ...]
    db1: Any
    db2: Any


class _MlpBackwardScratch(NamedTuple):
    x: Any
    dy: Any
    """Two items' rows of dy, then of dx."""
    dx: Any
    casts: tuple[Any, ...] | None
    dw: tuple[Any, ...]
    dw_sums: tuple[Any, ...]
    hidden_in: Any
    """Chunks of two steps."""
    fetched: Any
    written: Any
    dw_written: Any
    dw_fetched: Any
    hidden_fetched: Any


def _outputs(tiles: Tiles, inputs: _MlpBackwardInputs, grid: Grid, once: bool) -> _MlpBackwardOutputs:
    rows, weights = inputs.rows.array, [weight.array for weight in inputs.weights]
    dtype, items, width = gradient_dtype(weights[0].dtype, once), grid.cores * grid.items, rows.shape[1]
    return _MlpBackwardOutputs(
        drows=result(rows.shape, rows.dtype),
        dweights=tuple(result(weight.shape, dtype) for weight in weights),
        db1=result((items, 1, tiles.padded), jnp.float32, pl.BlockSpec((1, 1, tiles.chunk), grid.item_columns)),
        db2=result((items, 1, width), jnp.float32, pl.BlockSpec((1, 1, width), grid.item_whole)),
    )


def _scratch(tiles: Tiles, inputs: _MlpBackwardInputs, grid: Grid, *, summed: bool, once: bool) -> _MlpBackwardScratch:
    rows, held, chunk = inputs.rows.array, tiles.rows.rows, tiles.chunk
    width, two = rows.shape[1], pltpu.SemaphoreType.DMA((2,))
    dtype, slots = gradient_dtype(inputs.weights[0].array.dtype, once), gradient_slots(grid, once)
    summed, keeps = summed and dtype != jnp.float32, inputs.hidden is not None
    chunks: list[Any] = [weight.spec.block_shape[1:] for weight in inputs.weights]
    return _MlpBackwardScratch(
        x=pltpu.VMEM((2, held, width), rows.dtype),
        dy=pltpu.VMEM((2, held, width), rows.dtype),
        dx=pltpu.VMEM((held, width), jnp.float32),
        casts=room_for_casts(inputs.weights, rows.dtype),
        dw=tuple(pltpu.VMEM((slots, *shape), dtype) for shape in chunks),
        dw_sums=tuple(pltpu.VMEM(shape, jnp.float32) if summed else None for shape in chunks),
        hidden_in=pltpu.VMEM((2, held, chunk), rows.dtype) if keeps else None,
        fetched=two,
        written=two,
        dw_written=two,
        dw_fetched=pltpu.SemaphoreType.DMA,
        hidden_fetched=two if keeps else None,
    )


class _MlpBackward(NamedTuple):
    """The kernel: its static facts, scalars and arrays."""

    tiles: Tiles
    static: MlpStatic
    grid: Grid
    once: bool
    depth: int
    scalars: Scalars
    inputs: _MlpBackwardInputs
    outputs: _MlpBackwardOutputs
    scratch: _MlpBackwardScratch

    def run(self) -> None:
        """One step of the grid."""
        inputs, outputs, scratch = self.inputs, self.outputs, self.scratch
        step, gradients = this_step(self.grid, self.scalars), self._gradients()
        at, slot, chunk = step.at, step.slot, step.chunk

        def idle() -> None:
            outputs.db1[...] = jnp.zeros(outputs.db1.shape, jnp.float32)
            pl.when(chunk == 0)(self._no_db2)

        pl.when(step.number == 0)(lambda: self._fetch(at, slot))
        pl.when((chunk == 0) & step.busy)(lambda: self._begin(at, slot))
        step.swap(self._results, self._fetch)
        hidden = None
        if inputs.hidden is not None:
            place = inputs.hidden, scratch.hidden_in, scratch.hidden_fetched
            hidden = ChunkCopies(self.grid, self.tiles, self.scalars, *place).fetch(step)
        gradients.fill(step, lambda out_slot: self._work(at, slot, chunk, out_slot, hidden), idle)
        step.finish(scratch.dx, scratch.dy, self._results)
        gradients.drain(step)

    def _no_db2(self) -> None:
        self.outputs.db2[...] = jnp.zeros(self.outputs.db2.shape, jnp.float32)

    def _copies(self, at: Scalar, slot: Scalar, array: Any, buffer: Any, semaphores: Any) -> RowCopies:
        schedule = self.scalars.schedule
        first, count = schedule.first[at], schedule.size[at]
        return RowCopies(array, buffer.at[slot], semaphores.at[slot], first, count, self.tiles.rows.copied)

    def _results(self, at: Scalar, slot: Scalar) -> RowCopies:
        return self._copies(at, slot, self.outputs.drows, self.scratch.dy, self.scratch.written)

    def _fetch(self, at: Scalar, slot: Scalar) -> None:
        self._copies(at, slot, self.inputs.rows, self.scratch.x, self.scratch.fetched).fetch()
        self._copies(at, slot, self.inputs.dout, self.scratch.dy, self.scratch.fetched).fetch()

    def _begin(self, at: Scalar, slot: Scalar) -> None:
        """Rows are there: zero those of no run, and what is added up over chunks."""
        inputs, outputs, scratch = self.inputs, self.outputs, self.scratch
        self._copies(at, slot, inputs.rows, scratch.x, scratch.fetched).fetched()
        self._copies(at, slot, inputs.dout, scratch.dy, scratch.fetched).fetched()
        used = used_rows(self.scalars, at, self.static.layout, scratch.dx.shape)
        zero = jnp.zeros((), scratch.x.dtype)
        scratch.x[slot] = jnp.where(used, scratch.x[slot], zero)
        dy = jnp.where(used, scratch.dy[slot], zero)
        scratch.dy[slot] = dy
        outputs.db2[0] = jnp.sum(dy.astype(jnp.float32), axis=0, keepdims=True)
        scratch.dx[...] = jnp.zeros(scratch.dx.shape, jnp.float32)

    def _gradients(self) -> Gradients:
        outputs, scratch = self.outputs, self.scratch
        *first, second = zip(outputs.dweights, scratch.dw, scratch.dw_sums, strict=True)
        weights = (*(WeightGradient(*arrays, columns=True) for arrays in first), WeightGradient(*second, columns=False))
        return Gradients(
            self.grid, self.scalars, self.tiles.chunk, self.once, weights, scratch.dw_written, scratch.dw_fetched
        )

    def _work(self, at: Scalar, slot: Scalar, chunk: Scalar, out_slot: Scalar, kept: Any) -> None:
        inputs, outputs, scratch = self.inputs, self.outputs, self.scratch
        rows = self.tiles.rows
        weights = cast_weights(inputs.weights, scratch.casts, busy=True)

        def kept_hidden(offset: Scalar, size: int) -> Array:
            used = used_rows(self.scalars, at, self.static.layout, (size, self.tiles.chunk), offset)
            return jnp.where(used, kept[pl.ds(offset, size)], jnp.zeros((), scratch.x.dtype))

        operands = (scratch.x.at[slot], scratch.dy.at[slot], weights, inputs.b1, scratch.dx)
        products = Products(*operands, self.static.activation, None if kept is None else kept_hidden)

        def at_once(size: int) -> None:
            found = products.of(0, size)
            for place, gradient in zip(scratch.dw, found.weights, strict=True):
                place[out_slot] = gradient.astype(place.dtype)
            outputs.db1[0] = found.b1

        if straight(self.static.layout, rows):
            count, shorter = self.scalars.schedule.size[at], 0
            for size in straight_pieces(rows, self.depth):
                pl.when((count > shorter) & (count <= size))(lambda size=size: at_once(size))
                shorter = size
            return
        repeats, bits = pieces_of(self.scalars.schedule.size[at], self.scalars.covers, rows)
        chunks = self._gradients()
        totals = [weight.sums(out_slot) for weight in chunks.weights]

        def piecewise() -> None:
            chunks.begin(at, chunk, out_slot)
            outputs.db1[...] = jnp.zeros(outputs.db1.shape, jnp.float32)

            def add(offset: Scalar, size: int) -> None:
                found = products.of(offset, size)
                for total, part in zip(totals, found.weights, strict=True):
                    total[...] += part
                outputs.db1[0] += found.b1

            over_pieces(repeats, bits, rows, add)
            chunks.finish(out_slot)

        if rows.rows != rows.pieces[0]:
            piecewise()
            return
        # One piece, and the first of its expert: nothing to add up.
        single = (self.scalars.schedule.part[at] == STARTS) & (repeats == 1) & (bits <= 1)
        pl.when(single)(lambda: at_once(rows.pieces[0]))
        pl.when(jnp.logical_not(single))(piecewise)
