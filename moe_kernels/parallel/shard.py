"""The layer on one shard inside `shard_map`, with an exchange of rows before and after the experts.

    tokens ─route, plan, dispatch─▶ rows ═exchange═▶ rows ─experts─▶ rows ═exchange═▶ rows ─combine─▶ tokens

Each shard routes and plans its own tokens, so the result, drops included, does not depend on the mesh.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from moe_kernels import local
from moe_kernels.backends import Traced
from moe_kernels.capacity import as_fraction, capacity_of
from moe_kernels.choice import LayerChoice, LayerShapes, choose_layer
from moe_kernels.experts import check_experts
from moe_kernels.parallel import exchange, ragged
from moe_kernels.parallel.width import own_part, sum_parts
from moe_kernels.routing import router_weights
from moe_kernels.spec import MoeSpec, RouteInputs
from moe_kernels.types import ExpertWeights, MoeOutput, PlainWeights, RouterWeights, Routing

# Names of the exchanged rows. A remat policy that saves them beside SAVED_NAMES keeps two more [R, D] arrays of a
# layer, and its backward pass exchanges twice; otherwise it exchanges four times.
EXCHANGE_NAMES = ("moe_received", "moe_returned")


def moe_mlp_on_shard(
    tokens: Float[Array, "T D"],
    router: Float[Array, "D E"] | RouterWeights | Routing,
    weights: ExpertWeights,
    spec: MoeSpec = MoeSpec(),  # noqa: B008 (frozen)
    inputs: RouteInputs = RouteInputs(),  # noqa: B008 (a tuple)
) -> MoeOutput:
    """Do what one shard does in `moe_mlp`, for a program that has `shard_map` around more than the layer.

    Pass this shard's tokens, the whole router, and the weights of this shard's E / shards experts. `spec.num_groups`
    counts this shard's groups; `inputs.first_group` is the number of the first of them in the whole batch. Tokens and
    sums of the result are this shard's too. Rows are exchanged over `spec.exchange.expert_axis`. With a `width_axis`,
    pass the weights of this shard's part of F, and the same tokens along that axis. Raises ValueError if the experts
    cannot be split over the axis.

    >>> import jax, jax.numpy as jnp
    >>> from jax.sharding import PartitionSpec
    >>> from moe_kernels import MlpWeights, MoeSpec
    >>> mesh = jax.make_mesh((1,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> weights = MlpWeights(jnp.ones((2, 4, 8)), None, jnp.ones((2, 8, 4)), None)
    >>> def kept(tokens, router, weights):
    ...     return moe_mlp_on_shard(tokens, router, weights, MoeSpec(capacity_factor=1.0)).kept
    >>> split, whole = PartitionSpec("expert"), PartitionSpec()
    >>> here = jax.shard_map(kept, mesh=mesh, in_specs=(split, whole, split), out_specs=split)
    >>> jax.jit(here)(jnp.ones((6, 4)), jnp.eye(4, 2), weights).tolist()
    [[[3.0, 0.0]]]
    """
    router = router if isinstance(router, Routing) else router_weights(router)
    shards = jax.lax.axis_size(spec.exchange.expert_axis)
    check_exchange(spec, local.num_experts_of(router), shards)
    work = local.moe_mlp_here if shards == 1 else _exchanged
    output = work(tokens, router, own_part(local.routed_of(weights), spec.exchange), spec, inputs)
    output = output._replace(tokens=sum_parts(output.tokens, spec.exchange))
    return local.with_shared(output, tokens, weights, spec)


def _exchanged(
    tokens: Float[Array, "T D"],
    router: RouterWeights | Routing,
    weights: PlainWeights,
    spec: MoeSpec,
    inputs: RouteInputs,
) -> MoeOutput:
    shards = jax.lax.axis_size(spec.exchange.expert_axis)
    local.check_router(tokens, router, spec, inputs)
    check_experts(weights, local.num_experts_of(router) // shards, tokens.shape[1])
    shapes = local.shapes_of(tokens, router, weights, spec)
    choice = choose_exchanged(shapes, router, spec, inputs, shards)
    rows_per_expert = block_rows(spec, shapes)
    decided = local.decide(tokens, router, spec, inputs, choice, rows_per_expert)
    run = _in_one_piece if rows_per_expert is None else _in_chunks
    return run(decided, weights, spec, inputs, choice)


def block_rows(spec: MoeSpec, shapes: LayerShapes) -> int | None:
    """Compute the rows of the block in which an expert's rows are sent; None without a capacity limit."""
    capacity = capacity_of(spec, shapes.num_tokens, shapes.num_experts)
    if capacity is None:
        return None
    return exchange.block_rows(spec.num_groups * capacity, spec.exchange.num_chunks)


def choose_exchanged(
    shapes: LayerShapes,
    router: RouterWeights | Routing,
    spec: MoeSpec,
    inputs: RouteInputs,
    shards: int,
    on: Traced | None = None,
) -> LayerChoice:
    """Choose the spans of a layer whose experts get rows from all shards."""
    layout = local.layout_of(spec, shapes, block_rows(spec, shapes))
    if spec.capacity_factor is None:
        received = ragged.received_layout(layout, shards, spec.exchange.buffer_factor)
    else:
        received = exchange.received_layout(layout, shards, spec.exchange.num_chunks)
    static = local.static_of(router, spec, inputs)
    return choose_layer(shapes, static, layout, received, backend=spec.backend, on=on)


def _in_one_piece(
    decided: local.Decision,
    weights: PlainWeights,
    spec: MoeSpec,
    inputs: RouteInputs,
    choice: LayerChoice,
) -> MoeOutput:
    """Exchange all rows at once, without padding."""
    axis = spec.exchange.expert_axis
    shipped = ragged.plan_exchange(
        decided.routing,
        decided.plan,
        inputs.modality,
        spec.num_modalities,
        axis=axis,
        buffer_factor=spec.exchange.buffer_factor,
    )
    decided = decided._replace(plan=shipped.plan)
    rows = ragged.send(local.dispatch_rows(decided, choice, spec), shipped, axis)
    rows = local.run_experts(rows, weights, *shipped.received, choice, spec)
    back = ragged.send_back(rows, shipped, axis)
    return decided.output(local.combine_rows(back, decided, choice, spec))


def _in_chunks(
    decided: local.Decision,
    weights: PlainWeights,
    spec: MoeSpec,
    inputs: RouteInputs,
    choice: LayerChoice,
) -> MoeOutput:
    """Exchange blocks in chunks of equal size; the exchange of one chunk may overlap with the experts of another."""
    axis, num_chunks = spec.exchange.expert_axis, spec.exchange.num_chunks
    received = exchange.received_chunks(decided.plan, axis, num_chunks)
    decided = decided._replace(plan=exchange.in_chunks(decided.plan, num_chunks))
    sent = local.dispatch_rows(decided, choice, spec)
    returned = []
    for chunk, rows in zip(received, jnp.split(sent, num_chunks), strict=True):
        arrived = exchange.send(rows, chunk, axis)
        returned.append(exchange.send_back(local.run_experts(arrived, weights, *chunk, choice, spec), chunk, axis))
    back = checkpoint_name(jnp.concatenate(returned), "moe_returned")
    return decided.output(local.combine_rows(back, decided, choice, spec))


def check_exchange(spec: MoeSpec, num_experts: int, shards: int) -> None:
    """Refuse options that the exchange cannot satisfy."""
    options = spec.exchange
    if num_experts % shards:
        divisors = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
        raise ValueError(
            f"{num_experts} experts cannot be split over {shards} shards of mesh axis {options.expert_axis!r}; "
            f"use a mesh with one of {divisors} there"
        )
    if options.num_chunks < 1:
        raise ValueError(f"num_chunks={options.num_chunks} must be at least 1; use 1 for one exchange of everything")
    if options.buffer_factor is not None and spec.capacity_factor is not None:
        raise ValueError(
            f"buffer_factor={options.buffer_factor} is for a layer without a capacity limit; leave it out, or use "
            f"capacity_factor=None instead of {spec.capacity_factor}"
        )
    if options.buffer_factor is not None:
        as_fraction("buffer_factor", options.buffer_factor)
    if options.num_chunks > 1 and spec.capacity_factor is None:
        raise ValueError(
            f"num_chunks={options.num_chunks} needs a capacity limit; without one the exchange is in one chunk: use "
            "num_chunks=1"
        )
