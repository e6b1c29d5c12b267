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
from moe_kernels.backends.tpu.launch import NUM_SCALARS, Grid, Target, grid_of, launch, scalars_of, unflatten
from moe_kernels.backends.tpu.rows import RowCopies, Scalar, Scalars, dot, over_pieces, pieces_of, used_rows
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
    sizes = (rows.shape[1], weight.shape[2], rows.dtype.itemsize, weight.dtype.itemsize)
    tiles = matmul_forward_tiles(layout, *sizes, target.facts)
    assert tiles is not None, "refused by why_not"
    return run_forward(tiles, target, layout, rows, weight, runs), saved


def grouped_matmul_backward(
    target: Target, layout: Layout, saved: MatmulSaved, dout: Float[Array, "R F"]
) -> tuple[Float[Array, "R D"], Float[Array, "E D F"]]:
    """Gradients of rows and weights; an expert without rows gets exactly 0."""
    rows, weight, runs = saved
    if rows.shape[0] == 0:
        return rows, jnp.zeros_like(weight)
    sizes = (rows.shape[1], weight.shape[2], rows.dtype.itemsize, weight.dtype.itemsize)
    tiles = matmul_backward_tiles(layout, *sizes, target.facts)
    assert tiles is not None, "refused by why_not"
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
    core, item, chunk = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    at, slot, schedule = grid.item(core, item), jax.lax.rem(item, 2), scalars.schedule
    step = item * grid.chunks + chunk
    last_step = grid.items * grid.chunks - 1
    busy = schedule.size[at] > 0

    def rows(at: Scalar, slot: Scalar) -> RowCopies:
        place = (refs.x.at[slot], refs.fetched.at[slot], schedule.first[at], schedule.size[at])
        return RowCopies(refs.rows, *place, tiles.rows.copied)

    def results(step: Scalar) -> RowCopies:
        at, slot = grid.item(core, jax.lax.div(step, grid.chunks)), jax.lax.rem(step, 2)
        place = (refs.y.at[slot], refs.written.at[slot], schedule.first[at], schedule.size[at])
        return RowCopies(refs.out, *place, tiles.rows.copied, _columns(tiles, jax.lax.rem(step, grid.chunks)))

    pl.when(step == 0)(lambda: rows(at, slot).fetch())

    @pl.when(chunk == 0)
    def _() -> None:
        pl.when(item + 1 < grid.items)(lambda: rows(at + 1, 1 - slot).fetch())
        rows(at, slot).fetched()

    pl.when(step >= 2)(lambda: results(step - 2).written())
    weight = _weight(refs.weight, refs.cast, busy)
    x, y = refs.x.at[slot], refs.y.at[jax.lax.rem(step, 2)]

    def work(offset: Scalar, size: int) -> None:
        own = pl.ds(offset, size)
        y[own] = dot(x[own], weight[...], (1, 0)).astype(y.dtype)

    over_pieces(*pieces_of(scalars, at, tiles.rows), tiles.rows, work)
    results(step).write()

    @pl.when(step == last_step)
    def _() -> None:
        for last in range(min(2, last_step + 1)):
            results(step - last).written()


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
        grid, refs, schedule = self.grid, self.refs, self.scalars.schedule
        core, item, chunk = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        at, slot = grid.item(core, item), jax.lax.rem(item, 2)
        step, busy = item * grid.chunks + chunk, schedule.size[at] > 0
        last_step = grid.items * grid.chunks - 1
        gradients = Gradients(
            grid,
            self.scalars,
            self.tiles.chunk,
            self.once,
            (Gradient(refs.dweight, refs.dw, refs.dw_sum, columns=True),),
            refs.dw_written,
            refs.dw_fetched,
        )
        out_slot = gradients.slot(step)

        @pl.when(step == 0)
        def _() -> None:
            self._rows(at, slot).fetch()
            self._dy(core, step).fetch()

        pl.when(step < last_step)(lambda: self._dy(core, step + 1).fetch())
        self._dy(core, step).fetched()

        @pl.when((chunk == 0) & busy)
        def _() -> None:
            self._rows(at, slot).fetched()
            self._select(at, refs.x.at[slot])
            refs.dx[...] = jnp.zeros(refs.dx.shape, jnp.float32)

        @pl.when(chunk == min(1, grid.chunks - 1))
        def _() -> None:
            pl.when(item > 0)(lambda: self._results(at - 1, 1 - slot).written())
            pl.when(item + 1 < grid.items)(lambda: self._rows(at + 1, 1 - slot).fetch())

        pl.when(step >= gradients.num_slots)(lambda: gradients.wait(core, step - gradients.num_slots))
        pl.when(busy)(lambda: self._work(at, slot, step, chunk, gradients))
        pl.when(jnp.logical_not(busy))(lambda: gradients.zero(out_slot))
        gradients.write(at, chunk, out_slot)

        @pl.when(chunk == grid.chunks - 1)
        def _() -> None:
            @pl.when(busy)
            def _() -> None:
                refs.x[slot] = refs.dx[...].astype(refs.x.dtype)

            self._results(at, slot).write()

        @pl.when(step == last_step)
        def _() -> None:
            self._results(at, slot).written()
            for last in range(min(gradients.num_slots, last_step + 1)):
                gradients.wait(core, step - last)

    def _rows(self, at: Scalar, slot: Scalar) -> RowCopies:
        refs, schedule = self.refs, self.scalars.schedule
        place = (refs.x.at[slot], refs.fetched.at[slot], schedule.first[at], schedule.size[at])
        return RowCopies(refs.rows, *place, self.tiles.rows.copied)

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

    def _work(self, at: Scalar, slot: Scalar, step: Scalar, chunk: Scalar, gradients: Gradients) -> None:
        refs, tiles = self.refs, self.tiles.rows
        dy, x, out_slot = refs.dy.at[jax.lax.rem(step, 2)], refs.x.at[slot], gradients.slot(step)
        self._select(at, dy)
        weight = _weight(refs.weight, refs.cast, self.scalars.schedule.size[at] > 0)
        gradients.begin(at, chunk, out_slot)
        total = gradients.weights[0].sums(out_slot)

        def add(offset: Scalar, size: int) -> None:
            own = pl.ds(offset, size)
            refs.dx[own] += dot(dy[own], weight[...], (1, 1))
            total[...] += dot(x[own], dy[own], (0, 0))

        over_pieces(*pieces_of(self.scalars, at, tiles), tiles, add)
        gradients.finish(out_slot)
