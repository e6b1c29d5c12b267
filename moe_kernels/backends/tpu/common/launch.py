"""What the launchers of all kernels share: where a kernel runs, its schedule and its grid (core, item, chunk of F)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from moe_kernels.backends.tpu.common.rows import Scalars
from moe_kernels.backends.tpu.common.schedule import Schedule, items_per_core, make_schedule
from moe_kernels.backends.tpu.common.tiling import Tiles, covers
from moe_kernels.chips import MIB, Tpu, find_tpu
from moe_kernels.types import Layout, Runs

# The chip whose block sizes are taken where kernels run interpreted on another platform.
STAND_IN = "TPU v6 lite"


@dataclasses.dataclass(frozen=True)
class Target:
    """The device that a kernel is traced for; `interpret` on anything but a TPU."""

    chip: str
    num_cores: int = 1
    interpret: bool = False

    @property
    def facts(self) -> Tpu:
        """What block sizes are chosen by."""
        found = find_tpu(self.chip)
        assert found is not None, "refused by why_not"
        return found


def tiles_for(
    choose: Callable[..., Tiles | None], target: Target, layout: Layout, rows: Float[Array, "R D"], weight: Array
) -> Tiles:
    """Block sizes of a kernel for a problem that `why_not` lets through."""
    sizes = (rows.shape[1], weight.shape[2], rows.dtype.itemsize, weight.dtype.itemsize)
    tiles = choose(layout, *sizes, target.facts)
    assert tiles is not None, "refused by why_not"
    return tiles


@dataclasses.dataclass(frozen=True)
class Grid:
    """Cores, items of a core, chunks of F of an item; and index maps over them, which also get the scalars."""

    cores: int
    items: int
    chunks: int

    def item(self, core: Any, item: Any) -> Any:
        """Number of the item in the schedule."""
        return core * self.items + item

    def fetched(self, core: Any, item: Any, chunk: Any, scalars: tuple[Any, ...]) -> tuple[Any, Any]:
        """Expert and chunk whose weights an item needs; the last ones again where it has no rows."""
        schedule, at = unflatten(scalars).schedule, self.item(core, item)
        return schedule.fetched[at], self.fetched_chunk(chunk, schedule.size[at], schedule.after[at])

    def fetched_chunk(self, chunk: Any, size: Any, after: Any) -> Any:
        """The chunk of it; `after`: whether an item with rows came before on the core."""
        return jnp.where(size > 0, chunk, jnp.where(after > 0, self.chunks - 1, 0))

    def columns(self, core: Any, item: Any, chunk: Any, *scalars: Any) -> tuple[Any, int, Any]:
        """Block of an `[E, rows, F]` array: all rows and the chunk of F."""
        expert, chunk = self.fetched(core, item, chunk, scalars)
        return expert, 0, chunk

    def chunk_rows(self, core: Any, item: Any, chunk: Any, *scalars: Any) -> tuple[Any, Any, int]:
        """Block of an `[E, F, columns]` array."""
        expert, chunk = self.fetched(core, item, chunk, scalars)
        return expert, chunk, 0

    def whole(self, core: Any, item: Any, chunk: Any, *scalars: Any) -> tuple[Any, int, int]:
        """Block of an `[E, rows, columns]` array: all of an expert."""
        return self.fetched(core, item, chunk, scalars)[0], 0, 0

    def item_columns(self, core: Any, item: Any, chunk: Any, *scalars: Any) -> tuple[Any, int, Any]:
        """Block of a `[Q, 1, F]` array of sums of each item."""
        return self.item(core, item), 0, chunk

    def item_whole(self, core: Any, item: Any, chunk: Any, *scalars: Any) -> tuple[Any, int, int]:
        """Block of a `[Q, 1, columns]` array of sums of each item."""
        return self.item(core, item), 0, 0


NUM_SCALARS = len(Schedule._fields) + 1


def unflatten(scalars: Sequence[Any]) -> Scalars:
    """The prefetched scalars by name."""
    *schedule, cover = scalars
    return Scalars(Schedule(*schedule), cover)


def scalars_of(layout: Layout, runs: Runs, tiles: Tiles, target: Target) -> Scalars:
    """The schedule of a kernel, and the pieces that cover its rows."""
    schedule = make_schedule(layout, runs, tile_rows=tiles.rows.rows, num_cores=target.num_cores)
    return Scalars(schedule, jnp.array(covers(tiles.rows.pieces, target.facts.depth), jnp.int32))


def grid_of(layout: Layout, tiles: Tiles, target: Target) -> Grid:
    """The grid of a kernel."""
    items = items_per_core(layout, tiles.rows.rows, target.num_cores)
    return Grid(target.num_cores, items, tiles.num_chunks)


def apart(outputs: Sequence[Array]) -> tuple[Array, ...]:
    """The outputs of a kernel, none of which XLA may have it write straight into the stack that a scan makes.

    Where one of several outputs goes there, XLA makes one fusion of both, forgets how much VMEM the kernel asked for,
    and refuses it for taking more than 16 MiB (libtpu 0.0.42). A kernel of a single output is left alone.
    """
    return jax.lax.optimization_barrier(tuple(outputs))


def launch(
    kernel: Callable[..., None],
    name: str,
    grid: Grid,
    target: Target,
    tiles: Tiles,
    *,
    products: int,
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Sequence[pl.BlockSpec],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[Any],
    aliases: dict[int, int] | None = None,
) -> Callable[..., tuple[Float[Array, "..."], ...]]:
    """Give the function of `(scalars, *arrays)` that runs a kernel; under `jax.vmap` one after the other.

    The first array is rows `[R, D]`; the kernel does `products` matmuls of them with an expert's `[D, F]`.
    """

    def run(scalars: Scalars, *arrays: Float[Array, "..."]) -> tuple[Float[Array, "..."], ...]:
        rows, width = arrays[0].shape
        moved = sum(array.size * array.dtype.itemsize for array in (*arrays, *out_shape))
        call = pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=NUM_SCALARS,
                grid=(grid.cores, grid.items, grid.chunks),
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=scratch,
            ),
            out_shape=out_shape,
            input_output_aliases={n + NUM_SCALARS: out for n, out in (aliases or {}).items()},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=min(target.facts.vmem, tiles.vmem + MIB),
            ),
            # Of all planned rows: XLA and whoever counts a compiled program's work see no further into a kernel.
            cost_estimate=pl.CostEstimate(
                flops=2 * products * rows * width * tiles.padded, transcendentals=0, bytes_accessed=moved
            ),
            interpret=target.interpret,
            name=name,
        )
        return apart(call(*jax.tree.leaves(scalars), *arrays))

    # Pallas would give batched scalars a loop of its own, but not every batched array that a kernel copies by hand.
    return jax.custom_batching.sequential_vmap(run)
