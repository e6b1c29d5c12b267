"""The plan: which choices get a place in their expert's rows, and where (paper, section 2)."""

import math
from fractions import Fraction
from typing import Literal, NamedTuple, get_args

import numpy as np

Priority = Literal["bpr", "arrival", "random", "modality"]


class Plan(NamedTuple):
    """The places of choices. A choice without a place has position -1 and row R; an unused row has source T*K.

    The rows of an expert hold its kept choices without gaps, ordered by group and then by the order of claims. They
    start at `first` and are `size` many; `position` counts from `first`.

    >>> make_plan(np.array([[1], [1]]), np.array([[0.5], [0.6]]), num_experts=2, capacity=1).position.tolist()
    [[-1], [0]]
    """

    position: np.ndarray  # [T, K] int, within the rows of the expert
    row: np.ndarray  # [T, K] int
    source: np.ndarray  # [R] int, t * K + k
    expert: np.ndarray  # [T, K] int
    first: np.ndarray  # [E] int
    size: np.ndarray  # [E] int
    wanted: np.ndarray  # [G, M, E] choices
    kept: np.ndarray  # [G, M, E] choices
    active_tokens: np.ndarray  # [G, M] tokens that wanted a place
    placed_tokens: np.ndarray  # [G, M] tokens of which at least one choice got a place


def expert_capacity(
    tokens_per_group: int, num_choices: int, num_experts: int, capacity_factor: float | str | Fraction
) -> int:
    """Compute the places C = ceil(S K c / E) of an expert in a group, in exact arithmetic.

    The factor is the decimal number as written: 1.1 is 11/10, not the nearest binary fraction, which is larger.

    >>> expert_capacity(10, 1, 1, 1.1), math.ceil(10 * 1.1)
    (11, 11)
    >>> expert_capacity(100, 1, 1, 1.1), math.ceil(100 * 1.1)
    (110, 111)
    """
    return math.ceil(tokens_per_group * num_choices * Fraction(str(capacity_factor)) / num_experts)


def claim_order(
    gate: np.ndarray,
    *,
    priority: Priority = "bpr",
    modality: np.ndarray | None = None,
    first_modality: int = 0,
    priority_values: np.ndarray | None = None,
) -> list[int]:
    """Order the tokens of a group by when they claim places. Ties are ordered by index.

    bpr: the largest gate first. arrival: by index. random: the largest of `priority_values` [T] first. modality: tokens
    of `first_modality` first, then the others, by index. Raises ValueError for another priority or a missing argument.

    >>> claim_order(np.array([[0.4], [0.9], [0.35], [0.8]]))
    [1, 3, 0, 2]
    """
    indices = range(len(gate))
    if priority == "bpr":
        return sorted(indices, key=lambda t: (-gate[t].max(), t))
    if priority == "arrival":
        return list(indices)
    if priority == "random":
        if priority_values is None:
            raise ValueError('priority "random" needs priority_values, one number for each token')
        return sorted(indices, key=lambda t: (-priority_values[t], t))
    if priority == "modality":
        if modality is None:
            raise ValueError('priority "modality" needs modality, one id for each token')
        return sorted(indices, key=lambda t: (modality[t] != first_modality, t))
    raise ValueError(f"priority {priority!r} is not one of {get_args(Priority)}")


def make_plan(
    expert: np.ndarray,
    gate: np.ndarray,
    *,
    num_experts: int,
    num_groups: int = 1,
    capacity: int | None = None,
    priority: Priority = "bpr",
    first_modality: int = 0,
    priority_values: np.ndarray | None = None,
    modality: np.ndarray | None = None,
    num_modalities: int = 1,
    mask: np.ndarray | None = None,
    row_multiple: int = 1,
) -> Plan:
    """Give places to choices: in each group first choices, then second ones and so on, each in the order of claims.

    Expert and gate [T, K] are those of `Routing` or of another router. Capacity is per expert and group; None keeps
    everything. Masked tokens, and tokens with gates that are not finite, take no place. An expert owns G*C rows, or
    without a capacity as many as it needs; both are rounded up to `row_multiple`. Raises ValueError if T is not a
    multiple of the number of groups. Paper, section 2.

    >>> plan = make_plan(np.array([[0], [0], [1], [1]]), np.array([[0.4], [0.9], [0.35], [0.8]]), num_experts=2,
    ...                  capacity=1)
    >>> plan.row.tolist(), plan.source.tolist()
    ([[2], [0], [2], [1]], [1, 3])
    """
    expert, gate = np.asarray(expert), np.asarray(gate, np.float64)
    num_tokens, num_choices = expert.shape
    if num_tokens % num_groups:
        raise ValueError(f"{num_tokens} tokens cannot be cut into {num_groups} equal groups; use a divisor")
    tokens_per_group = num_tokens // num_groups
    active = np.asarray(np.isfinite(gate).all(axis=1))
    if mask is not None:
        active = active & np.asarray(mask, bool)
    kind = np.zeros(num_tokens, int) if modality is None else np.asarray(modality)

    position = np.full((num_tokens, num_choices), -1)
    size = np.zeros(num_experts, int)
    wanted = np.zeros((num_groups, num_modalities, num_experts))
    kept = np.zeros((num_groups, num_modalities, num_experts))
    active_tokens = np.zeros((num_groups, num_modalities))
    placed_tokens = np.zeros((num_groups, num_modalities))
    for g in range(num_groups):
        members = [t for t in range(g * tokens_per_group, (g + 1) * tokens_per_group) if active[t]]
        order = claim_order(
            gate[members],
            priority=priority,
            modality=kind[members] if modality is not None else None,
            first_modality=first_modality,
            priority_values=None if priority_values is None else np.asarray(priority_values)[members],
        )
        taken = np.zeros(num_experts, int)
        for k in range(num_choices):
            for t in (members[i] for i in order):
                e = expert[t, k]
                wanted[g, kind[t], e] += 1
                if capacity is None or taken[e] < capacity:
                    # Earlier choices fill the first size[e] rows of the expert.
                    position[t, k] = size[e]
                    size[e] += 1
                    taken[e] += 1
                    kept[g, kind[t], e] += 1
        for t in members:
            active_tokens[g, kind[t]] += 1
            placed_tokens[g, kind[t]] += position[t].max() >= 0

    owned = size if capacity is None else np.full(num_experts, num_groups * capacity)
    first, row, source = lay_rows(expert, position, owned, row_multiple)
    return Plan(position, row, source, expert, first, size, wanted, kept, active_tokens, placed_tokens)


def lay_rows(
    expert: np.ndarray, position: np.ndarray, owned: np.ndarray, row_multiple: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the first row of each expert, the row of each choice, and the choice in each row, as in `Plan`.

    Each expert in turn gets the rows that it owns [E], rounded up to `row_multiple`. `position` counts from its first.

    >>> first, row, source = lay_rows(np.array([[1], [0]]), np.array([[0], [-1]]), np.array([1, 1]), 2)
    >>> first.tolist(), row.tolist(), source.tolist()
    ([0, 2], [[2], [4]], [2, 2, 0, 2])
    """
    num_experts, (num_tokens, num_choices) = len(owned), expert.shape
    first = np.zeros(num_experts, int)
    num_rows = 0
    for e in range(num_experts):
        first[e] = num_rows
        num_rows += math.ceil(owned[e] / row_multiple) * row_multiple

    row = np.full((num_tokens, num_choices), num_rows)
    source = np.full(num_rows, num_tokens * num_choices)
    for t in range(num_tokens):
        for k in range(num_choices):
            if position[t, k] >= 0:
                row[t, k] = first[expert[t, k]] + position[t, k]
                source[row[t, k]] = t * num_choices + k
    return first, row, source
