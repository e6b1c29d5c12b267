"""Which work item works on which rows: traced arrays that kernels prefetch as scalars; pure, tested without kernels.

An item is a stretch of at most `tile_rows` rows of one expert. Items ascend by expert, every expert has at least one
(without rows it still has gradients to set to zero), and all items of an expert are worked by one core.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moe_kernels.types import Layout, Runs

# What an item does with the weight gradients of its expert.
PADDING, STARTS, ADDS = 0, 1, 2


class Schedule(NamedTuple):
    """The items of all cores, core after core; `N` runs."""

    expert: Int[Array, " Q"]
    fetched: Int[Array, " Q"]
    """Expert whose weights are in VMEM: its own, or the last (else next) one with rows, so that nothing is fetched.

    Where a core has no rows at all, any.
    """
    after: Int[Array, " Q"]
    """Whether an item with rows came before on this core."""
    first: Int[Array, " Q"]
    """First row."""
    size: Int[Array, " Q"]
    """Rows up to the last used one; 0 for an item with nothing to do."""
    offset: Int[Array, " Q"]
    """Rows of the expert before this item."""
    part: Int[Array, " Q"]
    """PADDING (no expert), STARTS or ADDS to the weight gradients."""
    run_first: Int[Array, " N"]
    """First row of each run, counted from the first row of its expert."""
    run_size: Int[Array, " N"]


def items_per_core(layout: Layout, tile_rows: int, num_cores: int) -> int:
    """Static number of items on a core, enough for every distribution of rows.

    >>> items_per_core(Layout(64, 1, 1, 4, 64, 16), 16, 2), items_per_core(Layout(64, 1, 1, 4, 64, None), 16, 1)
    (2, 8)
    """
    if layout.rows_per_expert is not None:
        return -(-layout.num_experts // num_cores) * max(1, -(-layout.rows_per_expert // tile_rows))
    return layout.num_experts + layout.num_rows // tile_rows


def make_schedule(layout: Layout, runs: Runs, *, tile_rows: int, num_cores: int = 1) -> Schedule:
    """Cut the rows of every expert into items of `tile_rows`, and give each core neighbouring experts.

    A block is split evenly among cores; packed runs are split where the rows up to there are the core's share.

    >>> runs = Runs(jnp.arange(3), jnp.array([0, 40, 40]), jnp.array([33, 0, 8]))
    >>> schedule = make_schedule(Layout(64, 1, 1, 3, 64, None), runs, tile_rows=32)
    >>> schedule.expert[:4].tolist(), schedule.first[:4].tolist(), schedule.size.tolist()
    ([0, 0, 1, 2], [0, 32, 40, 40], [32, 1, 0, 8, 0])
    """
    num_experts, per_expert = layout.num_experts, layout.runs_per_expert
    first = runs.first.reshape(num_experts, per_expert)
    size = runs.size.reshape(num_experts, per_expert)
    inside = first - first[:, :1]
    extent = jnp.max(jnp.where(size > 0, inside + size, 0), axis=1)

    experts = jnp.arange(num_experts, dtype=jnp.int32)
    needed = jnp.maximum(1, (extent + tile_rows - 1) // tile_rows)
    if layout.rows_per_expert is not None:
        core = experts // -(-num_experts // num_cores)
    else:
        before, total = jnp.cumsum(extent) - extent, jnp.maximum(jnp.sum(extent), 1)
        core = jnp.minimum((before + extent // 2) * num_cores // total, num_cores - 1)
    end = jnp.cumsum(needed, dtype=jnp.int32)
    cores = jnp.arange(num_cores, dtype=jnp.int32)
    core_end = jnp.sum(jnp.where(core[None] <= cores[:, None], needed[None], 0), axis=1, dtype=jnp.int32)
    core_start = jnp.concatenate([jnp.zeros(1, jnp.int32), core_end[:-1]])

    items = items_per_core(layout, tile_rows, num_cores)
    item = core_start[:, None] + jnp.arange(items, dtype=jnp.int32)[None]
    real = item < core_end[:, None]
    # Compared and added up: a TPU takes longer for a gather, and for a binary search, of which each step is one.
    expert = jnp.minimum(jnp.sum(end[None, None] <= item[..., None], axis=2, dtype=jnp.int32), num_experts - 1)
    own = expert[..., None] == experts[None, None]
    of_expert = lambda values: jnp.sum(jnp.where(own, values[None, None], 0), axis=2, dtype=jnp.int32)  # noqa: E731
    number = item - of_expert(end - needed)
    offset = jnp.where(real, number * tile_rows, 0)
    count = jnp.where(real, jnp.clip(of_expert(extent) - offset, 0, tile_rows), 0)

    last = jax.lax.cummax(jnp.where(count > 0, expert, -1), axis=1)
    next_used = jnp.min(jnp.where(count > 0, expert, num_experts - 1), axis=1, keepdims=True)
    part = jnp.where(real, jnp.where(number == 0, STARTS, ADDS), PADDING)
    flat = lambda values: values.astype(jnp.int32).reshape(-1)  # noqa: E731
    return Schedule(
        expert=flat(expert),
        fetched=flat(jnp.where(last >= 0, last, next_used)),
        after=flat(last >= 0),
        first=flat(of_expert(first[:, 0]) + offset),
        size=flat(count),
        offset=flat(offset),
        part=flat(part),
        run_first=flat(inside),
        run_size=flat(size),
    )
