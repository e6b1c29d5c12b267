"""The expert MLP in plain XLA: two grouped matmuls around an activation, with the pre-activation saved.

With `h = x w1 + b1` and `a = act(h)`, `y = a w2 + b2`: `da = dy w2ᵀ`, `dh = da act'(h)`, `dw2 = aᵀ dy`, `db2 = Σ dy`,
`dw1 = xᵀ dh`, `db1 = Σ dh`, `dx = dh w1ᵀ`. `a` is recomputed from `h` (elementwise), `h` is saved in the compute dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_kernels.backends.base import MatmulWeights, MlpStatic
from moe_kernels.backends.xla.activation import activate, activate_and_slope
from moe_kernels.backends.xla.block import OverExperts
from moe_kernels.backends.xla.matmul import (
    Tile,
    add_at,
    dot,
    gradients,
    like,
    of_expert,
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


def _forward(
    x: Float[Array, "P D"], w: MlpWeights, activation: Activation
) -> tuple[Float[Array, "P F"], Float[Array, "P D"]]:
    """The rows `x` of one expert: the hidden layer before the activation, and the result."""
    hidden = plus(dot("pd,df->pf", x, w.w1), w.b1).astype(x.dtype)
    return hidden, plus(dot("pf,fd->pd", activate(hidden, activation), w.w2), w.b2).astype(x.dtype)


def _backward(
    dy: Float[Array, "P D"], hidden: Float[Array, "P F"], used: Bool[Array, " P"], w: MlpWeights, activation: Activation
) -> tuple[Float[Array, "P F"], Float[Array, "P D"]]:
    """Gradients of the hidden layer, 0 in unused rows, and of the input."""
    _, slope = activate_and_slope(hidden, activation)
    dhidden = select_rows(used, (dot("pd,fd->pf", dy, w.w2) * slope).astype(hidden.dtype))
    return dhidden, dot("pf,df->pd", dhidden, w.w1).astype(dy.dtype)


def _gradients(
    weights: MlpWeights,
    x: Float[Array, "*E P D"],
    dhidden: Float[Array, "*E P F"],
    activated: Float[Array, "*E P F"],
    dy: Float[Array, "*E P D"],
) -> MlpWeights:
    """In float32: those of two matmuls."""
    dw1, db1, _ = gradients(MatmulWeights(weights.w1, weights.b1), x, [dhidden])
    dw2, db2, _ = gradients(MatmulWeights(weights.w2, weights.b2), activated, [dy])
    return MlpWeights(dw1, db1, dw2, db2)


def _cast(weights: MlpWeights, dtype: jnp.dtype) -> MlpWeights:
    """Matrices in the dtype of the rows."""
    return weights._replace(w1=weights.w1.astype(dtype), w2=weights.w2.astype(dtype))


def expert_mlp_forward(
    over_experts: OverExperts, static: MlpStatic, rows: Float[Array, "R D"], weights: MlpWeights, runs: Runs
) -> tuple[Float[Array, "R D"], MlpSaved]:
    """`y = act(x w1_e + b1_e) w2_e + b2_e`; unused rows hold anything."""
    layout, cast, expert_width = static.layout, _cast(weights, rows.dtype), weights.w1.shape[2]
    if layout.rows_per_expert is not None:
        used = used_rows(runs, layout)
        block = rows.reshape(*used.shape, rows.shape[1])
        hidden, out = over_experts(lambda x, _, w: _forward(x[0], w, static.activation), (block,), used, cast)
        return out.reshape(rows.shape), MlpSaved(rows, hidden.reshape(rows.shape[0], expert_width), weights, runs)

    padded = overhang(rows)

    def run(n: Int[Array, ""], expert: Int[Array, ""], carry: tuple[Array, Array]) -> tuple[Array, Array]:
        w = of_expert(cast, expert)

        def step(tile: Tile, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            hidden, out = carry
            h, y = _forward(tile.rows(padded), w, static.activation)
            return tile.write(hidden, h), tile.write(out, y)

        return over_tiles(runs, n, step, carry)

    hidden = jnp.zeros((padded.shape[0], expert_width), rows.dtype)
    hidden, out = over_runs(runs, run, (hidden, jnp.zeros_like(padded)))
    return out[: rows.shape[0]], MlpSaved(rows, hidden, weights, runs)


def expert_mlp_backward(
    over_experts: OverExperts, static: MlpStatic, saved: MlpSaved, dout: Float[Array, "R D"]
) -> tuple[Float[Array, "R D"], MlpWeights]:
    """All gradients; an expert without rows gets exactly 0.

    Those of the weights are a grouped matmul's. Those of the rows are not put together from two of them: an expert's
    (or a tile's) rows go through both matmuls at once, while its weights are in the cache.
    """
    rows, hidden, weights, runs = saved
    layout, cast = static.layout, _cast(weights, rows.dtype)
    if layout.rows_per_expert is not None:
        used = used_rows(runs, layout)
        x, dy, h = (array.reshape(*used.shape, array.shape[1]) for array in (rows, dout, hidden))
        dy = select_rows(used, dy)
        back = lambda a, used, w: _backward(a[0], a[1], used, w, static.activation)  # noqa: E731
        dh, drows = over_experts(back, (dy, h), used, cast)
        activated = select_rows(used, activate(h, static.activation))
        return drows.reshape(rows.shape), like(weights, _gradients(weights, select_rows(used, x), dh, activated, dy))

    padded, dpadded = overhang(rows), overhang(dout)

    def run(n: Int[Array, ""], expert: Int[Array, ""], carry: tuple[Array, MlpWeights]) -> tuple[Array, MlpWeights]:
        w = of_expert(cast, expert)

        def step(tile: Tile, carry: tuple[Array, MlpWeights]) -> tuple[Array, MlpWeights]:
            drows, sums = carry
            dy, h = tile.used_rows(dpadded), tile.rows(hidden)
            dh, dx = _backward(dy, h, tile.used, w, static.activation)
            activated = select_rows(tile.used, activate(h, static.activation))
            parts = _gradients(weights, tile.used_rows(padded), dh, activated, dy)
            return tile.write(drows, dx), jax.tree.map(jnp.add, sums, parts)

        drows, total = carry
        zero = jax.tree.map(lambda total: jnp.zeros(total.shape[1:], jnp.float32), total)
        drows, sums = over_tiles(runs, n, step, (drows, zero))
        return drows, jax.tree.map(lambda total, part: add_at(total, expert, part), total, sums)

    total = jax.tree.map(lambda weight: jnp.zeros(weight.shape, jnp.float32), weights)
    drows, dweights = over_runs(runs, run, (jnp.zeros_like(padded), total))
    return drows[: rows.shape[0]], like(weights, dweights)
