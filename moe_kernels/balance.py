"""Losses that balance experts, as functions of a routing's sums. Sums leave padding out, so these losses do too.

Each loss is by group, `[..., G]`; leading axes, of layers say, stay. For a loss over the whole batch, however the step
was cut, add up the groups first (`whole_batch`). With `t_g` tokens in group g, `wanted_ge` choices of expert e and
`p_ge` the sum of its probabilities, all over modalities, shares are `f_ge = wanted_ge / t_g` and `P_ge = p_ge / t_g`.
Only `P` has a derivative. A group without tokens adds 0.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_kernels.types import RoutingSums


def whole_batch(sums: RoutingSums) -> RoutingSums:
    """Add up all groups: sums `[G, M, ...]` become `[1, M, ...]`.

    >>> from moe_kernels import MoeSpec, route
    >>> sums = route(jnp.eye(4), jnp.zeros((4, 2)), MoeSpec(num_groups=2)).sums
    >>> whole_batch(sums).tokens.tolist()
    [[4.0]]
    """
    return RoutingSums(*(jnp.sum(values, axis=0, keepdims=True) for values in sums))


def balance_loss(sums: RoutingSums) -> Float[Array, "... G"]:
    """Compute `E Σ_e f_e P_e`, which is K for experts in balance (Switch Transformer, equation 4; Mixtral).

    Fedus et al. 2021 have K = 1. With more choices, `f` counts all of them, so it adds up to K.

    >>> from moe_kernels import MoeSpec, route
    >>> x = jnp.array([[9.0, 0.0], [0.0, 9.0]])
    >>> [round(float(balance_loss(route(x, w).sums)[0]), 3) for w in (jnp.eye(2), jnp.array([[9.0, 0], [9, 0]]))]
    [1.0, 2.0]
    """
    tokens = jnp.maximum(jnp.sum(sums.tokens, axis=-1), 1)[..., None]
    wanted, probability = jnp.sum(sums.wanted, axis=-2) / tokens, jnp.sum(sums.probability, axis=-2) / tokens
    return wanted.shape[-1] * jnp.sum(wanted * probability, axis=-1)


def sequence_balance_loss(sums: RoutingSums) -> Float[Array, "... G"]:
    """Compute `E / K Σ_e f_e P_e` of each sequence, for a routing with one group a sequence (DeepSeek-V3, equation 17).

    Its mean over groups is the loss of a batch. `P` are shares of the scores, of a sigmoid router too.

    >>> from moe_kernels import MoeSpec, route
    >>> routing = route(jnp.eye(4), jnp.zeros((4, 4)), MoeSpec(num_choices=2, num_groups=2))
    >>> sequence_balance_loss(routing.sums).tolist()
    [1.0, 1.0]
    """
    choices = jnp.sum(sums.wanted, axis=(-2, -1)) / jnp.maximum(jnp.sum(sums.tokens, axis=-1), 1)
    return balance_loss(sums) / jnp.maximum(choices, 1)


def importance_loss(sums: RoutingSums) -> Float[Array, "... G"]:
    """Compute the squared coefficient of variation over experts of `p_e` (Shazeer et al. 2017, equation 7).

    >>> from moe_kernels import route
    >>> importance_loss(route(jnp.eye(2), jnp.zeros((2, 4))).sums).tolist()
    [0.0]
    """
    return squared_variation(jnp.sum(sums.probability, axis=-2))


def load_loss(sums: RoutingSums) -> Float[Array, "... G"]:
    """Compute the squared coefficient of variation over experts of the smooth load (Shazeer et al. 2017, appendix A).

    It needs `RouteInputs.noise`; without noise it is 0.

    >>> from moe_kernels import route
    >>> load_loss(route(jnp.eye(2), jnp.zeros((2, 4))).sums).tolist()
    [0.0]
    """
    return squared_variation(jnp.sum(sums.load, axis=-2))


def z_loss(sums: RoutingSums) -> Float[Array, "... G"]:
    """Compute the mean over tokens of `logsumexp(logits)²` (ST-MoE, equation 5).

    >>> from moe_kernels import route
    >>> [round(value, 4) for value in z_loss(route(jnp.eye(2), jnp.zeros((2, 32))).sums).tolist()]
    [12.0113]
    """
    return jnp.sum(sums.logsumexp_squared, axis=-1) / jnp.maximum(jnp.sum(sums.tokens, axis=-1), 1)


def squared_variation(values: Float[Array, "... E"]) -> Float[Array, "..."]:
    """Compute `(std / mean)²` over experts, with the population's std; 0 if all values are 0.

    >>> float(squared_variation(jnp.array([1.0, 0.0, 0.0, 0.0])))
    3.0
    """
    mean = jnp.mean(values, axis=-1)
    return jnp.var(values, axis=-1) / jnp.square(jnp.where(mean == 0, 1, mean))
