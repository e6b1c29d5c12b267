"""Dispatch and combine by one kernel that gathers; masks select, they never multiply.

Both directions are gathers, since the plan holds the permutation both ways. The backward pass of combine goes by row:
`drows[r] = gate[s] dy[s // K]` with `s = source[r]`, and `<rows[r], dy[s // K]>` is at hand then, which is the gradient
of that gate; so both read dy and the rows once. Which row holds a gate's gradient is what the plan's `row` says.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_kernels.backends.gpu.common.launch import GpuTarget
from moe_kernels.backends.gpu.permute.gather import gather_rows
from moe_kernels.types import Plan


def dispatch_forward(
    device: GpuTarget, static: None, tokens: Float[Array, "T D"], plan: Plan
) -> tuple[Float[Array, "R D"], Plan]:
    """Copy tokens into their rows; unused rows are 0."""
    # An unused row has the source T K, so the token T, which is none.
    return gather_rows(tokens, (plan.source // plan.layout.num_choices)[:, None], device).rows, plan


def dispatch_backward(
    device: GpuTarget, static: None, plan: Plan, drows: Float[Array, "R D"]
) -> tuple[Float[Array, "T D"]]:
    """Add up the cotangents of a token's rows, in float32."""
    return (gather_rows(drows, plan.row, device).rows,)


def combine_forward(
    device: GpuTarget, static: None, rows: Float[Array, "R D"], gate: Float[Array, "T K"], plan: Plan
) -> tuple[Float[Array, "T D"], tuple[Float[Array, "R D"], Float[Array, "T K"], Plan]]:
    """Weigh and add a token's rows in float32; a token with a gate that is not finite becomes NaN."""
    weight = jnp.where(jnp.isfinite(gate), gate, jnp.float32(jnp.nan))
    return gather_rows(rows, plan.row, device, weight=weight).rows, (rows, gate, plan)


def combine_backward(
    device: GpuTarget,
    static: None,
    saved: tuple[Float[Array, "R D"], Float[Array, "T K"], Plan],
    dtokens: Float[Array, "T D"],
) -> tuple[Float[Array, "R D"], Float[Array, "T K"]]:
    """Cotangents of rows and gates: `drows = gate dy`, `dgate = <rows, dy>`."""
    rows, gate, plan = saved
    source = plan.source[:, None]
    used = source < gate.size
    weight = jnp.where(used, jnp.take(gate.reshape(-1), source, mode="clip"), jnp.float32(0))
    drows, products = gather_rows(dtokens, source // plan.layout.num_choices, device, weight=weight, other=rows)
    assert products is not None
    # A dropped choice's gate has no influence on the output.
    kept = plan.row < plan.layout.num_rows
    return drows, jnp.where(kept, jnp.take(products, plan.row, mode="clip"), jnp.float32(0))
