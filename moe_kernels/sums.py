"""Sums over the tokens of each group and modality. Selection keeps padding and other modalities out of each sum."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def members_of(
    num_tokens: int, num_modalities: int, modality: Int[Array, " T"] | None, mask: Bool[Array, " T"] | None
) -> list[Bool[Array, " T"]]:
    """Find the tokens of each modality; padding belongs to none.

    >>> [member.tolist() for member in members_of(2, 1, None, jnp.array([True, False]))]
    [[True, False]]
    """
    mask = jnp.ones(num_tokens, bool) if mask is None else mask
    if modality is None:
        return [mask] + [jnp.zeros_like(mask)] * (num_modalities - 1)
    return [mask & (modality == m) for m in range(num_modalities)]


def total(values: Array, members: list[Bool[Array, " T"]], num_groups: int) -> Float[Array, "G M ..."]:
    """Sum a `[T, ...]` array over the tokens of each group and modality.

    >>> total(jnp.arange(4.0), [jnp.array([True, True, True, False])], 2).tolist()
    [[1.0], [2.0]]
    """
    zero = jnp.zeros((), values.dtype)
    columns = (slice(None),) + (None,) * (values.ndim - 1)
    sums = [
        jnp.sum(jnp.where(member[columns], values, zero).reshape(num_groups, -1, *values.shape[1:]), axis=1)
        for member in members
    ]
    return jnp.stack(sums, axis=1).astype(jnp.float32)


def counts(expert: Int[Array, "T K"], counted: Bool[Array, " T"], num_experts: int) -> Int[Array, "T E"]:
    """Count how often each token wants each expert; 0 for tokens that are not `counted`.

    >>> counts(jnp.array([[1, 0]]), jnp.array([True]), 3).tolist()
    [[1, 1, 0]]
    """
    ids = jnp.arange(num_experts, dtype=jnp.int32)
    wanted = jnp.zeros((expert.shape[0], num_experts), jnp.int32)
    for choice in range(expert.shape[1]):
        wanted += (counted[:, None] & (expert[:, choice, None] == ids[None])).astype(jnp.int32)
    return wanted
