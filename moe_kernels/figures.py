"""Routing figures of each modality from sums; a figure that ignores modality hides a minority that is dropped."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_kernels.types import RoutingSums


class RoutingFigures(NamedTuple):
    """What to watch, for each modality (paper, section 6); entropies in nats, NaN for a modality without tokens.

    >>> RoutingFigures._fields[:3]
    ('wanted', 'kept', 'success_rate')
    """

    wanted: Float[Array, "M E"]
    kept: Float[Array, "M E"]
    success_rate: Float[Array, " M"]
    """Share of choices that found room."""
    largest_gate: Float[Array, " M"]
    local_entropy: Float[Array, " M"]
    """Mean entropy of a token's softmax."""
    mean_entropy: Float[Array, " M"]
    """Entropy of the mean softmax."""
    effective_experts: Float[Array, " M"]
    """exp(mean_entropy): how many experts the modality spreads over."""


def entropy_of_mean(probability: Float[Array, "... E"], tokens: Float[Array, "..."]) -> Float[Array, "..."]:
    """Entropy (nats) of the mean distribution, from summed probabilities and the number of tokens; `0 log 0 = 0`.

    >>> import jax.numpy as jnp
    >>> round(float(entropy_of_mean(jnp.array([3.0, 3.0]), jnp.array(6.0))), 4)
    0.6931
    """
    mean = probability / tokens[..., None]
    positive = mean > 0
    # Two selections, so that the derivative of log at 0 never meets a zero cotangent (0 * inf = NaN).
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
