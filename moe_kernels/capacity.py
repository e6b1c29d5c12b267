"""The number of places of an expert and the layout of the rows: static facts of a layer, in exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

from moe_kernels.spec import MoeSpec
from moe_kernels.types import ROW_ALIGNMENT, CapacityFactor, Layout, round_up

# The plan uses an [E, rows] block if the block has at most this many times the rows that choices can fill. With a
# larger capacity factor, empty places would cost more than the tile loop of a packed layout.
BLOCK_LIMIT = 1.25

# Rows and choices are counted in int32.
INDICES = 2**31


def as_fraction(name: str, factor: CapacityFactor) -> Fraction:
    """Convert a positive factor to its exact value. Raises ValueError, with the argument's name.

    >>> as_fraction("capacity_factor", 1.05)
    Fraction(21, 20)
    """
    try:
        exact = Fraction(str(factor))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{name}={factor!r} is not a finite number; use one like 1.05") from None
    if exact <= 0:
        raise ValueError(f"{name}={factor} must be positive; use None for no limit")
    return exact


def expert_capacity(group_size: int, num_choices: int, num_experts: int, capacity_factor: CapacityFactor) -> int:
    """Compute the places of an expert in a group, `C = ceil(S K c / E)`, in exact arithmetic (paper, section 2).

    A float means the decimal number that it prints as: 1.1 is 11/10, not the double just above it. A capacity never
    exceeds S. Raises ValueError unless c > 0.

    >>> expert_capacity(4096, 1, 32, 1.05)
    135
    >>> expert_capacity(100, 1, 10, 1.1)
    11
    """
    factor = as_fraction("capacity_factor", capacity_factor)
    return min(math.ceil(group_size * num_choices * factor / num_experts), group_size)


def most_rows(num_tokens: int, num_groups: int, capacity: int | None) -> int:
    """Compute the most rows that an expert can get: at most one from each token and `capacity` from each group.

    >>> most_rows(12, 2, 4), most_rows(12, 2, None)
    (8, 12)
    """
    group_size = num_tokens // num_groups
    return num_groups * (group_size if capacity is None else min(group_size, capacity))


def plan_layout(
    num_tokens: int,
    num_choices: int,
    num_groups: int,
    num_experts: int,
    capacity: int | None,
    rows_per_expert: int | None,
) -> Layout:
    """Choose the layout of the rows: an `[E, rows]` block, or runs packed one after the other.

    It is a block if `rows_per_expert` is given, or if the block has few more rows than there are choices. Raises
    ValueError if `T K + 8 E`, or the number of rows, is 2^31 or more.

    >>> plan_layout(12, 1, 1, 2, None, None).num_rows
    32
    """
    most = most_rows(num_tokens, num_groups, capacity)
    per_expert = round_up(most, ROW_ALIGNMENT) if rows_per_expert is None else rows_per_expert
    packed = round_up(num_tokens * num_choices, ROW_ALIGNMENT) + num_experts * (ROW_ALIGNMENT - 1)
    num_rows = per_expert * num_experts
    block = rows_per_expert is not None or (num_rows <= BLOCK_LIMIT * max(packed, 1) and num_rows < INDICES)
    num_rows = num_rows if block else round_up(packed, ROW_ALIGNMENT)
    if max(num_rows, num_tokens * num_choices + ROW_ALIGNMENT * num_experts) >= INDICES:
        raise ValueError(
            f"{num_tokens} tokens with {num_choices} choices and {num_experts} experts need {num_rows} rows; T K + 8 E "
            "and the rows must be below 2^31: give the layer fewer tokens at once"
        )
    return Layout(
        num_tokens=num_tokens,
        num_choices=num_choices,
        num_groups=num_groups,
        num_experts=num_experts,
        num_rows=num_rows,
        rows_per_expert=per_expert if block else None,
    )


def capacity_of(spec: MoeSpec, num_tokens: int, num_experts: int) -> int | None:
    """Compute the places of an expert in each group of a layer; None means no limit.

    >>> capacity_of(MoeSpec(num_groups=2, capacity_factor=1.0), 12, 3)
    2
    """
    if spec.capacity_factor is None:
        return None
    return expert_capacity(num_tokens // spec.num_groups, spec.num_choices, num_experts, spec.capacity_factor)
