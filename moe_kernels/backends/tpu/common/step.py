"""Where a kernel is in its grid, and what happens to the rows of its items there.

Two items' rows have a place in VMEM. Rows of the next item are fetched, and results of the last one written, under the
matmuls of this one; results leave from the buffer that rows came in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from moe_kernels.backends.tpu.common.grid import Grid
from moe_kernels.backends.tpu.common.rows import RowCopies, Scalar, Scalars
from moe_kernels.backends.tpu.common.tiling import Tiles


class Step(NamedTuple):
    """A step of the grid: one chunk of one item."""

    grid: Grid
    core: Scalar
    item: Scalar
    chunk: Scalar
    at: Scalar
    """Number of the item in the schedule."""
    slot: Scalar
    """Which of two places its rows have."""
    number: Scalar
    """Steps of this core before it."""
    busy: Scalar
    """Whether the item has rows."""

    @property
    def is_last(self) -> Scalar:
        """Whether the core has no other step."""
        return self.number == self.grid.items * self.grid.chunks - 1

    def swap(self, results: Callable[[Scalar, Scalar], RowCopies], fetch: Callable[[Scalar, Scalar], None]) -> None:
        """Give the place of the last item to the next one.

        One chunk later than possible, so that the results of the last item have left without a wait.
        """
        other = 1 - self.slot

        @pl.when(self.chunk == min(1, self.grid.chunks - 1))
        def _() -> None:
            pl.when(self.item > 0)(lambda: results(self.at - 1, other).written())
            pl.when(self.item + 1 < self.grid.items)(lambda: fetch(self.at + 1, other))

    def finish(self, total: Any, buffer: Any, results: Callable[[Scalar, Scalar], RowCopies]) -> None:
        """After an item's last chunk: round what was added up into its place and start to write that."""

        @pl.when(self.chunk == self.grid.chunks - 1)
        def _() -> None:
            @pl.when(self.busy)
            def _() -> None:
                buffer[self.slot] = total[...].astype(buffer.dtype)

            copies = results(self.at, self.slot)
            copies.write()
            pl.when(self.is_last)(copies.written)


class ChunkCopies(NamedTuple):
    """Copies of chunks of an `[R, F]` array, an item's rows of one chunk at every step; two steps have a place each."""

    grid: Grid
    tiles: Tiles
    scalars: Scalars
    hbm: Any
    vmem: Any
    semaphores: Any

    def of(self, core: Scalar, number: Scalar) -> RowCopies:
        """Those of step `number` of a core."""
        schedule, slot = self.scalars.schedule, jax.lax.rem(number, 2)
        at = self.grid.item(core, jax.lax.div(number, self.grid.chunks))
        place = (self.vmem.at[slot], self.semaphores.at[slot], schedule.first[at], schedule.size[at])
        return RowCopies(self.hbm, *place, self.tiles.rows.copied, self._columns(number))

    def fetch(self, step: Step) -> Any:
        """Read a step ahead; the place of this step's chunk, which is there."""
        pl.when(step.number == 0)(lambda: self.of(step.core, step.number).fetch())
        pl.when(jnp.logical_not(step.is_last))(lambda: self.of(step.core, step.number + 1).fetch())
        self.of(step.core, step.number).fetched()
        return self.vmem.at[jax.lax.rem(step.number, 2)]

    def place(self, step: Step) -> Any:
        """Where this step's chunk is built, once what was there has left."""
        pl.when(step.number >= 2)(lambda: self.of(step.core, step.number - 2).written())
        return self.vmem.at[jax.lax.rem(step.number, 2)]

    def write(self, step: Step) -> None:
        """Start to write this step's chunk; wait for all in the end."""
        self.of(step.core, step.number).write()

        @pl.when(step.is_last)
        def _() -> None:
            for last in range(min(2, self.grid.items * self.grid.chunks)):
                self.of(step.core, step.number - last).written()

    def _columns(self, number: Scalar) -> Any:
        if self.grid.chunks == 1:
            return None
        chunk = jax.lax.rem(number, self.grid.chunks)
        return pl.ds(pl.multiple_of(chunk * self.tiles.chunk, self.tiles.chunk), self.tiles.chunk)


def this_step(grid: Grid, scalars: Scalars) -> Step:
    """The step that a kernel is called for."""
    core, item, chunk = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    at = grid.item(core, item)
    number = item * grid.chunks + chunk
    return Step(grid, core, item, chunk, at, jax.lax.rem(item, 2), number, scalars.schedule.size[at] > 0)
