"""Send rows to the shards that hold their experts, and back, without padding: for a layer without a capacity limit.

A shard sends the runs of its plan. Received runs are ordered by expert, then by sending shard, and start at tile
boundaries. From one all-gather of `[2, E]` integers, every shard computes what each shard sends and where it arrives.
TPUs and GPUs use `ragged_all_to_all`. Other platforms do not have it: they gather all rows and pick. The derivative of
an exchange is the exchange in the other direction.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moe_kernels import backends
from moe_kernels.backends.base import Span, apply
from moe_kernels.capacity import as_fraction
from moe_kernels.parallel.exchange import Received
from moe_kernels.plan import kept_by_modality
from moe_kernels.types import ROW_ALIGNMENT, CapacityFactor, Layout, Plan, Routing, Runs, round_up

PLATFORMS_WITH_RAGGED = ("tpu", "gpu")


class Slices(NamedTuple):
    """What this shard sends and receives: one slice for each peer and expert of the receiver, in this order."""

    first: Int[Array, " N"]
    """First row here of the sent slice."""
    size: Int[Array, " N"]
    first_there: Int[Array, " N"]
    """First row where the slice arrives at the peer."""
    received_first: Int[Array, " N"]
    """First row where the peer's slice arrives here."""
    received_size: Int[Array, " N"]
    received_from: Int[Array, " N"]
    """First row of that slice at the peer."""


class RaggedExchange(NamedTuple):
    """One layer's exchange: the plan cut to what fits, the slices, and the rows that arrive."""

    plan: Plan
    slices: Slices
    received: Received


@dataclasses.dataclass(frozen=True)
class _Shipment:
    """The static facts of an exchange in one direction."""

    axis: str
    num_sent: int
    num_received: int
    ragged: bool

    def reversed(self) -> _Shipment:
        return dataclasses.replace(self, num_sent=self.num_received, num_received=self.num_sent)


def received_rows(num_tokens: int, num_choices: int, shards: int, local: int, factor: CapacityFactor | None) -> int:
    """Compute the rows of a buffer for `factor` times the choices of one shard, however runs divide them.

    >>> received_rows(64, 2, 4, 2, None), received_rows(64, 2, 4, 2, 1.5)
    (568, 248)
    """
    most = shards * num_tokens * min(num_choices, local)
    if factor is not None:
        most = min(most, math.ceil(as_fraction("buffer_factor", factor) * num_tokens * num_choices))
    return round_up(most, ROW_ALIGNMENT) + shards * local * (ROW_ALIGNMENT - 1) // ROW_ALIGNMENT * ROW_ALIGNMENT


def received_layout(layout: Layout, shards: int, factor: CapacityFactor | None) -> Layout:
    """Give the layout of the rows where they arrive, with runs of any length from each shard.

    >>> received_layout(Layout(64, 2, 1, 8, 200, None), 4, None).num_rows
    568
    """
    local = layout.num_experts // shards
    return Layout(
        num_tokens=shards * layout.num_tokens,
        num_choices=layout.num_choices,
        num_groups=shards * layout.num_groups,
        num_experts=local,
        num_rows=received_rows(layout.num_tokens, layout.num_choices, shards, local, factor),
        rows_per_expert=None,
        runs_per_expert=shards,
    )


def plan_exchange(
    routing: Routing,
    plan: Plan,
    modality: Int[Array, " T"] | None,
    num_modalities: int,
    *,
    axis: str,
    buffer_factor: CapacityFactor | None,
) -> RaggedExchange:
    """Compute which shard sends what. Choices that do not fit in a receiver's buffer lose their place in the plan."""
    layout, shards, here = plan.layout, jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    arrived = received_layout(layout, shards, buffer_factor)
    local, num_rows = arrived.num_experts, arrived.num_rows
    # [sender, receiver, expert there] and, of what arrives, [receiver, expert there, sender]
    everybody = jax.lax.all_gather(jnp.stack([plan.runs.first, plan.runs.size]), axis)
    everybody = checkpoint_name(everybody, "moe_plan").reshape(shards, 2, shards, local)
    first, wanted = everybody[:, 0], everybody[:, 1]
    arriving = wanted.transpose(1, 2, 0)
    aligned = round_up(arriving, ROW_ALIGNMENT).reshape(shards, local * shards)
    level = _level(aligned, num_rows)
    size = jnp.minimum(arriving, level[:, None, None])
    aligned = jnp.minimum(aligned, level[:, None])
    start = (jnp.cumsum(aligned, axis=1, dtype=jnp.int32) - aligned).reshape(arriving.shape)

    sent_size = size[:, :, here].reshape(-1)
    slices = Slices(
        first=plan.runs.first,
        size=sent_size,
        first_there=start[:, :, here].reshape(-1),
        received_first=start[here].T.reshape(-1),
        received_size=size[here].T.reshape(-1),
        received_from=first[:, here].reshape(-1),
    )
    run = jnp.arange(local * shards, dtype=jnp.int32)
    runs = Runs(expert=run // shards, first=start[here].reshape(-1), size=size[here].reshape(-1))
    received = Received(runs, arrived)
    if buffer_factor is not None:
        plan = _cut(routing, plan, sent_size, modality, num_modalities)
    return RaggedExchange(plan, slices, received)


def _level(aligned: Int[Array, "receivers N"], num_rows: int) -> Int[Array, " receivers"]:
    """Compute the most rows that a run may keep if all runs of a receiver are to fit, a multiple of the alignment.

    Shorter runs keep all rows, so only the longest runs lose rows, down to one length.
    """
    num_runs = aligned.shape[1]
    ascending = jnp.sort(aligned, axis=1)
    below = jnp.cumsum(ascending, axis=1, dtype=jnp.int32) - ascending
    others = jnp.arange(num_runs, 0, -1, dtype=jnp.int32)
    shared = (num_rows - below) // others[None] // ROW_ALIGNMENT * ROW_ALIGNMENT
    # Find the first run that is longer than its share of what the shorter runs leave.
    too_long = ascending > shared
    first = jnp.argmax(too_long, axis=1)
    level = jnp.take_along_axis(shared, first[:, None], axis=1)[:, 0]
    return jnp.where(jnp.any(too_long, axis=1), level, ascending[:, -1])


def _cut(
    routing: Routing, plan: Plan, size: Int[Array, " E"], modality: Int[Array, " T"] | None, num_modalities: int
) -> Plan:
    """Keep only the first `size` rows of every expert in the plan."""
    layout, first = plan.layout, plan.runs.first
    routing = jax.lax.stop_gradient(routing)
    fits = (plan.row < layout.num_rows) & (plan.row - first[routing.expert] < size[routing.expert])
    row = jnp.where(fits, plan.row, layout.num_rows)
    place = jnp.arange(layout.num_rows, dtype=jnp.int32)
    expert = jnp.searchsorted(first, place, side="right").astype(jnp.int32) - 1
    nobody = layout.num_tokens * layout.num_choices
    by_group = row.reshape(layout.num_groups, -1)
    return Plan(
        row=row,
        source=jnp.where(place - first[expert] < size[expert], plan.source, nobody),
        runs=plan.runs._replace(size=size),
        kept=kept_by_modality(routing, by_group, modality, num_modalities, layout),
        layout=layout,
    )


def send(rows: Float[Array, "R D"], exchange: RaggedExchange, axis: str) -> Float[Array, "Q D"]:
    """Send the rows of a plan to the shards of their experts; unused rows there are 0."""
    shipment = _shipment(rows, exchange, axis)
    return checkpoint_name(apply(_SHIP, shipment, (rows,), (exchange.slices,)), "moe_received")


def send_back(rows: Float[Array, "Q D"], exchange: RaggedExchange, axis: str) -> Float[Array, "R D"]:
    """The inverse of `send`."""
    shipment = _shipment(rows, exchange, axis).reversed()
    back = apply(_SHIP, shipment, (rows,), (_reversed(exchange.slices),))
    return checkpoint_name(back, "moe_returned")


def _shipment(rows: Float[Array, "_ D"], exchange: RaggedExchange, axis: str) -> _Shipment:
    return _Shipment(
        axis=axis,
        num_sent=exchange.plan.layout.num_rows,
        num_received=exchange.received.layout.num_rows,
        ragged=backends.traced_for().platform in PLATFORMS_WITH_RAGGED,
    )


def _reversed(slices: Slices) -> Slices:
    return Slices(
        first=slices.received_first,
        size=slices.received_size,
        first_there=slices.received_from,
        received_first=slices.first,
        received_size=slices.size,
        received_from=slices.first_there,
    )


def _ship(shipment: _Shipment, rows: Float[Array, "R D"], slices: Slices) -> Float[Array, "Q D"]:
    if rows.shape[0] == 0 or shipment.num_received == 0:
        return jnp.zeros((shipment.num_received, rows.shape[1]), rows.dtype)
    if shipment.ragged:
        return jax.lax.ragged_all_to_all(
            rows,
            jnp.zeros((shipment.num_received, rows.shape[1]), rows.dtype),
            slices.first,
            slices.size,
            slices.first_there,
            slices.received_size,
            axis_name=shipment.axis,
        )
    everything = jax.lax.all_gather(rows, shipment.axis)
    row = jnp.arange(shipment.num_received, dtype=jnp.int32)[:, None]
    first, size = slices.received_first[None], slices.received_size[None]
    inside = (row >= first) & (row < first + size)
    n = jnp.argmax(inside, axis=1).astype(jnp.int32)
    peer = n // (slices.size.shape[0] // everything.shape[0])
    picked = everything[peer, slices.received_from[n] + row[:, 0] - slices.received_first[n]]
    return jnp.where(jnp.any(inside, axis=1)[:, None], picked, jnp.zeros((), rows.dtype))


def _ship_forward(shipment: _Shipment, rows: Float[Array, "R D"], slices: Slices) -> tuple[Float[Array, "Q D"], Slices]:
    return _ship(shipment, rows, slices), slices


def _ship_backward(shipment: _Shipment, slices: Slices, drows: Float[Array, "Q D"]) -> tuple[Float[Array, "R D"]]:
    return (_ship(shipment.reversed(), drows, _reversed(slices)),)


_SHIP = Span(_ship_forward, _ship_backward)
