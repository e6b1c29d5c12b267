"""Grouped matmul in plain XLA: expert by expert where rows form an `[E, rows]` block, else a loop over tiles of runs.

A tile may overhang its run. In the forward pass and in dX the overhang is overwritten by the next run, because runs are
worked in ascending order of rows; in dW the rows past the end are masked out of both factors. Nothing is expanded to
`[R, E]`, and tiles without rows are never visited.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_kernels.backends.xla.block import OverExperts
from moe_kernels.types import Layout, Runs

# Rows of a tile in the loop: on a 2-core CPU (November 2026, D 512, F 2048) smaller tiles pay more for slicing an
# expert's weights than they save in padding.
TILE_ROWS = 128


Carry = TypeVar("Carry")


class MatmulSaved(NamedTuple):
    """What the backward pass of a grouped matmul needs."""

    rows: Float[Array, "R D"]
    weight: Float[Array, "E D F"]
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
    """Einsum of two arrays of one dtype, accumulated in float32; float32 factors are multiplied as float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
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

    return jax.lax.fori_loop(0, (size + TILE_ROWS - 1) // TILE_ROWS, visit, carry)


def over_runs(runs: Runs, step: Callable[[Int[Array, ""], Int[Array, ""], Carry], Carry], carry: Carry) -> Carry:
    """Visit the runs in order as `step(n, expert, carry)`."""
    return jax.lax.fori_loop(0, runs.expert.shape[0], lambda n, carry: step(n, runs.expert[n], carry), carry)


def add_at(total: Float[Array, "E ..."], expert: Int[Array, ""], part: Float[Array, "..."]) -> Float[Array, "E ..."]:
    """Add to the entry of one expert: a slice read and written in place, where `.at[].add` would be a scatter."""
    old = jax.lax.dynamic_index_in_dim(total, expert, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(total, old + part.astype(total.dtype), expert, axis=0)


def grouped_matmul_forward(
    over_experts: OverExperts, layout: Layout, rows: Float[Array, "R D"], weight: Float[Array, "E D F"], runs: Runs
) -> tuple[Float[Array, "R F"], MatmulSaved]:
    """`y = x W_e` for the rows of every expert e; unused rows hold anything finite inputs give."""
    cast = weight.astype(rows.dtype)
    if layout.rows_per_expert is not None:
        used = used_rows(runs, layout)
        block = rows.reshape(*used.shape, rows.shape[1])
        (out,) = over_experts(lambda x, _, w: (dot("pd,df->pf", x[0], w).astype(rows.dtype),), (block,), used, cast)
        return out.reshape(rows.shape[0], weight.shape[2]), MatmulSaved(rows, weight, runs)

    padded = overhang(rows)

    def run(n: Int[Array, ""], expert: Int[Array, ""], out: Float[Array, "Q F"]) -> Float[Array, "Q F"]:
        w = cast[expert]
        return over_tiles(runs, n, lambda tile, out: tile.write(out, dot("pd,df->pf", tile.rows(padded), w)), out)

    out = over_runs(runs, run, jnp.zeros((padded.shape[0], weight.shape[2]), rows.dtype))
    return out[: rows.shape[0]], MatmulSaved(rows, weight, runs)


def grouped_matmul_backward(
    over_experts: OverExperts, layout: Layout, saved: MatmulSaved, dout: Float[Array, "R F"]
) -> tuple[Float[Array, "R D"], Float[Array, "E D F"]]:
    """`dX_e = dY_e W_eᵀ` and `dW_e = X_eᵀ dY_e`, with unused rows masked in X and in dY; no rows: exactly 0."""
    rows, weight, runs = saved
    cast = weight.astype(rows.dtype)
    if layout.rows_per_expert is not None:
        used = used_rows(runs, layout)
        x = select_rows(used, rows.reshape(*used.shape, rows.shape[1]))
        dy = select_rows(used, dout.reshape(*used.shape, dout.shape[1]))
        (dx,) = over_experts(lambda dy, _, w: (dot("pf,df->pd", dy[0], w).astype(rows.dtype),), (dy,), used, cast)
        return dx.reshape(rows.shape), dot("epd,epf->edf", x, dy).astype(weight.dtype)

    padded, dpadded = overhang(rows), overhang(dout)

    def run(n: Int[Array, ""], expert: Int[Array, ""], carry: tuple[Array, Array]) -> tuple[Array, Array]:
        w = cast[expert]

        def step(tile: Tile, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            dx, dw = carry
            dy = tile.used_rows(dpadded)
            dx = tile.write(dx, dot("pf,df->pd", dy, w))
            return dx, dw + dot("pd,pf->df", tile.used_rows(padded), dy)

        dx, dweight = carry
        dx, dw = over_tiles(runs, n, step, (dx, jnp.zeros(w.shape, jnp.float32)))
        return dx, add_at(dweight, expert, dw)

    dx, dweight = over_runs(runs, run, (jnp.zeros_like(padded), jnp.zeros_like(weight)))
    return dx[: rows.shape[0]], dweight
