"""Which tile works on which rows: from traced runs to arrays that a kernel reads."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from moe_kernels.types import Layout, Runs


class RowTiles(NamedTuple):
    """The tiles that have rows, in order of rows; entries from `num` on are not used."""

    expert: Int[Array, " N"]
    first: Int[Array, " N"]
    size: Int[Array, " N"]
    """Rows that belong to the tile, at most the tile's height."""
    start: Int[Array, " E+1"]
    """Tiles of expert e: `start[e] .. start[e + 1] - 1`; the last entry is the number of tiles."""


def max_tiles(layout: Layout, height: int) -> int:
    """Most tiles that the runs of a layout can need."""
    num_runs = layout.num_experts * layout.runs_per_expert
    if layout.rows_per_expert is not None:
        return num_runs * -(-(layout.rows_per_expert // layout.runs_per_expert) // height)
    return layout.num_rows // height + num_runs


def row_tiles(runs: Runs, layout: Layout, height: int) -> RowTiles:
    """Cut every run into tiles of `height` rows, the last one ragged; a run without rows has none."""
    tiles_of_run = (runs.size + (height - 1)) // height
    ends = jnp.cumsum(tiles_of_run, dtype=jnp.int32)
    tile = jnp.arange(max(max_tiles(layout, height), 1), dtype=jnp.int32)
    run = jnp.minimum(jnp.searchsorted(ends, tile, side="right"), runs.size.shape[0] - 1).astype(jnp.int32)
    offset = (tile - (ends[run] - tiles_of_run[run])) * height
    start = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[layout.runs_per_expert - 1 :: layout.runs_per_expert]])
    return RowTiles(runs.expert[run], runs.first[run] + offset, jnp.clip(runs.size[run] - offset, 0, height), start)
