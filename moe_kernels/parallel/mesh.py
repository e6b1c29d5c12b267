"""The layer with its experts spread over a mesh axis: `moe_mlp` of global arrays, `moe_mlp_on_shard` in `shard_map`.

    tokens ─route, plan, dispatch─▶ rows ═exchange═▶ rows ─experts─▶ rows ═exchange═▶ rows ─combine─▶ tokens

Tokens are split over all axes by whole groups, and routed and planned where they are, so the result, drops included,
does not depend on the mesh.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from moe_kernels import layer
from moe_kernels.experts import check_mlp, expert_mlp_over_runs
from moe_kernels.parallel import exchange
from moe_kernels.parallel import ragged as ragged_exchange
from moe_kernels.permute import combine, dispatch
from moe_kernels.plan import as_fraction
from moe_kernels.routing import check_route
from moe_kernels.types import Activation, CapacityFactor, MlpWeights, MoeOutput, Priority

# Names of the exchanged rows. A remat policy that saves them beside SAVED_NAMES exchanges twice in the backward pass of
# a layer and keeps two more [R, D] of it; one that does not exchanges four times.
EXCHANGE_NAMES = ("moe_received", "moe_returned")


def moe_mlp(
    tokens: Float[Array, "T D"],
    router: Float[Array, "D E"],
    weights: MlpWeights,
    *,
    mesh: Mesh | AbstractMesh,
    expert_axis: str = "expert",
    token_axes: Sequence[str] | None = None,
    num_chunks: int = 1,
    buffer_factor: CapacityFactor | None = None,
    num_choices: int = 1,
    capacity_factor: CapacityFactor | None = None,
    num_groups: int = 1,
    priority: Priority = "bpr",
    noise: Float[Array, "T E"] | None = None,
    noise_std: float | None = None,
    mask: Bool[Array, " T"] | None = None,
    modality: Int[Array, " T"] | None = None,
    num_modalities: int = 1,
    first_modality: int = 0,
    key: Key[Array, ""] | None = None,
    first_group: int | Int[Array, ""] = 0,
    group_stride: int | None = None,
    activation: Activation = "gelu_tanh",
    backend: str | None = None,
) -> MoeOutput:
    """`moe_kernels.moe_mlp` on a mesh, called on global arrays outside of `shard_map`: the same function.

    Tokens (with noise, mask and modality) are split over `token_axes`, by default all axes of the mesh in its order,
    and experts over `expert_axis`, one of them; weights are whole on every index of the other axes, and the router
    everywhere. All other arguments are of the whole layer as in `moe_kernels.moe_mlp`. Groups are numbered from
    `first_group` on; a shard's first one is `group_stride` after that of the shard before it (default: its number of
    groups), for callers that work only some groups of each shard at a time. Sums and `kept` have their groups split
    like the tokens.

    Rows are exchanged among the devices that differ in `expert_axis` alone, twice forward and twice backward, in
    `num_chunks` pieces of equal size that may overlap with the experts of other pieces. Without a capacity limit each
    device exchanges as many rows as there are, in one piece, and has room for all that could arrive, or for
    `buffer_factor` times what it sends itself (on an axis of one device nothing is sent, and everything has room). What
    finds no room there is dropped, evenly from the longest runs of one expert's rows from one shard, the last groups of
    each first, and shows as the difference between `sums.wanted` and `kept`. What overflows depends on the mesh;
    nothing else does.

    Take gradients of this function, not of something inside its `shard_map`. Raises ValueError for arguments that do
    not fit the mesh.

    >>> import jax, jax.numpy as jnp
    >>> from moe_kernels import MlpWeights
    >>> mesh = jax.make_mesh((1,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> weights = MlpWeights(jnp.ones((2, 4, 8)), None, jnp.ones((2, 8, 4)), None)
    >>> output = moe_mlp(jnp.ones((6, 4)), jnp.eye(4, 2), weights, mesh=mesh, capacity_factor=1.0)
    >>> output.tokens.shape, output.kept.tolist()
    ((6, 4), [[[3.0, 0.0]]])
    """
    axes = _token_axes(mesh, expert_axis, token_axes)
    shards = math.prod(mesh.shape[axis] for axis in axes)
    check_route(tokens, router, num_choices, num_groups, noise, modality, num_modalities, mask)
    check_mlp(weights, router.shape[1], tokens.shape[1], activation)
    _check_options(router.shape[1], mesh.shape[expert_axis], expert_axis, num_chunks, capacity_factor, buffer_factor)
    if num_groups % shards:
        raise ValueError(
            f"num_groups={num_groups} cannot be split over the {shards} shards of mesh axes {axes}; "
            f"use a multiple of {shards}"
        )
    by_token, whole = PartitionSpec(axes), PartitionSpec()
    groups_here = num_groups // shards
    stride = groups_here if group_stride is None else group_stride

    def on_shard(
        tokens: Array,
        router: Array,
        weights: MlpWeights,
        noise: Array | None,
        mask: Array | None,
        modality: Array | None,
        key: Array | None,
        first_group: Array,
    ) -> MoeOutput:
        return moe_mlp_on_shard(
            tokens,
            router,
            weights,
            expert_axis=expert_axis,
            num_chunks=num_chunks,
            buffer_factor=buffer_factor,
            num_choices=num_choices,
            capacity_factor=capacity_factor,
            num_groups=groups_here,
            priority=priority,
            noise=noise,
            noise_std=noise_std,
            mask=mask,
            modality=modality,
            num_modalities=num_modalities,
            first_modality=first_modality,
            key=key,
            first_group=first_group + stride * jax.lax.axis_index(axes),
            activation=activation,
            backend=backend,
        )

    sharded = jax.shard_map(
        on_shard,
        mesh=mesh,
        in_specs=(by_token, whole, PartitionSpec(expert_axis), by_token, by_token, by_token, whole, whole),
        out_specs=by_token,
        # Interpreted kernels do not trace with it; gradients are right without it as long as they are taken outside.
        check_vma=False,
    )
    return sharded(tokens, router, weights, noise, mask, modality, key, jnp.asarray(first_group, jnp.int32))


def moe_mlp_on_shard(
    tokens: Float[Array, "T D"],
    router: Float[Array, "D E"],
    weights: MlpWeights,
    *,
    expert_axis: str,
    num_chunks: int = 1,
    buffer_factor: CapacityFactor | None = None,
    num_choices: int = 1,
    capacity_factor: CapacityFactor | None = None,
    num_groups: int = 1,
    priority: Priority = "bpr",
    noise: Float[Array, "T E"] | None = None,
    noise_std: float | None = None,
    mask: Bool[Array, " T"] | None = None,
    modality: Int[Array, " T"] | None = None,
    num_modalities: int = 1,
    first_modality: int = 0,
    key: Key[Array, ""] | None = None,
    first_group: int | Int[Array, ""] = 0,
    activation: Activation = "gelu_tanh",
    backend: str | None = None,
) -> MoeOutput:
    """What one shard does in `moe_mlp`, for a program that has `shard_map` around more than the layer.

    Everything is this shard's own: its tokens and groups (`first_group` is the number of its first one in the whole
    batch), the whole router, and the weights of its E / shards experts; so are the result's tokens and sums. Raises
    ValueError for a number of experts that cannot be split over the axis.

    >>> import jax, jax.numpy as jnp
    >>> from moe_kernels import MlpWeights
    >>> mesh = jax.make_mesh((1,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> weights = MlpWeights(jnp.ones((2, 4, 8)), None, jnp.ones((2, 8, 4)), None)
    >>> def kept(tokens, router, weights):
    ...     return moe_mlp_on_shard(tokens, router, weights, expert_axis="expert", capacity_factor=1.0).kept
    >>> split, whole = PartitionSpec("expert"), PartitionSpec()
    >>> here = jax.shard_map(kept, mesh=mesh, in_specs=(split, whole, split), out_specs=split, check_vma=False)
    >>> jax.jit(here)(jnp.ones((6, 4)), jnp.eye(4, 2), weights).tolist()
    [[[3.0, 0.0]]]
    """
    shards = jax.lax.axis_size(expert_axis)
    _check_options(router.shape[-1], shards, expert_axis, num_chunks, capacity_factor, buffer_factor)
    options = {
        "num_choices": num_choices,
        "capacity_factor": capacity_factor,
        "num_groups": num_groups,
        "priority": priority,
        "noise": noise,
        "noise_std": noise_std,
        "mask": mask,
        "modality": modality,
        "num_modalities": num_modalities,
        "first_modality": first_modality,
        "key": key,
        "first_group": first_group,
        "backend": backend,
    }
    if shards == 1:
        return layer.moe_mlp(tokens, router, weights, activation=activation, **options)
    run_experts = functools.partial(expert_mlp_over_runs, activation=activation, backend=backend)
    if capacity_factor is None:
        routing, plan, tokens = layer.decide(tokens, router, **options)
        shipped = ragged_exchange.plan_exchange(
            routing, plan, modality, num_modalities, axis=expert_axis, buffer_factor=buffer_factor
        )
        plan = shipped.plan
        rows = ragged_exchange.send(dispatch(tokens, plan, backend=backend), shipped, expert_axis)
        rows = run_experts(rows, weights, *shipped.received)
        back = ragged_exchange.send_back(rows, shipped, expert_axis)
        return MoeOutput(combine(back, routing.gate, plan, backend=backend), routing.sums, plan.kept)
    routing, plan, tokens = layer.decide(
        tokens, router, **options, round_rows=functools.partial(exchange.block_rows, num_chunks=num_chunks)
    )
    received = exchange.received_chunks(plan, expert_axis, num_chunks)
    plan = exchange.in_chunks(plan, num_chunks)
    returned = []
    for chunk, rows in zip(received, jnp.split(dispatch(tokens, plan, backend=backend), num_chunks), strict=True):
        rows = run_experts(exchange.send(rows, chunk, expert_axis), weights, *chunk)
        returned.append(exchange.send_back(rows, chunk, expert_axis))
    back = checkpoint_name(jnp.concatenate(returned), "moe_returned")
    return MoeOutput(combine(back, routing.gate, plan, backend=backend), routing.sums, plan.kept)


def _check_options(
    num_experts: int,
    shards: int,
    axis: str,
    num_chunks: int,
    capacity_factor: CapacityFactor | None,
    buffer_factor: CapacityFactor | None,
) -> None:
    """Refuse what the exchange cannot do."""
    if num_experts % shards:
        divisors = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
        raise ValueError(
            f"{num_experts} experts cannot be split over {shards} shards of mesh axis {axis!r}; "
            f"use a mesh with one of {divisors} there"
        )
    if num_chunks < 1:
        raise ValueError(f"num_chunks={num_chunks} must be at least 1; use 1 for one exchange of everything")
    if buffer_factor is not None and capacity_factor is not None:
        raise ValueError(
            f"buffer_factor={buffer_factor} is for a layer without a capacity limit; leave it out, or use "
            f"capacity_factor=None instead of {capacity_factor}"
        )
    if buffer_factor is not None:
        as_fraction("buffer_factor", buffer_factor)
    if num_chunks > 1 and capacity_factor is None:
        raise ValueError(
            f"num_chunks={num_chunks} needs a capacity limit; without one the exchange is one piece: use num_chunks=1"
        )


def _token_axes(mesh: Mesh | AbstractMesh, expert_axis: str, token_axes: Sequence[str] | None) -> tuple[str, ...]:
    names = tuple(mesh.axis_names)
    if expert_axis not in names:
        raise ValueError(f"expert_axis={expert_axis!r} is not an axis of the mesh; choose one of {names}")
    axes = names if token_axes is None else tuple(token_axes)
    if expert_axis not in axes or not set(axes) <= set(names) or len(set(axes)) != len(axes):
        raise ValueError(
            f"token_axes={axes} must be axes of the mesh {names}, each once, and {expert_axis!r} one of them"
        )
    return axes
