"""Router families by name: what a gate is, and what distribution over experts losses and figures see."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

OfLogits = Callable[[Float[Array, "T E"]], Float[Array, "T E"]]


class RouterFamily(NamedTuple):
    """Functions of float32 logits `[T, E]`, differentiable by JAX.

    >>> import jax.numpy as jnp
    >>> ROUTERS["sigmoid"].score(jnp.zeros((1, 2))).tolist()
    [[0.5, 0.5]]
    """

    score: OfLogits
    """What the gate of an expert is, before it is renormalised or scaled. Larger for a larger logit."""
    log_probability: OfLogits
    """Logarithm of the distribution over experts that the sums of a routing hold."""
    normalised: bool
    """Whether the scores of a token are that distribution."""


def _log_share(scores: Float[Array, "T E"], log_scores: Float[Array, "T E"]) -> Float[Array, "T E"]:
    return log_scores - jnp.log(jnp.sum(scores, axis=1, keepdims=True))


ROUTERS: dict[str, RouterFamily] = {
    "softmax": RouterFamily(
        score=lambda logits: jax.nn.softmax(logits, axis=1),
        log_probability=lambda logits: logits - jax.nn.logsumexp(logits, axis=1)[:, None],
        normalised=True,
    ),
    "sigmoid": RouterFamily(
        score=jax.nn.sigmoid,
        log_probability=lambda logits: _log_share(jax.nn.sigmoid(logits), jax.nn.log_sigmoid(logits)),
        normalised=False,
    ),
}
"""A program may add its own; kernels know "softmax", the XLA back end works all of them."""


def family_of(name: str) -> RouterFamily:
    """The family of that name. Raises ValueError for a name that is not in `ROUTERS`.

    >>> family_of("softmax").normalised
    True
    """
    if name not in ROUTERS:
        raise ValueError(f"router family {name!r} is not one of {', '.join(ROUTERS)}; add it to moe_kernels.ROUTERS")
    return ROUTERS[name]
