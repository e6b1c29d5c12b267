"""Priorities: which token claims a place first."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from moe_kernels.spec import MoeSpec, RouteInputs
from moe_kernels.types import Routing


def bpr_priority(routing: Routing) -> Float[Array, " T"]:
    """Batch Priority Routing: tokens claim places in order of their largest gate (V-MoE; paper, section 2).

    >>> from moe_kernels import route
    >>> import jax.numpy as jnp
    >>> bool((bpr_priority(route(jnp.eye(2), jnp.eye(2))) > 0.5).all())
    True
    """
    return jax.lax.stop_gradient(jnp.max(routing.gate, axis=1))


def random_priority(
    key: Key[Array, ""], *, num_groups: int, group_size: int, first_group: int | Int[Array, ""] = 0
) -> Float[Array, " T"]:
    """Draw a random order for every group g from `fold_in(key, first_group + g)`.

    >>> import jax
    >>> random_priority(jax.random.key(0), num_groups=2, group_size=3).shape
    (6,)
    """
    groups = first_group + jnp.arange(num_groups, dtype=jnp.int32)
    draw = jax.vmap(lambda g: jax.random.uniform(jax.random.fold_in(key, g), (group_size,), jnp.float32))
    return draw(groups).reshape(num_groups * group_size)


def modality_priority(modality: Int[Array, " T"], first_modality: int) -> Float[Array, " T"]:
    """Put all tokens of one modality before all others, each modality in order of arrival.

    >>> import jax.numpy as jnp
    >>> modality_priority(jnp.array([0, 1, 1]), 1).tolist()
    [0.0, 1.0, 1.0]
    """
    return (modality == first_modality).astype(jnp.float32)


def priority_of(spec: MoeSpec, routing: Routing, inputs: RouteInputs) -> Float[Array, " T"] | None:
    """Compute the priority that a spec asks for; None is the order of arrival.

    Raises ValueError if an input that the priority needs is missing.

    >>> import jax.numpy as jnp
    >>> from moe_kernels import route
    >>> priority_of(MoeSpec(priority="arrival"), route(jnp.eye(2), jnp.eye(2)), RouteInputs()) is None
    True
    """
    if inputs.token_priority is not None:
        return inputs.token_priority
    if spec.priority == "bpr":
        return bpr_priority(routing)
    if spec.priority == "random":
        if inputs.key is None:
            raise ValueError("priority='random' needs a key; pass RouteInputs(key=jax.random.key(...))")
        group_size = routing.expert.shape[0] // spec.num_groups
        return random_priority(
            inputs.key, num_groups=spec.num_groups, group_size=group_size, first_group=inputs.first_group
        )
    if spec.priority == "modality":
        if inputs.modality is None:
            raise ValueError("priority='modality' needs modality ids; pass RouteInputs(modality=[T] integers)")
        return modality_priority(inputs.modality, spec.first_modality)
    return None
