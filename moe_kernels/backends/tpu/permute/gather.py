"""The kernel of dispatch and combine: gather rows from VMEM, weigh them, add them up.

`out[m] = sum_k weight[m, k] * x[index[m, k]]` is dispatch (no weights), combine, and both of their derivatives; the
gates' gradient is `out[k, m] = <x[index[m, k]], dy[m]>` of the same rows. All of `x` is brought to VMEM first, as words
(see words.py), of which any row can be copied to where the tile of results is assembled. An index behind the last row
reads zeros that lie there, so nothing is masked and nothing of another row can leak.

Grid (core, block of x or tile of results): where a device has two TensorCores, each reads all of x and makes half of
the tiles.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from moe_kernels.backends.tpu.common.launch import Call, Operand, Target, launch, result
from moe_kernels.backends.tpu.permute.tiles import GatherTiles, gather_tiles
from moe_kernels.backends.tpu.permute.words import columns, move_row, pack, unpack
from moe_kernels.chips import LANES, SUBLANES


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
    cores = min(target.num_cores, tiles.outputs)
    steps = _GatherGrid(tiles, cores, -(-tiles.outputs // cores))
    more, zeros = (tiles.outputs * tiles.out - count) * terms, tiles.inputs * tiles.load
    # Whatever does not exist, rows of the last tile too, reads the zeros behind the last block that was loaded.
    scalars = _GatherScalars(
        source=jnp.pad(jnp.where(index < length, index, zeros), (0, more), constant_values=zeros),
        weight=jnp.pad(weight, (0, more)) if weight is not None and weight_index is None else weight,
        weight_index=None
        if weight is None or weight_index is None
        else jnp.pad(weight_index, (0, more), constant_values=weight.shape[0] - 1),
    )
    by_tile = pl.BlockSpec((tiles.out, width), steps.tile)
    if against is None:
        out = result((count, width), x.dtype, by_tile)
    else:
        shape = (terms, tiles.outputs * tiles.out)
        out = result(shape, jnp.float32, pl.BlockSpec((terms, tiles.out), steps.column))
    found = launch(
        lambda *refs: _Gather(steps, terms, *refs).run(),
        Call(
            "gather_rows" if against is None else "gather_products",
            (cores, tiles.inputs + steps.share),
            tiles.vmem,
            flops=0,  # No matmuls.
            moved=(cores * length + count) * width * x.dtype.itemsize,
        ),
        target,
        scalars=scalars,
        inputs=_GatherInputs(
            x=Operand(x, pl.BlockSpec((tiles.load, width), steps.loaded)),
            against=None if against is None else Operand(against, by_tile),
        ),
        outputs=_GatherOutputs(out),
        scratch=_GatherScratch(
            data=pltpu.VMEM((tiles.planes * tiles.stride, LANES), jnp.int32),
            picked=pltpu.VMEM((terms * tiles.planes * tiles.out_stride, LANES), jnp.int32),
            weights=None if weight is None else pltpu.VMEM((terms * tiles.out, LANES), jnp.float32),
        ),
    )
    return found.out if against is None else found.out[:, :count]


class _GatherScalars(NamedTuple):
    source: Int[Array, " MK"]
    weight: Float[Array, " W"] | None
    weight_index: Int[Array, " MK"] | None
    """Which weight a term has; None where it has its own."""


class _GatherInputs(NamedTuple):
    x: Any
    against: Any


class _GatherOutputs(NamedTuple):
    out: Any


class _GatherScratch(NamedTuple):
    data: Any
    """Words of all rows, and zeros."""
    picked: Any
    """Words of the rows of a tile, term after term."""
    weights: Any


@dataclasses.dataclass(frozen=True)
class _GatherGrid:
    """Cores and steps, and index maps over them; a core makes `share` tiles."""

    tiles: GatherTiles
    cores: int
    share: int

    def loaded(self, core: Any, step: Any, scalars: _GatherScalars) -> tuple[Any, int]:
        """Block of rows that come."""
        return jnp.minimum(step, self.tiles.inputs - 1), 0

    def tile_of(self, core: Any, step: Any) -> Any:
        """A core with fewer tiles than the other makes its last one twice."""
        first = core * self.share
        return jnp.minimum(first + jnp.maximum(step - self.tiles.inputs, 0), self.tiles.outputs - 1)

    def tile(self, core: Any, step: Any, scalars: _GatherScalars) -> tuple[Any, int]:
        """Block of results as rows."""
        return self.tile_of(core, step), 0

    def column(self, core: Any, step: Any, scalars: _GatherScalars) -> tuple[int, Any]:
        """Block of results along lanes."""
        return 0, self.tile_of(core, step)


class _Gather(NamedTuple):
    """The kernel: its static facts, scalars and arrays."""

    grid: _GatherGrid
    terms: int
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
        core, step = pl.program_id(0), pl.program_id(1)
        pl.when(step == 0)(self._clear)
        pl.when(step < self.tiles.inputs)(lambda: self._load(step))

        @pl.when(step >= self.tiles.inputs)
        def _() -> None:
            self._pick(self.grid.tile_of(core, step) * self.tiles.out)
            if self.inputs.against is None:
                self._add_up()
            else:
                self._multiply()

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

    def _pick(self, first: Any) -> None:
        """Copy the rows of all terms of a tile, and spread their weights over the lanes."""
        tiles, terms, scalars, scratch = self.tiles, self.terms, self.scalars, self.scratch

        def pick(step: Any, carry: None) -> None:
            base = (first + step * tiles.unrolled) * terms
            for n in range(tiles.unrolled):
                row = step * tiles.unrolled + n
                for term in range(terms):
                    at = base + (n * terms + term)
                    to = term * tiles.planes * tiles.out_stride + row
                    place = scalars.source[at]
                    move_row(tiles.planes, scratch.data, place, tiles.stride, scratch.picked, to, tiles.out_stride)
                    if scalars.weight is not None:
                        weight = scalars.weight[at if scalars.weight_index is None else scalars.weight_index[at]]
                        own = pl.ds(term * tiles.out + row, 1)
                        scratch.weights[own, :] = jnp.full((1, LANES), weight, jnp.float32)

        jax.lax.fori_loop(0, tiles.out // tiles.unrolled, pick, None)

    def _picked(self, term: int, plane: int, dtype: Any) -> list[Float[Array, "N L"]]:
        """What a plane of the rows of a term holds."""
        first = (term * self.tiles.planes + plane) * self.tiles.out_stride
        return list(unpack(self.scratch.picked[pl.ds(first, self.tiles.out), :], dtype))

    def _add_up(self) -> None:
        """Weigh, add up and write a tile."""
        tiles, out = self.tiles, self.outputs.out
        for plane in range(tiles.planes):
            totals: list[Any] = []
            for term in range(self.terms):
                values = self._picked(term, plane, out.dtype)
                if self.scratch.weights is not None:
                    weights = self.scratch.weights[pl.ds(term * tiles.out, tiles.out), :]
                    values = [value * weights for value in values]
                totals = [total + value for total, value in zip(totals, values, strict=True)] if term else values
            for own, total in zip(columns(plane, tiles.planes, out.dtype), totals, strict=True):
                out[:, own] = total.astype(out.dtype)

    def _multiply(self) -> None:
        """Products of a tile's rows with those of another array, one number a row, along lanes."""
        against = self.inputs.against
        for term in range(self.terms):
            total: Any = None
            for plane in range(self.tiles.planes):
                values = self._picked(term, plane, against.dtype)
                for own, value in zip(columns(plane, self.tiles.planes, against.dtype), values, strict=True):
                    product = value * against[:, own].astype(jnp.float32)
                    total = product if total is None else total + product
            self.outputs.out[pl.ds(term, 1), :] = jnp.sum(total.T, axis=0, keepdims=True)
