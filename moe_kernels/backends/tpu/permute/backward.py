"""Dispatch and combine on TPUs, backward: gathers too, combine's of rows and of products."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_kernels.backends.tpu.common.launch import Target
from moe_kernels.backends.tpu.permute.forward import CombineSaved
from moe_kernels.backends.tpu.permute.gather import MOST_SCALARS, gather_rows
from moe_kernels.types import Plan


def dispatch_backward(target: Target, static: None, plan: Plan, drows: Float[Array, "R D"]) -> tuple[Array]:
    """Add up the cotangents of a token's rows, in float32."""
    return (gather_rows(target, drows, plan.row.reshape(-1), plan.layout.num_choices),)


def combine_backward(
    target: Target, static: None, saved: CombineSaved, dtokens: Float[Array, "T D"]
) -> tuple[Float[Array, "R D"], Float[Array, "T K"]]:
    """Cotangents of rows and gates: `drows = gate dy`, `dgate = <rows, dy>`."""
    rows, gate, plan = saved
    choices = plan.layout.num_choices
    # The entry behind the last choice is the weight of unused rows.
    weight = jnp.append(gate.reshape(-1), jnp.float32(0))
    index = plan.source
    if weight.size * weight.dtype.itemsize > MOST_SCALARS:
        weight, index = weight[index], None
    drows = gather_rows(target, dtokens, plan.source // choices, 1, weight, index)
    dgate = gather_rows(target, rows, plan.row.reshape(-1), choices, against=dtokens)
    # A dropped choice's gate has no influence on the output, also where dy is not finite (0 * NaN above).
    return drows, jnp.where(plan.row < plan.layout.num_rows, dgate.T, jnp.float32(0))
