"""The kernel of dispatch and combine: gather rows from VMEM, weigh them, add them up.

`out[m] = sum_k weight[m, k] * x[index[m, k]]` is dispatch (no weights), combine, and both of their derivatives; the
gates' gradient is `out[k, m] = <x[index[m, k]], dy[m]>` of the same rows. A block of columns of all of `x` is brought
to VMEM first, as words (see words.py), of which any row can be copied to where the tile of results is assembled. An
index behind the last row reads zeros that lie there, so nothing is masked and nothing of another row can leak.

Grid (core, block of columns, block of x or tile of results). `x` is read once, and the places of a tile come to scalar
memory with it. Where a device has two TensorCores, each takes half of the blocks of columns; if these are odd, each
reads all of x and makes half of the tiles.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from moe_kernels.backends.tpu.common.launch import Call, Operand, Target, launch, result
from moe_kernels.backends.tpu.permute.tiles import PLANE_BYTES, GatherTiles, gather_tiles
from moe_kernels.backends.tpu.permute.words import columns, move_row, pack, unpack
from moe_kernels.chips import LANES, SUBLANES

# Bytes of scalar memory that weights may take that are looked up one by one.
MOST_SCALARS = 512 * 1024


def gather_rows(
    target: Target,
    x: Float[Array, "N D"],
    index: Int[Array, " MK"],
    terms: int,
    weight: Float[Array, " W"] | None = None,
    weight_index: Int[Array, " MK"] | None = None,
    against: Float[Array, "M D"] | None = None,
) -> Float[Array, "..."]:
    """`out[m] = sum_k weight[m K + k] x[index[m K + k]]` over `terms` K; or with `weight[weight_index[m K + k]]`.

    With `against`, instead, `out[k, m] = <x[index[m K + k]], against[m]>` in float32. Terms whose index is N or more
    read zeros.
    """
    (length, width), count = x.shape, index.shape[0] // terms
    if length == 0 or count == 0:
        return jnp.zeros((count, width), x.dtype) if against is None else jnp.zeros((terms, count), jnp.float32)
    tiles = gather_tiles(length, count, width, x.dtype.itemsize, terms, target.facts)
    assert tiles is not None, "refused by why_not"
    steps = _GatherGrid(tiles, *_shares(tiles, target.num_cores))
    # Whatever does not exist, rows of the last tile too, reads the zeros behind the last block that was loaded.
    zeros, per_block = tiles.inputs * tiles.load, tiles.planes * PLANE_BYTES // x.dtype.itemsize
    tile = pl.BlockSpec((tiles.out, per_block), steps.tile)
    if against is None:
        out = result((count, width), x.dtype, tile)
    else:
        shape = (tiles.blocks, terms, tiles.outputs * tiles.out)
        out = result(shape, jnp.float32, pl.BlockSpec((1, terms, tiles.out), steps.products))
    of_term = weight if weight_index is None else weight_index
    found = launch(
        lambda *refs: _Gather(steps, terms, width, *refs).run(),
        Call(
            "gather_rows" if against is None else "gather_products",
            steps.grid,
            tiles.vmem,
            flops=0,  # No matmuls.
            moved=(steps.times_read * length + count) * width * x.dtype.itemsize,
        ),
        target,
        scalars=_GatherScalars(None if weight_index is None else weight),
        inputs=_GatherInputs(
            x=Operand(x, pl.BlockSpec((tiles.load, per_block), steps.loaded)),
            against=None if against is None else Operand(against, tile),
            source=steps.pieces(jnp.where(index < length, index, zeros), terms, zeros),
            weight=None if of_term is None else steps.pieces(of_term, terms, 0),
        ),
        outputs=_GatherOutputs(out),
        scratch=_GatherScratch(
            data=pltpu.VMEM((tiles.planes * tiles.stride, LANES), jnp.int32),
            picked=pltpu.VMEM((terms * tiles.planes * tiles.out_stride, LANES), jnp.int32),
            weights=None if weight is None else pltpu.VMEM((terms * tiles.out, LANES), jnp.float32),
        ),
    )
    return found.out if against is None else jnp.sum(found.out[:, :, :count], axis=0)


class _GatherScalars(NamedTuple):
    weight: Float[Array, " W"] | None
    """Weights that terms look up; None where each has its own."""


class _GatherInputs(NamedTuple):
    x: Any
    against: Any
    source: Any
    """Where the row of each term of a tile lies; in scalar memory, as the next."""
    weight: Any
    """The weight of each term of a tile, or which one it is."""


class _GatherOutputs(NamedTuple):
    out: Any


class _GatherScratch(NamedTuple):
    data: Any
    """Words of all rows, and zeros."""
    picked: Any
    """Words of the rows of a tile, term after term."""
    weights: Any


class _Shares(NamedTuple):
    """What a core makes: its blocks of columns of its tiles."""

    cores: int
    blocks: int
    tiles: int


def _shares(tiles: GatherTiles, num_cores: int) -> _Shares:
    """Share columns among cores, so that each entry of x is read once, or else tiles."""
    if tiles.blocks % num_cores == 0:
        return _Shares(num_cores, tiles.blocks // num_cores, tiles.outputs)
    cores = min(num_cores, tiles.outputs)
    return _Shares(cores, tiles.blocks, -(-tiles.outputs // cores))


@dataclasses.dataclass(frozen=True)
class _GatherGrid:
    """Cores, blocks of columns and steps, and index maps over them; a core makes `share` tiles."""

    tiles: GatherTiles
    cores: int
    blocks: int
    share: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """For each block of columns, steps that load x and steps that make tiles."""
        return self.cores, self.blocks, self.tiles.inputs + self.share

    @property
    def times_read(self) -> int:
        """How often each entry of x is read."""
        return self.cores * self.blocks // self.tiles.blocks

    def column(self, core: Any, block: Any) -> Any:
        """Block of columns; every core has all of them, or its own."""
        return block if self.blocks == self.tiles.blocks else core * self.blocks + block

    def tile_of(self, core: Any, step: Any) -> Any:
        """A core with fewer tiles than the other makes its last one twice."""
        first = core * self.share if self.blocks == self.tiles.blocks else 0
        return jnp.minimum(first + jnp.maximum(step - self.tiles.inputs, 0), self.tiles.outputs - 1)

    def loaded(self, core: Any, block: Any, step: Any, scalars: _GatherScalars) -> tuple[Any, Any]:
        """Block of rows that come."""
        return jnp.minimum(step, self.tiles.inputs - 1), self.column(core, block)

    def tile(self, core: Any, block: Any, step: Any, scalars: _GatherScalars) -> tuple[Any, Any]:
        """Block of results as rows."""
        return self.tile_of(core, step), self.column(core, block)

    def products(self, core: Any, block: Any, step: Any, scalars: _GatherScalars) -> tuple[Any, int, Any]:
        """Block of results along lanes, of some columns."""
        return self.column(core, block), 0, self.tile_of(core, step)

    def piece(self, core: Any, block: Any, step: Any, scalars: _GatherScalars) -> tuple[Any, int, int]:
        """Places or weights of a tile."""
        return self.tile_of(core, step), 0, 0

    def pieces(self, values: Array, terms: int, fill: int) -> Operand:
        """What each term has, tile by tile in scalar memory; `fill` is for terms that do not exist."""
        size = self.tiles.out * terms
        values = jnp.pad(values, (0, self.tiles.outputs * size - values.size), constant_values=fill)
        spec = pl.BlockSpec((1, 1, size), self.piece, memory_space=pltpu.MemorySpace.SMEM)
        return Operand(values.reshape(self.tiles.outputs, 1, size), spec)


class _Gather(NamedTuple):
    """The kernel: its static facts, scalars and arrays."""

    grid: _GatherGrid
    terms: int
    width: int
    scalars: _GatherScalars
    inputs: _GatherInputs
    outputs: _GatherOutputs
    scratch: _GatherScratch

    @property
    def tiles(self) -> GatherTiles:
        """Block sizes."""
        return self.grid.tiles

    def run(self) -> None:
        """One step of the grid."""
        core, block, step = (pl.program_id(axis) for axis in range(3))
        own = self.tiles.planes * PLANE_BYTES // self.inputs.x.dtype.itemsize
        # Behind the last column of x lies what was there before.
        exist = self.width - self.grid.column(core, block) * own
        pl.when(step == 0)(self._clear)
        pl.when(step < self.tiles.inputs)(lambda: self._load(step))

        @pl.when(step >= self.tiles.inputs)
        def _() -> None:
            self._pick()
            finish = self._add_up if self.inputs.against is None else functools.partial(self._multiply, exist)
            if self.tiles.out == self.tiles.weighed:
                finish(0)
            else:
                jax.lax.fori_loop(0, self.tiles.out // self.tiles.weighed, lambda part, _: finish(part), None)

    def _clear(self) -> None:
        tiles = self.tiles
        for plane in range(tiles.planes):
            zeros = pl.ds(plane * tiles.stride + tiles.inputs * tiles.load, SUBLANES)
            self.scratch.data[zeros, :] = jnp.zeros((SUBLANES, LANES), jnp.int32)

    def _load(self, step: Any) -> None:
        """A block of x as words."""
        tiles, x = self.tiles, self.inputs.x
        at = pl.multiple_of(step * tiles.load, SUBLANES)
        for plane in range(tiles.planes):
            parts = [x[:, own].astype(jnp.float32) for own in columns(plane, tiles.planes, x.dtype)]
            self.scratch.data[pl.ds(plane * tiles.stride + at, tiles.load), :] = pack(parts)

    def _pick(self) -> None:
        """Copy the rows of all terms of a tile, and spread their weights over the lanes."""
        tiles, terms, inputs, scratch = self.tiles, self.terms, self.inputs, self.scratch

        def pick(step: Any, carry: None) -> None:
            for n in range(tiles.unrolled):
                row = step * tiles.unrolled + n
                for term in range(terms):
                    at = row * terms + term
                    to = term * tiles.planes * tiles.out_stride + row
                    place = inputs.source[0, 0, at]
                    move_row(tiles.planes, scratch.data, place, tiles.stride, scratch.picked, to, tiles.out_stride)
                    if scratch.weights is not None:
                        own = pl.ds(term * tiles.out + row, 1)
                        scratch.weights[own, :] = jnp.full((1, LANES), self._weight(at), jnp.float32)

        jax.lax.fori_loop(0, tiles.out // tiles.unrolled, pick, None)

    def _weight(self, at: Any) -> Any:
        """The weight of a term."""
        own, weights = self.inputs.weight[0, 0, at], self.scalars.weight
        return own if weights is None else weights[own]

    def _rows(self, part: Any) -> Any:
        """Rows of a part of a tile."""
        return pl.ds(pl.multiple_of(part * self.tiles.weighed, SUBLANES), self.tiles.weighed)

    def _picked(self, term: int, plane: int, part: Any, dtype: Any) -> list[Float[Array, "N L"]]:
        """What a plane of the rows of a term holds, for a part of a tile."""
        first = (term * self.tiles.planes + plane) * self.tiles.out_stride
        own = pl.ds(pl.multiple_of(first + part * self.tiles.weighed, SUBLANES), self.tiles.weighed)
        return list(unpack(self.scratch.picked[own, :], dtype))

    def _add_up(self, part: Any) -> None:
        """Weigh, add up and write a part of a tile."""
        tiles, out = self.tiles, self.outputs.out
        for plane in range(tiles.planes):
            totals: list[Any] = []
            for term in range(self.terms):
                values = self._picked(term, plane, part, out.dtype)
                if self.scratch.weights is not None:
                    own = pl.multiple_of(term * tiles.out + part * tiles.weighed, SUBLANES)
                    weights = self.scratch.weights[pl.ds(own, tiles.weighed), :]
                    values = [value * weights for value in values]
                totals = [total + value for total, value in zip(totals, values, strict=True)] if term else values
            for own, total in zip(columns(plane, tiles.planes, out.dtype), totals, strict=True):
                out[self._rows(part), own] = total.astype(out.dtype)

    def _multiply(self, exist: Any, part: Any) -> None:
        """Products of a part's rows with those of another array, one number a row, along lanes; `exist` columns."""
        against, out = self.inputs.against, self.outputs.out
        for term in range(self.terms):
            total: Any = None
            for plane in range(self.tiles.planes):
                values = self._picked(term, plane, part, against.dtype)
                for own, value in zip(columns(plane, self.tiles.planes, against.dtype), values, strict=True):
                    product = value * against[self._rows(part), own].astype(jnp.float32)
                    product = jnp.where(own.start < exist, product, jnp.float32(0))
                    total = product if total is None else total + product
            lanes = pl.ds(pl.multiple_of(part * self.tiles.weighed, self.tiles.weighed), self.tiles.weighed)
            out[0, pl.ds(term, 1), lanes] = jnp.sum(total.T, axis=0, keepdims=True)
