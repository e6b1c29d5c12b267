"""Dispatch and combine on TPUs, forward: gathers."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_kernels.backends.tpu.common.launch import Target
from moe_kernels.backends.tpu.permute.gather import gather_rows
from moe_kernels.types import Plan


class CombineSaved(NamedTuple):
    """What the backward pass of combine needs."""

    rows: Float[Array, "R D"]
    gate: Float[Array, "T K"]
    plan: Plan


def dispatch_forward(
    target: Target, static: None, tokens: Float[Array, "T D"], plan: Plan
) -> tuple[Float[Array, "R D"], Plan]:
    """Copy tokens into their rows; unused rows are 0."""
    return gather_rows(target, tokens, plan.source // plan.layout.num_choices, 1), plan


def combine_forward(
    target: Target, static: None, rows: Float[Array, "R D"], gate: Float[Array, "T K"], plan: Plan
) -> tuple[Float[Array, "T D"], CombineSaved]:
    """Weigh and add a token's rows in float32; a token with a gate that is not finite becomes NaN."""
    weight = jnp.where(jnp.isfinite(gate), gate, jnp.float32(jnp.nan)).reshape(-1)
    index = plan.row.reshape(-1)
    return gather_rows(target, rows, index, plan.layout.num_choices, weight), CombineSaved(rows, gate, plan)
