"""Grouped matmul for TPU, backward: one kernel for `dX_e = dH_e W_eᵀ`, `dW_e = X_eᵀ dH_e` and `db_e = Σ dH_e`.

`dH` is `dY`, or `dY` taken back through the activation, whose argument `x W_e + b_e` is computed again; of a gated pair
both are. Grid (core, item, chunk of F) as forward; a chunk of `dy` comes in at every step. `dx` is added up in float32
over chunks and leaves from the buffer that `x` came in; `W` is never transposed in HBM. Rows that belong to no run are
zeroed in `x` and in `dy` before any matmul. The bias's gradient leaves as one sum an item.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from moe_kernels.backends.base import MatmulStatic, MatmulWeights, epilogue_of
from moe_kernels.backends.tpu.common.gradients import (
    Gradients,
    WeightGradient,
    by_expert,
    gradient_dtype,
    gradient_slots,
)
from moe_kernels.backends.tpu.common.grid import Grid, grid_of, scalars_of, sizes_of
from moe_kernels.backends.tpu.common.launch import Call, Operand, Target, launch, result
from moe_kernels.backends.tpu.common.products import parts_of, rounded, taken_back, times_transposed
from moe_kernels.backends.tpu.common.rows import RowCopies, Scalar, Scalars, over_pieces, pieces_of, used_rows
from moe_kernels.backends.tpu.common.step import ChunkCopies, Step, this_step
from moe_kernels.backends.tpu.common.tiling import Tiles, one_item
from moe_kernels.backends.tpu.common.weights import cast_weights, room_for_casts
from moe_kernels.backends.tpu.matmul.forward import MatmulSaved, weight_blocks
from moe_kernels.backends.tpu.matmul.tiles import matmul_backward_tiles
from moe_kernels.precision import dot
from moe_kernels.types import Runs


def grouped_matmul_backward(
    target: Target,
    static: MatmulStatic,
    saved: MatmulSaved,
    dout: Float[Array, "R F"],
    *,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "R D"], MatmulWeights]:
    """Gradients of rows and weights; an expert without rows gets exactly 0."""
    rows, weights, runs = saved
    if rows.shape[0] == 0:
        return rows, jax.tree.map(jnp.zeros_like, weights)
    tiles = tiles or matmul_backward_tiles(
        sizes_of(target, static.layout, rows, weights.weight), epilogue=epilogue_of(weights, static.activation)
    )
    assert tiles is not None, "refused by why_not"
    return run_backward(tiles, target, static, rows, weights, runs, dout)


def run_backward(
    tiles: Tiles,
    target: Target,
    static: MatmulStatic,
    rows: Float[Array, "R D"],
    weights: MatmulWeights,
    runs: Runs,
    dout: Float[Array, "R F"],
) -> tuple[Float[Array, "R D"], MatmulWeights]:
    """The backward pass with given block sizes."""
    grid, once = grid_of(static.layout, tiles, target), one_item(static.layout, tiles.rows)
    dtype, expert_width = gradient_dtype(weights.weight.dtype, once), weights.weight.shape[2]
    dout = jnp.pad(dout, ((0, 0), (0, tiles.padded - expert_width)))
    inputs = _MatmulBackwardInputs(Operand(rows), Operand(dout), *weight_blocks(weights, grid, tiles))
    sums = (grid.cores * grid.items, 1, tiles.padded), jnp.float32, pl.BlockSpec((1, 1, tiles.chunk), grid.item_columns)
    outputs = _MatmulBackwardOutputs(
        drows=result(rows.shape, rows.dtype),
        dweights=tuple(result(weight.array.shape, dtype) for weight in inputs.weights),
        dbias=None if inputs.bias is None else result(*sums),
    )
    scalars = scalars_of(static.layout, runs, tiles, target)
    matmuls = (2 if static.activation is None else 3) * len(inputs.weights)
    found = launch(
        lambda *refs: _MatmulBackward(tiles, static, grid, once, *refs).run(),
        Call("grouped_matmul_backward", grid.axes, tiles.vmem, 2 * matmuls * rows.size * tiles.padded),
        target,
        scalars=scalars,
        inputs=inputs,
        outputs=outputs,
        scratch=_scratch(tiles, inputs, gradient_slots(grid, once), dtype),
    )
    dmatrices = [dw[:, :, :expert_width].astype(weights.weight.dtype) for dw in found.dweights]
    dbias = None
    if weights.bias is not None:
        dbias = by_expert(found.dbias[:, 0], scalars.schedule, static.layout, once)[:, :expert_width]
        dbias = dbias.astype(weights.bias.dtype)
    return found.drows, MatmulWeights(dmatrices[0], dbias, dmatrices[1] if weights.up is not None else None)


class _MatmulBackwardInputs(NamedTuple):
    rows: Any
    dout: Any
    weights: tuple[Any, ...]
    bias: Any


class _MatmulBackwardOutputs(NamedTuple):
    drows: Any
    dweights: tuple[Any, ...]
    dbias: Any


class _MatmulBackwardScratch(NamedTuple):
    x: Any
    """Two items' rows of x, then of dx."""
    dy: Any
    """Chunks of dy, of two steps."""
    dx: Any
    casts: tuple[Any, ...] | None
    dw: tuple[Any, ...]
    dw_sums: tuple[Any, ...]
    """None where gradients are added up in float32 as they are."""
    fetched: Any
    dy_fetched: Any
    written: Any
    dw_written: Any
    dw_fetched: Any


def _scratch(tiles: Tiles, inputs: _MatmulBackwardInputs, slots: int, dtype: Any) -> _MatmulBackwardScratch:
    held, chunk, pair = tiles.rows.rows, tiles.chunk, len(inputs.weights)
    rows, two = inputs.rows.array, pltpu.SemaphoreType.DMA((2,))
    width = rows.shape[1]
    return _MatmulBackwardScratch(
        x=pltpu.VMEM((2, held, width), rows.dtype),
        dy=pltpu.VMEM((2, held, chunk), rows.dtype),
        dx=pltpu.VMEM((held, width), jnp.float32),
        casts=room_for_casts(inputs.weights, rows.dtype),
        dw=(pltpu.VMEM((slots, width, chunk), dtype),) * pair,
        dw_sums=(None if dtype == jnp.float32 else pltpu.VMEM((width, chunk), jnp.float32),) * pair,
        fetched=two,
        dy_fetched=two,
        written=two,
        dw_written=two,
        dw_fetched=pltpu.SemaphoreType.DMA,
    )


class _MatmulBackward(NamedTuple):
    """The kernel: its static facts, scalars and arrays."""

    tiles: Tiles
    static: MatmulStatic
    grid: Grid
    once: bool
    scalars: Scalars
    inputs: _MatmulBackwardInputs
    outputs: _MatmulBackwardOutputs
    scratch: _MatmulBackwardScratch

    def run(self) -> None:
        """One step of the grid."""
        inputs, outputs, scratch = self.inputs, self.outputs, self.scratch
        step = this_step(self.grid, self.scalars)
        at, slot = step.at, step.slot
        weights = zip(outputs.dweights, scratch.dw, scratch.dw_sums, strict=True)
        gradients = Gradients(
            self.grid,
            self.scalars,
            self.tiles.chunk,
            self.once,
            tuple(WeightGradient(*arrays, columns=True) for arrays in weights),
            scratch.dw_written,
            scratch.dw_fetched,
        )

        pl.when(step.number == 0)(lambda: self._fetch(at, slot))
        dy = ChunkCopies(self.grid, self.tiles, self.scalars, inputs.dout, scratch.dy, scratch.dy_fetched).fetch(step)

        @pl.when((step.chunk == 0) & step.busy)
        def _() -> None:
            self._rows(at, slot).fetched()
            self._select(at, scratch.x.at[slot])
            scratch.dx[...] = jnp.zeros(scratch.dx.shape, jnp.float32)

        step.swap(self._results, self._fetch)
        gradients.fill(step, lambda out_slot: self._work(step, dy, out_slot, gradients), self._no_bias)
        step.finish(scratch.dx, scratch.x, self._results)
        gradients.drain(step)

    def _rows(self, at: Scalar, slot: Scalar) -> RowCopies:
        scratch, schedule = self.scratch, self.scalars.schedule
        place = (scratch.x.at[slot], scratch.fetched.at[slot], schedule.first[at], schedule.size[at])
        return RowCopies(self.inputs.rows, *place, self.tiles.rows.copied)

    def _fetch(self, at: Scalar, slot: Scalar) -> None:
        self._rows(at, slot).fetch()

    def _results(self, at: Scalar, slot: Scalar) -> RowCopies:
        return self._rows(at, slot)._replace(hbm=self.outputs.drows, semaphore=self.scratch.written.at[slot])

    def _select(self, at: Scalar, block: Any) -> None:
        """Zero the rows of no run."""
        used = used_rows(self.scalars, at, self.static.layout, block.shape)
        block[...] = jnp.where(used, block[...], jnp.zeros((), block.dtype))

    def _no_bias(self) -> None:
        """Sums of the bias's gradient start at zero."""
        if self.outputs.dbias is not None:
            self.outputs.dbias[...] = jnp.zeros(self.outputs.dbias.shape, jnp.float32)

    def _work(self, step: Step, dy: Any, out_slot: Scalar, gradients: Gradients) -> None:
        outputs, scratch, tiles, at = self.outputs, self.scratch, self.tiles.rows, step.at
        x = scratch.x.at[step.slot]
        self._select(at, dy)
        weights = cast_weights(self.inputs.weights, scratch.casts, step.busy)
        gradients.begin(at, step.chunk, out_slot)
        self._no_bias()
        totals = [weight.sums(out_slot) for weight in gradients.weights]

        def add(offset: Scalar, size: int) -> None:
            own = pl.ds(offset, size)
            parts = self._dparts(x[own], dy[own], weights)
            scratch.dx[own] += times_transposed(parts, weights)
            for total, part in zip(totals, parts, strict=True):
                total[...] += dot(x[own], part, (0, 0))
            if outputs.dbias is not None:
                outputs.dbias[0] += jnp.sum(parts[0].astype(jnp.float32), axis=0, keepdims=True)

        over_pieces(*pieces_of(self.scalars.schedule.size[at], self.scalars.covers, tiles), tiles, add)
        gradients.finish(out_slot)

    def _dparts(self, x: Float[Array, "P D"], dy: Float[Array, "P C"], weights: Sequence[Any]) -> list[Array]:
        """`dy` taken back to what each matrix gave."""
        if self.static.activation is None:
            return [dy]
        parts = [rounded(part, x.dtype) for part in parts_of(x, weights, self.inputs.bias)]
        back = taken_back(dy.astype(jnp.float32), parts, self.static.activation)
        return [part.astype(x.dtype) for part in back.dparts]
