"""How many places an expert has, and how rows lie: static facts of a layer, in exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

from moe_kernels.spec import MoeSpec
from moe_kernels.types import ROW_ALIGNMENT, CapacityFactor, Layout, round_up

# An [E, rows] block is planned while it holds at most this many times the rows that choices can fill; above it (a large
# capacity factor), empty places would cost more than the tile loop of a packed layout.
BLOCK_LIMIT = 1.25


def as_fraction(name: str, factor: CapacityFactor) -> Fraction:
    """The exact value of a factor that must be positive. Raises ValueError, with the argument's name.

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
    """Places of an expert in a group, `C = ceil(S K c / E)` in exact arithmetic (paper, section 2).

    A float stands for the decimal literal that prints as it (1.1 is 11/10, not the double just above it), and no
    capacity exceeds S. Raises ValueError unless c > 0.

    >>> expert_capacity(4096, 1, 32, 1.05)
    135
    >>> expert_capacity(100, 1, 10, 1.1)
    11
    """
    factor = as_fraction("capacity_factor", capacity_factor)
    return min(math.ceil(group_size * num_choices * factor / num_experts), group_size)


def most_rows(num_tokens: int, num_groups: int, capacity: int | None) -> int:
    """The most rows that an expert can get: at most one choice of each token, and `capacity` of each group.

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
    """An `[E, rows]` block where that is asked for, or where the most rows of an expert keep it near the number of
    choices; else runs packed one after the other.

    >>> plan_layout(12, 1, 1, 2, None, None).num_rows
    32
    """
    most = most_rows(num_tokens, num_groups, capacity)
    per_expert = round_up(most, ROW_ALIGNMENT) if rows_per_expert is None else rows_per_expert
    packed = round_up(num_tokens * num_choices, ROW_ALIGNMENT) + num_experts * (ROW_ALIGNMENT - 1)
    block = rows_per_expert is not None or per_expert * num_experts <= BLOCK_LIMIT * max(packed, 1)
    return Layout(
        num_tokens=num_tokens,
        num_choices=num_choices,
        num_groups=num_groups,
        num_experts=num_experts,
        num_rows=per_expert * num_experts if block else round_up(packed, ROW_ALIGNMENT),
        rows_per_expert=per_expert if block else None,
    )


def capacity_of(spec: MoeSpec, num_tokens: int, num_experts: int) -> int | None:
    """Places of an expert in each group of a layer; None without a limit.

    >>> capacity_of(MoeSpec(num_groups=2, capacity_factor=1.0), 12, 3)
    2
    """
    if spec.capacity_factor is None:
        return None
    return expert_capacity(num_tokens // spec.num_groups, spec.num_choices, num_experts, spec.capacity_factor)
