"""Grouped matmul in plain XLA: expert by expert where rows form an `[E, rows]` block, else a loop over tiles of runs.

A tile may overhang its run. In the forward pass and in dX the overhang is overwritten by the next run, because runs are
worked in ascending order of rows; in dW the rows past the end are masked out of both factors. Nothing is expanded to
`[R, E]`, and tiles without rows are never visited. What an activation was of is computed again on the way back, one
more matmul instead of `[R, F]` kept for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_kernels.activations import function_of
from moe_kernels.axes import vary_like
from moe_kernels.backends.base import MatmulStatic, MatmulWeights
from moe_kernels.backends.xla.activation import activate, activate_and_slope
from moe_kernels.backends.xla.block import OverExperts
from moe_kernels.types import Layout, MatmulActivation, Runs

# Rows of a tile in the loop: on a 2-core CPU (November 2026, D 512, F 2048) smaller tiles pay more for slicing an
# expert's weights than they save in padding.
TILE_ROWS = 128


Carry = TypeVar("Carry")
Weights = TypeVar("Weights")


class MatmulSaved(NamedTuple):
    """What the backward pass of a grouped matmul needs."""

    rows: Float[Array, "R D"]
    weights: MatmulWeights
    runs: Runs


def used_rows(runs: Runs, layout: Layout) -> Bool[Array, "E P"]:
    """Which rows of the `[E, rows_per_expert]` block hold something."""
    assert layout.rows_per_expert is not None
    rows_per_run = layout.rows_per_expert // layout.runs_per_expert
    used = jnp.arange(rows_per_run, dtype=jnp.int32)[None, :] < runs.size[:, None]
    return used.reshape(layout.num_experts, layout.rows_per_expert)


def select_rows(used: Bool[Array, "..."], values: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Zero in unused rows, whatever stood there (NaN included)."""
    return jnp.where(used[..., None], values, jnp.zeros((), values.dtype))


def dot(spec: str, a: Array, b: Array) -> Float[Array, "..."]:
    """Einsum of two arrays of one dtype, accumulated in float32.

    Float32 factors are multiplied as float32, unless `jax.default_matmul_precision` asks for another precision while
    this is traced.
    """
    asked = getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009 (not in JAX's stubs)
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 and asked is None else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


class Tile(NamedTuple):
    """A tile of a run: its first row, and which of its rows belong to the run."""

    first: Int[Array, ""]
    used: Bool[Array, " P"]

    def rows(self, array: Float[Array, "R D"]) -> Float[Array, "P D"]:
        """Its rows of an array, those of the next run included."""
        return jax.lax.dynamic_slice_in_dim(array, self.first, TILE_ROWS, axis=0)

    def used_rows(self, array: Float[Array, "R D"]) -> Float[Array, "P D"]:
        """Its own rows of an array, 0 past the end of the run."""
        return select_rows(self.used, self.rows(array))

    def write(self, array: Float[Array, "R D"], values: Float[Array, "P D"]) -> Float[Array, "R D"]:
        """The array with its rows replaced."""
        return jax.lax.dynamic_update_slice_in_dim(array, values.astype(array.dtype), self.first, axis=0)


def overhang(array: Float[Array, "R D"]) -> Float[Array, "Q D"]:
    """Room for the overhang of the last tile, since a slice past the end would be shifted back."""
    return jnp.pad(array, ((0, TILE_ROWS), (0, 0)))


def over_tiles(runs: Runs, n: Int[Array, ""], step: Callable[[Tile, Carry], Carry], carry: Carry) -> Carry:
    """Visit the tiles of run `n` in order."""
    first, size = runs.first[n], runs.size[n]

    def visit(i: Int[Array, ""], carry: Carry) -> Carry:
        offset = i * TILE_ROWS
        return step(Tile(first + offset, offset + jnp.arange(TILE_ROWS, dtype=jnp.int32) < size), carry)

    return jax.lax.fori_loop(0, (size + TILE_ROWS - 1) // TILE_ROWS, visit, vary_like(carry, runs))


def over_runs(runs: Runs, step: Callable[[Int[Array, ""], Int[Array, ""], Carry], Carry], carry: Carry) -> Carry:
    """Visit the runs in order as `step(n, expert, carry)`."""
    visit = lambda n, carry: step(n, runs.expert[n], carry)  # noqa: E731
    return jax.lax.fori_loop(0, runs.expert.shape[0], visit, vary_like(carry, runs))


def add_at(total: Float[Array, "E ..."], expert: Int[Array, ""], part: Float[Array, "..."]) -> Float[Array, "E ..."]:
    """Add to the entry of one expert: a slice read and written in place, where `.at[].add` would be a scatter."""
    old = jax.lax.dynamic_index_in_dim(total, expert, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(total, old + part.astype(total.dtype), expert, axis=0)


def plus(values: Float[Array, "P F"], bias: Float[Array, " F"] | None) -> Float[Array, "P F"]:
    """Add a bias where there is one."""
    return values if bias is None else values + bias[None].astype(jnp.float32)


def parts_of(x: Float[Array, "P D"], w: MatmulWeights) -> tuple[Float[Array, "P F"], ...]:
    """The rows `x` of one expert through its matrices, rounded: `x weight + bias`, and `x up` if there is one."""
    before = plus(dot("pd,df->pf", x, w.weight), w.bias).astype(x.dtype)
    return (before,) if w.up is None else (before, dot("pd,df->pf", x, w.up).astype(x.dtype))


def result_of(parts: Sequence[Float[Array, "*E P F"]], activation: MatmulActivation | None) -> Float[Array, "*E P F"]:
    """What follows the matmul: nothing, or the activation and a product with `x up`."""
    before, *gated = parts
    if activation is None or not gated:
        return before if activation is None else activate(before, activation)
    return (function_of(activation)(before.astype(jnp.float32)) * gated[0].astype(jnp.float32)).astype(before.dtype)


def dparts_of(
    dresult: Float[Array, "P F"],
    parts: Sequence[Float[Array, "P F"]],
    used: Bool[Array, " P"],
    activation: MatmulActivation,
) -> tuple[Float[Array, "P F"], ...]:
    """The gradient of the result taken back to `parts`, 0 in unused rows."""
    before, *gated = parts
    activated, slope = activate_and_slope(before, activation)
    dparts = [dresult * (gated[0].astype(jnp.float32) * slope), dresult * activated] if gated else [dresult * slope]
    return tuple(select_rows(used, dpart.astype(before.dtype)) for dpart in dparts)


def dx_of(dparts: Sequence[Float[Array, "P F"]], w: MatmulWeights) -> Float[Array, "P D"]:
    """The gradient of the rows, `Σ dY Wᵀ`."""
    dx = dot("pf,df->pd", dparts[0], w.weight)
    if w.up is not None:
        dx += dot("pf,df->pd", dparts[1], w.up)
    return dx.astype(dparts[0].dtype)


def _backward(
    x: Float[Array, "P D"],
    dy: Float[Array, "P F"],
    used: Bool[Array, " P"],
    w: MatmulWeights,
    activation: MatmulActivation | None,
) -> tuple[tuple[Float[Array, "P F"], ...], Float[Array, "P D"]]:
    """Gradients of the parts, 0 in unused rows, and of the rows; `dy` is 0 there."""
    dparts = (dy,)
    if activation is not None:
        dparts = dparts_of(dy.astype(jnp.float32), parts_of(x, w), used, activation)
    return dparts, dx_of(dparts, w)


def cast(weights: MatmulWeights, dtype: jnp.dtype) -> MatmulWeights:
    """Matrices in the dtype of the rows."""
    up = None if weights.up is None else weights.up.astype(dtype)
    return weights._replace(weight=weights.weight.astype(dtype), up=up)


def grouped_matmul_forward(
    over_experts: OverExperts, static: MatmulStatic, rows: Float[Array, "R D"], weights: MatmulWeights, runs: Runs
) -> tuple[Float[Array, "R F"], MatmulSaved]:
    """`y = x W_e` for the rows of every expert e, and what follows; unused rows hold anything finite inputs give."""
    layout, matrices, expert_width = static.layout, cast(weights, rows.dtype), weights.weight.shape[2]
    if layout.rows_per_expert is not None:
        used = used_rows(runs, layout)
        block = rows.reshape(*used.shape, rows.shape[1])
        (out,) = over_experts(
            lambda x, _, w: (result_of(parts_of(x[0], w), static.activation),), (block,), used, matrices
        )
        return out.reshape(rows.shape[0], expert_width), MatmulSaved(rows, weights, runs)

    padded = overhang(rows)

    def run(n: Int[Array, ""], expert: Int[Array, ""], out: Float[Array, "Q F"]) -> Float[Array, "Q F"]:
        w = of_expert(matrices, expert)
        return over_tiles(
            runs,
            n,
            lambda tile, out: tile.write(out, result_of(parts_of(tile.rows(padded), w), static.activation)),
            out,
        )

    out = over_runs(runs, run, jnp.zeros((padded.shape[0], expert_width), rows.dtype))
    return out[: rows.shape[0]], MatmulSaved(rows, weights, runs)


def grouped_matmul_backward(
    over_experts: OverExperts, static: MatmulStatic, saved: MatmulSaved, dout: Float[Array, "R F"]
) -> tuple[Float[Array, "R D"], MatmulWeights]:
    """`dX_e = dY_e W_eᵀ` and `dW_e = X_eᵀ dY_e`, with unused rows masked in X and in dY; no rows: exactly 0.

    With an activation, dY is first taken back through it.
    """
    rows, weights, runs = saved
    layout, matrices = static.layout, cast(weights, rows.dtype)
    if layout.rows_per_expert is not None:
        used = used_rows(runs, layout)
        x = select_rows(used, rows.reshape(*used.shape, rows.shape[1]))
        dy = select_rows(used, dout.reshape(*used.shape, dout.shape[1]))

        def expert(arrays: tuple[Array, ...], used: Array, w: MatmulWeights) -> tuple[Array, ...]:
            dparts, dx = _backward(arrays[0], arrays[1], used, w, static.activation)
            # Not what is there already: a loop over experts would copy it.
            return dx, *(() if static.activation is None else dparts)

        dx, *dparts = over_experts(expert, (x, dy), used, matrices)
        return dx.reshape(rows.shape), like(weights, gradients(weights, x, dparts or [dy]))

    padded, dpadded = overhang(rows), overhang(dout)

    def run(
        n: Int[Array, ""], expert: Int[Array, ""], carry: tuple[Array, MatmulWeights]
    ) -> tuple[Array, MatmulWeights]:
        w = of_expert(matrices, expert)

        def step(tile: Tile, carry: tuple[Array, MatmulWeights]) -> tuple[Array, MatmulWeights]:
            dx, sums = carry
            x, dy = tile.used_rows(padded), tile.used_rows(dpadded)
            dparts, part = _backward(x, dy, tile.used, w, static.activation)
            return tile.write(dx, part), jax.tree.map(jnp.add, sums, gradients(weights, x, dparts))

        dx, total = carry
        zero = jax.tree.map(lambda total: jnp.zeros(total.shape[1:], jnp.float32), total)
        dx, sums = over_tiles(runs, n, step, (dx, zero))
        return dx, jax.tree.map(lambda total, part: add_at(total, expert, part), total, sums)

    dx, dweights = over_runs(runs, run, (jnp.zeros_like(padded), jax.tree.map(jnp.zeros_like, weights)))
    return dx[: rows.shape[0]], dweights


def of_expert(weights: Weights, expert: Int[Array, ""]) -> Weights:
    """The weights of one expert."""
    return jax.tree.map(lambda w: w[expert], weights)


def gradients(weights: MatmulWeights, x: Float[Array, "*E P D"], dparts: Sequence[Array]) -> MatmulWeights:
    """In float32, for rows and cotangents that are 0 where unused: `dW = Xᵀ dY`, `db = Σ dY`."""
    products = [dot("...pd,...pf->...df", x, dpart) for dpart in dparts]
    bias = None if weights.bias is None else jnp.sum(dparts[0], axis=-2, dtype=jnp.float32)
    return MatmulWeights(products[0], bias, None if weights.up is None else products[1])


def like(weights: Weights, gradients: Weights) -> Weights:
    """Gradients in the dtypes of what they are of."""
    return jax.tree.map(lambda like, gradient: gradient.astype(like.dtype), weights, gradients)
