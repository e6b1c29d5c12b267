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
from moe_kernels.backends.tpu.common.activation import activate
from moe_kernels.backends.tpu.common.launch import Grid, Target, apart, grid_of
from moe_kernels.backends.tpu.common.rows import Scalar, dot
from moe_kernels.backends.tpu.common.schedule import make_schedule
from moe_kernels.backends.tpu.common.tiling import PIECE
from moe_kernels.backends.tpu.fused.in_place import alone, column, in_lanes, places, run_phases, steps_of
from moe_kernels.backends.tpu.mlp.forward import padded_weights
from moe_kernels.backends.tpu.permute.tiles import FusedTiles
from moe_kernels.backends.tpu.permute.words import LANES, SUBLANES, columns, move_row, pack, unpack
from moe_kernels.chips import MIB
from moe_kernels.types import MlpWeights, Plan


def run_fused(
    tiles: FusedTiles,
    target: Target,
    static: MlpStatic,
    tokens: Float[Array, "T D"],
    gate: Float[Array, "T 1"],
    weights: MlpWeights,
    plan: Plan,
    *,
    keep: bool,
    keep_rows: bool = False,
) -> tuple[Float[Array, "..."], ...]:
    """The layer's output `[T, D]`; with `keep` also what it was before gates, where a token has a row.

    With `keep_rows`, last, the experts' rows `[R, D]`; unused ones hold anything.
    """
    width, mlp, dtype = tokens.shape[1], tiles.mlp, tokens.dtype
    grid = grid_of(static.layout, mlp, target)
    cast = weights.w1.dtype != dtype
    steps, blocks = grid.items * grid.chunks, tiles.inputs
    place = places(plan, tiles)
    # A token that has a row has a gate above 0: others claim none.
    factor = jnp.where(plan.row < plan.layout.num_rows, gate, jnp.float32(0))
    factor = in_lanes(jnp.where(jnp.isfinite(gate), factor, jnp.float32(jnp.nan)), tiles)

    schedule = make_schedule(static.layout, plan.runs, tile_rows=mlp.rows.rows)
    expert, chunk, *_ = steps_of(grid, schedule, blocks)

    def kernel(expert: Any, chunk: Any, *refs: Any) -> None:
        given, outs, rest = refs[:8], refs[8 : 9 + keep], refs[9 + keep :]
        scratch, rows = (rest[1:], rest[0].at[0]) if keep_rows else (rest[:-1], rest[-1])
        named = _Refs(*given, *scratch, rows=rows, outs=outs)
        _Fused(tiles, static, grid, target.facts.depth, named).run()

    out = pl.BlockSpec((tiles.load, width), lambda step, *_: (jnp.clip(step - blocks - steps, 0, blocks - 1), 0))
    out_specs, out_shape = [out] * (1 + keep), [jax.ShapeDtypeStruct(tokens.shape, dtype)] * (1 + keep)
    if keep_rows:
        # Worked on where they leave from. What an expert without rows has there is anything.
        held = (1, mlp.rows.rows, width)
        out_specs.append(pl.BlockSpec(held, lambda step, expert, *_: (expert[step], 0, 0)))
        out_shape.append(jax.ShapeDtypeStruct((plan.layout.num_experts, *held[1:]), dtype))
    small, words = (8, LANES), tiles.planes * tiles.held_stride

    @jax.custom_batching.sequential_vmap
    def run(*operands: Array) -> tuple[Array, ...]:
        call = pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=4,
                grid=(blocks + steps + blocks,),
                in_specs=[
                    pl.BlockSpec((tiles.load, width), lambda step, *_: (jnp.minimum(step, blocks - 1), 0)),
                    pl.BlockSpec((1, width, mlp.chunk), lambda step, expert, chunk, *_: (expert[step], 0, chunk[step])),
                    pl.BlockSpec((1, 1, mlp.chunk), lambda step, expert, chunk, *_: (expert[step], 0, chunk[step])),
                    pl.BlockSpec((1, mlp.chunk, width), lambda step, expert, chunk, *_: (expert[step], chunk[step], 0)),
                    pl.BlockSpec((1, 1, width), lambda step, expert, *_: (expert[step], 0, 0)),
                    pl.BlockSpec(factor.shape, lambda step, *_: (0, 0)),
                ],
                out_specs=out_specs,
                scratch_shapes=[
                    pltpu.VMEM((tiles.planes * tiles.stride, LANES), jnp.int32),
                    pltpu.VMEM((words, LANES), jnp.int32),
                    pltpu.VMEM((words, LANES), jnp.int32),
                    pltpu.VMEM((mlp.rows.rows, width), jnp.float32),
                    pltpu.VMEM((width, mlp.chunk) if cast else small, dtype),
                    pltpu.VMEM((mlp.chunk, width) if cast else small, dtype),
                    *([] if keep_rows else [pltpu.VMEM((mlp.rows.rows, width), dtype)]),
                ],
            ),
            out_shape=out_shape,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("arbitrary",), vmem_limit_bytes=min(target.facts.vmem, mlp.vmem + MIB)
            ),
            cost_estimate=pl.CostEstimate(
                flops=4 * plan.layout.num_rows * width * mlp.padded,
                transcendentals=0,
                bytes_accessed=sum(array.size * array.dtype.itemsize for array in (*out_shape, *operands)),
            ),
            interpret=target.interpret,
            name="dispatch_mlp_combine_forward" if keep else "dispatch_mlp_combine_value",
        )
        return apart(call(*operands))

    outs = run(expert, chunk, schedule.size, place, tokens, *padded_weights(weights, mlp.padded), factor)
    if not keep_rows:
        return outs
    *results, rows = outs
    return *results, rows[:, : plan.layout.rows_per_expert].reshape(plan.layout.num_rows, width)


class _Refs(NamedTuple):
    """Arrays of the kernel."""

    sizes: Any
    """Rows of every expert."""
    place: Any
    """Sublane of the token of each row."""
    tokens: Any
    w1: Any
    b1: Any
    w2: Any
    b2: Any
    factor: Any
    """Gates; 0 for a token without a row, NaN for one whose gate is not finite."""
    data: Any
    """Words of all tokens, then of their results."""
    picked: Any
    """Words of the rows of the next expert."""
    results: Any
    """Words of the results of the last expert."""
    total: Any
    w1_cast: Any
    w2_cast: Any
    rows: Any
    outs: Any
    """Results, and results before gates where these are kept."""


class _Fused(NamedTuple):
    """The kernel: its static facts and arrays."""

    tiles: FusedTiles
    static: MlpStatic
    grid: Grid
    depth: int
    refs: _Refs

    def run(self) -> None:
        """One step of the grid."""
        run_phases(self, self.tiles.inputs, self.grid, self.refs.sizes)

    def load(self, block: Scalar) -> None:
        """A block of tokens as words."""
        tiles, refs = self.tiles, self.refs
        at = pl.multiple_of(block * tiles.load, SUBLANES)
        for plane in range(tiles.planes):
            parts = [refs.tokens[:, own].astype(jnp.float32) for own in self._columns(plane)]
            refs.data[pl.ds(plane * tiles.stride + at, tiles.load), :] = pack(parts)

    def leave(self, block: Scalar) -> None:
        """A block of results, weighed."""
        tiles, refs = self.tiles, self.refs
        lanes = -(-tiles.load // LANES)
        for number in range(lanes):
            first = number * LANES
            size = min(LANES, tiles.load - first)
            factor = jnp.broadcast_to(column(refs.factor, block * lanes + number, size), (size, LANES))
            for plane in range(tiles.planes):
                at = pl.multiple_of(block * tiles.load + first, SUBLANES)
                words = refs.data[pl.ds(plane * tiles.stride + at, size), :]
                # Words of a token without a row are still the token's, and may be anything.
                words = jnp.where(factor != 0, words, 0)
                for own, value in zip(self._columns(plane), unpack(words, refs.tokens.dtype), strict=True):
                    for out, weighed in zip(refs.outs, (value * factor, value), strict=False):
                        out[first : first + size, own] = weighed.astype(out.dtype)

    def _columns(self, plane: int) -> list[slice]:
        return list(columns(plane, self.tiles.planes, self.refs.tokens.dtype))

    def compute(self, number: Scalar) -> None:
        """One chunk of one expert."""
        tiles, refs, chunks, sizes = self.tiles, self.refs, self.grid.chunks, self.refs.sizes
        item, chunk = jax.lax.div(number, chunks), jax.lax.rem(number, chunks)
        piece, short = tiles.mlp.rows.pieces[0], tiles.mlp.rows.shorter(self.depth)
        pieces = jax.lax.div(sizes[item] + (piece - 1), piece)

        before = jnp.where(item > 0, item - 1, self.grid.items)

        def moves(base: Scalar, rows: int) -> None:
            self.put(before, base, rows)
            self.pick(item + 1, base, rows)

        pl.when((chunk == 0) & (pieces > 0))(self._begin)
        w1, w2 = self._weights(pieces > 0)

        def work(size: int, step: Scalar, carry: None = None) -> None:
            own = pl.ds(pl.multiple_of(step * size, PIECE), size)
            # In one stretch of code with the matmuls, and before them: the compiler runs them beside the first.
            moves(pl.multiple_of((chunk * pieces + step) * tiles.part, PIECE), tiles.part)
            hidden = (dot(refs.rows[own], w1[...], (1, 0)) + refs.b1[0]).astype(refs.rows.dtype)
            activated = activate(hidden.astype(jnp.float32), self.static.activation).astype(refs.rows.dtype)
            refs.total[own] += dot(activated, w2[...], (1, 0))

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

        @pl.when(chunk == chunks - 1)
        def _() -> None:
            # What was more than this expert had pieces for.
            put, picked = sizes[jnp.maximum(item - 1, 0)], sizes[jnp.minimum(item + 1, self.grid.items - 1)]
            alone(chunks * pieces * tiles.part, jnp.maximum(put, picked), moves)
            pl.when(pieces > 0)(self._end)

    def _weights(self, busy: Scalar) -> tuple[Any, Any]:
        """The chunk of the weights, in the dtype of the rows."""
        refs, dtype = self.refs, self.refs.rows.dtype
        if refs.w1.dtype == dtype:
            return refs.w1.at[0], refs.w2.at[0]

        @pl.when(busy)
        def _() -> None:
            refs.w1_cast[...], refs.w2_cast[...] = refs.w1[0].astype(dtype), refs.w2[0].astype(dtype)

        return refs.w1_cast, refs.w2_cast

    def _begin(self) -> None:
        """The rows that were picked, as the matmuls want them; sums start as the bias."""
        tiles, refs = self.tiles, self.refs
        for plane in range(tiles.planes):
            words = refs.picked[pl.ds(plane * tiles.held_stride, tiles.mlp.rows.rows), :]
            for own, value in zip(self._columns(plane), unpack(words, refs.rows.dtype), strict=True):
                refs.rows[:, own] = value.astype(refs.rows.dtype)
        refs.total[...] = jnp.broadcast_to(refs.b2[0], refs.total.shape)

    def _end(self) -> None:
        """Results as words, rounded."""
        tiles, refs = self.tiles, self.refs
        for plane in range(tiles.planes):
            parts = [refs.total[:, own].astype(refs.rows.dtype).astype(jnp.float32) for own in self._columns(plane)]
            refs.results[pl.ds(plane * tiles.held_stride, tiles.mlp.rows.rows), :] = pack(parts)

    def pick(self, item: Scalar, base: Scalar, rows: int) -> None:
        """Copy the tokens of some rows of an expert to there; rows that nobody has read something."""
        tiles, refs, first = self.tiles, self.refs, item * self.tiles.moved + base
        for n in range(rows):
            place = refs.place[first + n]
            move_row(tiles.planes, refs.data, place, tiles.stride, refs.picked, base + n, tiles.held_stride)

    def put(self, item: Scalar, base: Scalar, rows: int) -> None:
        """Copy the results of some rows of an expert to where their tokens were."""
        tiles, refs, first = self.tiles, self.refs, item * self.tiles.moved + base
        for n in range(rows):
            place = refs.place[first + n]
            move_row(tiles.planes, refs.results, base + n, tiles.held_stride, refs.data, place, tiles.stride)
