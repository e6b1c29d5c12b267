"""Dispatch, expert MLP and combine as one kernel, forward, for one choice a token.

Rows do not travel through HBM; they are written only where a backward pass in parts will read them (see layer.py).

All tokens are brought to VMEM as words (see words.py). While an expert is at its matmuls, the rows of the next one are
picked, and the results of the last one are put where their tokens were: each token has one row, so nobody needs it any
more. Both are in the same stretch of code as the matmuls, which leave the units for loads, stores and scalars idle. At
the end tokens leave VMEM with their gates; those without a row become 0.

Grid: blocks of tokens, then (expert, chunk of F) as in the MLP kernel, then blocks of results.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from moe_kernels.backends.base import MlpStatic
from moe_kernels.backends.tpu.common.grid import grid_of
from moe_kernels.backends.tpu.common.launch import Call, Operand, Target, launch, result
from moe_kernels.backends.tpu.common.products import parts_of, result_of
from moe_kernels.backends.tpu.common.rows import Scalar
from moe_kernels.backends.tpu.common.tiling import PIECE
from moe_kernels.backends.tpu.common.weights import cast_weights, room_for_casts
from moe_kernels.backends.tpu.fused.in_place import InPlace, LayerOperands, Phased, column, in_lanes
from moe_kernels.backends.tpu.fused.tiles import FusedTiles
from moe_kernels.backends.tpu.mlp.forward import weight_blocks
from moe_kernels.backends.tpu.permute.words import pack, unpack
from moe_kernels.chips import LANES, SUBLANES
from moe_kernels.precision import dot


class LayerResults(NamedTuple):
    """The layer's output, and what a backward pass wants."""

    out: Float[Array, "T D"]
    ungated: Float[Array, "T D"] | None
    """Before gates, where a token has a row."""
    rows: Float[Array, "R D"] | None
    """The experts' rows; unused ones hold anything."""


def run_fused(
    tiles: FusedTiles,
    target: Target,
    static: MlpStatic,
    operands: LayerOperands,
    *,
    keep: bool,
    keep_rows: bool = False,
) -> LayerResults:
    """The layer's output; with `keep` also what it was before gates, with `keep_rows` also the experts' rows."""
    tokens, gate, weights, plan = operands
    (_, width), mlp, layout = tokens.shape, tiles.mlp, plan.layout
    steps = Phased(grid_of(static.layout, mlp, target), tiles.inputs)
    # A token that has a row has a gate above 0: others claim none.
    factor = jnp.where(plan.row < layout.num_rows, gate, jnp.float32(0))
    factor = in_lanes(jnp.where(jnp.isfinite(gate), factor, jnp.float32(jnp.nan)), tiles)
    inputs = _FusedForwardInputs(
        Operand(tokens, pl.BlockSpec((tiles.load, width), steps.loaded)),
        *weight_blocks(weights, steps, mlp),
        Operand(factor, pl.BlockSpec(factor.shape, steps.all)),
    )
    out = result(tokens.shape, tokens.dtype, pl.BlockSpec((tiles.load, width), steps.left))
    # Worked on where they leave from. What an expert without rows has there is anything.
    held = (1, mlp.rows.rows, width)
    rows = result((layout.num_experts, *held[1:]), tokens.dtype, pl.BlockSpec(held, steps.whole))
    found = launch(
        lambda *refs: _FusedForward(tiles, static, steps.grid, target.facts.depth, *refs).run(),
        Call(
            "dispatch_mlp_combine_forward" if keep else "dispatch_mlp_combine_value",
            steps.axes,
            mlp.vmem,
            flops=4 * layout.num_rows * width * mlp.padded,
        ),
        target,
        scalars=steps.steering(plan, tiles, target.facts.depth),
        inputs=inputs,
        outputs=_FusedForwardOutputs(out, out if keep else None, rows if keep_rows else None),
        scratch=_scratch(tiles, inputs, keep_rows=keep_rows),
    )
    if keep_rows:
        found = found._replace(rows=found.rows[:, : layout.rows_per_expert].reshape(layout.num_rows, width))
    return LayerResults(*found)


class _FusedForwardInputs(NamedTuple):
    tokens: Any
    first: tuple[Any, ...]
    b1: Any
    second: Any
    b2: Any
    factor: Any
    """Gates; 0 for a token without a row, NaN for one whose gate is not finite."""


class _FusedForwardOutputs(NamedTuple):
    out: Any
    ungated: Any
    rows: Any


class _FusedForwardScratch(NamedTuple):
    data: Any
    """Words of all tokens, then of their results."""
    picked: Any
    """Words of the rows of the next expert."""
    results: Any
    """Words of the results of the last expert."""
    total: Any
    casts: tuple[Any, ...] | None
    rows: Any
    """Those of this expert; None where they are an output."""


def _scratch(tiles: FusedTiles, inputs: _FusedForwardInputs, *, keep_rows: bool) -> _FusedForwardScratch:
    tokens, held = inputs.tokens.array, tiles.mlp.rows.rows
    words = pltpu.VMEM((tiles.planes * tiles.held_stride, LANES), jnp.int32)
    return _FusedForwardScratch(
        data=pltpu.VMEM((tiles.planes * tiles.stride, LANES), jnp.int32),
        picked=words,
        results=words,
        total=pltpu.VMEM((held, tokens.shape[1]), jnp.float32),
        casts=room_for_casts((*inputs.first, inputs.second), tokens.dtype),
        rows=None if keep_rows else pltpu.VMEM((held, tokens.shape[1]), tokens.dtype),
    )


class _FusedForward(InPlace):
    """The kernel."""

    @property
    def rows(self) -> Any:
        """Rows of this expert."""
        return self.scratch.rows if self.outputs.rows is None else self.outputs.rows.at[0]

    def load(self, block: Scalar) -> None:
        """A block of tokens as words."""
        tiles, inputs, scratch = self.tiles, self.inputs, self.scratch
        at = pl.multiple_of(block * tiles.load, SUBLANES)
        for plane in range(tiles.planes):
            parts = [inputs.tokens[:, own].astype(jnp.float32) for own in self.columns(plane)]
            scratch.data[pl.ds(plane * tiles.stride + at, tiles.load), :] = pack(parts)

    def leave(self, block: Scalar) -> None:
        """A block of results, weighed."""
        tiles, inputs, outputs, scratch = self.tiles, self.inputs, self.outputs, self.scratch
        lanes = -(-tiles.load // LANES)
        for number in range(lanes):
            first = number * LANES
            size = min(LANES, tiles.load - first)
            factor = jnp.broadcast_to(column(inputs.factor, block * lanes + number, size), (size, LANES))
            for plane in range(tiles.planes):
                at = pl.multiple_of(block * tiles.load + first, SUBLANES)
                words = scratch.data[pl.ds(plane * tiles.stride + at, size), :]
                # Words of a token without a row are still the token's, and may be anything.
                words = jnp.where(factor != 0, words, 0)
                for own, value in zip(self.columns(plane), unpack(words, inputs.tokens.dtype), strict=True):
                    outputs.out[first : first + size, own] = (value * factor).astype(outputs.out.dtype)
                    if outputs.ungated is not None:
                        outputs.ungated[first : first + size, own] = value.astype(outputs.ungated.dtype)

    def compute(self, number: Scalar) -> None:
        """One chunk of one expert."""
        tiles, chunks, sizes = self.tiles, self.grid.chunks, self.steering.sizes
        inputs, scratch, rows = self.inputs, self.scratch, self.rows
        item, chunk = jax.lax.div(number, chunks), jax.lax.rem(number, chunks)
        piece, short = tiles.mlp.rows.pieces[0], tiles.mlp.rows.shorter(self.depth)
        pieces = jax.lax.div(sizes[item] + (piece - 1), piece)
        pl.when((chunk == 0) & (pieces > 0))(self._begin)
        *first, second = cast_weights((*inputs.first, inputs.second), scratch.casts, pieces > 0)

        def work(size: int, step: Scalar, carry: None = None) -> None:
            own = pl.ds(pl.multiple_of(step * size, PIECE), size)
            # In one stretch of code with the matmuls, and before them: the compiler runs them beside the first.
            self.moves(item, pl.multiple_of((chunk * pieces + step) * tiles.part, PIECE), tiles.part)
            parts = parts_of(rows[own], first, inputs.b1)
            scratch.total[own] += dot(result_of(parts, self.static.activation, rows.dtype), second[...], (1, 0))

        def each(size: int) -> None:
            if tiles.num_pieces == 1:
                work(size, 0)
            else:
                jax.lax.fori_loop(0, pieces, functools.partial(work, size), None)

        # As many shorter pieces, which fill the MXU's depth, where those hold all rows.
        fit = sizes[item] <= pieces * short
        pl.when((pieces > 0) & jnp.logical_not(fit))(lambda: each(piece))
        if short:
            pl.when((pieces > 0) & fit)(lambda: each(short))

        # What was more than this expert had pieces for is moved after them.
        moved = chunks * pieces * tiles.part
        pl.when(chunk == chunks - 1)(lambda: self.end(item, moved, scratch.total))

    def _begin(self) -> None:
        """The rows that were picked, as the matmuls want them; sums start as the bias."""
        tiles, scratch, rows = self.tiles, self.scratch, self.rows
        for plane in range(tiles.planes):
            words = scratch.picked[pl.ds(plane * tiles.held_stride, tiles.mlp.rows.rows), :]
            for own, value in zip(self.columns(plane), unpack(words, rows.dtype), strict=True):
                rows[:, own] = value.astype(rows.dtype)
        scratch.total[...] = jnp.broadcast_to(self.inputs.b2[0], scratch.total.shape)
