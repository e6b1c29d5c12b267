"""The expert MLP in plain XLA: two grouped matmuls around an activation, with the pre-activation saved.

With `h = x w1 + b1` and `a = act(h)`, `y = a w2 + b2`: `da = dy w2ᵀ`, `dh = da act'(h)`, `dw2 = aᵀ dy`, `db2 = Σ dy`,
`dw1 = xᵀ dh`, `db1 = Σ dh`, `dx = dh w1ᵀ`. `a` is recomputed from `h` (elementwise), `h` is saved in the compute dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_kernels.backends.base import MlpStatic
from moe_kernels.backends.xla.activation import activate, activate_and_slope
from moe_kernels.backends.xla.block import OverExperts
from moe_kernels.backends.xla.matmul import (
    Tile,
    add_at,
    dot,
    over_runs,
    over_tiles,
    overhang,
    plus,
    select_rows,
    used_rows,
)
from moe_kernels.types import Activation, MlpWeights, Runs


class MlpSaved(NamedTuple):
    """What the backward pass needs."""

    rows: Float[Array, "R D"]
    hidden: Float[Array, "R F"]
    """Pre-activation in the compute dtype; in the tile loop with the overhang's rows."""
    weights: MlpWeights
    runs: Runs


def _activate_backward(
    hidden: Float[Array, "..."], dactivated: Float[Array, "..."], activation: Activation
) -> Float[Array, "..."]:
    return (dactivated * activate_and_slope(hidden, activation)[1]).astype(hidden.dtype)


def expert_mlp_forward(
    over_experts: OverExperts, static: MlpStatic, rows: Float[Array, "R D"], weights: MlpWeights, runs: Runs
) -> tuple[Float[Array, "R D"], MlpSaved]:
    """`y = act(x w1_e + b1_e) w2_e + b2_e`; unused rows hold anything."""
    layout, dtype = static.layout, rows.dtype
    w1, w2 = weights.w1.astype(dtype), weights.w2.astype(dtype)
    if layout.rows_per_expert is not None:

        def mlp(x: tuple[Array, ...], used: Array, w: MlpWeights) -> tuple[Array, Array]:
            hidden = plus(dot("pd,df->pf", x[0], w.w1), w.b1).astype(dtype)
            out = plus(dot("pf,fd->pd", activate(hidden, static.activation), w.w2), w.b2)
            return hidden, out.astype(dtype)

        used = used_rows(runs, layout)
        block = rows.reshape(*used.shape, rows.shape[1])
        hidden, out = over_experts(mlp, (block,), used, MlpWeights(w1, weights.b1, w2, weights.b2))
        return out.reshape(rows.shape), MlpSaved(rows, hidden.reshape(rows.shape[0], w1.shape[2]), weights, runs)

    padded = overhang(rows)

    def run(n: Int[Array, ""], expert: Int[Array, ""], carry: tuple[Array, Array]) -> tuple[Array, Array]:
        v1, v2 = w1[expert], w2[expert]
        b1 = None if weights.b1 is None else weights.b1[expert]
        b2 = None if weights.b2 is None else weights.b2[expert]

        def step(tile: Tile, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            hidden, out = carry
            h = plus(dot("pd,df->pf", tile.rows(padded), v1), b1).astype(dtype)
            y = plus(dot("pf,fd->pd", activate(h, static.activation), v2), b2)
            return tile.write(hidden, h), tile.write(out, y)

        return over_tiles(runs, n, step, carry)

    hidden = jnp.zeros((padded.shape[0], w1.shape[2]), dtype)
    hidden, out = over_runs(runs, run, (hidden, jnp.zeros_like(padded)))
    return out[: rows.shape[0]], MlpSaved(rows, hidden, weights, runs)


def expert_mlp_backward(
    over_experts: OverExperts, static: MlpStatic, saved: MlpSaved, dout: Float[Array, "R D"]
) -> tuple[Float[Array, "R D"], MlpWeights]:
    """All five matmuls' worth of gradients; an expert without rows gets exactly 0."""
    rows, hidden, weights, runs = saved
    layout, dtype = static.layout, rows.dtype
    w1, w2 = weights.w1.astype(dtype), weights.w2.astype(dtype)
    if layout.rows_per_expert is not None:
        used = used_rows(runs, layout)
        dy = select_rows(used, dout.reshape(*used.shape, dout.shape[1]))
        h = hidden.reshape(*used.shape, hidden.shape[1])

        def mlp(arrays: tuple[Array, ...], used: Array, w: MlpWeights) -> tuple[Array, Array]:
            dy, h = arrays
            dh = select_rows(used, _activate_backward(h, dot("pd,fd->pf", dy, w.w2), static.activation))
            return dh, dot("pf,df->pd", dh, w.w1).astype(dtype)

        dh, drows = over_experts(mlp, (dy, h), used, MlpWeights(w1, None, w2, None))
        dweights = MlpWeights(
            w1=dot("epd,epf->edf", select_rows(used, rows.reshape(*used.shape, rows.shape[1])), dh),
            b1=jnp.sum(dh, axis=1, dtype=jnp.float32),
            w2=dot("epf,epd->efd", select_rows(used, activate(h, static.activation)), dy),
            b2=jnp.sum(dy, axis=1, dtype=jnp.float32),
        )
        return drows.reshape(rows.shape), _like(weights, dweights)

    padded, dpadded = overhang(rows), overhang(dout)

    def run(n: Int[Array, ""], expert: Int[Array, ""], carry: tuple[Array, MlpWeights]) -> tuple[Array, MlpWeights]:
        v1, v2 = w1[expert], w2[expert]

        def step(tile: Tile, carry: tuple[Array, MlpWeights]) -> tuple[Array, MlpWeights]:
            drows, grad = carry
            dy, h = tile.used_rows(dpadded), tile.rows(hidden)
            dh = select_rows(tile.used, _activate_backward(h, dot("pd,fd->pf", dy, v2), static.activation))
            activated = select_rows(tile.used, activate(h, static.activation))
            delta = MlpWeights(
                w1=dot("pd,pf->df", tile.used_rows(padded), dh),
                b1=jnp.sum(dh, axis=0, dtype=jnp.float32),
                w2=dot("pf,pd->fd", activated, dy),
                b2=jnp.sum(dy, axis=0, dtype=jnp.float32),
            )
            return tile.write(drows, dot("pf,df->pd", dh, v1)), jax.tree.map(jnp.add, grad, delta)

        drows, dweights = carry
        zero = jax.tree.map(lambda total: jnp.zeros(total.shape[1:], jnp.float32), dweights)
        drows, grad = over_tiles(runs, n, step, (drows, zero))
        return drows, jax.tree.map(lambda total, part: add_at(total, expert, part), dweights, grad)

    num_experts, width, expert_width = w1.shape
    dweights = MlpWeights(
        w1=jnp.zeros(w1.shape, jnp.float32),
        b1=jnp.zeros((num_experts, expert_width), jnp.float32),
        w2=jnp.zeros(w2.shape, jnp.float32),
        b2=jnp.zeros((num_experts, width), jnp.float32),
    )
    drows, dweights = over_runs(runs, run, (jnp.zeros_like(padded), dweights))
    return drows[: rows.shape[0]], _like(weights, dweights)


def _like(weights: MlpWeights, grad: MlpWeights) -> MlpWeights:
    """Gradients in the dtypes of the weights, and none where there is no bias."""

    def bias(like: Array | None, value: Array | None) -> Array | None:
        return None if like is None or value is None else value.astype(like.dtype)

    w1, w2 = grad.w1.astype(weights.w1.dtype), grad.w2.astype(weights.w2.dtype)
    return MlpWeights(w1, bias(weights.b1, grad.b1), w2, bias(weights.b2, grad.b2))
