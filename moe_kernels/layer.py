"""The whole mixture-of-experts layer, on one device or with its experts spread over a mesh."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float

from moe_kernels import local
from moe_kernels.axes import place, refuse_split
from moe_kernels.experts import check_experts
from moe_kernels.parallel.shard import check_exchange, moe_mlp_on_shard
from moe_kernels.parallel.width import check_width, split_weights
from moe_kernels.routing import router_weights
from moe_kernels.spec import ExchangeSpec, MoeSpec, RouteInputs
from moe_kernels.types import ExpertWeights, MoeOutput, RouterWeights, Routing, WithShared

_NOW_IN = {
    **dict.fromkeys((field.name for field in dataclasses.fields(MoeSpec)), "MoeSpec"),
    **dict.fromkeys(RouteInputs._fields, "RouteInputs"),
    **dict.fromkeys((field.name for field in dataclasses.fields(ExchangeSpec)), "MoeSpec(exchange=ExchangeSpec"),
}


def moe_mlp(
    tokens: Float[Array, "T D"],
    router: Float[Array, "D E"] | RouterWeights | Routing,
    weights: ExpertWeights,
    spec: MoeSpec = MoeSpec(),  # noqa: B008 (frozen)
    inputs: RouteInputs = RouteInputs(),  # noqa: B008 (a tuple)
    *,
    mesh: Mesh | AbstractMesh | None = None,
    **renamed: Any,
) -> MoeOutput:
    """Send every token through its `num_choices` best experts: `y = sum of gate_e MLP_e(x)` (paper, section 2).

    `router` is a matrix, `RouterWeights` with biases, or a `Routing` that the caller made (`make_routing`). `weights`
    are plain or gated experts, with or without a shared expert. Padding and tokens without a place are 0 in the output,
    except for what the shared expert adds. Returns the tokens, the router's sums and the counts of kept choices.
    Differentiable once in tokens, router and weights.

    With a `mesh`, `moe_mlp` is the same function of global arrays; call it outside `shard_map`. It splits tokens and
    inputs by whole groups over `spec.exchange.token_axes`, and experts over `expert_axis`. Every device has the router
    and the shared expert. Devices that differ only in `expert_axis` exchange rows, twice forward and twice backward.
    With a `width_axis` the hidden layers of the experts are split over it, and the parts of the output are added up.
    Without a capacity limit, rows that do not fit in a receiver's buffer (`buffer_factor`) are dropped. Each receiver
    cuts the longest runs to one length, and a run loses its last groups first. The dropped rows are the difference
    between `sums.wanted` and `kept`; only they depend on the mesh. Take gradients of this function, not of something
    inside its `shard_map`. Raises ValueError for arguments that do not fit.

    >>> import jax, jax.numpy as jnp
    >>> from moe_kernels import MlpWeights, MoeSpec
    >>> keys = jax.random.split(jax.random.key(0), 4)
    >>> x = jax.random.normal(keys[0], (8, 4))
    >>> weights = MlpWeights(jax.random.normal(keys[1], (2, 4, 16)), None, jax.random.normal(keys[2], (2, 16, 4)), None)
    >>> output = moe_mlp(x, jax.random.normal(keys[3], (4, 2)), weights, MoeSpec(capacity_factor=1.0))
    >>> output.tokens.shape, bool((output.kept <= 4).all())
    ((8, 4), True)
    >>> mesh = jax.make_mesh((1,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> moe_mlp(jnp.ones((6, 4)), jnp.eye(4, 2), weights, MoeSpec(capacity_factor=1.0), mesh=mesh).kept.tolist()
    [[[3.0, 0.0]]]
    """
    _refuse_renamed(renamed)
    tokens, weights = jax.tree.map(jnp.asarray, (tokens, weights))
    router = router if isinstance(router, Routing) else router_weights(router)
    if mesh is not None:
        return _on_mesh(tokens, router, weights, spec, inputs, mesh)
    refuse_split(tokens=tokens, router=router, weights=weights)
    output = local.moe_mlp_here(tokens, router, local.routed_of(weights), spec, inputs)
    return local.with_shared(output, tokens, weights, spec)


def _refuse_renamed(renamed: dict[str, Any]) -> None:
    for name in renamed:
        if name not in _NOW_IN:
            raise TypeError(f"moe_mlp() got an unexpected keyword argument {name!r}")
        home = _NOW_IN[name]
        where = "inputs" if home == "RouteInputs" else "spec"
        call = f"{home}({name}=...)" + ")" * home.count("(")
        raise TypeError(f"moe_mlp takes {name} in {where}: moe_mlp(tokens, router, weights, {where}={call})")


def _on_mesh(
    tokens: Float[Array, "T D"],
    router: RouterWeights | Routing,
    weights: ExpertWeights,
    spec: MoeSpec,
    inputs: RouteInputs,
    mesh: Mesh | AbstractMesh,
) -> MoeOutput:
    axes = _token_axes(mesh, spec.exchange)
    shards, expert_axis = math.prod(mesh.shape[axis] for axis in axes), spec.exchange.expert_axis
    local.check_router(tokens, router, spec, inputs)
    check_experts(local.routed_of(weights), local.num_experts_of(router), tokens.shape[1])
    check_exchange(spec, local.num_experts_of(router), mesh.shape[expert_axis])
    check_width(local.routed_of(weights), spec, mesh.shape.get(spec.exchange.width_axis, 1))
    if spec.num_groups % shards:
        raise ValueError(
            f"num_groups={spec.num_groups} cannot be split over the {shards} shards of mesh axes {axes}; "
            f"use a multiple of {shards}"
        )
    groups_here = spec.num_groups // shards
    here = dataclasses.replace(spec, num_groups=groups_here)
    stride = groups_here if spec.exchange.group_stride is None else spec.exchange.group_stride

    def on_shard(tokens: Array, router: Any, weights: Any, inputs: RouteInputs) -> MoeOutput:
        first = inputs.first_group + stride * jax.lax.axis_index(axes)
        return moe_mlp_on_shard(tokens, router, weights, here, inputs._replace(first_group=first))

    by_token, whole = PartitionSpec(axes), PartitionSpec()
    routed = split_weights(local.routed_of(weights), spec.exchange)
    specs = (
        by_token,
        by_token if isinstance(router, Routing) else whole,
        WithShared._make((routed, whole, whole)) if isinstance(weights, WithShared) else routed,
        RouteInputs._make((by_token, by_token, by_token, by_token, by_token, whole, whole)),
    )
    first_group = jnp.asarray(inputs.first_group, jnp.int32)
    arguments = tokens, router, weights, inputs._replace(first_group=first_group)
    # Interpreted kernels do not trace with the check. Without it, gradients are right if they are taken outside.
    sharded = jax.shard_map(on_shard, mesh=mesh, in_specs=specs, out_specs=by_token, check_vma=False)
    return sharded(*place(arguments, specs, mesh))


def _token_axes(mesh: Mesh | AbstractMesh, exchange: ExchangeSpec) -> tuple[str, ...]:
    names, expert_axis = tuple(mesh.axis_names), exchange.expert_axis
    if expert_axis not in names:
        raise ValueError(f"expert_axis={expert_axis!r} is not an axis of the mesh; choose one of {names}")
    if exchange.width_axis is not None and (exchange.width_axis not in names or exchange.width_axis == expert_axis):
        raise ValueError(f"width_axis={exchange.width_axis!r} must be an axis of the mesh {names}, not {expert_axis!r}")
    others = tuple(name for name in names if name != exchange.width_axis)
    axes = others if exchange.token_axes is None else tuple(exchange.token_axes)
    if expert_axis not in axes or not set(axes) <= set(others) or len(set(axes)) != len(axes):
        raise ValueError(
            f"token_axes={axes} must be axes of the mesh {others}, each once, and {expert_axis!r} one of them"
        )
    return axes
