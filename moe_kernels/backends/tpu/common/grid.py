"""The grid of the kernels that go over experts (core, item, chunk of F), with its schedule and its index maps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_kernels.backends.tpu.common.launch import Target
from moe_kernels.backends.tpu.common.rows import Scalars
from moe_kernels.backends.tpu.common.schedule import items_per_core, make_schedule
from moe_kernels.backends.tpu.common.tiling import Sizes, Tiles, covers
from moe_kernels.types import Layout, Runs


def sizes_of(
    target: Target, layout: Layout, rows: Float[Array, "N D"], weight: Float[Array, "E D F"], *, gated: bool = False
) -> Sizes:
    """What block sizes are chosen by."""
    itemsizes = rows.dtype.itemsize, weight.dtype.itemsize
    return Sizes(layout, rows.shape[1], weight.shape[2], *itemsizes, target.facts, gated)


@runtime_checkable
class WeightMaps(Protocol):
    """Index maps for the weights of experts: a chunk of F of `[E, rows, F]` or `[E, F, columns]`, or all of one."""

    @property
    def columns(self) -> Callable[..., tuple[Any, int, Any]]:
        """Of an `[E, rows, F]` array."""
        ...

    @property
    def chunk_rows(self) -> Callable[..., tuple[Any, Any, int]]:
        """Of an `[E, F, columns]` array."""
        ...

    @property
    def whole(self) -> Callable[..., tuple[Any, int, int]]:
        """Of an `[E, rows, columns]` array."""
        ...


@dataclasses.dataclass(frozen=True)
class Grid:
    """Cores, items of a core, chunks of F of an item; and index maps over them, which also get the scalars."""

    cores: int
    items: int
    chunks: int

    @property
    def axes(self) -> tuple[int, int, int]:
        """Their numbers, the slowest first."""
        return self.cores, self.items, self.chunks

    def item(self, core: Any, item: Any) -> Any:
        """Number of the item in the schedule."""
        return core * self.items + item

    def fetched(self, core: Any, item: Any, chunk: Any, scalars: Scalars) -> tuple[Any, Any]:
        """Expert and chunk whose weights an item needs; the last ones again where it has no rows."""
        schedule, at = scalars.schedule, self.item(core, item)
        return schedule.fetched[at], self.fetched_chunk(chunk, schedule.size[at], schedule.after[at])

    def fetched_chunk(self, chunk: Any, size: Any, after: Any) -> Any:
        """The chunk of it; `after`: whether an item with rows came before on the core."""
        return jnp.where(size > 0, chunk, jnp.where(after > 0, self.chunks - 1, 0))

    def columns(self, core: Any, item: Any, chunk: Any, scalars: Scalars) -> tuple[Any, int, Any]:
        """Block of an `[E, rows, F]` array: all rows and the chunk of F."""
        expert, chunk = self.fetched(core, item, chunk, scalars)
        return expert, 0, chunk

    def chunk_rows(self, core: Any, item: Any, chunk: Any, scalars: Scalars) -> tuple[Any, Any, int]:
        """Block of an `[E, F, columns]` array."""
        expert, chunk = self.fetched(core, item, chunk, scalars)
        return expert, chunk, 0

    def whole(self, core: Any, item: Any, chunk: Any, scalars: Scalars) -> tuple[Any, int, int]:
        """Block of an `[E, rows, columns]` array: all of an expert."""
        return self.fetched(core, item, chunk, scalars)[0], 0, 0

    def item_columns(self, core: Any, item: Any, chunk: Any, scalars: Scalars) -> tuple[Any, int, Any]:
        """Block of a `[Q, 1, F]` array of sums of each item."""
        return self.item(core, item), 0, chunk

    def item_whole(self, core: Any, item: Any, chunk: Any, scalars: Scalars) -> tuple[Any, int, int]:
        """Block of a `[Q, 1, columns]` array of sums of each item."""
        return self.item(core, item), 0, 0


def scalars_of(layout: Layout, runs: Runs, tiles: Tiles, target: Target) -> Scalars:
    """The schedule of a kernel, and the pieces that cover its rows."""
    schedule = make_schedule(layout, runs, tile_rows=tiles.rows.rows, num_cores=target.num_cores)
    return Scalars(schedule, jnp.array(covers(tiles.rows.pieces, target.facts.depth), jnp.int32))


def grid_of(layout: Layout, tiles: Tiles, target: Target) -> Grid:
    """The grid of a kernel."""
    items = items_per_core(layout, tiles.rows.rows, target.num_cores)
    return Grid(target.num_cores, items, tiles.num_chunks)
