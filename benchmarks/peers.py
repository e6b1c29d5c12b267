"""All baselines: a dense MLP with the same work, V-MoE's two dispatchers, and grouped matmuls after a sort.

They are simple but not naive. They have the same float32 router, capacity and Batch Priority Routing as our layer, but
no sums for losses.

- dense: one MLP on T K rows, with its own [D, F] and [F, D] and without routing
- one-hot: V-MoE's einsum dispatch through a [G, S, E, C] tensor; its cost grows with the group
- scatter: V-MoE's other dispatch, a scatter to [G, E, C, D] and a gather back
- ragged_dot, megablox, mosaic, tokamax: a sort by expert, then `jax.lax.ragged_dot`, JAX's Pallas kernels for TPU and
  for Hopper, or tokamax; tokamax-v2 is its newer kernel for TPUs
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from benchmarks.cases import Case
from benchmarks.implementations import Counts, Implementation, Setting
from benchmarks.roofline import Op
from moe_kernels import MlpWeights
from moe_kernels.chips import find_generation

# Rows of a tile in megablox and in Mosaic's ragged dot, and megablox's tile size in D and F.
_TILE_ROWS, _MEGABLOX_TILE = 128, 512
# The most FLOPs of a layer's forward and backward pass for a dense expansion on a CPU (about 20 s on 2 cores).
_CPU_LIMIT = 2e12

Matmul = Callable[[Array, Array, Array], Array]
"""(rows [R, D] sorted by expert, weight [E, D, F], number of rows [E]) to [R, F]."""


def _route(case: Case, tokens: Array, router: Array, noise: Array) -> tuple[Int[Array, "T K"], Float[Array, "T K"]]:
    logits = jnp.dot(tokens.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)
    gate, expert = jax.lax.top_k(jax.nn.softmax(logits + noise, axis=1), case.choices)
    return expert, gate


def _with_layer(operations: dict[Op, Callable[..., Any]]) -> dict[Op, Callable[..., Any]]:
    """Add the layer: the router, then the operations in order."""

    def layer(case: Case, tokens: Array, router: Array, weights: MlpWeights, noise: Array) -> Float[Array, "T D"]:
        expert, gate = _route(case, tokens, router, noise)
        plan = operations["plan"](case, expert, jax.lax.stop_gradient(gate))
        rows = operations["expert_mlp"](case, plan, operations["dispatch"](case, plan, tokens), weights)
        return operations["combine"](case, plan, rows, gate)

    return {**operations, "layer": layer}


def _add_picked(pick: Callable[..., Array]) -> Callable[..., Array]:
    """Make a combine that picks the row of each choice and adds up those of a token, weighted by gate."""

    def combine(case: Case, plan: Any, rows: Array, gate: Array) -> Float[Array, "T D"]:
        picked = pick(case, plan, rows).reshape(*gate.shape, -1)
        return jnp.einsum("tk,tkd->td", gate, picked.astype(jnp.float32)).astype(rows.dtype)

    return combine


def _dense_mlp(case: Case, plan: None, rows: Float[Array, "R D"], weights: MlpWeights) -> Float[Array, "R D"]:
    assert weights.b1 is not None and weights.b2 is not None
    hidden = jax.nn.gelu(rows @ weights.w1[0] + weights.b1[0])
    return hidden @ weights.w2[0] + weights.b2[0]


DENSE = Implementation(
    name="dense",
    operations={
        "grouped_matmul": lambda case, plan, rows, weight: rows @ weight[0],
        "expert_mlp": _dense_mlp,
        "layer": lambda case, tokens, weights: _dense_mlp(case, None, jnp.repeat(tokens, case.choices, 0), weights),
    },
    place=lambda case, plan, choices: choices,
    pick=lambda case, plan, rows: rows,
    computed_rows=lambda case, counts, setting: case.tokens * case.choices,
    is_dense=True,
)


# V-MoE has a buffer of C rows for every group and expert.


class Buffers(NamedTuple):
    """The expert and position of each choice. A choice at position C or later is dropped."""

    expert: Int[Array, "G S K"]
    position: Int[Array, "G S K"]


def _buffer_plan(case: Case, expert: Int[Array, "T K"], gate: Float[Array, "T K"]) -> Buffers:
    """Compute positions by a cumulative sum over one-hot rows: the number of earlier choices of the same expert."""
    shape = (case.groups, case.group_size, case.choices)

    def of_group(expert: Int[Array, "S K"], gate: Float[Array, "S K"]) -> Int[Array, "S K"]:
        order = jnp.argsort(-gate[:, 0], stable=True)
        # The first choices of all tokens come before second choices.
        sorted_expert = expert[order].T.reshape(-1)
        hits = jax.nn.one_hot(sorted_expert, case.experts, dtype=jnp.int32)
        before = jnp.take_along_axis(jnp.cumsum(hits, axis=0), sorted_expert[:, None], axis=1)[:, 0] - 1
        return jnp.zeros_like(expert).at[order].set(before.reshape(case.choices, -1).T)

    expert = expert.reshape(shape)
    return Buffers(expert, jax.vmap(of_group)(expert, gate.reshape(shape)))


def _flat(case: Case, plan: Buffers) -> Int[Array, " M"]:
    """Compute the row of each choice in [G E C, D]; a dropped choice gets the row after the last."""
    group = jnp.arange(case.groups)[:, None, None]
    row = (group * case.experts + plan.expert) * case.capacity + plan.position
    return jnp.where(plan.position < case.capacity, row, case.groups * case.experts * case.capacity).reshape(-1)


def _buffer_place(case: Case, plan: Buffers, choices: Float[Array, "M D"]) -> Float[Array, "G E C D"]:
    shape = (case.groups, case.experts, case.capacity, choices.shape[1])
    flat = jnp.zeros((shape[0] * shape[1] * shape[2], shape[3]), choices.dtype)
    return flat.at[_flat(case, plan)].add(choices, mode="drop").reshape(shape)


def _buffer_pick(case: Case, plan: Buffers, rows: Float[Array, "G E C D"]) -> Float[Array, "M D"]:
    return rows.reshape(-1, rows.shape[3]).at[_flat(case, plan)].get(mode="fill", fill_value=0)


def _buffer_matmul(case: Case, plan: Buffers, rows: Array, weight: Array) -> Array:
    return jnp.einsum("gecd,edf->gecf", rows, weight)


def _buffer_mlp(case: Case, plan: Buffers, rows: Array, weights: MlpWeights) -> Array:
    assert weights.b1 is not None and weights.b2 is not None
    hidden = jax.nn.gelu(_buffer_matmul(case, plan, rows, weights.w1) + weights.b1[:, None])
    return _buffer_matmul(case, plan, hidden, weights.w2) + weights.b2[:, None]


def _one_hot(case: Case, plan: Buffers, value: Float[Array, "G S K"]) -> Float[Array, "G S E C"]:
    to_expert = jax.nn.one_hot(plan.expert, case.experts, dtype=value.dtype) * value[..., None]
    return jnp.einsum("gske,gskc->gsec", to_expert, jax.nn.one_hot(plan.position, case.capacity, dtype=value.dtype))


def _one_hot_dispatch(case: Case, plan: Buffers, tokens: Array) -> Float[Array, "G E C D"]:
    grouped = tokens.reshape(case.groups, case.group_size, -1)
    return jnp.einsum("gsec,gsd->gecd", _one_hot(case, plan, jnp.ones_like(plan.expert, tokens.dtype)), grouped)


def _one_hot_combine(case: Case, plan: Buffers, rows: Array, gate: Array) -> Float[Array, "T D"]:
    weights = _one_hot(case, plan, gate.reshape(plan.expert.shape).astype(rows.dtype))
    return jnp.einsum("gsec,gecd->gsd", weights, rows).reshape(case.tokens, -1)


def _scatter_dispatch(case: Case, plan: Buffers, tokens: Array) -> Float[Array, "G E C D"]:
    return _buffer_place(case, plan, jnp.repeat(tokens, case.choices, axis=0))


def _one_hot_flops(case: Case) -> float:
    """Count the FLOPs of one matmul with the [G, S, E C] tensor."""
    return 2.0 * case.tokens * case.experts * case.capacity * case.width


def _needs_capacity(case: Case, dtype: str, platform: str) -> str | None:
    if case.capacity_factor is None:
        return "needs a capacity; without one it would compute every expert on every token"
    return None


def _v_moe(
    name: str,
    dispatch: Callable[..., Array],
    combine: Callable[..., Array],
    around_flops: Callable[[Case], float] = lambda case: 0.0,
) -> Implementation:
    operations: dict[Op, Callable[..., Any]] = {
        "plan": _buffer_plan,
        "dispatch": dispatch,
        "combine": combine,
        "grouped_matmul": _buffer_matmul,
        "expert_mlp": _buffer_mlp,
    }
    return Implementation(
        name=name,
        operations=_with_layer(operations),
        place=_buffer_place,
        pick=_buffer_pick,
        computed_rows=lambda case, counts, setting: case.groups * case.experts * case.capacity,
        why_not=_needs_capacity,
        around_flops=around_flops,
    )


# The others sort choices by expert and compute a grouped matmul over the runs.


class Sorted(NamedTuple):
    """The choices sorted by expert. Dropped choices stay in their run, as rows of zeros."""

    order: Int[Array, " M"]
    expert: Int[Array, " M"]
    kept: Bool[Array, " M"]
    sizes: Int[Array, " E"]


def _sorted_plan(case: Case, expert: Int[Array, "T K"], gate: Float[Array, "T K"]) -> Sorted:
    column = jnp.broadcast_to(jnp.arange(case.choices), expert.shape)
    group = jnp.broadcast_to(jnp.arange(case.tokens)[:, None] // case.group_size, expert.shape)
    priority = jnp.broadcast_to(-gate[:, :1], expert.shape)
    run = (expert * case.groups + group).reshape(-1)
    order = jnp.lexsort((priority.reshape(-1), column.reshape(-1), run))
    counts = jnp.bincount(run, length=case.experts * case.groups)
    start = jnp.cumsum(counts) - counts
    kept = jnp.arange(order.size) - start[run[order]] < case.capacity
    sizes = counts.reshape(case.experts, case.groups).sum(axis=1).astype(jnp.int32)
    return Sorted(order, expert.reshape(-1)[order], kept, sizes)


def _sorted_place(case: Case, plan: Sorted, choices: Float[Array, "M D"]) -> Float[Array, "M D"]:
    return jnp.where(plan.kept[:, None], choices[plan.order], 0)


def _sorted_pick(case: Case, plan: Sorted, rows: Float[Array, "M D"]) -> Float[Array, "M D"]:
    return jnp.where(plan.kept[:, None], rows, 0)[jnp.argsort(plan.order)]


def _sorted_dispatch(case: Case, plan: Sorted, tokens: Array) -> Float[Array, "M D"]:
    return jnp.where(plan.kept[:, None], tokens[plan.order // case.choices], 0)


def _after_sort(
    name: str,
    matmul: Matmul,
    computed_rows: Callable[[Case, Counts, Setting], int | None],
    why_not: Callable[[Case, str, str], str | None],
) -> Implementation:
    def mlp(case: Case, plan: Sorted, rows: Float[Array, "M D"], weights: MlpWeights) -> Float[Array, "M D"]:
        assert weights.b1 is not None and weights.b2 is not None
        hidden = jax.nn.gelu(matmul(rows, weights.w1, plan.sizes) + weights.b1[plan.expert])
        return matmul(hidden, weights.w2, plan.sizes) + weights.b2[plan.expert]

    operations: dict[Op, Callable[..., Any]] = {
        "plan": _sorted_plan,
        "dispatch": _sorted_dispatch,
        "combine": _add_picked(_sorted_pick),
        "grouped_matmul": lambda case, plan, rows, weight: matmul(rows, weight, plan.sizes),
        "expert_mlp": mlp,
    }
    return Implementation(
        name=name,
        operations=_with_layer(operations),
        place=_sorted_place,
        pick=_sorted_pick,
        computed_rows=computed_rows,
        why_not=why_not,
    )


def _ragged_dot(rows: Array, weight: Array, sizes: Array) -> Array:
    return jax.lax.ragged_dot(rows, weight, sizes)


def _ragged_dot_rows(case: Case, counts: Counts, setting: Setting) -> int:
    """Except on TPUs, JAX expands ragged_dot to every expert on every row."""
    return case.tokens * case.choices * (1 if setting.platform == "tpu" else case.experts)


def _ragged_dot_why_not(case: Case, dtype: str, platform: str) -> str | None:
    flops = 12.0 * case.tokens * case.choices * case.width * case.expert_width * case.experts
    if platform == "cpu" and flops > _CPU_LIMIT:
        return f"expands to {flops / 1e12:.0f} TFLOP for a layer on a CPU, more than {_CPU_LIMIT / 1e12:.0f}"
    return None


def megablox_matmul(rows: Array, weight: Array, sizes: Array, *, interpret: bool = False) -> Array:
    """Run `megablox.gmm` with rows padded to its tile. The last expert computes the padding, which is then cut off."""
    # Import it here, because it loads the TPU part of Pallas.
    from jax.experimental.pallas.ops.tpu.megablox.ops import gmm

    num_rows = rows.shape[0]
    extra = -num_rows % _TILE_ROWS
    tiles = (_TILE_ROWS, min(_MEGABLOX_TILE, weight.shape[1]), min(_MEGABLOX_TILE, weight.shape[2]))
    padded = jnp.pad(rows, ((0, extra), (0, 0)))
    out = gmm(padded, weight, sizes.at[-1].add(extra), rows.dtype, tiles, None, None, False, interpret)
    return out[:num_rows]


def _megablox_why_not(case: Case, dtype: str, platform: str) -> str | None:
    return None if platform == "tpu" else f"is for TPUs, not for {platform}"


def _tokamax(implementation: str) -> Matmul:
    def matmul(rows: Array, weight: Array, sizes: Array) -> Array:
        tokamax = importlib.import_module("tokamax")
        # By default, tokamax uses XLA's ragged dot if this machine has no TPU.
        return tokamax.ragged_dot(rows, weight, group_sizes=sizes, implementation=implementation)

    return matmul


def _tokamax_why_not(case: Case, dtype: str, platform: str) -> str | None:
    if importlib.util.find_spec("tokamax") is None:
        return "is not installed (pip install tokamax; it needs Python 3.12)"
    return None if platform in ("tpu", "gpu") else f"has no kernel for {platform}"


def _tokamax_v2_why_not(case: Case, dtype: str, platform: str) -> str | None:
    return _tokamax_why_not(case, dtype, platform) if platform == "tpu" else f"is for TPUs, not for {platform}"


def mosaic_matmul(rows: Array, weight: Array, sizes: Array) -> Array:
    """Run JAX's own Mosaic kernels for Hopper, forward and backward, with untuned tiles of 128 x 128 x 64."""
    # Import them here, because they load the GPU part of Pallas.
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

    tiles: dict[str, Any] = {
        "block_m": _TILE_ROWS,
        "block_n": 128,
        "block_k": 64,
        "max_concurrent_steps": 4,
        "grid_block_n": 4,
    }

    @jax.custom_vjp
    def matmul(rows: Array, weight: Array) -> Array:
        return ragged_dot(rows, weight, group_sizes=sizes, **tiles)

    def forward(rows: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
        return matmul(rows, weight), (rows, weight)

    def backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
        rows, weight = saved
        d_rows = ragged_dot(cotangent, weight, group_sizes=sizes, transpose_rhs=True, **tiles)
        return d_rows, transposed_ragged_dot(rows, cotangent, group_sizes=sizes, **tiles)

    matmul.defvjp(forward, backward)
    return matmul(rows, weight)


def _mosaic_why_not(case: Case, dtype: str, platform: str) -> str | None:
    chip = find_generation(jax.devices()[0].device_kind) if platform == "gpu" else None
    if chip is None or chip.name != "hopper":
        return f"is for Hopper GPUs, not for {jax.devices()[0].device_kind if platform == 'gpu' else platform}"
    return None if dtype in ("bfloat16", "float16") else f"does not take {dtype}"


def _tiles_visited(case: Case, counts: Counts, setting: Setting) -> int:
    """Count computed rows. A tile of 128 rows in two runs is computed for both; dropped choices stay in their run."""
    ends = np.cumsum(counts.wanted)
    first, last = (ends - counts.wanted) // _TILE_ROWS, -(-ends // _TILE_ROWS)
    return int(_TILE_ROWS * (last - first)[counts.wanted > 0].sum())


PEERS = (
    DENSE,
    _v_moe("one-hot", _one_hot_dispatch, _one_hot_combine, _one_hot_flops),
    _v_moe("scatter", _scatter_dispatch, _add_picked(_buffer_pick)),
    _after_sort("ragged_dot", _ragged_dot, _ragged_dot_rows, _ragged_dot_why_not),
    _after_sort("megablox", megablox_matmul, _tiles_visited, _megablox_why_not),
    _after_sort("mosaic", mosaic_matmul, _tiles_visited, _mosaic_why_not),
    _after_sort("tokamax", _tokamax("mosaic"), lambda case, counts, setting: None, _tokamax_why_not),
    _after_sort("tokamax-v2", _tokamax("mosaic_tpu_v2"), lambda case, counts, setting: None, _tokamax_v2_why_not),
)
