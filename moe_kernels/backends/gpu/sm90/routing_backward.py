"""The router, backward: its two products by the kernels of the grouped matmul.

The gradient of the logits, `dA [T, E]`, is a matter of the kept logits alone, a few per cent of the tokens, and XLA's.
`dx = dA Wᵀ` is then a matmul of rows with one matrix, and `dW = xᵀ dA` the gradient of one, taken over parts of the
tokens as if each had an expert, so that every multiprocessor has a tile, and added up in a fixed order. Both multiply
pieces of float32 factors in bfloat16: dA in all three for dW; three of four products of two each for dx, where what is
left out is 2^-16 of a result that has 2^-9.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_kernels.backends.base import RouteStatic
from moe_kernels.backends.gpu.common.launch import NUM_CONSUMERS, GpuTarget
from moe_kernels.backends.gpu.sm90.matmul import flat_tiles, tall_tiles
from moe_kernels.backends.gpu.sm90.routing import PIECES
from moe_kernels.backends.gpu.sm90.row_matmul import row_matmul
from moe_kernels.backends.gpu.sm90.tiling import DEPTH, WARPGROUP_ROWS, WIDTH_ALIGNMENT, choose_blocks
from moe_kernels.backends.gpu.sm90.weight_gradient import weight_gradient
from moe_kernels.backends.route_parts import split
from moe_kernels.backends.xla.routing import RouteSaved, logits_gradient
from moe_kernels.types import ROW_ALIGNMENT, Layout, Routing, Runs, round_up


def route_backward(
    device: GpuTarget,
    static: RouteStatic,
    saved: RouteSaved,
    cotangent: Routing,
    passed: Float[Array, "T D"] | None = None,
) -> tuple[Float[Array, "T D"], Float[Array, "D E"]]:
    """Gradients of tokens and router, for the choice already made; with the cotangent of tokens passed on."""
    dlogits, tokens, mask = logits_gradient(static, saved, cotangent), saved.tokens, saved.inputs.mask
    if mask is not None:
        tokens = jnp.where(mask[:, None], tokens, jnp.zeros((), tokens.dtype))
    drouter = _drouter(tokens, dlogits, device).astype(saved.router.kernel.dtype)
    dtokens = _dtokens(dlogits, saved.router.kernel, device)
    if passed is not None:
        dtokens = dtokens.astype(jnp.float32) + passed.astype(jnp.float32)
    return dtokens.astype(tokens.dtype), drouter


def _dtokens(dlogits: Float[Array, "T E"], router: Float[Array, "D E"], device: GpuTarget) -> Float[Array, "T D"]:
    """`dA Wᵀ`: high high + high low + low high."""
    num_tokens, num_experts = dlogits.shape
    (high, low), (w_high, w_low) = split(dlogits, 2), split(router.astype(jnp.float32).T, 2)
    depth = round_up(PIECES * num_experts, DEPTH) - PIECES * num_experts
    # A run is stored by eights.
    more = round_up(num_tokens, ROW_ALIGNMENT) - num_tokens
    rows = jnp.pad(jnp.concatenate([high, high, low], axis=1), ((0, more), (0, depth)))
    weight = jnp.pad(jnp.concatenate([w_high, w_low, w_high]), ((0, depth), (0, 0)))
    layout = Layout(len(rows), 1, 1, 1, len(rows), None)
    one = Runs(*(jnp.full(1, value, jnp.int32) for value in (0, 0, num_tokens)))
    return row_matmul(rows, weight[None], tall_tiles(one, layout), device).out[:num_tokens]


def _drouter(tokens: Float[Array, "T D"], dlogits: Float[Array, "T E"], device: GpuTarget) -> Float[Array, "D E"]:
    """`xᵀ dA` over parts of the tokens, piece by piece of dA, small ones first."""
    (num_tokens, width), num_experts = tokens.shape, dlogits.shape[1]
    columns = round_up(PIECES * num_experts, WIDTH_ALIGNMENT)
    pieces = jnp.concatenate(split(dlogits, PIECES), axis=1)
    pieces = jnp.pad(pieces, ((0, 0), (0, columns - pieces.shape[1])))
    tiles = (
        width
        // (NUM_CONSUMERS * WARPGROUP_ROWS)
        * (columns // choose_blocks("weight_gradient", columns, device.chip).columns)
    )
    parts = max(1, min(device.num_sms // tiles, -(-num_tokens // DEPTH)))
    length = round_up(-(-num_tokens // parts), DEPTH)
    part = jnp.arange(parts, dtype=jnp.int32)
    runs = Runs(part, part * length, jnp.clip(num_tokens - part * length, 0, length))
    layout = Layout(num_tokens, 1, 1, parts, num_tokens, None)
    found = weight_gradient(tokens, pieces, flat_tiles(runs, layout), device, dtype=jnp.float32).sum(axis=0)
    by_piece = (found[:, n * num_experts : (n + 1) * num_experts] for n in reversed(range(PIECES)))
    return functools.reduce(jnp.add, by_piece)
