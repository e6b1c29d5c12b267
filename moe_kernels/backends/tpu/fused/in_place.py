"""What both passes of the layer's kernels share: tokens that lie in VMEM, each of which has one row at most.

A row is picked from the place of its token, and its result is put there: nobody needs the token any more.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from moe_kernels.backends.base import MlpStatic
from moe_kernels.backends.tpu.common.grid import Grid
from moe_kernels.backends.tpu.common.rows import Scalar
from moe_kernels.backends.tpu.common.schedule import make_schedule
from moe_kernels.backends.tpu.common.tiling import covers
from moe_kernels.backends.tpu.fused.tiles import FusedTiles
from moe_kernels.backends.tpu.permute.words import columns, move_row, pack
from moe_kernels.chips import LANES, SUBLANES
from moe_kernels.types import MlpWeights, Plan


class LayerOperands(NamedTuple):
    """What a layer is of."""

    tokens: Float[Array, "T D"]
    gate: Float[Array, "T 1"]
    weights: MlpWeights
    plan: Plan


class Steering(NamedTuple):
    """Scalars of the kernels; the expert and chunk of every step are read, not computed: each array asks twice."""

    expert: Int[Array, " S"]
    """Expert and chunk whose weights a step needs, or the last one that did."""
    chunk: Int[Array, " S"]
    own: Int[Array, " S"]
    """Expert and chunk of a step, and so of its weight gradients."""
    own_chunk: Int[Array, " S"]
    sizes: Int[Array, " E"]
    """Rows of every expert."""
    place: Int[Array, " N"]
    """Sublane of the token of each row."""
    covers: Int[Array, " C"]
    """Which pieces cover how many rows."""


@dataclasses.dataclass(frozen=True)
class Phased:
    """The grid: `blocks` of tokens, then (expert, chunk of F), then as many blocks of results; and its index maps."""

    grid: Grid
    blocks: int

    @property
    def axes(self) -> tuple[int]:
        """Steps of all phases."""
        return (2 * self.blocks + self.grid.items * self.grid.chunks,)

    def all(self, step: Any, steering: Steering) -> tuple[int, int]:
        """An array that is one block."""
        return 0, 0

    def loaded(self, step: Any, steering: Steering) -> tuple[Any, int]:
        """Block of tokens that come."""
        return jnp.minimum(step, self.blocks - 1), 0

    def left(self, step: Any, steering: Steering) -> tuple[Any, int]:
        """Block of results that go."""
        return jnp.clip(step - (self.axes[0] - self.blocks), 0, self.blocks - 1), 0

    def columns(self, step: Any, steering: Steering) -> tuple[Any, int, Any]:
        """Block of weights `[E, rows, F]`: all rows and the chunk of F."""
        return steering.expert[step], 0, steering.chunk[step]

    def chunk_rows(self, step: Any, steering: Steering) -> tuple[Any, Any, int]:
        """Block of weights `[E, F, columns]`."""
        return steering.expert[step], steering.chunk[step], 0

    def whole(self, step: Any, steering: Steering) -> tuple[Any, int, int]:
        """All of an expert's `[E, rows, columns]`."""
        return steering.expert[step], 0, 0

    def own_columns(self, step: Any, steering: Steering) -> tuple[Any, int, Any]:
        """Block of gradients `[E, rows, F]`."""
        return steering.own[step], 0, steering.own_chunk[step]

    def own_rows(self, step: Any, steering: Steering) -> tuple[Any, Any, int]:
        """Block of gradients `[E, F, columns]`."""
        return steering.own[step], steering.own_chunk[step], 0

    def own_whole(self, step: Any, steering: Steering) -> tuple[Any, int, int]:
        """All of an expert's gradients `[E, 1, columns]`."""
        return steering.own[step], 0, 0

    def steering(self, plan: Plan, tiles: FusedTiles, depth: int) -> Steering:
        """The scalars; before and after the steps with weights come those of blocks of tokens."""
        grid, schedule = self.grid, make_schedule(plan.layout, plan.runs, tile_rows=tiles.mlp.rows.rows)
        chunk = jnp.arange(grid.chunks, dtype=jnp.int32)
        item = jnp.arange(grid.items, dtype=jnp.int32)[:, None]
        fetched = grid.fetched_chunk(chunk, schedule.size[:, None], schedule.after[:, None])
        own = (jnp.broadcast_to(values, fetched.shape) for values in (schedule.fetched[:, None], fetched, item, chunk))
        expert, of_weights, own, own_chunk = (jnp.pad(values.reshape(-1), self.blocks, mode="edge") for values in own)
        cover = jnp.array(covers(tiles.mlp.rows.pieces, depth), jnp.int32)
        return Steering(expert, of_weights, own, own_chunk, schedule.size, places(plan, tiles), cover)


def places(plan: Plan, tiles: FusedTiles) -> Int[Array, " N"]:
    """Sublane of the token of each row, `tiles.moved` for every expert and for one that has none behind the last.

    A row without a token has the place behind all of them: what it reads is anything, and its result goes there. So
    does all of the expert behind the last one, the neighbour of the first and the last.
    """
    layout, spare = plan.layout, tiles.inputs * tiles.load
    place = jnp.where(plan.source < layout.num_tokens, plan.source, spare).reshape(layout.num_experts, -1)
    return jnp.pad(place, ((0, 1), (0, tiles.moved - place.shape[1])), constant_values=spare).reshape(-1)


def in_lanes(side: Array, tiles: FusedTiles) -> Float[Array, "N L"]:
    """Numbers of tokens `[T, 1]` side by side, 128 to a row; a block of tokens begins a row."""
    blocks = jnp.pad(side[:, 0], (0, tiles.inputs * tiles.load - side.shape[0])).reshape(tiles.inputs, tiles.load)
    return jnp.pad(blocks, ((0, 0), (0, -tiles.load % LANES))).reshape(-1, LANES)


def from_lanes(lanes: Float[Array, "N L"], tiles: FusedTiles, length: int) -> Float[Array, "T 1"]:
    """The numbers that `in_lanes` put side by side."""
    return lanes.reshape(tiles.inputs, -1)[:, : tiles.load].reshape(-1, 1)[:length]


@dataclasses.dataclass(frozen=True)
class InPlace(abc.ABC):
    """A kernel that has all tokens in VMEM, for one step of its grid: its static facts, scalars and arrays.

    It says what happens to a block of tokens (`load`), to a chunk of an expert (`compute`) and to a block of results
    (`leave`); rows are picked from the places of their tokens, and their results put there.
    """

    tiles: FusedTiles
    static: MlpStatic
    grid: Grid
    depth: int
    steering: Steering
    inputs: Any
    outputs: Any
    scratch: Any

    @abc.abstractmethod
    def load(self, block: Scalar) -> None:
        """Bring a block of tokens."""

    @abc.abstractmethod
    def compute(self, number: Scalar) -> None:
        """Work on a chunk of an expert; move rows of its neighbours."""

    @abc.abstractmethod
    def leave(self, block: Scalar) -> None:
        """Give a block of results."""

    def run(self) -> None:
        """Do the step: blocks of tokens, then chunks of experts, then blocks of results."""
        step, sizes = pl.program_id(0), self.steering.sizes
        number, steps, last = step - self.tiles.inputs, self.grid.items * self.grid.chunks, self.grid.items - 1

        @pl.when(number < 0)
        def _() -> None:
            self.load(step)
            pl.when(number == -1)(lambda: alone(0, sizes[0], functools.partial(self.pick, 0)))

        pl.when((number >= 0) & (number < steps))(lambda: self.compute(number))

        @pl.when(number >= steps)
        def _() -> None:
            pl.when(number == steps)(lambda: alone(0, sizes[last], functools.partial(self.put, last)))
            self.leave(number - steps)

    def columns(self, plane: int) -> list[slice]:
        """Columns of a row that the words of a plane hold."""
        return list(columns(plane, self.tiles.planes, self.inputs.tokens.dtype))

    def picked(self) -> tuple[tuple[Any, Any], ...]:
        """Words of all tokens, and of the rows of the next expert."""
        return ((self.scratch.data, self.scratch.picked),)

    def pick(self, item: Scalar, base: Scalar, rows: int) -> None:
        """Copy some rows of an expert from the places of their tokens. Rows without a token get any row."""
        tiles, first = self.tiles, item * self.tiles.moved + base
        for n in range(rows):
            place = self.steering.place[first + n]
            for source, to in self.picked():
                move_row(tiles.planes, source, place, tiles.stride, to, base + n, tiles.held_stride)

    def put(self, item: Scalar, base: Scalar, rows: int) -> None:
        """Copy the results of some rows of an expert to the places of their tokens."""
        tiles, scratch, first = self.tiles, self.scratch, item * self.tiles.moved + base
        for n in range(rows):
            place = self.steering.place[first + n]
            move_row(tiles.planes, scratch.results, base + n, tiles.held_stride, scratch.data, place, tiles.stride)

    def moves(self, item: Scalar, base: Scalar, rows: int) -> None:
        """Put some rows of the expert before, and pick as many of the next one."""
        self.put(jnp.where(item > 0, item - 1, self.grid.items), base, rows)
        self.pick(item + 1, base, rows)

    def end(self, item: Scalar, moved: Scalar, total: Any) -> None:
        """After an expert's last chunk: move what is left of its neighbours' rows, and its results become words."""
        tiles, sizes = self.tiles, self.steering.sizes
        put, picked = sizes[jnp.maximum(item - 1, 0)], sizes[jnp.minimum(item + 1, self.grid.items - 1)]
        alone(moved, jnp.maximum(put, picked), functools.partial(self.moves, item))

        @pl.when(sizes[item] > 0)
        def _() -> None:
            for plane in range(tiles.planes):
                rounded = [total[:, own].astype(self.inputs.tokens.dtype) for own in self.columns(plane)]
                words = pack([part.astype(jnp.float32) for part in rounded])
                self.scratch.results[pl.ds(plane * tiles.held_stride, tiles.mlp.rows.rows), :] = words


def alone(first: Scalar, rows: Scalar, moves: Callable[[Scalar, int], None]) -> None:
    """Move rows without matmuls, from a first one on."""

    def move(n: Scalar, carry: None) -> None:
        moves(pl.multiple_of(n * SUBLANES, SUBLANES), SUBLANES)

    jax.lax.fori_loop(jax.lax.div(first, SUBLANES), jax.lax.div(rows + (SUBLANES - 1), SUBLANES), move, None)


def column(side: Any, row: Scalar, size: int) -> Float[Array, "N 1"]:
    """The first numbers of a row, one below the other."""
    shape = (size, LANES)
    own = jax.lax.broadcasted_iota(jnp.int32, shape, 0) == jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return jnp.sum(jnp.where(own, side[pl.ds(row, 1), :], jnp.float32(0)), axis=1, keepdims=True)
