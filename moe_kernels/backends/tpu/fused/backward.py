"""Dispatch, expert MLP and combine as one kernel, backward: neither rows nor their gradients travel through HBM.

All tokens and the gradients of all outputs are brought to VMEM as words (see words.py), the latter times their gates;
on the way the gates' gradients are made, products of the outputs before gates with what comes in. While an expert is at
its five matmuls, the rows of the next one are picked from both, and the gradients of the last one's rows are put where
their tokens were. At the end they leave VMEM; those of tokens without a row become 0.

Grid: blocks of tokens, then (expert, chunk of F) as in the MLP kernel, then blocks of gradients. Weight gradients leave
straight from the MXU where an expert is one piece; else they are added up in float32 over its pieces.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from moe_kernels.backends.base import MatmulWeights, MlpStatic
from moe_kernels.backends.mlp_parts import Matmuls, gradients_like
from moe_kernels.backends.tpu.common.grid import grid_of
from moe_kernels.backends.tpu.common.launch import Call, Operand, Target, launch, result
from moe_kernels.backends.tpu.common.products import Products
from moe_kernels.backends.tpu.common.rows import Scalar, over_pieces, pieces_of
from moe_kernels.backends.tpu.common.tiling import PIECE, straight, straight_pieces
from moe_kernels.backends.tpu.common.weights import cast_weights, room_for_casts
from moe_kernels.backends.tpu.fused.in_place import InPlace, LayerOperands, Phased, column, from_lanes, in_lanes
from moe_kernels.backends.tpu.fused.tiles import FusedTiles
from moe_kernels.backends.tpu.mlp.forward import weight_blocks
from moe_kernels.backends.tpu.permute.words import pack, unpack
from moe_kernels.chips import LANES, SUBLANES
from moe_kernels.types import MlpWeights


class LayerGradients(NamedTuple):
    """Those of what a layer is of."""

    tokens: Float[Array, "T D"]
    gate: Float[Array, "T 1"]
    weights: MlpWeights


def run_fused_backward(
    tiles: FusedTiles,
    target: Target,
    static: MlpStatic,
    operands: LayerOperands,
    ungated: Float[Array, "T D"],
    dout: Float[Array, "T D"],
) -> LayerGradients:
    """Gradients of tokens, gates and weights; anything for the gate of a token without a row."""
    tokens, gate, weights, plan = operands
    (length, width), mlp, depth = tokens.shape, tiles.mlp, target.facts.depth
    steps = Phased(grid_of(static.layout, mlp, target), tiles.inputs)
    factor = in_lanes(jnp.where(plan.row < plan.layout.num_rows, gate, jnp.float32(0)), tiles)
    some = pl.BlockSpec((tiles.load, width), steps.loaded)
    first, b1, second, _ = weight_blocks(weights, steps, mlp)
    inputs = _FusedBackwardInputs(
        tokens=Operand(tokens, some),
        dout=Operand(dout, some),
        ungated=Operand(ungated, some),
        weights=(*first, second),
        b1=b1,
        factor=Operand(factor, pl.BlockSpec(factor.shape, steps.all)),
    )
    found = launch(
        lambda *refs: _FusedBackward(tiles, static, steps.grid, depth, *refs).run(),
        Call(
            "dispatch_mlp_combine_backward",
            steps.axes,
            mlp.vmem,
            flops=10 * plan.layout.num_rows * width * mlp.padded,
        ),
        target,
        scalars=steps.steering(plan, tiles, depth),
        inputs=inputs,
        outputs=_outputs(tiles, inputs, steps),
        scratch=_scratch(tiles, inputs, summed=not straight(static.layout, mlp.rows)),
    )
    expert_width, (dw1, dw2) = weights.w1.shape[2], found.dweights
    dfirst = MatmulWeights(dw1[:, :, :expert_width], found.db1[:, 0, :expert_width])
    dweights = gradients_like(weights, Matmuls(dfirst, MatmulWeights(dw2[:, :expert_width], found.db2[:, 0])))
    return LayerGradients(found.dtokens, from_lanes(found.dgate, tiles, length), dweights)


class _FusedBackwardInputs(NamedTuple):
    tokens: Any
    dout: Any
    ungated: Any
    weights: tuple[Any, ...]
    b1: Any
    factor: Any
    """Gates; 0 for a token without a row."""


class _FusedBackwardOutputs(NamedTuple):
    dtokens: Any
    dgate: Any
    dweights: tuple[Any, ...]
    db1: Any
    db2: Any


class _FusedBackwardScratch(NamedTuple):
    data: Any
    """Words of all tokens, then of their gradients."""
    ddata: Any
    """Words of the gradients of all results."""
    picked: Any
    """Words of the rows of the next expert."""
    dpicked: Any
    results: Any
    """Words of the gradients of the last expert's rows."""
    x: Any
    dy: Any
    dx: Any
    casts: tuple[Any, ...] | None
    dw_sums: tuple[Any, ...]
    """None where gradients are not added up, or in float32 where they leave from."""


def _outputs(tiles: FusedTiles, inputs: _FusedBackwardInputs, steps: Phased) -> _FusedBackwardOutputs:
    tokens, (w1, w2) = inputs.tokens.array, (weight.array for weight in inputs.weights)
    width, chunk = tokens.shape[1], tiles.mlp.chunk
    return _FusedBackwardOutputs(
        dtokens=result(tokens.shape, tokens.dtype, pl.BlockSpec((tiles.load, width), steps.left)),
        dgate=result(inputs.factor.array.shape, jnp.float32, inputs.factor.spec),
        dweights=(
            result(w1.shape, w1.dtype, pl.BlockSpec((1, width, chunk), steps.own_columns)),
            result(w2.shape, w2.dtype, pl.BlockSpec((1, chunk, width), steps.own_rows)),
        ),
        db1=result(inputs.b1.array.shape, jnp.float32, pl.BlockSpec((1, 1, chunk), steps.own_columns)),
        db2=result((steps.grid.items, 1, width), jnp.float32, pl.BlockSpec((1, 1, width), steps.own_whole)),
    )


def _scratch(tiles: FusedTiles, inputs: _FusedBackwardInputs, *, summed: bool) -> _FusedBackwardScratch:
    tokens, mlp = inputs.tokens.array, tiles.mlp
    width, summed = tokens.shape[1], summed and inputs.weights[0].array.dtype != jnp.float32
    words = pltpu.VMEM((tiles.planes * tiles.stride, LANES), jnp.int32)
    held = pltpu.VMEM((tiles.planes * tiles.held_stride, LANES), jnp.int32)
    return _FusedBackwardScratch(
        data=words,
        ddata=words,
        picked=held,
        dpicked=held,
        results=held,
        x=pltpu.VMEM((mlp.rows.rows, width), tokens.dtype),
        dy=pltpu.VMEM((mlp.rows.rows, width), tokens.dtype),
        dx=pltpu.VMEM((mlp.rows.rows, width), jnp.float32),
        casts=room_for_casts(inputs.weights, tokens.dtype),
        dw_sums=tuple(
            pltpu.VMEM(shape, jnp.float32) if summed else None for shape in ((width, mlp.chunk), (mlp.chunk, width))
        ),
    )


class _FusedBackward(InPlace):
    """The kernel."""

    def picked(self) -> tuple[tuple[Any, Any], ...]:
        """Rows, and their gradients."""
        return (*super().picked(), (self.scratch.ddata, self.scratch.dpicked))

    def _blocks(self, block: Scalar) -> list[tuple[int, int, Scalar, Scalar]]:
        """Parts of a block of tokens: first token of the block and their number, row of lanes, first sublane."""
        load, lanes = self.tiles.load, -(-self.tiles.load // LANES)
        return [
            (first, min(LANES, load - first), block * lanes + n, pl.multiple_of(block * load + first, SUBLANES))
            for n, first in enumerate(range(0, load, LANES))
        ]

    def load(self, block: Scalar) -> None:
        """A block of tokens and of weighed gradients as words; the gates' gradients."""
        inputs, outputs, scratch = self.inputs, self.outputs, self.scratch
        tiles, dtype = self.tiles, self.inputs.tokens.dtype
        for first, size, row, at in self._blocks(block):
            factor = jnp.broadcast_to(column(inputs.factor, row, size), (size, LANES))
            own, product = pl.ds(first, size), jnp.zeros((size, LANES), jnp.float32)
            for plane in range(tiles.planes):
                to, weighed = pl.ds(plane * tiles.stride + at, size), []
                for lanes in self.columns(plane):
                    value = inputs.dout[own, lanes].astype(jnp.float32)
                    product += value * inputs.ungated[own, lanes].astype(jnp.float32)
                    weighed.append((value * factor).astype(dtype).astype(jnp.float32))
                scratch.ddata[to, :] = pack(weighed)
                tokens = [inputs.tokens[own, lanes].astype(jnp.float32) for lanes in self.columns(plane)]
                scratch.data[to, :] = pack(tokens)
            outputs.dgate[pl.ds(row, 1), pl.ds(0, size)] = jnp.sum(product.T, axis=0, keepdims=True)

    def leave(self, block: Scalar) -> None:
        """A block of gradients."""
        inputs, outputs, scratch = self.inputs, self.outputs, self.scratch
        tiles, dtype = self.tiles, self.inputs.tokens.dtype
        for first, size, row, at in self._blocks(block):
            has_row = jnp.broadcast_to(column(inputs.factor, row, size), (size, LANES)) != 0
            for plane in range(tiles.planes):
                # Words of a token without a row are still the token's, and may be anything.
                words = jnp.where(has_row, scratch.data[pl.ds(plane * tiles.stride + at, size), :], 0)
                for lanes, value in zip(self.columns(plane), unpack(words, dtype), strict=True):
                    outputs.dtokens[pl.ds(first, size), lanes] = value.astype(dtype)

    def compute(self, number: Scalar) -> None:
        """One chunk of one expert."""
        tiles, chunks, sizes = self.tiles, self.grid.chunks, self.steering.sizes
        item, chunk = jax.lax.div(number, chunks), jax.lax.rem(number, chunks)
        size = sizes[item]

        def moves(stretch: Scalar) -> None:
            self.moves(item, pl.multiple_of(stretch * tiles.part, PIECE), tiles.part)

        pl.when((chunk == 0) & (size > 0))(lambda: self._begin(size))
        if straight(self.static.layout, tiles.mlp.rows):
            stretches = jnp.minimum(size, 1)
            self._straight(size, lambda: moves(chunk))
        else:
            stretches, bits = pieces_of(size, self.steering.covers, tiles.mlp.rows)
            first = chunk * stretches
            whole = functools.partial(self._piecewise, stretches, bits)
            pl.when(size > 0)(lambda: whole(lambda n: moves(first + n)))
        pl.when(size == 0)(lambda: self._zero(chunk))

        # What was more than this expert had stretches for is moved after them.
        moved = chunks * stretches * tiles.part
        pl.when(chunk == chunks - 1)(lambda: self.end(item, moved, self.scratch.dx))

    def _begin(self, size: Scalar) -> None:
        """The rows that were picked, as the matmuls want them, zero where none is; sums start at zero."""
        tiles, scratch = self.tiles, self.scratch
        rows = tiles.mlp.rows.rows
        used = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 0) < size
        for plane in range(tiles.planes):
            own = pl.ds(plane * tiles.held_stride, rows)
            for source, to in ((scratch.picked, scratch.x), (scratch.dpicked, scratch.dy)):
                words = jnp.where(used, source[own, :], 0)
                for lanes, value in zip(self.columns(plane), unpack(words, to.dtype), strict=True):
                    to[:, lanes] = value.astype(to.dtype)
                    if to is scratch.dy:
                        self.outputs.db2[0, :, lanes] = jnp.sum(value, axis=0, keepdims=True)
        scratch.dx[...] = jnp.zeros(scratch.dx.shape, jnp.float32)

    def _products(self) -> Products:
        inputs, scratch = self.inputs, self.scratch
        weights = cast_weights(inputs.weights, scratch.casts, busy=True)
        return Products(scratch.x, scratch.dy, weights, inputs.b1, scratch.dx, self.static.activation)

    def _straight(self, count: Scalar, moves: Any) -> None:
        """All rows of an expert at once: nothing to add up."""
        outputs, shorter = self.outputs, 0

        def at_once(size: int) -> None:
            # In one stretch of code with the matmuls, and before them: the compiler runs them beside the first.
            moves()
            found = self._products().of(0, size)
            for place, gradient in zip(outputs.dweights, found.weights, strict=True):
                place[0] = gradient.astype(place.dtype)
            outputs.db1[0] = found.b1

        for size in straight_pieces(self.tiles.mlp.rows, self.depth):
            pl.when((count > shorter) & (count <= size))(lambda size=size: at_once(size))
            shorter = size

    def _piecewise(self, repeats: Scalar, bits: Scalar, moves: Any) -> None:
        """Pieces of an expert one after the other."""
        outputs, scratch = self.outputs, self.scratch
        rows, products = self.tiles.mlp.rows, self._products()
        there = outputs.dweights[0].dtype == jnp.float32
        sums = [place.at[0] for place in outputs.dweights] if there else scratch.dw_sums

        def add(offset: Scalar, size: int) -> None:
            if size == rows.pieces[0]:
                moves(jax.lax.div(offset, size))
            # Sums begin with the first piece: to write zeros before would take as long as the products of it.
            found = products.of(offset, size)
            for total, part in zip((*sums, outputs.db1.at[0]), (*found.weights, found.b1), strict=True):
                total[...] = jnp.where(offset == 0, 0.0, total[...]) + part

        over_pieces(repeats, bits, rows, add)
        if not there:
            for place, total in zip(outputs.dweights, sums, strict=True):
                place[0] = total[...].astype(place.dtype)

    def _zero(self, chunk: Scalar) -> None:
        """Gradients of an expert without rows."""
        outputs = self.outputs
        for gradient in (*outputs.dweights, outputs.db1):
            gradient[...] = jnp.zeros(gradient.shape, gradient.dtype)

        @pl.when(chunk == 0)
        def _() -> None:
            outputs.db2[...] = jnp.zeros(outputs.db2.shape, jnp.float32)
