"""The plan of a layer: which row each choice gets, from one sort."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_kernels.axes import refuse_split, refuse_symbolic
from moe_kernels.capacity import most_rows, plan_layout
from moe_kernels.chips import SUBLANES
from moe_kernels.packed_sort import Field, descending, sort_fields
from moe_kernels.types import ROW_ALIGNMENT, Layout, Plan, Routing, Runs, round_up


class _Sorted(NamedTuple):
    """The choices of each group in claim order (expert, then choice, then priority, then token)."""

    order: Int[Array, "G Q"]
    """Choice `s * K + k` at each place of the order."""
    expert: Int[Array, "G Q"]
    """Expert at each place. At the end, E stands for choices that claim no place."""
    start: Int[Array, "G E"]
    wanted: Int[Array, "G E"]


def make_plan(
    routing: Routing,
    *,
    num_experts: int,
    num_groups: int = 1,
    capacity: int | None = None,
    priority: Float[Array, " T"] | None = None,
    modality: Int[Array, " T"] | None = None,
    num_modalities: int = 1,
    rows_per_expert: int | None = None,
) -> Plan:
    """Assign rows to choices: exactly `min(wanted, capacity)` for each group and expert (paper, section 2).

    All first choices claim places before all second choices. Among equals, the token with the larger `priority [T]`
    claims first, then the one with the lower index (None: order of arrival). `capacity=None` keeps every choice.
    Tokens whose gates are all 0 (padding) or not finite claim no place, nor does a choice of an expert that does not
    exist. The rows of an expert follow group after
    group without gaps, in claim order. With `rows_per_expert` they are an `[E, rows_per_expert]` block, as an exchange
    needs; else the cheaper layout is chosen. Not differentiable. Raises ValueError for shapes that do not fit.

    >>> from moe_kernels import bpr_priority, route
    >>> import jax.numpy as jnp
    >>> gates = jnp.array([[0.4, 0.0], [0.9, 0.0], [0.0, 0.35], [0.0, 0.8]])
    >>> routing = route(gates, jnp.eye(2))
    >>> make_plan(routing, num_experts=2, capacity=1).row[:, 0].tolist()  # arrival: tokens 0 and 2
    [0, 16, 8, 16]
    >>> make_plan(routing, num_experts=2, capacity=1, priority=bpr_priority(routing)).row[:, 0].tolist()
    [16, 0, 16, 8]
    """
    refuse_symbolic(routing=routing)
    num_tokens, num_choices = routing.expert.shape
    if num_groups < 1 or num_tokens % num_groups:
        raise ValueError(
            f"{num_tokens} tokens cannot be split into num_groups={num_groups}; use a divisor of {num_tokens}"
        )
    if capacity is not None and capacity < min(1, num_tokens):
        raise ValueError(f"capacity={capacity} must be at least 1; use None for no limit")
    for name, value in (("priority", priority), ("modality", modality)):
        if value is not None and value.shape != (num_tokens,):
            raise ValueError(f"{name} has shape {value.shape}; it must be [T] = {(num_tokens,)}")
    if num_modalities > 1 and modality is None:
        raise ValueError(f"num_modalities={num_modalities} needs modality ids; pass modality=[T] integers")

    if num_experts != (expected := routing.sums.wanted.shape[-1]):
        raise ValueError(f"num_experts={num_experts} must be the {expected} experts of the routing")

    most = most_rows(num_tokens, num_groups, capacity)
    if rows_per_expert is not None and (rows_per_expert < most or rows_per_expert % ROW_ALIGNMENT):
        raise ValueError(
            f"rows_per_expert={rows_per_expert} must hold the {most} rows that an expert can get and be a multiple of "
            f"{ROW_ALIGNMENT}; use None to have it chosen"
        )
    layout = plan_layout(num_tokens, num_choices, num_groups, num_experts, capacity, rows_per_expert)
    refuse_split(routing=routing, priority=priority, modality=modality)
    routing, priority = jax.lax.stop_gradient((routing, priority))
    return _planned(routing, priority, modality, layout, most // num_groups, num_modalities)


# Called outside of jit, a plan is one program and not one for each of its operations.
@functools.partial(jax.jit, static_argnums=(3, 4, 5), inline=True)
def _planned(
    routing: Routing,
    priority: Float[Array, " T"] | None,
    modality: Int[Array, " T"] | None,
    layout: Layout,
    places: int,
    num_modalities: int,
) -> Plan:
    """Plan with checked arguments; an expert has at most `places` places in a group."""
    ranked = _sort(routing, priority, layout.num_groups, layout.num_experts)
    kept = jnp.minimum(ranked.wanted, places)
    row, source, runs = _places(ranked, kept, layout)
    if modality is None:
        by_modality = kept[:, None].astype(jnp.float32)
    else:
        by_modality = kept_by_modality(routing, row.reshape(layout.num_groups, -1), modality, num_modalities, layout)
    return Plan(row.reshape(routing.expert.shape), source, runs, by_modality, layout)


class _Places(NamedTuple):
    """The row of every choice, the choice of every row, and the runs of every expert."""

    row: Int[Array, " TK"]
    source: Int[Array, " R"]
    runs: Runs


def _places(ranked: _Sorted, kept: Int[Array, "G E"], layout: Layout) -> _Places:
    """Assign rows to the first `kept` choices of each group and expert, group after group, in claim order."""
    num_experts = layout.num_experts
    size = jnp.sum(kept, axis=0, dtype=jnp.int32)
    if layout.rows_per_expert is not None:
        first = jnp.arange(num_experts, dtype=jnp.int32) * layout.rows_per_expert
    else:
        aligned = round_up(size, ROW_ALIGNMENT)
        first = jnp.cumsum(aligned, dtype=jnp.int32) - aligned
    offset = jnp.cumsum(kept, axis=0, dtype=jnp.int32) - kept
    in_order = _rows_in_claim_order(ranked, kept, first[None] + offset, layout)
    row, source = jax.lax.platform_dependent(
        ranked,
        in_order,
        first,
        size,
        tpu=functools.partial(_both_ways_by_sort, layout=layout),
        default=functools.partial(_both_ways_by_scatter, layout=layout),
    )
    return _Places(row, source, Runs(jnp.arange(num_experts, dtype=jnp.int32), first, size))


def _sort(routing: Routing, priority: Float[Array, " T"] | None, num_groups: int, num_experts: int) -> _Sorted:
    num_choices = routing.expert.shape[1]
    # Padding has gates of 0; a token with logits that are not finite has NaN gates. Neither may enter a comparison.
    gate = routing.gate
    claims = jnp.any(gate != 0, axis=1, keepdims=True) & jnp.all(jnp.isfinite(gate), axis=1, keepdims=True)
    column = jnp.arange(num_choices, dtype=jnp.int32)
    nobody = jnp.int32(num_experts * num_choices)
    claims = claims & (routing.expert >= 0) & (routing.expert < num_experts)
    key = jnp.where(claims, routing.expert * num_choices + column[None], nobody).reshape(num_groups, -1)
    choice = jnp.broadcast_to(jnp.arange(key.shape[1], dtype=jnp.int32), key.shape)
    # The choice is the last key, which makes the order unique; a stable sort would move more data on CPU and TPU.
    fields = [Field(key, num_experts * num_choices + 1), Field(choice, key.shape[1])]
    if priority is not None:
        rank = jnp.broadcast_to(jnp.where(claims, priority[:, None], jnp.float32(0)), routing.expert.shape)
        fields.insert(1, descending(rank.reshape(key.shape)))
    key, *_, order = _sort_groups(fields)
    bounds = jnp.arange(num_experts + 1, dtype=jnp.int32) * num_choices

    def count_below(method: str, key: Array) -> Array:
        search = functools.partial(jnp.searchsorted, v=bounds, method=method)
        # No vmap over a single group: a TPU would leave seven of eight sublanes idle.
        return (jax.vmap(search)(key) if num_groups > 1 else search(key[0])[None]).astype(jnp.int32)

    start = jax.lax.platform_dependent(
        key,
        tpu=functools.partial(count_below, "compare_all"),  # A TPU compares everything before it gathers once.
        default=functools.partial(count_below, "scan"),
    )
    return _Sorted(order, key // num_choices, start[:, :-1], start[:, 1:] - start[:, :-1])


def _sort_groups(fields: Sequence[Field]) -> tuple[Array, ...]:
    """Sort every row `[G, Q]` by all fields.

    A TPU spreads the rows over the 8 sublanes of its registers, so it sorts a few rows faster as one vector.
    """
    key, *others = fields
    shape = key.values.shape
    if shape[0] >= SUBLANES:
        return sort_fields(fields)
    first = jnp.arange(shape[0], dtype=jnp.int32)[:, None] * key.limit
    flat = [Field(key.values + first, key.limit * shape[0]), *others]
    sorted_key, *sorted_others = sort_fields([Field(field.values.reshape(-1), field.limit) for field in flat])
    return sorted_key.reshape(shape) - first, *(values.reshape(shape) for values in sorted_others)


def _look_up(table: Int[Array, "G E"], index: Int[Array, "G Q"]) -> Int[Array, "G Q"]:
    """Look up entries of each group's table; the index past its end, E, gives 0.

    A TPU takes 10 cycles to gather one number, but a tenth of a cycle to compare and add up a short table."""

    def compare(table: Array, index: Array) -> Array:
        hit = index[..., None] == jnp.arange(table.shape[1], dtype=jnp.int32)[None, None]
        return jnp.sum(jnp.where(hit, table[:, None], jnp.int32(0)), axis=-1, dtype=jnp.int32)

    gather = jax.vmap(lambda table, index: jnp.pad(table, (0, 1)).at[index].get(mode="promise_in_bounds"))
    return jax.lax.platform_dependent(table, index, tpu=compare, default=gather)


def _rows_in_claim_order(
    ranked: _Sorted, kept: Int[Array, "G E"], base: Int[Array, "G E"], layout: Layout
) -> Int[Array, "G Q"]:
    """Find the row of the choice at every place of the claim order; `num_rows` for a choice without a place."""
    place = jnp.arange(ranked.order.shape[1], dtype=jnp.int32)
    # The end is 0 for choices that claim no place.
    taken = place[None] < _look_up(ranked.start + kept, ranked.expert)
    return jnp.where(taken, place[None] + _look_up(base - ranked.start, ranked.expert), layout.num_rows)


def _flat_choice(ranked: _Sorted) -> Int[Array, " TK"]:
    """Give the flat choice `t * K + k` at every place of the claim order, group after group."""
    num_groups, size = ranked.order.shape
    return (jnp.arange(num_groups, dtype=jnp.int32)[:, None] * size + ranked.order).reshape(-1)


def _both_ways_by_scatter(
    ranked: _Sorted, in_order: Int[Array, "G Q"], first: Int[Array, " E"], size: Int[Array, " E"], *, layout: Layout
) -> tuple[Int[Array, " TK"], Int[Array, " R"]]:
    """Invert the claim order into the row of every choice and the choice of every row."""
    choice, row = _flat_choice(ranked), in_order.reshape(-1)
    # The last entry is for choices without a place: `jax.experimental.checkify` reports what a scatter drops.
    source = jnp.full((layout.num_rows + 1,), choice.size, jnp.int32).at[row].set(choice)
    return jnp.zeros_like(row).at[choice].set(row, unique_indices=True), source[:-1]


def _both_ways_by_sort(
    ranked: _Sorted, in_order: Int[Array, "G Q"], first: Int[Array, " E"], size: Int[Array, " E"], *, layout: Layout
) -> tuple[Int[Array, " TK"], Int[Array, " R"]]:
    """Do the same on TPUs, where sorting 16,384 pairs takes a fifteenth of the time of scattering them."""
    choice, row = _flat_choice(ranked), in_order.reshape(-1)
    nobody = jnp.int32(choice.size)
    choices, rows = (functools.partial(Field, limit=limit + 1) for limit in (choice.size, layout.num_rows))
    _, of_choice = sort_fields([choices(choice), rows(row)])
    if layout.rows_per_expert is None:
        # With pairs also for the rows that pad runs to whole tiles, each pair sorts to the position of its row.
        padding = (first + size)[:, None] + jnp.arange(ROW_ALIGNMENT - 1, dtype=jnp.int32)[None]
        padding = jnp.where(padding < round_up(first + size, ROW_ALIGNMENT)[:, None], padding, layout.num_rows)
        row = jnp.concatenate([row, padding.reshape(-1)])
        row, source = sort_fields([rows(row), choices(jnp.pad(choice, (0, padding.size), constant_values=nobody))])
        source = jnp.where(row < layout.num_rows, source, nobody)
        return of_choice, jnp.pad(source, (0, layout.num_rows - source.size), constant_values=nobody)
    if layout.num_groups == 1:
        begin = ranked.start[0]
    else:
        _, choice = sort_fields([rows(row), choices(choice)])
        begin = jnp.cumsum(size, dtype=jnp.int32) - size
    padded = jnp.pad(choice, (0, layout.rows_per_expert))
    block = jax.vmap(lambda begin: jax.lax.dynamic_slice(padded, (begin,), (layout.rows_per_expert,)))(begin)
    used = jnp.arange(layout.rows_per_expert, dtype=jnp.int32)[None] < size[:, None]
    return of_choice, jnp.where(used, block, nobody).reshape(-1)


def kept_by_modality(
    routing: Routing, row: Int[Array, "G Q"], modality: Int[Array, " T"] | None, num_modalities: int, layout: Layout
) -> Float[Array, "G M E"]:
    """Count the choices that found a place, by comparison and sum. XLA fuses both and stores no one-hot tensor."""
    shape = (layout.num_groups, -1, layout.num_choices)
    expert = routing.expert.reshape(shape)
    found = row.reshape(shape) < layout.num_rows
    ids = jnp.arange(layout.num_experts, dtype=jnp.int32)
    counts = []
    for m in range(num_modalities):
        member = found if modality is None else found & (modality.reshape(*shape[:2], 1) == m)
        hits = member[..., None] & (expert[..., None] == ids[None, None, None])
        counts.append(jnp.sum(hits, axis=(1, 2), dtype=jnp.int32))
    return jnp.stack(counts, axis=1).astype(jnp.float32)
