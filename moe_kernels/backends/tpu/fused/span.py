"""The span from tokens to tokens, `out = gate * mlp(x)` of the expert that has the token: one kernel for each pass.

Where tokens and the gradients of the output do not fit VMEM together, the backward pass is made of the kernels for its
parts. The rows of the forward pass are then kept for it; where two experts' rows do not fit, they are gathered again.
Besides its operands, the forward pass keeps its output before the gates: the gradient of a gate is the product of that
with the gradient of the output.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_kernels.backends.base import MlpStatic
from moe_kernels.backends.tpu.common.grid import sizes_of
from moe_kernels.backends.tpu.common.launch import Target
from moe_kernels.backends.tpu.fused.backward import LayerGradients, run_fused_backward
from moe_kernels.backends.tpu.fused.forward import run_fused
from moe_kernels.backends.tpu.fused.in_place import LayerOperands
from moe_kernels.backends.tpu.fused.tiles import FusedTiles, fused_backward_tiles, fused_tiles, keeps_rows
from moe_kernels.backends.tpu.mlp.backward import expert_mlp_backward
from moe_kernels.backends.tpu.mlp.forward import MlpSaved
from moe_kernels.backends.tpu.permute.backward import dispatch_backward
from moe_kernels.backends.tpu.permute.forward import dispatch_forward
from moe_kernels.backends.tpu.permute.gather import gather_rows
from moe_kernels.types import MlpWeights, Plan


class LayerSaved(NamedTuple):
    """What the backward pass needs."""

    operands: LayerOperands
    ungated: Float[Array, "T D"]
    """Results of the experts; nobody reads that of a token without a row."""
    rows: Float[Array, "R D"] | None = None
    """For a backward pass in parts, if they fit; unused ones hold anything."""


def layer_value(
    target: Target,
    static: MlpStatic,
    tokens: Float[Array, "T D"],
    gate: Float[Array, "T 1"],
    weights: MlpWeights,
    plan: Plan,
) -> Float[Array, "T D"]:
    """`gate * mlp(x)`; a token without a row becomes 0, one with a gate that is not finite NaN."""
    tiles = fused_tiles(sizes_of(target, static.layout, tokens, weights.w1))
    assert tiles is not None, "refused by why_not"
    return run_fused(tiles, target, static, LayerOperands(tokens, gate, weights, plan), keep=False).out


def layer_forward(
    target: Target,
    static: MlpStatic,
    tokens: Float[Array, "T D"],
    gate: Float[Array, "T 1"],
    weights: MlpWeights,
    plan: Plan,
) -> tuple[Float[Array, "T D"], LayerSaved]:
    """As `layer_value`, with what the backward pass needs."""
    sizes = sizes_of(target, static.layout, tokens, weights.w1)
    keep_rows = keeps_rows(sizes)
    tiles = fused_tiles(sizes, keep_rows=keep_rows)
    assert tiles is not None, "refused by why_not"
    operands = LayerOperands(tokens, gate, weights, plan)
    out, ungated, rows = run_fused(tiles, target, static, operands, keep=True, keep_rows=keep_rows)
    assert ungated is not None
    return out, LayerSaved(operands, ungated, rows)


def layer_backward(
    target: Target, static: MlpStatic, saved: LayerSaved, dout: Float[Array, "T D"]
) -> tuple[Float[Array, "T D"], Float[Array, "T 1"], MlpWeights]:
    """Gradients of tokens, gates and weights; those of a token without a row are exactly 0."""
    tokens, _, weights, _ = saved.operands
    tiles = fused_backward_tiles(sizes_of(target, static.layout, tokens, weights.w1))
    found = run_backward(tiles, target, static, saved, dout)
    return found.tokens, found.gate, found.weights


def run_backward(
    tiles: FusedTiles | None, target: Target, static: MlpStatic, saved: LayerSaved, dout: Float[Array, "T D"]
) -> LayerGradients:
    """The backward pass as one kernel with given block sizes, or in parts without."""
    if tiles is None:
        found = _in_parts(target, static, saved, dout)
    else:
        found = run_fused_backward(tiles, target, static, saved.operands, saved.ungated, dout)
    # A dropped token's gate has no influence on the output, also where dout is not finite (0 * NaN above).
    held = saved.operands.plan.row < saved.operands.plan.layout.num_rows
    return found._replace(gate=jnp.where(held, found.gate, jnp.float32(0)))


def _in_parts(target: Target, static: MlpStatic, saved: LayerSaved, dout: Float[Array, "T D"]) -> LayerGradients:
    (tokens, gate, weights, plan), ungated, rows = saved
    if rows is None:
        rows, _ = dispatch_forward(target, None, tokens, plan)
    weighed = (gate * dout.astype(jnp.float32)).astype(dout.dtype)
    dresults = gather_rows(target, weighed, plan.source, 1)
    drows, dweights = expert_mlp_backward(target, static, MlpSaved(rows, weights, plan.runs), dresults)
    assert isinstance(dweights, MlpWeights), "gated ones are refused"
    (dtokens,) = dispatch_backward(target, None, plan, drows)
    dgate = jnp.sum(ungated.astype(jnp.float32) * dout.astype(jnp.float32), axis=1, keepdims=True)
    return LayerGradients(dtokens, dgate, dweights)
