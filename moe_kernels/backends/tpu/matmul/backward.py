"""Grouped matmul for TPU, backward: one kernel for `dX_e = dH_e W_eᵀ`, `dW_e = X_eᵀ dH_e` and `db_e = Σ dH_e`.

`dH` is `dY`, or `dY` taken back through the activation, whose argument `x W_e + b_e` is computed again; of a gated pair
both are. Grid (core, item, chunk of F) as forward; a chunk of `dy` comes in at every step. `dx` is added up in float32
over chunks and leaves from the buffer that `x` came in; `W` is never transposed in HBM. Rows that belong to no run are
zeroed in `x` and in `dy` before any matmul. The bias's gradient leaves as one sum an item.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from moe_kernels.backends.base import MatmulStatic, MatmulWeights, epilogue_of
from moe_kernels.backends.tpu.common.activation import activate_and_slope
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
from moe_kernels.backends.tpu.common.rows import RowCopies, Scalar, Scalars, dot, over_pieces, pieces_of, used_rows
from moe_kernels.backends.tpu.common.step import ChunkCopies, Step, this_step
from moe_kernels.backends.tpu.common.tiling import Tiles, matmul_backward_tiles, one_item
from moe_kernels.backends.tpu.matmul.forward import MatmulSaved, cast_weights, casts, padded_operands, products, rounded
from moe_kernels.types import Runs


def grouped_matmul_backward(
    target: Target, static: MatmulStatic, saved: MatmulSaved, dout: Float[Array, "R F"]
) -> tuple[Float[Array, "R D"], MatmulWeights]:
    """Gradients of rows and weights; an expert without rows gets exactly 0."""
    rows, weights, runs = saved
    if rows.shape[0] == 0:
        return rows, jax.tree.map(jnp.zeros_like, weights)
    choose = functools.partial(matmul_backward_tiles, epilogue=epilogue_of(weights, static.activation))
    tiles = tiles_for(choose, target, static.layout, rows, weights.weight)
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
    layout, width, chunk, held = static.layout, rows.shape[1], tiles.chunk, tiles.rows.rows
    grid = grid_of(layout, tiles, target)
    once = one_item(layout, tiles.rows)
    dtype, slots = gradient_dtype(weights.weight.dtype, once), gradient_slots(grid, once)
    matrices, bias = padded_operands(weights, tiles.padded)
    pair = len(matrices)
    hbm = pl.BlockSpec(memory_space=pltpu.MemorySpace.HBM)
    two = pltpu.SemaphoreType.DMA((2,))
    arrays = _Refs(
        rows=hbm,
        dout=hbm,
        weights=(pl.BlockSpec((1, width, chunk), grid.columns),) * pair,
        bias=None if bias is None else pl.BlockSpec((1, 1, chunk), grid.columns),
        drows=hbm,
        dweights=(hbm,) * pair,
        dbias=None if bias is None else pl.BlockSpec((1, 1, chunk), grid.item_columns),
        x=pltpu.VMEM((2, held, width), rows.dtype),
        dy=pltpu.VMEM((2, held, chunk), rows.dtype),
        dx=pltpu.VMEM((held, width), jnp.float32),
        casts=casts(matrices, chunk, rows.dtype),
        dw=(pltpu.VMEM((slots, width, chunk), dtype),) * pair,
        dw_sums=(pltpu.VMEM((width, chunk) if dtype != jnp.float32 else (8, 128), jnp.float32),) * pair,
        fetched=two,
        dy_fetched=two,
        written=two,
        dw_written=two,
        dw_fetched=pltpu.SemaphoreType.DMA,
    )

    def kernel(*refs: Any) -> None:
        scalars = unflatten(refs[:NUM_SCALARS])
        named = jax.tree.unflatten(jax.tree.structure(arrays), refs[NUM_SCALARS:])
        _Backward(tiles, static, grid, once, scalars, named).run()

    sums = jax.ShapeDtypeStruct((grid.cores * grid.items, 1, tiles.padded), jnp.float32)
    run = launch(
        kernel,
        "grouped_matmul_backward",
        grid,
        target,
        tiles,
        products=(2 if static.activation is None else 3) * pair,
        in_specs=jax.tree.leaves(arrays[:4]),
        out_specs=jax.tree.leaves(arrays[4:7]),
        out_shape=[
            jax.ShapeDtypeStruct(rows.shape, rows.dtype),
            *(jax.ShapeDtypeStruct(w.shape, dtype) for w in matrices),
            *([] if bias is None else [sums]),
        ],
        scratch=jax.tree.leaves(arrays[7:]),
    )
    expert_width = weights.weight.shape[2]
    dout = jnp.pad(dout, ((0, 0), (0, tiles.padded - expert_width)))
    scalars = scalars_of(layout, runs, tiles, target)
    drows, *found = run(scalars, rows, dout, *jax.tree.leaves((matrices, bias)))
    dmatrices = [dw[:, :, :expert_width].astype(weights.weight.dtype) for dw in found[:pair]]
    dbias = None
    if weights.bias is not None:
        dbias = by_expert(found[pair][:, 0], scalars.schedule, layout, once)[:, :expert_width].astype(
            weights.bias.dtype
        )
    return drows, MatmulWeights(dmatrices[0], dbias, dmatrices[1] if pair == 2 else None)


class _Refs(NamedTuple):
    """Arrays of the kernel, or how they are given to it."""

    rows: Any
    dout: Any
    weights: tuple[Any, ...]
    bias: Any
    drows: Any
    dweights: tuple[Any, ...]
    dbias: Any
    x: Any
    """Two items' rows of x, then of dx."""
    dy: Any
    """Chunks of dy, of two steps."""
    dx: Any
    casts: tuple[Any, ...]
    dw: tuple[Any, ...]
    dw_sums: tuple[Any, ...]
    fetched: Any
    dy_fetched: Any
    written: Any
    dw_written: Any
    dw_fetched: Any


class _Backward(NamedTuple):
    """The kernel: its static facts, scalars and arrays."""

    tiles: Tiles
    static: MatmulStatic
    grid: Grid
    once: bool
    scalars: Scalars
    refs: _Refs

    def run(self) -> None:
        """One step of the grid."""
        refs, step = self.refs, this_step(self.grid, self.scalars)
        at, slot = step.at, step.slot
        gradients = Gradients(
            self.grid,
            self.scalars,
            self.tiles.chunk,
            self.once,
            tuple(Gradient(*arrays, columns=True) for arrays in zip(refs.dweights, refs.dw, refs.dw_sums, strict=True)),
            refs.dw_written,
            refs.dw_fetched,
        )

        pl.when(step.number == 0)(lambda: self._fetch(at, slot))
        dy = ChunkCopies(self.grid, self.tiles, self.scalars, refs.dout, refs.dy, refs.dy_fetched).fetch(step)

        @pl.when((step.chunk == 0) & step.busy)
        def _() -> None:
            self._rows(at, slot).fetched()
            self._select(at, refs.x.at[slot])
            refs.dx[...] = jnp.zeros(refs.dx.shape, jnp.float32)

        step.swap(self._results, self._fetch)
        gradients.fill(step, lambda out_slot: self._work(step, dy, out_slot, gradients), self._no_bias)
        step.finish(refs.dx, refs.x, self._results)
        gradients.drain(step)

    def _rows(self, at: Scalar, slot: Scalar) -> RowCopies:
        refs, schedule = self.refs, self.scalars.schedule
        place = (refs.x.at[slot], refs.fetched.at[slot], schedule.first[at], schedule.size[at])
        return RowCopies(refs.rows, *place, self.tiles.rows.copied)

    def _fetch(self, at: Scalar, slot: Scalar) -> None:
        self._rows(at, slot).fetch()

    def _results(self, at: Scalar, slot: Scalar) -> RowCopies:
        return self._rows(at, slot)._replace(hbm=self.refs.drows, semaphore=self.refs.written.at[slot])

    def _select(self, at: Scalar, block: Any) -> None:
        """Zero the rows of no run."""
        used = used_rows(self.scalars, at, self.static.layout, block.shape)
        block[...] = jnp.where(used, block[...], jnp.zeros((), block.dtype))

    def _no_bias(self) -> None:
        """Sums of the bias's gradient start at zero."""
        if self.refs.dbias is not None:
            self.refs.dbias[...] = jnp.zeros(self.refs.dbias.shape, jnp.float32)

    def _work(self, step: Step, dy: Any, out_slot: Scalar, gradients: Gradients) -> None:
        refs, tiles, at = self.refs, self.tiles.rows, step.at
        x = refs.x.at[step.slot]
        self._select(at, dy)
        weights = cast_weights(refs.weights, refs.casts, step.busy)
        gradients.begin(at, step.chunk, out_slot)
        self._no_bias()
        totals = [weight.sums(out_slot) for weight in gradients.weights]

        def add(offset: Scalar, size: int) -> None:
            own = pl.ds(offset, size)
            parts = self._dparts(x[own], dy[own], weights)
            first, *others = (dot(part, weight[...], (1, 1)) for part, weight in zip(parts, weights, strict=True))
            refs.dx[own] += sum(others, start=first)
            for total, part in zip(totals, parts, strict=True):
                total[...] += dot(x[own], part, (0, 0))
            if refs.dbias is not None:
                refs.dbias[0] += jnp.sum(parts[0].astype(jnp.float32), axis=0, keepdims=True)

        over_pieces(*pieces_of(self.scalars.schedule.size[at], self.scalars.covers, tiles), tiles, add)
        gradients.finish(out_slot)

    def _dparts(self, x: Float[Array, "P D"], dy: Float[Array, "P C"], weights: Sequence[Any]) -> list[Array]:
        """`dy` taken back to what each matrix gave."""
        if self.static.activation is None:
            return [dy]
        before, *gated = (rounded(part, x.dtype) for part in products(x, weights, self.refs.bias))
        activated, slope = activate_and_slope(before, self.static.activation)
        dy32 = dy.astype(jnp.float32)
        if not gated:
            return [(dy32 * slope).astype(x.dtype)]
        return [(dy32 * (gated[0] * slope)).astype(x.dtype), (dy32 * activated).astype(x.dtype)]
