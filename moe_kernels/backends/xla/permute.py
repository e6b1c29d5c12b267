"""Dispatch and combine as gathers in both directions; masks select, they never multiply.

The plan holds the permutation both ways (`row` of a choice, `source` of a row), so no direction needs a scatter:
dispatch `rows[r] = tokens[source[r] // K]` has the derivative `dtokens[t] = sum_k drows[row[t, k]]`, and combine
`y[t] = sum_k gate[t, k] rows[row[t, k]]` has `drows[r] = gate[source[r]] dy[source[r] // K]`. Where gates weigh what
experts get, `weigh` follows dispatch, on every platform.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_kernels.types import Plan


def _at(array: Array, index: Int[Array, "..."]) -> Array:
    """Gather entries. An index past the end, of what has no place, is moved inside; whoever asks masks the entry."""
    # `jax.experimental.checkify` would report what `take` clips.
    return jnp.take(array, jnp.minimum(index, max(len(array) - 1, 0)), axis=0, mode="clip")


def _rows_of_choice(rows: Float[Array, "R D"], plan: Plan, choice: int) -> Float[Array, "T D"]:
    """Gather the row of the given choice of every token; 0 where the choice found no room."""
    row = plan.row[:, choice]
    kept = row < plan.layout.num_rows
    picked = _at(rows, row)
    return jnp.where(kept[:, None], picked, jnp.zeros((), rows.dtype))


def _tokens_of_row(tokens: Float[Array, "T D"], plan: Plan) -> Float[Array, "R D"]:
    """Gather the token of every row; 0 in unused rows."""
    layout = plan.layout
    used = plan.source < layout.num_tokens * layout.num_choices
    picked = _at(tokens, plan.source // layout.num_choices)
    return jnp.where(used[:, None], picked, jnp.zeros((), tokens.dtype))


def weigh_forward(
    static: None, rows: Float[Array, "R D"], gate: Float[Array, "T K"], plan: Plan
) -> tuple[Float[Array, "R D"], tuple[Float[Array, "R D"], Float[Array, "T K"], Plan]]:
    """Multiply each row by the gate of its choice: `y[r] = gate[source[r]] rows[r]`; 0 in unused rows."""
    return _weighed(rows, gate, plan), (rows, gate, plan)


def weigh_backward(
    static: None, saved: tuple[Float[Array, "R D"], Float[Array, "T K"], Plan], dout: Float[Array, "R D"]
) -> tuple[Float[Array, "R D"], Float[Array, "T K"]]:
    """Cotangents of rows and gates: `drows = gate dy`, `dgate = <rows, dy>`."""
    rows, gate, plan = saved
    product = jnp.sum(rows.astype(jnp.float32) * dout.astype(jnp.float32), axis=1)
    dgate = jnp.where(plan.row < plan.layout.num_rows, _at(product, plan.row), jnp.float32(0))
    return _weighed(dout, gate, plan), dgate


def _weighed(rows: Float[Array, "R D"], gate: Float[Array, "T K"], plan: Plan) -> Float[Array, "R D"]:
    used = (plan.source < gate.size)[:, None]
    weight = _at(gate.reshape(-1), plan.source)[:, None]
    return jnp.where(used, weight * rows.astype(jnp.float32), jnp.float32(0)).astype(rows.dtype)


def dispatch_forward(static: None, tokens: Float[Array, "T D"], plan: Plan) -> tuple[Float[Array, "R D"], Plan]:
    """Copy tokens into their rows."""
    return _tokens_of_row(tokens, plan), plan


def dispatch_backward(static: None, plan: Plan, drows: Float[Array, "R D"]) -> tuple[Float[Array, "T D"]]:
    """Add up the cotangents of a token's rows, in float32."""
    total = _rows_of_choice(drows, plan, 0).astype(jnp.float32)
    for choice in range(1, plan.layout.num_choices):
        total += _rows_of_choice(drows, plan, choice).astype(jnp.float32)
    return (total.astype(drows.dtype),)


def combine_forward(
    static: None, rows: Float[Array, "R D"], gate: Float[Array, "T K"], plan: Plan
) -> tuple[Float[Array, "T D"], tuple[Float[Array, "R D"], Float[Array, "T K"], Plan]]:
    """Weigh and add a token's rows in float32; a token with a gate that is not finite becomes NaN."""
    # A choice without room contributes 0, but a NaN gate (logits not finite) must not vanish with it.
    lost = jnp.where(jnp.isfinite(gate), jnp.float32(0), jnp.float32(jnp.nan))
    total = jnp.sum(lost, axis=1, keepdims=True)
    for choice in range(plan.layout.num_choices):
        total = total + gate[:, choice, None] * _rows_of_choice(rows, plan, choice).astype(jnp.float32)
    return total.astype(rows.dtype), (rows, gate, plan)


def combine_backward(
    static: None, saved: tuple[Float[Array, "R D"], Float[Array, "T K"], Plan], dtokens: Float[Array, "T D"]
) -> tuple[Float[Array, "R D"], Float[Array, "T K"]]:
    """Cotangents of rows and gates: `drows = gate dy`, `dgate = <rows, dy>`."""
    rows, gate, plan = saved
    drows = _weighed(_tokens_of_row(dtokens, plan), gate, plan)
    dy = dtokens.astype(jnp.float32)
    dgate = jnp.stack(
        [
            jnp.sum(_rows_of_choice(rows, plan, choice).astype(jnp.float32) * dy, axis=1)
            for choice in range(plan.layout.num_choices)
        ],
        axis=1,
    )
    # A dropped choice's gate has no influence on the output, also where dy is not finite (0 * NaN above).
    return drows, jnp.where(plan.row < plan.layout.num_rows, dgate, jnp.float32(0))
