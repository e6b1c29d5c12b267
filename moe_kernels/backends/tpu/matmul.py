"""Grouped matmul for TPU: `y = x W_e`, and one kernel for `dX_e = dY_e W_eᵀ` and `dW_e = X_eᵀ dY_e`.

Grid (core, item, chunk of F), as in the expert MLP: the rows `x` of an item stay in VMEM while chunks of its expert's
weights stream through, each read once for an item; a chunk of `y` leaves, or a chunk of `dy` comes in, at every step.
Backward, `dx` is added up in float32 over chunks and leaves from the buffer that `x` came in; `W` is never transposed
in HBM. Rows that belong to no run are zeroed in `x` and in `dy` before any matmul.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from moe_kernels.backends.tiling import Tiles, matmul_backward_tiles, matmul_forward_tiles, one_item
from moe_kernels.backends.tpu.gradients import Gradient, Gradients, gradient_dtype, gradient_slots
from moe_kernels.backends.tpu.launch import NUM_SCALARS, Grid, Target, grid_of, launch, scalars_of, tiles_for, unflatten
from moe_kernels.backends.tpu.rows import RowCopies, Scalar, Scalars, dot, over_pieces, pieces_of, used_rows
from moe_kernels.backends.tpu.step import Step, this_step
from moe_kernels.types import Layout, Runs


class MatmulSaved(NamedTuple):
    """What the backward pass needs."""

    rows: Float[Array, "R D"]
    weight: Float[Array, "E D F"]
    runs: Runs


def grouped_matmul_forward(
    target: Target, layout: Layout, rows: Float[Array, "R D"], weight: Float[Array, "E D F"], runs: Runs
) -> tuple[Float[Array, "R F"], MatmulSaved]:
    """`y = x W_e` for the rows of every expert e; unused rows hold anything."""
    saved = MatmulSaved(rows, weight, runs)
    if rows.shape[0] == 0:
        return jnp.zeros((0, weight.shape[2]), rows.dtype), saved
    tiles = tiles_for(matmul_forward_tiles, target, layout, rows, weight)
    return run_forward(tiles, target, layout, rows, weight, runs), saved


def grouped_matmul_backward(
    target: Target, layout: Layout, saved: MatmulSaved, dout: Float[Array, "R F"]
) -> tuple[Float[Array, "R D"], Float[Array, "E D F"]]:
    """Gradients of rows and weights; an expert without rows gets exactly 0."""
    rows, weight, runs = saved
    if rows.shape[0] == 0:
        return rows, jnp.zeros_like(weight)
    tiles = tiles_for(matmul_backward_tiles, target, layout, rows, weight)
    return run_backward(tiles, target, layout, rows, weight, runs, dout)


def run_forward(
    tiles: Tiles, target: Target, layout: Layout, rows: Float[Array, "R D"], weight: Float[Array, "E D F"], runs: Runs
) -> Float[Array, "R F"]:
    """The forward pass with given block sizes."""
    width, chunk, held = rows.shape[1], tiles.chunk, tiles.rows.rows
    grid = grid_of(layout, tiles, target)

    def kernel(*refs: Any) -> None:
        _forward(tiles, grid, unflatten(refs[:NUM_SCALARS]), _Forward(*refs[NUM_SCALARS:]))

    hbm = pl.BlockSpec(memory_space=pltpu.MemorySpace.HBM)
    run = launch(
        kernel,
        "grouped_matmul_forward",
        grid,
        target,
        tiles,
        products=1,
        in_specs=[hbm, pl.BlockSpec((1, width, chunk), grid.columns)],
        out_specs=[hbm],
        out_shape=[jax.ShapeDtypeStruct((rows.shape[0], tiles.padded), rows.dtype)],
        scratch=[
            pltpu.VMEM((2, held, width), rows.dtype),
            pltpu.VMEM((2, held, chunk), rows.dtype),
            pltpu.VMEM((width, chunk) if weight.dtype != rows.dtype else (8, 128), rows.dtype),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
        ],
    )
    (out,) = run(scalars_of(layout, runs, tiles, target), rows, _padded(weight, tiles.padded))
    return out[:, : weight.shape[2]]


def run_backward(
    tiles: Tiles,
    target: Target,
    layout: Layout,
    rows: Float[Array, "R D"],
    weight: Float[Array, "E D F"],
    runs: Runs,
    dout: Float[Array, "R F"],
) -> tuple[Float[Array, "R D"], Float[Array, "E D F"]]:
    """The backward pass with given block sizes."""
    width, chunk, held = rows.shape[1], tiles.chunk, tiles.rows.rows
    grid = grid_of(layout, tiles, target)
    once = one_item(layout, tiles.rows)
    dtype, slots = gradient_dtype(weight.dtype, once), gradient_slots(grid, once)

    def kernel(*refs: Any) -> None:
        scalars = unflatten(refs[:NUM_SCALARS])
        _Backward(tiles, layout, grid, once, scalars, _Refs(*refs[NUM_SCALARS:])).run()

    hbm = pl.BlockSpec(memory_space=pltpu.MemorySpace.HBM)
    padded = _padded(weight, tiles.padded)
    run = launch(
        kernel,
        "grouped_matmul_backward",
        grid,
        target,
        tiles,
        products=2,
        in_specs=[hbm, hbm, pl.BlockSpec((1, width, chunk), grid.columns)],
        out_specs=[hbm, hbm],
        out_shape=[
            jax.ShapeDtypeStruct(rows.shape, rows.dtype),
            jax.ShapeDtypeStruct(padded.shape, dtype),
        ],
        scratch=[
            pltpu.VMEM((2, held, width), rows.dtype),
            pltpu.VMEM((2, held, chunk), rows.dtype),
            pltpu.VMEM((held, width), jnp.float32),
            pltpu.VMEM((width, chunk) if weight.dtype != rows.dtype else (8, 128), rows.dtype),
            pltpu.VMEM((slots, width, chunk), dtype),
            pltpu.VMEM((width, chunk) if dtype != jnp.float32 else (8, 128), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA,
        ],
    )
    dout = jnp.pad(dout, ((0, 0), (0, tiles.padded - dout.shape[1])))
    drows, dweight = run(scalars_of(layout, runs, tiles, target), rows, dout, padded)
    return drows, dweight[:, :, : weight.shape[2]].astype(weight.dtype)


def _padded(weight: Float[Array, "E D F"], padded: int) -> Float[Array, "E D Q"]:
    return jnp.pad(weight, ((0, 0), (0, 0), (0, padded - weight.shape[2])))


def _columns(tiles: Tiles, chunk: Scalar) -> Any:
    """The columns of a chunk, None for all."""
    if tiles.num_chunks == 1:
        return None
    return pl.ds(pl.multiple_of(chunk * tiles.chunk, tiles.chunk), tiles.chunk)


def _weight(weight: Any, cast: Any, busy: Scalar) -> Any:
    """The chunk of the weights in the dtype of the rows."""
    if weight.dtype == cast.dtype:
        return weight.at[0]

    @pl.when(busy)
    def _() -> None:
        cast[...] = weight[0].astype(cast.dtype)

    return cast


class _Forward(NamedTuple):
    """Arrays of the forward kernel."""

    rows: Any
    weight: Any
    out: Any
    x: Any
    y: Any
    cast: Any
    fetched: Any
    written: Any


def _forward(tiles: Tiles, grid: Grid, scalars: Scalars, refs: _Forward) -> None:
    step, schedule = this_step(grid, scalars), scalars.schedule
    at, slot, number = step.at, step.slot, step.number

    def rows(at: Scalar, slot: Scalar) -> RowCopies:
        place = (refs.x.at[slot], refs.fetched.at[slot], schedule.first[at], schedule.size[at])
        return RowCopies(refs.rows, *place, tiles.rows.copied)

    def results(number: Scalar) -> RowCopies:
        at, slot = grid.item(step.core, jax.lax.div(number, grid.chunks)), jax.lax.rem(number, 2)
        place = (refs.y.at[slot], refs.written.at[slot], schedule.first[at], schedule.size[at])
        return RowCopies(refs.out, *place, tiles.rows.copied, _columns(tiles, jax.lax.rem(number, grid.chunks)))

    pl.when(number == 0)(lambda: rows(at, slot).fetch())

    @pl.when(step.chunk == 0)
    def _() -> None:
        pl.when(step.item + 1 < grid.items)(lambda: rows(at + 1, 1 - slot).fetch())
        rows(at, slot).fetched()

    pl.when(number >= 2)(lambda: results(number - 2).written())
    weight = _weight(refs.weight, refs.cast, step.busy)
    x, y = refs.x.at[slot], refs.y.at[jax.lax.rem(number, 2)]

    def work(offset: Scalar, size: int) -> None:
        own = pl.ds(offset, size)
        y[own] = dot(x[own], weight[...], (1, 0)).astype(y.dtype)

    over_pieces(*pieces_of(scalars, at, tiles.rows), tiles.rows, work)
    results(number).write()

    @pl.when(step.is_last)
    def _() -> None:
        for last in range(min(2, grid.items * grid.chunks)):
            results(number - last).written()


class _Refs(NamedTuple):
    """Arrays of the backward kernel."""

    rows: Any
    dout: Any
    weight: Any
    drows: Any
    dweight: Any
    x: Any
    """Two items' rows of x, then of dx."""
    dy: Any
    """Chunks of dy, of two steps."""
    dx: Any
    cast: Any
    dw: Any
    dw_sum: Any
    fetched: Any
    dy_fetched: Any
    written: Any
    dw_written: Any
    dw_fetched: Any


class _Backward(NamedTuple):
    """The backward kernel: its static facts, scalars and arrays."""

    tiles: Tiles
    layout: Layout
    grid: Grid
    once: bool
    scalars: Scalars
    refs: _Refs

    def run(self) -> None:
        """One step of the grid."""
        refs, step = self.refs, this_step(self.grid, self.scalars)
        at, slot, number = step.at, step.slot, step.number
        gradients = Gradients(
            self.grid,
            self.scalars,
            self.tiles.chunk,
            self.once,
            (Gradient(refs.dweight, refs.dw, refs.dw_sum, columns=True),),
            refs.dw_written,
            refs.dw_fetched,
        )

        @pl.when(number == 0)
        def _() -> None:
            self._fetch(at, slot)
            self._dy(step.core, number).fetch()

        pl.when(jnp.logical_not(step.is_last))(lambda: self._dy(step.core, number + 1).fetch())
        self._dy(step.core, number).fetched()

        @pl.when((step.chunk == 0) & step.busy)
        def _() -> None:
            self._rows(at, slot).fetched()
            self._select(at, refs.x.at[slot])
            refs.dx[...] = jnp.zeros(refs.dx.shape, jnp.float32)

        step.swap(self._results, self._fetch)
        gradients.fill(step, lambda out_slot: self._work(step, out_slot, gradients))
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

    def _dy(self, core: Scalar, step: Scalar) -> RowCopies:
        refs, schedule = self.refs, self.scalars.schedule
        at, slot = self.grid.item(core, jax.lax.div(step, self.grid.chunks)), jax.lax.rem(step, 2)
        place = (refs.dy.at[slot], refs.dy_fetched.at[slot], schedule.first[at], schedule.size[at])
        columns = _columns(self.tiles, jax.lax.rem(step, self.grid.chunks))
        return RowCopies(refs.dout, *place, self.tiles.rows.copied, columns)

    def _select(self, at: Scalar, block: Any) -> None:
        """Zero the rows of no run."""
        used = used_rows(self.scalars, at, self.layout, block.shape)
        block[...] = jnp.where(used, block[...], jnp.zeros((), block.dtype))

    def _work(self, step: Step, out_slot: Scalar, gradients: Gradients) -> None:
        refs, tiles, at = self.refs, self.tiles.rows, step.at
        dy, x = refs.dy.at[jax.lax.rem(step.number, 2)], refs.x.at[step.slot]
        self._select(at, dy)
        weight = _weight(refs.weight, refs.cast, step.busy)
        gradients.begin(at, step.chunk, out_slot)
        total = gradients.weights[0].sums(out_slot)

        def add(offset: Scalar, size: int) -> None:
            own = pl.ds(offset, size)
            refs.dx[own] += dot(dy[own], weight[...], (1, 1))
            total[...] += dot(x[own], dy[own], (0, 0))

        over_pieces(*pieces_of(self.scalars, at, tiles), tiles, add)
        gradients.finish(out_slot)
