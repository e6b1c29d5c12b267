"""The router in float32: logits, softmax, the K best experts and all sums, without gather or scatter.

Paper, sections 2 (routing) and 3 (auxiliary losses): `A = x W`, `g = softmax(A + noise)`, the K largest kept as is.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from moe_kernels.backends.base import RouteInputs, RouteStatic
from moe_kernels.types import Routing, RoutingSums


class RouteSaved(NamedTuple):
    """What the backward pass needs; `expert` is the decision itself, never taken twice."""

    tokens: Float[Array, "T D"]
    router: Float[Array, "D E"]
    logits: Float[Array, "T E"]
    expert: Int[Array, "T K"]
    inputs: RouteInputs


def _select_masked(tokens: Float[Array, "T D"], mask: Bool[Array, " T"] | None) -> Float[Array, "T D"]:
    tokens = tokens.astype(jnp.float32)
    return tokens if mask is None else jnp.where(mask[:, None], tokens, jnp.float32(0))


def _gates_and_sums(
    logits: Float[Array, "T E"], expert: Int[Array, "T K"], static: RouteStatic, inputs: RouteInputs
) -> tuple[Float[Array, "T K"], RoutingSums]:
    """Everything that has a derivative, as a function of the clean logits for a given choice of experts."""
    num_experts = logits.shape[1]
    noisy = logits if inputs.noise is None else logits + inputs.noise
    ids = jnp.arange(num_experts, dtype=jnp.int32)

    def of_choice(values: Float[Array, "T E"], choice: int) -> Float[Array, " T"]:
        return jnp.sum(jnp.where(expert[:, choice, None] == ids, values, jnp.float32(0)), axis=1)

    log_partition = jax.nn.logsumexp(logits, axis=1)
    log_probability = logits - log_partition[:, None]
    probability = jnp.exp(log_probability)
    noisy_probability = probability if inputs.noise is None else jax.nn.softmax(noisy, axis=1)
    finite = jnp.all(jnp.isfinite(noisy), axis=1)
    gate = jnp.stack([of_choice(noisy_probability, k) for k in range(static.num_choices)], axis=1)
    gate = jnp.where(finite[:, None], gate, jnp.float32(jnp.nan))

    if inputs.noise is None:
        load = jnp.zeros_like(logits)
    else:
        threshold = of_choice(noisy, static.num_choices - 1)
        load = jax.scipy.stats.norm.cdf((logits - threshold[:, None]) / jnp.float32(static.noise_std))
    wanted = jnp.zeros(logits.shape, jnp.int32)
    for choice in range(static.num_choices):
        # A token whose logits are not finite wants nothing.
        wanted += (finite[:, None] & (expert[:, choice, None] == ids)).astype(jnp.int32)

    members = _members(logits.shape[0], static, inputs)

    def total(values: Array) -> Array:
        """Sum a [T, ...] array over the tokens of each group and modality, by selection."""
        zero = jnp.zeros((), values.dtype)
        columns = (slice(None),) + (None,) * (values.ndim - 1)
        sums = [
            jnp.sum(jnp.where(member[columns], values, zero).reshape(static.num_groups, -1, *values.shape[1:]), axis=1)
            for member in members
        ]
        return jnp.stack(sums, axis=1).astype(jnp.float32)

    sums = RoutingSums(
        tokens=total(jnp.ones(logits.shape[:1], jnp.int32)),
        wanted=total(wanted),
        probability=total(probability),
        # p log p with p = 0 from a logit far below the others: exp underflows before the product overflows.
        entropy=total(-jnp.sum(probability * log_probability, axis=1)),
        logsumexp_squared=total(jnp.square(log_partition)),
        load=total(load),
        largest_gate=total(gate[:, 0]),
    )
    if inputs.mask is not None:
        gate = jnp.where(inputs.mask[:, None], gate, jnp.float32(0))
    return gate, sums


def _members(num_tokens: int, static: RouteStatic, inputs: RouteInputs) -> list[Bool[Array, " T"]]:
    mask = jnp.ones(num_tokens, bool) if inputs.mask is None else inputs.mask
    if inputs.modality is None:
        return [mask] + [jnp.zeros_like(mask)] * (static.num_modalities - 1)
    return [mask & (inputs.modality == m) for m in range(static.num_modalities)]


def route_forward(
    static: RouteStatic, tokens: Float[Array, "T D"], router: Float[Array, "D E"], inputs: RouteInputs
) -> tuple[Routing, RouteSaved]:
    """Decide experts (ties to the lower index), gates and sums."""
    # HIGHEST: a float32 dot is bfloat16 on TPU and tf32 on GPU by default, and near ties would be decided by rounding.
    logits = jnp.dot(
        _select_masked(tokens, inputs.mask), router.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    noisy = logits if inputs.noise is None else logits + inputs.noise
    # top_k puts -0.0 below 0.0, which are a tie.
    _, expert = jax.lax.top_k(jnp.where(noisy == 0, jnp.float32(0), noisy), static.num_choices)
    # Named here, inside, so that a remat policy saves the decision itself and not a recomputed twin of it.
    expert = checkpoint_name(expert.astype(jnp.int32), "moe_routing")
    gate, sums = _gates_and_sums(logits, expert, static, inputs)
    gate = checkpoint_name(gate, "moe_routing")
    return Routing(expert, gate, sums), RouteSaved(tokens, router, logits, expert, inputs)


def logits_gradient(static: RouteStatic, saved: RouteSaved, cotangent: Routing) -> Float[Array, "T E"]:
    """The gradient of the clean logits through gates and sums, for the choice already made; 0 for padding."""
    _, pull = jax.vjp(lambda a: _gates_and_sums(a, saved.expert, static, saved.inputs), saved.logits)
    (dlogits,) = pull((cotangent.gate, cotangent.sums))
    if saved.inputs.mask is not None:
        dlogits = jnp.where(saved.inputs.mask[:, None], dlogits, jnp.float32(0))
    return dlogits


def route_backward(
    static: RouteStatic, saved: RouteSaved, cotangent: Routing, passed: Float[Array, "T D"] | None = None
) -> tuple[Float[Array, "T D"], Float[Array, "D E"]]:
    """`dx = dA Wᵀ`, plus the cotangent of tokens that were passed on; `dW = xᵀ dA`."""
    dlogits = logits_gradient(static, saved, cotangent)
    highest = jax.lax.Precision.HIGHEST
    router = saved.router.astype(jnp.float32)
    dtokens = jnp.einsum("te,de->td", dlogits, router, precision=highest)
    if passed is not None:
        dtokens += passed.astype(jnp.float32)
    drouter = jnp.einsum("td,te->de", _select_masked(saved.tokens, saved.inputs.mask), dlogits, precision=highest)
    return dtokens.astype(saved.tokens.dtype), drouter.astype(saved.router.dtype)
