"""The expert MLP in six matmul kernels and two sums, with the pre-activation saved.

With `h = x w1 + b1` and `a = act(h)`, `y = a w2 + b2`: one kernel gives h and a, one y. Backward, one kernel gives
`dh = (dy w2ᵀ) act'(h)` and a again, which is cheaper than keeping it; then `dw2 = aᵀ dy`, `dw1 = xᵀ dh`, `dx = dh w1ᵀ`,
`db2 = Σ dy`, `db1 = Σ dh`.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float

from moe_kernels.backends.base import MlpStatic
from moe_kernels.backends.gpu.common.launch import Device
from moe_kernels.backends.gpu.sm90.matmul import bias_gradient, flat_tiles, float32_of, gradient_like, tall_tiles
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
    device: Device, static: MlpStatic, rows: Float[Array, "R D"], weights: MlpWeights, runs: Runs
) -> Float[Array, "R D"]:
    """`y = act(x w1_e + b1_e) w2_e + b2_e`; unused rows hold anything, NaN included."""
    return _results(device, static, rows, weights, runs, keep=False)[-1]


def expert_mlp_forward(
    device: Device, static: MlpStatic, rows: Float[Array, "R D"], weights: MlpWeights, runs: Runs
) -> tuple[Float[Array, "R D"], MlpSaved]:
    """The same, with the hidden layer before the activation kept for the backward pass."""
    hidden, out = _results(device, static, rows, weights, runs, keep=True)
    return out, MlpSaved(rows, hidden, weights, runs)


def _results(
    device: Device, static: MlpStatic, rows: Float[Array, "R D"], weights: MlpWeights, runs: Runs, *, keep: bool
) -> tuple[Float[Array, "R _"], ...]:
    """The result, behind the hidden layer before the activation if that is kept."""
    tiles = tall_tiles(runs, static.layout)
    *hidden, activated = row_matmul(
        rows,
        weights.w1.astype(rows.dtype),
        tiles,
        device,
        epilogue="activate",
        bias=float32_of(weights.b1),
        activation=static.activation,
        keep=keep,
    )
    return *hidden, *row_matmul(activated, weights.w2.astype(rows.dtype), tiles, device, bias=float32_of(weights.b2))


def expert_mlp_backward(
    device: Device, static: MlpStatic, saved: MlpSaved, dout: Float[Array, "R D"]
) -> tuple[Float[Array, "R D"], MlpWeights]:
    """All gradients; an expert without rows gets exactly 0."""
    rows, hidden, weights, runs = saved
    tall, flat = tall_tiles(runs, static.layout), flat_tiles(runs, static.layout)
    dhidden, activated = row_matmul(
        dout,
        weights.w2.astype(rows.dtype),
        tall,
        device,
        epilogue="activate_backward",
        transposed=True,
        hidden=hidden,
        activation=static.activation,
    )
    (drows,) = row_matmul(dhidden, weights.w1.astype(rows.dtype), tall, device, transposed=True)
    return drows, MlpWeights(
        w1=gradient_like(weights.w1, rows, dhidden, flat, device),
        b1=bias_gradient(weights.b1, dhidden, flat, device),
        w2=gradient_like(weights.w2, activated, dout, flat, device),
        b2=bias_gradient(weights.b2, dout, flat, device),
    )
