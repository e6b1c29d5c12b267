"""Grouped matmul: forward and dX over tiles of 128 rows, dW over slices of 64."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from moe_kernels.backends.base import MatmulStatic, MatmulWeights
from moe_kernels.backends.gpu.launch import Device
from moe_kernels.backends.gpu.row_matmul import row_matmul
from moe_kernels.backends.gpu.schedule import RowTiles, row_tiles
from moe_kernels.backends.gpu.tiling import DEPTH, NUM_CONSUMERS, WARPGROUP_ROWS
from moe_kernels.backends.gpu.weight_gradient import weight_gradient
from moe_kernels.types import Layout, Runs


class MatmulSaved(NamedTuple):
    """What the backward pass of a grouped matmul needs."""

    rows: Float[Array, "R D"]
    weights: MatmulWeights
    runs: Runs


def tall_tiles(runs: Runs, layout: Layout) -> RowTiles:
    """Tiles of a result with a row for each row."""
    return row_tiles(runs, layout, NUM_CONSUMERS * WARPGROUP_ROWS)


def flat_tiles(runs: Runs, layout: Layout) -> RowTiles:
    """Slices of rows that are summed over."""
    return row_tiles(runs, layout, DEPTH)


def gradient_like(
    weight: Float[Array, "E D F"],
    rows: Float[Array, "R D"],
    drows: Float[Array, "R F"],
    tiles: RowTiles,
    device: Device,
) -> Float[Array, "E D F"]:
    """The gradient of a weight in the weight's dtype, written so where the kernel can, else cast."""
    written: DTypeLike = weight.dtype if weight.dtype in (rows.dtype, jnp.float32) else jnp.float32
    return weight_gradient(rows, drows, tiles, device, dtype=written).astype(weight.dtype)


def grouped_matmul_forward(
    device: Device, static: MatmulStatic, rows: Float[Array, "R D"], weights: MatmulWeights, runs: Runs
) -> tuple[Float[Array, "R F"], MatmulSaved]:
    """`y = x W_e`; unused rows hold anything, NaN included."""
    (out,) = row_matmul(rows, weights.weight.astype(rows.dtype), tall_tiles(runs, static.layout), device)
    return out, MatmulSaved(rows, weights, runs)


def grouped_matmul_backward(
    device: Device, static: MatmulStatic, saved: MatmulSaved, dout: Float[Array, "R F"]
) -> tuple[jax.Array, MatmulWeights]:
    """`dX_e = dY_e W_eᵀ` and `dW_e = X_eᵀ dY_e`."""
    rows, (weight, _, _), runs = saved
    (drows,) = row_matmul(dout, weight.astype(rows.dtype), tall_tiles(runs, static.layout), device, transposed=True)
    return drows, MatmulWeights(gradient_like(weight, rows, dout, flat_tiles(runs, static.layout), device))
