"""Expert MLPs in plain XLA, plain and gated, in one pass over the rows, with what the activation was of saved.

With `h = x w1 + b1` and `a = act(h)`, `y = a w2 + b2`: `da = dy w2ᵀ`, `dh = da act'(h)`, `dw2 = aᵀ dy`, `db2 = Σ dy`,
`dw1 = xᵀ dh`, `db1 = Σ dh`, `dx = dh w1ᵀ`. Gated, with `u = x up` and `a = act(h) u`, also `du = da act(h)`,
`dup = xᵀ du`, and `dx` is the sum of both. `a` is recomputed from `h` and `u` (elementwise), which are saved in the
compute dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_kernels.backends.base import MlpStatic
from moe_kernels.backends.mlp_parts import Matmuls, gradients_like, matmuls_of
from moe_kernels.backends.xla.block import OverExperts
from moe_kernels.backends.xla.matmul import (
    Tile,
    add_at,
    cast,
    dot,
    dparts_of,
    dx_of,
    gradients,
    of_expert,
    over_runs,
    over_tiles,
    overhang,
    parts_of,
    result_of,
    select_rows,
    used_rows,
)
from moe_kernels.types import Activation, GluWeights, MlpWeights, Runs


class MlpSaved(NamedTuple):
    """What the backward pass needs."""

    rows: Float[Array, "R D"]
    parts: tuple[Float[Array, "R F"], ...]
    """What the activation was of, and with a gate `x up`; in the compute dtype, in the tile loop with the overhang."""
    weights: MlpWeights | GluWeights
    runs: Runs


def _forward(x: Float[Array, "P D"], w: Matmuls, activation: Activation) -> tuple[Array, ...]:
    """The rows `x` of one expert: what is saved, and the result `[P, D]`."""
    parts = parts_of(x, w.first)
    return *parts, *parts_of(result_of(parts, activation), w.second)


def _backward(
    dy: Float[Array, "P D"],
    parts: Sequence[Float[Array, "P F"]],
    used: Bool[Array, " P"],
    w: Matmuls,
    activation: Activation,
) -> tuple[Array, ...]:
    """Gradients of what was saved, 0 in unused rows, and of the input."""
    dparts = dparts_of(dot("pd,fd->pf", dy, w.second.weight), parts, used, activation)
    return *dparts, dx_of(dparts, w.first)


def _gradients(
    weights: Matmuls,
    x: Float[Array, "*E P D"],
    dparts: Sequence[Float[Array, "*E P F"]],
    hidden: Float[Array, "*E P F"],
    dy: Float[Array, "*E P D"],
) -> Matmuls:
    """In float32: those of two matmuls."""
    return Matmuls(gradients(weights.first, x, dparts), gradients(weights.second, hidden, [dy]))


def _cast(weights: Matmuls, dtype: jnp.dtype) -> Matmuls:
    """Matrices in the dtype of the rows."""
    return Matmuls(cast(weights.first, dtype), cast(weights.second, dtype))


def expert_mlp_forward(
    over_experts: OverExperts,
    static: MlpStatic,
    rows: Float[Array, "R D"],
    weights: MlpWeights | GluWeights,
    runs: Runs,
) -> tuple[Float[Array, "R D"], MlpSaved]:
    """`y = act(x w1_e + b1_e) w2_e + b2_e`, or gated; unused rows hold anything."""
    layout, matmuls = static.layout, _cast(matmuls_of(weights), rows.dtype)
    expert_width, num_parts = matmuls.first.weight.shape[2], 1 if matmuls.first.up is None else 2
    if layout.rows_per_expert is not None:
        used = used_rows(runs, layout)
        block = rows.reshape(*used.shape, rows.shape[1])
        *parts, out = over_experts(lambda x, _, w: _forward(x[0], w, static.activation), (block,), used, matmuls)
        parts = tuple(part.reshape(rows.shape[0], expert_width) for part in parts)
        return out.reshape(rows.shape), MlpSaved(rows, parts, weights, runs)

    padded = overhang(rows)

    def run(n: Int[Array, ""], expert: Int[Array, ""], carry: tuple[Array, ...]) -> tuple[Array, ...]:
        w = of_expert(matmuls, expert)

        def step(tile: Tile, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            results = _forward(tile.rows(padded), w, static.activation)
            return tuple(tile.write(array, result) for array, result in zip(carry, results, strict=True))

        return over_tiles(runs, n, step, carry)

    empty = (jnp.zeros((padded.shape[0], expert_width), rows.dtype),) * num_parts
    *parts, out = over_runs(runs, run, (*empty, jnp.zeros_like(padded)))
    return out[: rows.shape[0]], MlpSaved(rows, tuple(parts), weights, runs)


def expert_mlp_backward(
    over_experts: OverExperts, static: MlpStatic, saved: MlpSaved, dout: Float[Array, "R D"]
) -> tuple[Float[Array, "R D"], MlpWeights | GluWeights]:
    """All gradients; an expert without rows gets exactly 0.

    Those of the weights are a grouped matmul's. Those of the rows are not put together from two of them: an expert's
    (or a tile's) rows go through both matmuls at once, while its weights are in the cache.
    """
    rows, parts, weights, runs = saved
    layout, of_all = static.layout, matmuls_of(weights)
    matmuls = _cast(of_all, rows.dtype)
    if layout.rows_per_expert is not None:
        used = used_rows(runs, layout)
        x, dy, *parts = (array.reshape(*used.shape, array.shape[1]) for array in (rows, dout, *parts))
        x, dy = select_rows(used, x), select_rows(used, dy)
        back = lambda a, used, w: _backward(a[0], a[1:], used, w, static.activation)  # noqa: E731
        *dparts, drows = over_experts(back, (dy, *parts), used, matmuls)
        hidden = select_rows(used, result_of(parts, static.activation))
        return drows.reshape(rows.shape), gradients_like(weights, _gradients(of_all, x, dparts, hidden, dy))

    padded, dpadded = overhang(rows), overhang(dout)

    def run(n: Int[Array, ""], expert: Int[Array, ""], carry: tuple[Array, Matmuls]) -> tuple[Array, Matmuls]:
        w = of_expert(matmuls, expert)

        def step(tile: Tile, carry: tuple[Array, Matmuls]) -> tuple[Array, Matmuls]:
            drows, sums = carry
            dy, own = tile.used_rows(dpadded), [tile.rows(part) for part in parts]
            *dparts, dx = _backward(dy, own, tile.used, w, static.activation)
            hidden = select_rows(tile.used, result_of(own, static.activation))
            added = _gradients(of_all, tile.used_rows(padded), dparts, hidden, dy)
            return tile.write(drows, dx), jax.tree.map(jnp.add, sums, added)

        drows, total = carry
        zero = jax.tree.map(lambda total: jnp.zeros(total.shape[1:], jnp.float32), total)
        drows, sums = over_tiles(runs, n, step, (drows, zero))
        return drows, jax.tree.map(lambda total, part: add_at(total, expert, part), total, sums)

    total = jax.tree.map(lambda weight: jnp.zeros(weight.shape, jnp.float32), of_all)
    drows, dmatmuls = over_runs(runs, run, (jnp.zeros_like(padded), total))
    return drows[: rows.shape[0]], gradients_like(weights, dmatmuls)
