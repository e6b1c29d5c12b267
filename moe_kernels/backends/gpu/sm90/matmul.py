"""Grouped matmul: forward and dX over tiles of 128 rows, dW over slices of 64.

A bias and an activation are worked in the forward kernel, and what the activation was of is kept for gradients. The
matrices of a gated pair are laid out as one, in which 64 columns of each take turns: one kernel forward, one for dX,
one for dW, whose result is taken apart.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from moe_kernels.backends.base import MatmulStatic, MatmulWeights
from moe_kernels.backends.gpu.common.activation import activate_and_slope
from moe_kernels.backends.gpu.common.launch import NUM_CONSUMERS, GpuTarget
from moe_kernels.backends.gpu.common.schedule import RowTiles, row_tiles
from moe_kernels.backends.gpu.sm90.column_sums import column_sums
from moe_kernels.backends.gpu.sm90.epilogues import Activate, Epilogue, Gated, Results, Store
from moe_kernels.backends.gpu.sm90.row_matmul import row_matmul
from moe_kernels.backends.gpu.sm90.tiling import CHUNK, DEPTH, WARPGROUP_ROWS
from moe_kernels.backends.gpu.sm90.weight_gradient import weight_gradient
from moe_kernels.types import Layout, Runs


class MatmulSaved(NamedTuple):
    """What the backward pass of a grouped matmul needs."""

    rows: Float[Array, "R D"]
    hidden: Float[Array, "R H"] | None
    """What the activation was of, where there is one; with an `up` in turns with `x up`, H = 2 F."""
    weights: MatmulWeights
    runs: Runs


def tall_tiles(runs: Runs, layout: Layout) -> RowTiles:
    """Tiles of a result with a row for each row."""
    return row_tiles(runs, layout, NUM_CONSUMERS * WARPGROUP_ROWS)


def flat_tiles(runs: Runs, layout: Layout) -> RowTiles:
    """Slices of rows that are summed over."""
    return row_tiles(runs, layout, DEPTH)


def float32_of(bias: Float[Array, "E F"] | None) -> Float[Array, "E F"] | None:
    """A bias as the kernels add it."""
    return None if bias is None else bias.astype(jnp.float32)


def grouped_matmul_value(
    device: GpuTarget, static: MatmulStatic, rows: Float[Array, "R D"], weights: MatmulWeights, runs: Runs
) -> Float[Array, "R F"]:
    """`y = x W_e` and what follows it, in one kernel; unused rows hold anything, NaN included."""
    return _results(device, static, rows, weights, runs, keep=False).out


def grouped_matmul_forward(
    device: GpuTarget, static: MatmulStatic, rows: Float[Array, "R D"], weights: MatmulWeights, runs: Runs
) -> tuple[Float[Array, "R F"], MatmulSaved]:
    """The same, with what the activation was of kept for the backward pass."""
    hidden, out = _results(device, static, rows, weights, runs, keep=True)
    return out, MatmulSaved(rows, hidden, weights, runs)


def _results(
    device: GpuTarget,
    static: MatmulStatic,
    rows: Float[Array, "R D"],
    weights: MatmulWeights,
    runs: Runs,
    *,
    keep: bool,
) -> Results:
    """The result, and what the activation was of where there is one that is kept."""
    matrix, tiles = _matrix(weights).astype(rows.dtype), tall_tiles(runs, static.layout)
    epilogue: Epilogue = Store()
    if static.activation is not None:
        epilogue = (Activate if weights.up is None else Gated)(static.activation, keep)
    return row_matmul(rows, matrix, tiles, device, epilogue, bias=float32_of(weights.bias))


def grouped_matmul_backward(
    device: GpuTarget, static: MatmulStatic, saved: MatmulSaved, dout: Float[Array, "R F"]
) -> tuple[jax.Array, MatmulWeights]:
    """`dX_e = dH_e W_eᵀ`, `dW_e = X_eᵀ dH_e` and `db_e = Σ dH_e`, where `dH` is `dY` taken back by XLA."""
    rows, hidden, weights, runs = saved
    dhidden = dout if hidden is None else _dhidden(hidden, weights, static, dout)
    tiles = tall_tiles(runs, static.layout), flat_tiles(runs, static.layout)
    drows, gradients = linear_backward(MatmulWeights(_matrix(weights), weights.bias), rows, dhidden, tiles, device)
    if weights.up is None:
        return drows, gradients
    dweight, dup = _apart(gradients.weight)
    return drows, MatmulWeights(dweight, up=dup)


def linear_backward(
    weights: MatmulWeights,
    rows: Float[Array, "R D"],
    dout: Float[Array, "R F"],
    tiles: tuple[RowTiles, RowTiles],
    device: GpuTarget,
) -> tuple[Float[Array, "R D"], MatmulWeights]:
    """`dX_e = dY_e W_eᵀ` and the gradients of the weights, for a matmul with nothing behind it; tall and flat tiles."""
    tall, flat = tiles
    drows = row_matmul(dout, weights.weight.astype(rows.dtype), tall, device, transposed=True).out
    return drows, weight_gradients(weights, rows, dout, flat, device)


def weight_gradients(
    weights: MatmulWeights, rows: Float[Array, "R D"], dout: Float[Array, "R F"], tiles: RowTiles, device: GpuTarget
) -> MatmulWeights:
    """`dW_e = X_eᵀ dY_e` and `db_e = Σ dY_e`, each in the dtype of what it is of, written so where the kernel can."""
    weight, bias, _ = weights
    written: DTypeLike = weight.dtype if weight.dtype in (rows.dtype, jnp.float32) else jnp.float32
    dweight = weight_gradient(rows, dout, tiles, device, dtype=written).astype(weight.dtype)
    return MatmulWeights(dweight, None if bias is None else column_sums(dout, tiles, device).astype(bias.dtype))


def _matrix(weights: MatmulWeights) -> Float[Array, "E D H"]:
    """What the rows are multiplied by."""
    return weights.weight if weights.up is None else _in_turns(weights.weight, weights.up)


def _in_turns(gate: Float[Array, "*A F"], up: Float[Array, "*A F"]) -> Float[Array, "*A G"]:
    """64 columns of one, 64 of the other, and so on, so that a tile has both factors of its results."""
    chunks = [a.reshape(*a.shape[:-1], -1, CHUNK) for a in (gate, up)]
    return jnp.stack(chunks, axis=-2).reshape(*gate.shape[:-1], -1)


def _apart(pair: Float[Array, "*A G"]) -> tuple[Float[Array, "*A F"], Float[Array, "*A F"]]:
    """Back from what takes turns."""
    chunks = pair.reshape(*pair.shape[:-1], -1, 2, CHUNK)
    gate, up = (chunks[..., i, :].reshape(*pair.shape[:-1], -1) for i in range(2))
    return gate, up


def _dhidden(
    hidden: Float[Array, "R H"], weights: MatmulWeights, static: MatmulStatic, dout: Float[Array, "R F"]
) -> Float[Array, "R H"]:
    """The gradient of what the activation was of, and of `x up`; what unused rows hold stays in them."""
    assert static.activation is not None
    before, up = (hidden, None) if weights.up is None else _apart(hidden)
    activated, slope = activate_and_slope(before.astype(jnp.float32), static.activation)
    dout = dout.astype(jnp.float32)
    if up is None:
        return (dout * slope).astype(hidden.dtype)
    parts = dout * (up.astype(jnp.float32) * slope), dout * activated
    return _in_turns(*(part.astype(hidden.dtype) for part in parts))
