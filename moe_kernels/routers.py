"""Router families by name. A family defines the gates, and the distribution over experts that losses and figures
use."""

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
    """The gate of each expert before it is renormalised or scaled. A larger logit must give a larger gate."""
    log_probability: OfLogits
    """The logarithm of the distribution over experts that enters the sums of a routing."""
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
"""A program may add its own. Kernels know only "softmax"; the XLA back end runs every family."""


def family_of(name: str) -> RouterFamily:
    """Look up a router family by name. Raises ValueError for a name that is not in `ROUTERS`.

    >>> family_of("softmax").normalised
    True
    """
    if name not in ROUTERS:
        raise ValueError(f"router family {name!r} is not one of {', '.join(ROUTERS)}; add it to moe_kernels.ROUTERS")
    return ROUTERS[name]
