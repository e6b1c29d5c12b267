"""Send rows to the shards that hold their experts, and back; called inside `shard_map`.

Shard `e // (E / shards)` of the axis holds expert e. A shard sends its plan's `[E, rows]` block in the dtype of the
rows; reshaped, that is `[shards, experts per shard, rows, D]`. Received rows are ordered by expert, with one run from
each sending shard. The derivative of each exchange is the exchange in the other direction.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moe_kernels.types import Layout, Plan, Runs, round_up

# A block is rounded up to the depth of the MXU (128 rows), half or a quarter of it, if that adds at most a twentieth.
# Else it is rounded up to a bfloat16 tile of a TPU, which has 16 rows.
ALIGNMENTS, LEAST_ALIGNMENT = (128, 64, 32), 16


class Received(NamedTuple):
    """Runs of this shard's experts in the rows from all shards, and their static facts."""

    runs: Runs
    layout: Layout


def block_rows(rows: int, num_chunks: int) -> int:
    """Compute the rows of an expert's block that holds `rows` rows and can be split into chunks.

    >>> block_rows(250, 1), block_rows(135, 1), block_rows(135, 2), block_rows(3, 1)
    (256, 144, 160, 16)
    """
    for alignment in ALIGNMENTS:
        rounded = round_up(rows, alignment * num_chunks)
        if 20 * rounded <= 21 * rows:
            return rounded
    return round_up(rows, LEAST_ALIGNMENT * num_chunks)


def in_chunks(plan: Plan, num_chunks: int) -> Plan:
    """Reorder a plan's rows chunk after chunk, each an `[E, rows / chunks]` block.

    Row p of an expert goes to chunk `p % chunks`, which fills all chunks equally. Dispatch and combine see `chunks * E`
    experts.
    """
    if num_chunks == 1:
        return plan
    layout = plan.layout
    assert layout.rows_per_expert is not None and layout.rows_per_expert % num_chunks == 0
    num_experts, size = layout.num_experts, layout.rows_per_expert // num_chunks
    expert, place = plan.row // layout.rows_per_expert, plan.row % layout.rows_per_expert
    moved = ((place % num_chunks) * num_experts + expert) * size + place // num_chunks
    return Plan(
        row=jnp.where(plan.row < layout.num_rows, moved, layout.num_rows),
        source=plan.source.reshape(num_experts, size, num_chunks).transpose(2, 0, 1).reshape(-1),
        runs=Runs(
            expert=jnp.arange(num_chunks * num_experts, dtype=jnp.int32),
            first=jnp.arange(num_chunks * num_experts, dtype=jnp.int32) * size,
            size=_chunk_sizes(plan.runs.size, num_chunks).reshape(-1),
        ),
        kept=plan.kept,
        layout=Layout(
            num_tokens=layout.num_tokens,
            num_choices=layout.num_choices,
            num_groups=layout.num_groups,
            num_experts=num_chunks * num_experts,
            num_rows=layout.num_rows,
            rows_per_expert=size,
        ),
    )


def _chunk_sizes(size: Int[Array, "..."], num_chunks: int) -> Int[Array, "N ..."]:
    """Compute how many of `size` rows each chunk gets if they are dealt out in turn."""
    chunk = jnp.arange(num_chunks, dtype=jnp.int32).reshape(-1, *(1,) * size.ndim)
    return (size[None] + (num_chunks - 1) - chunk) // num_chunks


def received_layout(layout: Layout, shards: int, num_chunks: int) -> Layout:
    """Give the layout of a chunk's rows where they arrive: rows of one shard's experts, from all shards.

    >>> received_layout(Layout(64, 1, 1, 8, 128, 16), shards=4, num_chunks=1).num_rows
    128
    """
    assert layout.rows_per_expert is not None
    local, size = layout.num_experts // shards, layout.rows_per_expert // num_chunks
    return Layout(
        num_tokens=shards * layout.num_tokens,
        num_choices=layout.num_choices,
        num_groups=shards * layout.num_groups,
        num_experts=local,
        num_rows=local * shards * size,
        rows_per_expert=shards * size,
        runs_per_expert=shards,
    )


def received_chunks(plan: Plan, axis: str, num_chunks: int) -> list[Received]:
    """Find out what this shard's experts get in each chunk, by one exchange of counts, int32 `[shards, experts
    here]`."""
    shards = jax.lax.axis_size(axis)
    arrived = received_layout(plan.layout, shards, num_chunks)
    local = arrived.num_experts
    counts = jax.lax.all_to_all(plan.runs.size.reshape(shards, local), axis, 0, 0, tiled=True)
    # A remat policy that saves plans saves the counts too, and does not exchange them again.
    counts = checkpoint_name(counts.T.reshape(-1), "moe_plan")
    run = jnp.arange(local * shards, dtype=jnp.int32)
    first = run * (arrived.num_rows // len(run))
    return [
        Received(Runs(expert=run // shards, first=first, size=counts_of_chunk), arrived)
        for counts_of_chunk in _chunk_sizes(counts, num_chunks)
    ]


def send(rows: Float[Array, "R D"], received: Received, axis: str) -> Float[Array, "R D"]:
    """Send an `[E, rows]` block to the shards of its experts; it arrives ordered by expert, then by sending shard."""
    local, shards, size, width = _block(rows, received)
    block = jax.lax.all_to_all(rows.reshape(shards, local, size, width), axis, 0, 0, tiled=True)
    return checkpoint_name(block.swapaxes(0, 1).reshape(rows.shape), "moe_received")


def send_back(rows: Float[Array, "R D"], received: Received, axis: str) -> Float[Array, "R D"]:
    """The inverse of `send`."""
    local, shards, size, width = _block(rows, received)
    block = rows.reshape(local, shards, size, width).swapaxes(0, 1)
    return jax.lax.all_to_all(block, axis, 0, 0, tiled=True).reshape(rows.shape)


def _block(rows: Float[Array, "R D"], received: Received) -> tuple[int, int, int, int]:
    local, shards = received.layout.num_experts, received.layout.runs_per_expert
    return local, shards, rows.shape[0] // (local * shards), rows.shape[1]
