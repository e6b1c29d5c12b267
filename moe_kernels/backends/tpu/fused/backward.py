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

from moe_kernels.backends.base import MlpStatic
from moe_kernels.backends.tpu.common.launch import Grid, Target, apart, grid_of
from moe_kernels.backends.tpu.common.products import Products
from moe_kernels.backends.tpu.common.rows import Scalar, over_pieces, pieces_of
from moe_kernels.backends.tpu.common.schedule import make_schedule
from moe_kernels.backends.tpu.common.tiling import PIECE, covers, straight, straight_pieces
from moe_kernels.backends.tpu.fused.in_place import alone, column, from_lanes, in_lanes, places, run_phases, steps_of
from moe_kernels.backends.tpu.mlp.forward import padded_weights
from moe_kernels.backends.tpu.permute.tiles import FusedTiles
from moe_kernels.backends.tpu.permute.words import LANES, SUBLANES, columns, move_row, pack, unpack
from moe_kernels.chips import MIB
from moe_kernels.types import MlpWeights, Plan

# Arrays of scalars that the kernel prefetches.
NUM_STEERING = 7


def run_fused_backward(
    tiles: FusedTiles,
    target: Target,
    static: MlpStatic,
    tokens: Float[Array, "T D"],
    gate: Float[Array, "T 1"],
    weights: MlpWeights,
    plan: Plan,
    ungated: Float[Array, "T D"],
    dout: Float[Array, "T D"],
) -> tuple[Float[Array, "T D"], Float[Array, "T 1"], MlpWeights]:
    """Gradients of tokens, gates and weights; anything for the gate of a token without a row."""
    (length, width), mlp, dtype = tokens.shape, tiles.mlp, tokens.dtype
    grid = grid_of(static.layout, mlp, target)
    cast, summed = weights.w1.dtype != dtype, not straight(static.layout, mlp.rows)
    sums = summed and weights.w1.dtype != jnp.float32
    steps, blocks = grid.items * grid.chunks, tiles.inputs
    place = places(plan, tiles)
    factor = in_lanes(jnp.where(plan.row < plan.layout.num_rows, gate, jnp.float32(0)), tiles)

    schedule = make_schedule(static.layout, plan.runs, tile_rows=mlp.rows.rows)
    steering = (
        *steps_of(grid, schedule, blocks),
        *(schedule.size, place, jnp.array(covers(mlp.rows.pieces, target.facts.depth), jnp.int32)),
    )
    assert len(steering) == NUM_STEERING

    def loaded(step: Any, *_: Any) -> tuple[Any, int]:
        return jnp.minimum(step, blocks - 1), 0

    def left(step: Any, *_: Any) -> tuple[Any, int]:
        return jnp.clip(step - blocks - steps, 0, blocks - 1), 0

    def columns_of(step: Any, expert: Any, chunk: Any, *_: Any) -> tuple[Any, int, Any]:
        return expert[step], 0, chunk[step]

    def own_columns(step: Any, *given: Any) -> tuple[Any, int, Any]:
        steering = _Steering(*given)
        return steering.own[step], 0, steering.part[step]

    def own_rows(step: Any, *given: Any) -> tuple[Any, Any, int]:
        steering = _Steering(*given)
        return steering.own[step], steering.part[step], 0

    tokens_in, small = pl.BlockSpec((tiles.load, width), loaded), (8, LANES)
    whole = pl.BlockSpec(factor.shape, lambda step, *_: (0, 0))
    words, held = tiles.planes * tiles.stride, tiles.planes * tiles.held_stride
    first, second = (width, mlp.chunk), (mlp.chunk, width)
    w1, b1, w2, _ = padded_weights(weights, mlp.padded)
    arrays = _Refs(
        tokens=tokens_in,
        dout=tokens_in,
        ungated=tokens_in,
        w1=pl.BlockSpec((1, *first), columns_of),
        b1=pl.BlockSpec((1, 1, mlp.chunk), columns_of),
        w2=pl.BlockSpec((1, *second), lambda step, expert, chunk, *_: (expert[step], chunk[step], 0)),
        factor=whole,
        dtokens=pl.BlockSpec((tiles.load, width), left),
        dgate=whole,
        dw1=pl.BlockSpec((1, *first), own_columns),
        dw2=pl.BlockSpec((1, *second), own_rows),
        db1=pl.BlockSpec((1, 1, mlp.chunk), own_columns),
        db2=pl.BlockSpec((1, 1, width), lambda step, *given: (_Steering(*given).own[step], 0, 0)),
        data=pltpu.VMEM((words, LANES), jnp.int32),
        ddata=pltpu.VMEM((words, LANES), jnp.int32),
        picked=pltpu.VMEM((held, LANES), jnp.int32),
        dpicked=pltpu.VMEM((held, LANES), jnp.int32),
        results=pltpu.VMEM((held, LANES), jnp.int32),
        x=pltpu.VMEM((mlp.rows.rows, width), dtype),
        dy=pltpu.VMEM((mlp.rows.rows, width), dtype),
        dx=pltpu.VMEM((mlp.rows.rows, width), jnp.float32),
        w1_cast=pltpu.VMEM(first if cast else small, dtype),
        w2_cast=pltpu.VMEM(second if cast else small, dtype),
        dw1_sum=pltpu.VMEM(first if sums else small, jnp.float32),
        dw2_sum=pltpu.VMEM(second if sums else small, jnp.float32),
    )

    def kernel(*refs: Any) -> None:
        steering, named = _Steering(*refs[:NUM_STEERING]), _Refs(*refs[NUM_STEERING:])
        _Backward(tiles, static, grid, target.facts.depth, steering, named).run()

    @jax.custom_batching.sequential_vmap
    def run(*operands: Array) -> tuple[Array, ...]:
        out_shape = [
            jax.ShapeDtypeStruct(tokens.shape, dtype),
            jax.ShapeDtypeStruct(factor.shape, jnp.float32),
            jax.ShapeDtypeStruct(w1.shape, w1.dtype),
            jax.ShapeDtypeStruct(w2.shape, w2.dtype),
            jax.ShapeDtypeStruct(b1.shape, jnp.float32),
            jax.ShapeDtypeStruct((grid.items, 1, width), jnp.float32),
        ]
        call = pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=NUM_STEERING,
                grid=(blocks + steps + blocks,),
                in_specs=list(arrays[:7]),
                out_specs=list(arrays[7:13]),
                scratch_shapes=list(arrays[13:]),
            ),
            out_shape=out_shape,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("arbitrary",), vmem_limit_bytes=min(target.facts.vmem, mlp.vmem + MIB)
            ),
            cost_estimate=pl.CostEstimate(
                flops=10 * plan.layout.num_rows * width * mlp.padded,
                transcendentals=0,
                bytes_accessed=sum(array.size * array.dtype.itemsize for array in (*operands, *out_shape)),
            ),
            interpret=target.interpret,
            name="dispatch_mlp_combine_backward",
        )
        return apart(call(*operands))

    dtokens, dgate, dw1, dw2, db1, db2 = run(*steering, tokens, dout, ungated, w1, b1, w2, factor)
    expert_width = weights.w1.shape[2]
    dweights = MlpWeights(
        dw1[:, :, :expert_width],
        None if weights.b1 is None else db1[:, 0, :expert_width].astype(weights.b1.dtype),
        dw2[:, :expert_width],
        None if weights.b2 is None else db2[:, 0].astype(weights.b2.dtype),
    )
    return dtokens, from_lanes(dgate, tiles, length), dweights


class _Steering(NamedTuple):
    """Scalars of the kernel."""

    expert: Any
    """Expert and chunk of the weights of each step, then of their gradients."""
    chunk: Any
    own: Any
    part: Any
    sizes: Any
    """Rows of every expert."""
    place: Any
    """Sublane of the token of each row."""
    covers: Any


class _Refs(NamedTuple):
    """Arrays of the kernel, or how they are given to it."""

    tokens: Any
    dout: Any
    ungated: Any
    w1: Any
    b1: Any
    w2: Any
    factor: Any
    """Gates; 0 for a token without a row."""
    dtokens: Any
    dgate: Any
    dw1: Any
    dw2: Any
    db1: Any
    db2: Any
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
    w1_cast: Any
    w2_cast: Any
    dw1_sum: Any
    dw2_sum: Any


class _Backward(NamedTuple):
    """The kernel: its static facts, scalars and arrays."""

    tiles: FusedTiles
    static: MlpStatic
    grid: Grid
    depth: int
    steering: _Steering
    refs: _Refs

    def run(self) -> None:
        """One step of the grid."""
        run_phases(self, self.tiles.inputs, self.grid, self.steering.sizes)

    def _blocks(self, block: Scalar) -> list[tuple[int, int, Scalar, Scalar]]:
        """Parts of a block of tokens: first token of the block and their number, row of lanes, first sublane."""
        load, lanes = self.tiles.load, -(-self.tiles.load // LANES)
        return [
            (first, min(LANES, load - first), block * lanes + n, pl.multiple_of(block * load + first, SUBLANES))
            for n, first in enumerate(range(0, load, LANES))
        ]

    def _columns(self, plane: int) -> list[slice]:
        return list(columns(plane, self.tiles.planes, self.refs.tokens.dtype))

    def load(self, block: Scalar) -> None:
        """A block of tokens and of weighed gradients as words; the gates' gradients."""
        tiles, refs, dtype = self.tiles, self.refs, self.refs.tokens.dtype
        for first, size, row, at in self._blocks(block):
            factor = jnp.broadcast_to(column(refs.factor, row, size), (size, LANES))
            own, product = pl.ds(first, size), jnp.zeros((size, LANES), jnp.float32)
            for plane in range(tiles.planes):
                to, weighed = pl.ds(plane * tiles.stride + at, size), []
                for lanes in self._columns(plane):
                    value = refs.dout[own, lanes].astype(jnp.float32)
                    product += value * refs.ungated[own, lanes].astype(jnp.float32)
                    weighed.append((value * factor).astype(dtype).astype(jnp.float32))
                refs.ddata[to, :] = pack(weighed)
                refs.data[to, :] = pack([refs.tokens[own, lanes].astype(jnp.float32) for lanes in self._columns(plane)])
            refs.dgate[pl.ds(row, 1), pl.ds(0, size)] = jnp.sum(product.T, axis=0, keepdims=True)

    def leave(self, block: Scalar) -> None:
        """A block of gradients."""
        tiles, refs, dtype = self.tiles, self.refs, self.refs.tokens.dtype
        for first, size, row, at in self._blocks(block):
            has_row = jnp.broadcast_to(column(refs.factor, row, size), (size, LANES)) != 0
            for plane in range(tiles.planes):
                # Words of a token without a row are still the token's, and may be anything.
                words = jnp.where(has_row, refs.data[pl.ds(plane * tiles.stride + at, size), :], 0)
                for lanes, value in zip(self._columns(plane), unpack(words, dtype), strict=True):
                    refs.dtokens[pl.ds(first, size), lanes] = value.astype(dtype)

    def compute(self, number: Scalar) -> None:
        """One chunk of one expert."""
        tiles, chunks, sizes = self.tiles, self.grid.chunks, self.steering.sizes
        item, chunk = jax.lax.div(number, chunks), jax.lax.rem(number, chunks)
        size, before = sizes[item], jnp.where(item > 0, item - 1, self.grid.items)

        def moves(base: Scalar, rows: int) -> None:
            self.put(before, base, rows)
            self.pick(item + 1, base, rows)

        pl.when((chunk == 0) & (size > 0))(lambda: self._begin(size))
        if straight(self.static.layout, tiles.mlp.rows):
            stretches = jnp.minimum(size, 1)
            self._straight(size, lambda: moves(pl.multiple_of(chunk * tiles.part, PIECE), tiles.part))
        else:
            stretches, bits = pieces_of(size, self.steering.covers, tiles.mlp.rows)
            first = chunk * stretches
            whole = functools.partial(self._piecewise, stretches, bits)
            pl.when(size > 0)(
                lambda: whole(lambda n: moves(pl.multiple_of((first + n) * tiles.part, PIECE), tiles.part))
            )
        pl.when(size == 0)(lambda: self._zero(chunk))

        @pl.when(chunk == chunks - 1)
        def _() -> None:
            # What was more than this expert had stretches for.
            put, picked = sizes[jnp.maximum(item - 1, 0)], sizes[jnp.minimum(item + 1, self.grid.items - 1)]
            alone(chunks * stretches * tiles.part, jnp.maximum(put, picked), moves)
            pl.when(size > 0)(self._end)

    def _begin(self, size: Scalar) -> None:
        """The rows that were picked, as the matmuls want them, zero where none is; sums start at zero."""
        tiles, refs = self.tiles, self.refs
        rows = tiles.mlp.rows.rows
        used = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 0) < size
        for plane in range(tiles.planes):
            own = pl.ds(plane * tiles.held_stride, rows)
            for source, to in ((refs.picked, refs.x), (refs.dpicked, refs.dy)):
                words = jnp.where(used, source[own, :], 0)
                for lanes, value in zip(self._columns(plane), unpack(words, to.dtype), strict=True):
                    to[:, lanes] = value.astype(to.dtype)
                    if to is refs.dy:
                        refs.db2[0, :, lanes] = jnp.sum(value, axis=0, keepdims=True)
        refs.dx[...] = jnp.zeros(refs.dx.shape, jnp.float32)

    def _products(self) -> Products:
        refs, dtype = self.refs, self.refs.x.dtype
        w1, w2 = refs.w1.at[0], refs.w2.at[0]
        if refs.w1.dtype != dtype:
            w1, w2 = refs.w1_cast, refs.w2_cast
            w1[...], w2[...] = refs.w1[0].astype(dtype), refs.w2[0].astype(dtype)
        return Products(refs.x, refs.dy, w1, refs.b1, w2, refs.dx, self.static.activation)

    def _straight(self, count: Scalar, moves: Any) -> None:
        """All rows of an expert at once: nothing to add up."""
        refs, shorter = self.refs, 0

        def at_once(size: int) -> None:
            # In one stretch of code with the matmuls, and before them: the compiler runs them beside the first.
            moves()
            g1, g2, db1 = self._products().of(0, size)
            refs.dw1[0], refs.dw2[0], refs.db1[0] = g1.astype(refs.dw1.dtype), g2.astype(refs.dw2.dtype), db1

        for size in straight_pieces(self.tiles.mlp.rows, self.depth):
            pl.when((count > shorter) & (count <= size))(lambda size=size: at_once(size))
            shorter = size

    def _piecewise(self, repeats: Scalar, bits: Scalar, moves: Any) -> None:
        """Pieces of an expert one after the other."""
        refs, rows, products = self.refs, self.tiles.mlp.rows, self._products()
        there = refs.dw1.dtype == jnp.float32
        sum1, sum2 = (refs.dw1.at[0], refs.dw2.at[0]) if there else (refs.dw1_sum, refs.dw2_sum)

        def add(offset: Scalar, size: int) -> None:
            if size == rows.pieces[0]:
                moves(jax.lax.div(offset, size))
            # Sums begin with the first piece: to write zeros before would take as long as the products of it.
            for total, part in zip((sum1, sum2, refs.db1.at[0]), products.of(offset, size), strict=True):
                total[...] = jnp.where(offset == 0, 0.0, total[...]) + part

        over_pieces(repeats, bits, rows, add)
        if not there:
            refs.dw1[0], refs.dw2[0] = sum1[...].astype(refs.dw1.dtype), sum2[...].astype(refs.dw2.dtype)

    def _zero(self, chunk: Scalar) -> None:
        """Gradients of an expert without rows."""
        refs = self.refs
        for gradient in (refs.dw1, refs.dw2, refs.db1):
            gradient[...] = jnp.zeros(gradient.shape, gradient.dtype)

        @pl.when(chunk == 0)
        def _() -> None:
            refs.db2[...] = jnp.zeros(refs.db2.shape, jnp.float32)

    def _end(self) -> None:
        """Gradients of rows as words, rounded."""
        tiles, refs = self.tiles, self.refs
        for plane in range(tiles.planes):
            parts = [refs.dx[:, own].astype(refs.x.dtype).astype(jnp.float32) for own in self._columns(plane)]
            refs.results[pl.ds(plane * tiles.held_stride, tiles.mlp.rows.rows), :] = pack(parts)

    def pick(self, item: Scalar, base: Scalar, rows: int) -> None:
        """Copy some rows of an expert, and their gradients, to there; rows that nobody has read something."""
        tiles, refs, first = self.tiles, self.refs, item * self.tiles.moved + base
        for n in range(rows):
            place = self.steering.place[first + n]
            for source, to in ((refs.data, refs.picked), (refs.ddata, refs.dpicked)):
                move_row(tiles.planes, source, place, tiles.stride, to, base + n, tiles.held_stride)

    def put(self, item: Scalar, base: Scalar, rows: int) -> None:
        """Copy gradients of some rows of an expert to where their tokens were."""
        tiles, refs, first = self.tiles, self.refs, item * self.tiles.moved + base
        for n in range(rows):
            place = self.steering.place[first + n]
            move_row(tiles.planes, refs.results, base + n, tiles.held_stride, refs.data, place, tiles.stride)
