"""Dispatch and combine as one kernel: gather rows from VMEM, weigh them, add them up.

`out[m] = sum_k weight[m, k] * x[index[m, k]]` is dispatch (no weights), combine, and both of their derivatives; the
gates' gradient is `out[k, m] = <x[index[m, k]], dy[m]>` of the same rows. All of `x` is brought to VMEM first, as words
(see words.py), of which any row can be copied to where the tile of results is assembled. An index behind the last row
reads zeros that lie there, so nothing is masked and nothing of another row can leak.

Grid (core, block of x or tile of results): where a device has two TensorCores, each reads all of x and makes half of
the tiles.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from moe_kernels.backends.tpu.common.launch import Target
from moe_kernels.backends.tpu.permute.tiles import GatherTiles, gather_tiles
from moe_kernels.backends.tpu.permute.words import LANES, SUBLANES, columns, move_row, pack, unpack
from moe_kernels.chips import MIB
from moe_kernels.types import Plan


def dispatch_forward(
    target: Target, static: None, tokens: Float[Array, "T D"], plan: Plan
) -> tuple[Float[Array, "R D"], Plan]:
    """Copy tokens into their rows; unused rows are 0."""
    return gather_rows(target, tokens, plan.source // plan.layout.num_choices, 1), plan


def dispatch_backward(target: Target, static: None, plan: Plan, drows: Float[Array, "R D"]) -> tuple[Array]:
    """Add up the cotangents of a token's rows, in float32."""
    return (gather_rows(target, drows, plan.row.reshape(-1), plan.layout.num_choices),)


def combine_forward(
    target: Target, static: None, rows: Float[Array, "R D"], gate: Float[Array, "T K"], plan: Plan
) -> tuple[Float[Array, "T D"], tuple[Float[Array, "R D"], Float[Array, "T K"], Plan]]:
    """Weigh and add a token's rows in float32; a token with a gate that is not finite becomes NaN."""
    weight = jnp.where(jnp.isfinite(gate), gate, jnp.float32(jnp.nan)).reshape(-1)
    index = plan.row.reshape(-1)
    return gather_rows(target, rows, index, plan.layout.num_choices, weight), (rows, gate, plan)


def combine_backward(
    target: Target,
    static: None,
    saved: tuple[Float[Array, "R D"], Float[Array, "T K"], Plan],
    dtokens: Float[Array, "T D"],
) -> tuple[Float[Array, "R D"], Float[Array, "T K"]]:
    """Cotangents of rows and gates: `drows = gate dy`, `dgate = <rows, dy>`."""
    rows, gate, plan = saved
    choices = plan.layout.num_choices
    # The entry behind the last choice is the weight of unused rows.
    weight = jnp.append(gate.reshape(-1), jnp.float32(0))
    drows = gather_rows(target, dtokens, plan.source // choices, 1, weight, plan.source)
    dgate = gather_rows(target, rows, plan.row.reshape(-1), choices, against=dtokens)
    # A dropped choice's gate has no influence on the output, also where dy is not finite (0 * NaN above).
    return drows, jnp.where(plan.row < plan.layout.num_rows, dgate.T, jnp.float32(0))


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
    share = -(-tiles.outputs // cores)
    more, zeros = tiles.outputs * tiles.out - count, tiles.inputs * tiles.load
    # Whatever does not exist, rows of the last tile too, reads the zeros behind the last block that was loaded.
    scalars = [jnp.pad(jnp.where(index < length, index, zeros), (0, more * terms), constant_values=zeros)]
    if weight is not None:
        scalars.append(jnp.pad(weight, (0, more * terms)) if weight_index is None else weight)
        if weight_index is not None:
            scalars.append(jnp.pad(weight_index, (0, more * terms), constant_values=weight.shape[0] - 1))

    def loaded(core: Any, step: Any, *_: Any) -> tuple[Any, int]:
        return jnp.minimum(step, tiles.inputs - 1), 0

    def tile_of(core: Any, step: Any) -> Any:
        """A core with fewer tiles than the other makes its last one twice."""
        return jnp.minimum(core * share + jnp.maximum(step - tiles.inputs, 0), tiles.outputs - 1)

    def tile(core: Any, step: Any, *_: Any) -> tuple[Any, int]:
        return tile_of(core, step), 0

    def column(core: Any, step: Any, *_: Any) -> tuple[int, Any]:
        return 0, tile_of(core, step)

    def kernel(*refs: Any) -> None:
        steering, (x_ref, *against_ref, out_ref, data, picked, weights) = refs[: len(scalars)], refs[len(scalars) :]
        core, step = pl.program_id(0), pl.program_id(1)
        pl.when(step == 0)(lambda: _clear(tiles, data))
        pl.when(step < tiles.inputs)(lambda: _load(tiles, step, x_ref, data))

        @pl.when(step >= tiles.inputs)
        def _() -> None:
            _pick(tiles, terms, tile_of(core, step) * tiles.out, steering, data, picked, weights)
            if against is None:
                _add_up(tiles, terms, len(steering) > 1, picked, weights, out_ref)
            else:
                _multiply(tiles, terms, picked, against_ref[0], out_ref)

    by_tile, by_column = pl.BlockSpec((tiles.out, width), tile), pl.BlockSpec((terms, tiles.out), column)
    if against is None:
        out_shape = jax.ShapeDtypeStruct((count, width), x.dtype)
    else:
        out_shape = jax.ShapeDtypeStruct((terms, tiles.outputs * tiles.out), jnp.float32)

    @jax.custom_batching.sequential_vmap
    def run(*operands: Array) -> Array:
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(cores, tiles.inputs + share),
                in_specs=[pl.BlockSpec((tiles.load, width), loaded), *([] if against is None else [by_tile])],
                out_specs=by_tile if against is None else by_column,
                scratch_shapes=[
                    pltpu.VMEM((tiles.planes * tiles.stride, LANES), jnp.int32),
                    pltpu.VMEM((terms * tiles.planes * tiles.out_stride, LANES), jnp.int32),
                    pltpu.VMEM((terms * tiles.out if weight is not None else SUBLANES, LANES), jnp.float32),
                ],
            ),
            out_shape=out_shape,
            # No matmuls. XLA, and whoever counts a compiled program's work, see no further into a kernel.
            cost_estimate=pl.CostEstimate(
                flops=0, transcendentals=0, bytes_accessed=(cores * length + count) * width * x.dtype.itemsize
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"),
                vmem_limit_bytes=min(target.facts.vmem, tiles.vmem + MIB),
            ),
            interpret=target.interpret,
            name="gather_rows" if against is None else "gather_products",
        )(*operands)

    if against is None:
        return run(*scalars, x)
    return run(*scalars, x, against)[:, :count]


def _clear(tiles: GatherTiles, data: Any) -> None:
    for plane in range(tiles.planes):
        data[pl.ds(plane * tiles.stride + tiles.inputs * tiles.load, SUBLANES), :] = jnp.zeros(
            (SUBLANES, LANES), jnp.int32
        )


def _load(tiles: GatherTiles, step: Any, x_ref: Any, data: Any) -> None:
    """A block of x as words."""
    at = pl.multiple_of(step * tiles.load, SUBLANES)
    for plane in range(tiles.planes):
        parts = [x_ref[:, own].astype(jnp.float32) for own in columns(plane, tiles.planes, x_ref.dtype)]
        data[pl.ds(plane * tiles.stride + at, tiles.load), :] = pack(parts)


def _pick(tiles: GatherTiles, terms: int, first: Any, steering: Any, data: Any, picked: Any, weights: Any) -> None:
    """Copy the rows of all terms of a tile, and spread their weights over the lanes."""
    index, *weighing = steering

    def pick(step: Any, carry: None) -> None:
        base = (first + step * tiles.unrolled) * terms
        for n in range(tiles.unrolled):
            row = step * tiles.unrolled + n
            for term in range(terms):
                at = base + (n * terms + term)
                to = term * tiles.planes * tiles.out_stride + row
                move_row(tiles.planes, data, index[at], tiles.stride, picked, to, tiles.out_stride)
                if weighing:
                    weight = weighing[0][at if len(weighing) == 1 else weighing[1][at]]
                    weights[pl.ds(term * tiles.out + row, 1), :] = jnp.full((1, LANES), weight, jnp.float32)

    jax.lax.fori_loop(0, tiles.out // tiles.unrolled, pick, None)


def _add_up(tiles: GatherTiles, terms: int, weighed: bool, picked: Any, weights: Any, out_ref: Any) -> None:
    """Weigh, add up and write a tile."""
    for plane in range(tiles.planes):
        totals: list[Any] = []
        for term in range(terms):
            words = picked[pl.ds((term * tiles.planes + plane) * tiles.out_stride, tiles.out), :]
            values = list(unpack(words, out_ref.dtype))
            if weighed:
                values = [value * weights[pl.ds(term * tiles.out, tiles.out), :] for value in values]
            totals = [total + value for total, value in zip(totals, values, strict=True)] if term else values
        for own, total in zip(columns(plane, tiles.planes, out_ref.dtype), totals, strict=True):
            out_ref[:, own] = total.astype(out_ref.dtype)


def _multiply(tiles: GatherTiles, terms: int, picked: Any, against_ref: Any, out_ref: Any) -> None:
    """Products of a tile's rows with those of another array, one number a row, along lanes."""
    dtype = against_ref.dtype
    for term in range(terms):
        total: Any = None
        for plane in range(tiles.planes):
            words = picked[pl.ds((term * tiles.planes + plane) * tiles.out_stride, tiles.out), :]
            for own, value in zip(columns(plane, tiles.planes, dtype), unpack(words, dtype), strict=True):
                product = value * against_ref[:, own].astype(jnp.float32)
                total = product if total is None else total + product
        out_ref[pl.ds(term, 1), :] = jnp.sum(total.T, axis=0, keepdims=True)
