"""The whole mixture-of-experts layer on one shard: route, plan, dispatch, experts, combine."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, get_args

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Key

from moe_kernels import backends
from moe_kernels.backends.base import MlpStatic, apply
from moe_kernels.experts import check_mlp, expert_mlp
from moe_kernels.permute import combine, dispatch
from moe_kernels.plan import bpr_priority, expert_capacity, make_plan, modality_priority, random_priority
from moe_kernels.routing import route_and_pass
from moe_kernels.types import Activation, CapacityFactor, MlpWeights, MoeOutput, Plan, Priority, Routing

# Names of values that every remat policy should save: routing is decided once, since a near tie could flip if
# recomputed.
SAVED_NAMES = ("moe_routing", "moe_plan")


def moe_mlp(
    tokens: Float[Array, "T D"],
    router: Float[Array, "D E"],
    weights: MlpWeights,
    *,
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
    """Send every token through its `num_choices` best experts: `y = sum of gate_e MLP_e(x)` (paper, section 2).

    `tokens [T, D]` lie group after group; each group is planned by itself with `ceil(S K c / E)` places an expert for
    `capacity_factor=c`, or without a limit for None. Who gets a place: by `priority`, "bpr" (largest gate first),
    "arrival", "random" (needs `key`; group g of this call draws from `first_group + g`) or "modality" (`first_modality`
    first). A token without a place is 0 in the output; so is padding (`mask` False). Returns the tokens with the
    router's sums and what was kept. Differentiable once in tokens, router and weights. Raises ValueError for arguments
    that do not fit.

    >>> import jax, jax.numpy as jnp
    >>> keys = jax.random.split(jax.random.key(0), 4)
    >>> x = jax.random.normal(keys[0], (8, 4))
    >>> weights = MlpWeights(jax.random.normal(keys[1], (2, 4, 16)), None, jax.random.normal(keys[2], (2, 16, 4)), None)
    >>> output = moe_mlp(x, jax.random.normal(keys[3], (4, 2)), weights, capacity_factor=1.0)
    >>> output.tokens.shape, bool((output.kept <= 4).all())
    ((8, 4), True)
    """
    routing, plan, tokens = decide(
        tokens,
        router,
        num_choices=num_choices,
        capacity_factor=capacity_factor,
        num_groups=num_groups,
        priority=priority,
        noise=noise,
        noise_std=noise_std,
        mask=mask,
        modality=modality,
        num_modalities=num_modalities,
        first_modality=first_modality,
        key=key,
        first_group=first_group,
        backend=backend,
    )
    return MoeOutput(_experts(tokens, routing.gate, weights, plan, activation, backend), routing.sums, plan.kept)


class Decision(NamedTuple):
    """Where every token goes: what the router chose, and who found room; the tokens, passed on by the router."""

    routing: Routing
    plan: Plan
    tokens: Float[Array, "T D"]


def decide(
    tokens: Float[Array, "T D"],
    router: Float[Array, "D E"],
    *,
    num_choices: int,
    capacity_factor: CapacityFactor | None,
    num_groups: int,
    priority: Priority,
    noise: Float[Array, "T E"] | None,
    noise_std: float | None,
    mask: Bool[Array, " T"] | None,
    modality: Int[Array, " T"] | None,
    num_modalities: int,
    first_modality: int,
    key: Key[Array, ""] | None,
    first_group: int | Int[Array, ""],
    backend: str | None,
    round_rows: Callable[[int], int] | None = None,
) -> Decision:
    """Route and plan a layer, with the arguments of `moe_mlp`.

    Where `round_rows` is given and capacity limited, rows are an `[E, rows]` block with the rows that it makes of the
    most an expert can get.
    """
    if priority not in get_args(Priority):
        raise ValueError(f"priority={priority!r} is not one of {', '.join(get_args(Priority))}")
    routing, tokens = route_and_pass(
        tokens,
        router,
        num_choices=num_choices,
        num_groups=num_groups,
        noise=noise,
        noise_std=noise_std,
        modality=modality,
        num_modalities=num_modalities,
        mask=mask,
        backend=backend,
    )
    group_size, num_experts = tokens.shape[0] // num_groups, router.shape[1]
    capacity = (
        None if capacity_factor is None else expert_capacity(group_size, num_choices, num_experts, capacity_factor)
    )
    plan = make_plan(
        routing,
        num_experts=num_experts,
        num_groups=num_groups,
        capacity=capacity,
        priority=_priority(
            priority, routing, num_groups, group_size, modality, num_modalities, first_modality, key, first_group
        ),
        modality=modality,
        num_modalities=num_modalities,
        rows_per_expert=None if capacity is None or round_rows is None else round_rows(num_groups * capacity),
    )
    return Decision(routing, jax.tree.map(lambda leaf: checkpoint_name(leaf, "moe_plan"), plan), tokens)


def _experts(
    tokens: Float[Array, "T D"],
    gate: Float[Array, "T K"],
    weights: MlpWeights,
    plan: Plan,
    activation: Activation,
    backend: str | None,
) -> Float[Array, "T D"]:
    """Dispatch, experts and combine: in one span where a back end has it, else one after the other."""
    problem = backends.problem_of(
        "dispatch_mlp_combine",
        tokens,
        plan.layout.num_experts,
        expert_width=weights.w1.shape[-1],
        layout=plan.layout,
        weight_dtype=str(weights.w1.dtype),
    )
    if (span := backends.find(problem, backend)) is not None:
        check_mlp(weights, plan.layout.num_experts, tokens.shape[1], activation)
        return apply(span, MlpStatic(plan.layout, activation), (tokens, gate, weights), (plan,))
    rows = dispatch(tokens, plan, backend=backend)
    rows = expert_mlp(rows, weights, plan, activation=activation, backend=backend)
    return combine(rows, gate, plan, backend=backend)


def _priority(
    name: Priority,
    routing: Routing,
    num_groups: int,
    group_size: int,
    modality: Int[Array, " T"] | None,
    num_modalities: int,
    first_modality: int,
    key: Key[Array, ""] | None,
    first_group: int | Int[Array, ""],
) -> Float[Array, " T"] | None:
    if name == "bpr":
        return bpr_priority(routing)
    if name == "random":
        if key is None:
            raise ValueError("priority='random' needs a key; pass key=jax.random.key(...)")
        return random_priority(key, num_groups=num_groups, group_size=group_size, first_group=first_group)
    if name == "modality":
        if modality is None:
            raise ValueError("priority='modality' needs modality ids; pass modality=[T] integers")
        if not 0 <= first_modality < num_modalities:
            raise ValueError(
                f"first_modality={first_modality} is not one of num_modalities={num_modalities}; "
                f"choose from 0 to {num_modalities - 1}"
            )
        return modality_priority(modality, first_modality)
    return None
