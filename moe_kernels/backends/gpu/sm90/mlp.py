"""The expert MLP in six matmul kernels and two sums, with the pre-activation saved.

Behind the activation its derivative is that of the grouped matmul. Before it there is a kernel of its own, so that the
gradient of the activated layer never travels through memory.

With `h = x w1 + b1` and `a = act(h)`, `y = a w2 + b2`: one kernel gives h and a, one y. Backward, one kernel gives
`dh = (dy w2ᵀ) act'(h)` and a again, which is cheaper than keeping it; then `dw2 = aᵀ dy`, `dw1 = xᵀ dh`, `dx = dh w1ᵀ`,
`db2 = Σ dy`, `db1 = Σ dh`.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float

from moe_kernels.backends.base import MatmulWeights, MlpStatic
from moe_kernels.backends.gpu.common.launch import GpuTarget
from moe_kernels.backends.gpu.sm90.epilogues import Activate, ActivateBackward, Results
from moe_kernels.backends.gpu.sm90.matmul import flat_tiles, float32_of, linear_backward, tall_tiles, weight_gradients
from moe_kernels.backends.gpu.sm90.row_matmul import row_matmul
from moe_kernels.types import MlpWeights, Runs


class MlpSaved(NamedTuple):
    """What the backward pass needs."""

    rows: Float[Array, "R D"]
    hidden: Float[Array, "R F"]
    """Pre-activation in the compute dtype; unused rows hold anything."""
    weights: MlpWeights
    runs: Runs


def expert_mlp_value(
    device: GpuTarget, static: MlpStatic, rows: Float[Array, "R D"], weights: MlpWeights, runs: Runs
) -> Float[Array, "R D"]:
    """`y = act(x w1_e + b1_e) w2_e + b2_e`; unused rows hold anything, NaN included."""
    return _results(device, static, rows, weights, runs, keep=False).out


def expert_mlp_forward(
    device: GpuTarget, static: MlpStatic, rows: Float[Array, "R D"], weights: MlpWeights, runs: Runs
) -> tuple[Float[Array, "R D"], MlpSaved]:
    """The same, with the hidden layer before the activation kept for the backward pass."""
    hidden, out = _results(device, static, rows, weights, runs, keep=True)
    return out, MlpSaved(rows, hidden, weights, runs)


def _results(
    device: GpuTarget, static: MlpStatic, rows: Float[Array, "R D"], weights: MlpWeights, runs: Runs, *, keep: bool
) -> Results:
    """The result, and the hidden layer before the activation if that is kept."""
    tiles, w1, w2 = tall_tiles(runs, static.layout), weights.w1.astype(rows.dtype), weights.w2.astype(rows.dtype)
    epilogue = Activate(static.activation, keep)
    hidden, activated = row_matmul(rows, w1, tiles, device, epilogue, bias=float32_of(weights.b1))
    return Results(hidden, row_matmul(activated, w2, tiles, device, bias=float32_of(weights.b2)).out)


def expert_mlp_backward(
    device: GpuTarget, static: MlpStatic, saved: MlpSaved, dout: Float[Array, "R D"]
) -> tuple[Float[Array, "R D"], MlpWeights]:
    """All gradients; an expert without rows gets exactly 0."""
    rows, hidden, weights, runs = saved
    tall, flat = tiles = tall_tiles(runs, static.layout), flat_tiles(runs, static.layout)
    w2, epilogue = weights.w2.astype(rows.dtype), ActivateBackward(static.activation)
    dhidden, activated = row_matmul(dout, w2, tall, device, epilogue, transposed=True, hidden=hidden)
    drows, (dw1, db1, _) = linear_backward(MatmulWeights(weights.w1, weights.b1), rows, dhidden, tiles, device)
    dw2, db2, _ = weight_gradients(MatmulWeights(weights.w2, weights.b2), activated, dout, flat, device)
    return drows, MlpWeights(dw1, db1, dw2, db2)
