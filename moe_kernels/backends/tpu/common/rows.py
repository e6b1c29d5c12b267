"""Rows inside a kernel: fetched and written by copies of static sizes, worked on in pieces of static sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Int

from moe_kernels.backends.tpu.common.schedule import Schedule
from moe_kernels.backends.tpu.common.tiling import PIECE, RowCuts
from moe_kernels.types import ROW_ALIGNMENT, Layout

Scalar = Any  # a traced integer inside a kernel


class Scalars(NamedTuple):
    """What a kernel prefetches into scalar memory: the schedule, and which pieces cover how many rows."""

    schedule: Schedule
    covers: Int[Array, " N"]


def pieces_of(count: Scalar, covers: Any, tiles: RowCuts) -> tuple[Scalar, Scalar]:
    """How often the first piece is repeated for an item of `count` rows, and the bits of the other ones."""
    largest = tiles.pieces[0]
    whole = jax.lax.div(count, largest)
    bits = covers[jax.lax.div(count - whole * largest + (PIECE - 1), PIECE)]
    return whole + (bits & 1), bits


def over_pieces(
    repeats: Scalar, bits: Scalar, tiles: RowCuts, work: Callable[[Scalar, int], None], *, first: bool = True
) -> None:
    """Do `work(offset, rows)` for the pieces of an item; without the repeated one where it cannot occur."""
    offset: Scalar = 0
    if first:
        largest = tiles.pieces[0]
        if tiles.rows == largest:
            pl.when(repeats > 0)(lambda: work(0, largest))
        else:

            def repeat(n: Scalar, carry: None) -> None:
                work(pl.multiple_of(n * largest, PIECE), largest)

            jax.lax.fori_loop(0, repeats, repeat, None)
        offset = repeats * largest
    for n, size in enumerate(tiles.pieces[1:], start=1):
        taken = (bits >> n) & 1
        pl.when(taken == 1)(lambda offset=offset, size=size: work(_multiple(offset, PIECE), size))
        offset = offset + taken * size


def over_pieces_or_shorter(
    count: Scalar, covers: Any, tiles: RowCuts, depth: int, work: Callable[[Scalar, int], None]
) -> None:
    """Do `work(offset, rows)` for an item of `count` rows, in as many shorter pieces where those hold all of them.

    For matmuls that do not contract over rows: each costs what its rows are.
    """
    repeats, bits = pieces_of(count, covers, tiles)
    number, short = tiles.rows // tiles.pieces[0], tiles.shorter(depth)
    if short:
        fit = (repeats == number) & (count <= number * short)

        @pl.when(fit)
        def _() -> None:
            def repeat(n: Scalar, carry: None) -> None:
                work(pl.multiple_of(n * short, PIECE), short)

            if number == 1:
                work(0, short)
            else:
                jax.lax.fori_loop(0, number, repeat, None)

        repeats, bits = jnp.where(fit, 0, repeats), jnp.where(fit, 0, bits)
    over_pieces(repeats, bits, tiles, work)


def _multiple(value: Scalar, multiple: int) -> Scalar:
    return value if isinstance(value, int) else pl.multiple_of(value, multiple)


class RowCopies(NamedTuple):
    """Copies of the rows of one item between an array in HBM and its place in VMEM."""

    hbm: Any
    vmem: Any
    semaphore: Any
    first: Scalar
    count: Scalar
    copied: int
    columns: Any = None
    """A slice of the columns of the array in HBM; None for all."""

    def fetch(self) -> None:
        """Start to read."""
        self._each(lambda far, near: pltpu.make_async_copy(far, near, self.semaphore).start())

    def fetched(self) -> None:
        """Wait until read."""
        self._each(lambda far, near: pltpu.make_async_copy(far, near, self.semaphore).wait())

    def write(self) -> None:
        """Start to write."""
        self._each(lambda far, near: pltpu.make_async_copy(near, far, self.semaphore).start())

    def written(self) -> None:
        """Wait until written."""
        self._each(lambda far, near: pltpu.make_async_copy(near, far, self.semaphore).wait())

    def _each(self, act: Callable[[Any, Any], None]) -> None:
        """All rows in one copy, else one copy for each binary digit of their number: sizes of copies are static."""

        def copy(offset: Scalar, size: int) -> None:
            own = pl.ds(pl.multiple_of(self.first + offset, ROW_ALIGNMENT), size)
            far = self.hbm.at[own] if self.columns is None else self.hbm.at[own, self.columns]
            act(far, self.vmem.at[pl.ds(_multiple(offset, min(PIECE, size)), size)])

        rows = jax.lax.div(self.count + (ROW_ALIGNMENT - 1), ROW_ALIGNMENT) * ROW_ALIGNMENT
        whole = rows == self.copied
        pl.when(whole)(lambda: copy(0, self.copied))
        left, offset, size = jnp.where(whole, 0, rows), 0, ROW_ALIGNMENT
        while size * 2 < self.copied:
            size *= 2
        while size >= ROW_ALIGNMENT and size < self.copied:
            taken = left & size
            pl.when(taken != 0)(lambda offset=offset, size=size: copy(offset, size))
            offset, size = offset + taken, size // 2


def used_rows(
    scalars: Scalars, at: Scalar, layout: Layout, shape: tuple[int, int], start: Scalar = 0
) -> Bool[Array, "P D"]:
    """Which rows of item `at` belong to a run, over a whole block of VMEM or from its row `start` on."""
    schedule, per_expert = scalars.schedule, layout.runs_per_expert
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + start
    if per_expert == 1:
        return row < schedule.size[at]
    row = row + schedule.offset[at]
    used = jnp.zeros(shape, jnp.bool_)
    for n in range(per_expert):
        run = schedule.expert[at] * per_expert + n
        first = schedule.run_first[run]
        used |= (row >= first) & (row < first + schedule.run_size[run])
    return used & (row < schedule.offset[at] + schedule.size[at])
