"""Routing figures of each modality. A figure over all modalities would hide that tokens of a rare one are dropped."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_kernels.types import RoutingSums


class RoutingFigures(NamedTuple):
    """What to watch for each modality (paper, section 6). Entropies are in nats; NaN for a modality without tokens.

    >>> RoutingFigures._fields[:3]
    ('wanted', 'kept', 'success_rate')
    """

    wanted: Float[Array, "M E"]
    kept: Float[Array, "M E"]
    success_rate: Float[Array, " M"]
    """The share of choices that found a place."""
    largest_gate: Float[Array, " M"]
    local_entropy: Float[Array, " M"]
    """The mean over tokens of the entropy of a token's router probabilities."""
    mean_entropy: Float[Array, " M"]
    """The entropy of the mean router probabilities."""
    effective_experts: Float[Array, " M"]
    """exp(mean_entropy): over how many experts the modality spreads."""


def entropy_of_mean(probability: Float[Array, "... E"], tokens: Float[Array, "..."]) -> Float[Array, "..."]:
    """Compute the entropy (nats) of a mean distribution from summed probabilities and a token count; `0 log 0 = 0`.

    >>> import jax.numpy as jnp
    >>> round(float(entropy_of_mean(jnp.array([3.0, 3.0]), jnp.array(6.0))), 4)
    0.6931
    """
    mean = probability / tokens[..., None]
    positive = mean > 0
    # Without the first selection, the derivative of log at 0 would meet a zero cotangent (0 * inf = NaN).
    log = jnp.log(jnp.where(positive, mean, jnp.float32(1)))
    return -jnp.sum(jnp.where(mean == 0, jnp.float32(0), mean * log), axis=-1)


def routing_figures(sums: RoutingSums, kept: Float[Array, "G M E"]) -> RoutingFigures:
    """Compute the figures of a layer over all groups.

    >>> import jax.numpy as jnp
    >>> from moe_kernels import route
    >>> sums = route(jnp.eye(2), 50 * jnp.eye(2)).sums
    >>> figures = routing_figures(sums, sums.wanted)
    >>> round(float(figures.effective_experts[0]), 3), float(figures.success_rate[0])
    (2.0, 1.0)
    """
    total = RoutingSums(*(values.sum(axis=0) for values in sums))
    kept = kept.sum(axis=0)
    mean_entropy = entropy_of_mean(total.probability, total.tokens)
    return RoutingFigures(
        wanted=total.wanted,
        kept=kept,
        success_rate=kept.sum(axis=-1) / total.wanted.sum(axis=-1),
        largest_gate=total.largest_gate / total.tokens,
        local_entropy=total.entropy / total.tokens,
        mean_entropy=mean_entropy,
        effective_experts=jnp.exp(mean_entropy),
    )
