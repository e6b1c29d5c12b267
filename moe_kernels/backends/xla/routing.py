"""The router in float32: logits, scores, the K best experts and all sums, without gather or scatter.

Paper, sections 2 (routing) and 3 (auxiliary losses): `A = x W`, `g = softmax(A + noise)`, the K largest kept as is.
Other families of scores are those of `moe_kernels.routers`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from moe_kernels.axes import vary_like
from moe_kernels.backends.base import RouteStatic
from moe_kernels.routers import family_of
from moe_kernels.spec import RouteInputs, RouterSpec
from moe_kernels.sums import counts, members_of, total
from moe_kernels.types import RouterWeights, Routing, RoutingSums

# What DeepSeek-V3 adds to the sum of gates before it divides by it.
_SMALLEST_SUM = 1e-20


class RouteSaved(NamedTuple):
    """What the backward pass needs; `expert` is the decision itself, never taken twice."""

    tokens: Float[Array, "T D"]
    router: RouterWeights
    logits: Float[Array, "T E"]
    expert: Int[Array, "T K"]
    inputs: RouteInputs


class GatesAndSums(NamedTuple):
    """Everything of a routing that has a derivative."""

    gate: Float[Array, "T K"]
    sums: RoutingSums


def _select_masked(tokens: Float[Array, "T D"], mask: Bool[Array, " T"] | None) -> Float[Array, "T D"]:
    tokens = tokens.astype(jnp.float32)
    return tokens if mask is None else jnp.where(mask[:, None], tokens, jnp.float32(0))


def _of_choices(values: Float[Array, "T E"], expert: Int[Array, "T K"]) -> Float[Array, "T K"]:
    """What stands at each token's experts, by comparison and sum."""
    ids = jnp.arange(values.shape[1], dtype=jnp.int32)
    picked = [
        jnp.sum(jnp.where(expert[:, choice, None] == ids[None], values, jnp.float32(0)), axis=1)
        for choice in range(expert.shape[1])
    ]
    return jnp.stack(picked, axis=1)


def _largest(gate: Float[Array, "T K"]) -> Float[Array, " T"]:
    """The first of each token's largest gates; all of the derivative is its own."""
    return _of_choices(gate, jnp.argmax(gate, axis=1)[:, None])[:, 0]


def _gates_and_sums(
    logits: Float[Array, "T E"], expert: Int[Array, "T K"], static: RouteStatic, inputs: RouteInputs
) -> GatesAndSums:
    """Gates and sums as a function of the clean logits, for a given choice of experts."""
    num_tokens, num_experts = logits.shape
    family = family_of(static.router.family)
    noisy = logits if inputs.noise is None else logits + inputs.noise
    log_partition = jax.nn.logsumexp(logits, axis=1)
    log_probability = family.log_probability(logits)
    probability = jnp.exp(log_probability)
    clean = inputs.noise is None and family.normalised
    finite = jnp.all(jnp.isfinite(noisy), axis=1)
    gate = _of_choices(probability if clean else family.score(noisy), expert)
    if static.router.renormalise:
        gate = gate / (jnp.sum(gate, axis=1, keepdims=True) + jnp.float32(_SMALLEST_SUM))
    if static.router.scale != 1.0:
        gate = gate * jnp.float32(static.router.scale)
    gate = jnp.where(finite[:, None], gate, jnp.float32(jnp.nan))

    if inputs.noise is None:
        load = jnp.zeros_like(logits)
    else:
        threshold = _of_choices(noisy, expert)[:, -1]
        load = jax.scipy.stats.norm.cdf((logits - threshold[:, None]) / jnp.float32(static.noise_std))
    members = members_of(num_tokens, static.num_modalities, inputs.modality, inputs.mask)

    def summed(values: Array) -> Array:
        return total(values, members, static.num_groups)

    sums = RoutingSums(
        tokens=summed(jnp.ones(num_tokens, jnp.int32)),
        # A token whose logits are not finite wants nothing.
        wanted=summed(counts(expert, finite, num_experts)),
        probability=summed(probability),
        # p log p with p = 0 from a logit far below the others: exp underflows before the product overflows.
        entropy=summed(-jnp.sum(probability * log_probability, axis=1)),
        logsumexp_squared=summed(jnp.square(log_partition)),
        load=summed(load),
        # With a bias for the choice, or a choice already made, the first one may not have the largest gate.
        largest_gate=summed(_largest(gate) if static.biased or static.chosen else gate[:, 0]),
    )
    if inputs.mask is not None:
        gate = jnp.where(inputs.mask[:, None], gate, jnp.float32(0))
    return vary_like(GatesAndSums(gate, sums), logits)


def _choice(
    noisy: Float[Array, "T E"], choice_bias: Float[Array, " E"] | None, num_choices: int, spec: RouterSpec
) -> Int[Array, "T K"]:
    """The K best experts, ties to the lower index."""
    if choice_bias is None and spec.expert_groups == 1:
        ranked = noisy  # Scores ascend with logits, and logits tie less often.
    else:
        score = family_of(spec.family).score(noisy)
        ranked = score if choice_bias is None else score + choice_bias[None].astype(jnp.float32)
        if spec.expert_groups > 1:
            ranked = _in_best_groups(ranked, spec)
    # top_k puts -0.0 below 0.0, which are a tie.
    _, expert = jax.lax.top_k(jnp.where(ranked == 0, jnp.float32(0), ranked), num_choices)
    return expert.astype(jnp.int32)


def _in_best_groups(score: Float[Array, "T E"], spec: RouterSpec) -> Float[Array, "T E"]:
    """The scores with those outside of the best groups of experts put below all others (DeepSeek-V3, 2.1.2)."""
    by_group = score.reshape(len(score), spec.expert_groups, -1)
    best, _ = jax.lax.top_k(by_group, min(spec.group_best, by_group.shape[2]))
    _, chosen = jax.lax.top_k(jnp.sum(best, axis=2), spec.groups_chosen)
    groups = jnp.arange(spec.expert_groups, dtype=jnp.int32)
    inside = jnp.any(chosen[:, :, None] == groups[None, None], axis=1)
    return jnp.where(inside[:, :, None], by_group, -jnp.inf).reshape(score.shape)


def route_forward(
    static: RouteStatic, tokens: Float[Array, "T D"], router: RouterWeights, inputs: RouteInputs
) -> tuple[Routing, RouteSaved]:
    """Decide experts (ties to the lower index) unless that was done, gates and sums."""
    # HIGHEST: a float32 dot is bfloat16 on TPU and tf32 on GPU by default, and near ties would be decided by rounding.
    logits = jnp.dot(
        _select_masked(tokens, inputs.mask), router.kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    if router.bias is not None:
        logits += router.bias.astype(jnp.float32)[None]
    noisy = logits if inputs.noise is None else logits + inputs.noise
    expert = inputs.expert
    if expert is None:
        expert = _choice(noisy, router.choice_bias, static.num_choices, static.router)
    # Named here, inside, so that a remat policy saves the decision itself and not a recomputed twin of it.
    expert = checkpoint_name(expert, "moe_routing")
    gate, sums = _gates_and_sums(logits, expert, static, inputs)
    gate = checkpoint_name(gate, "moe_routing")
    return Routing(expert, gate, sums), RouteSaved(tokens, router, logits, expert, inputs)


def logits_gradient(static: RouteStatic, saved: RouteSaved, cotangent: Routing) -> Float[Array, "T E"]:
    """The gradient of the clean logits through gates and sums, for the choice already made; 0 for padding."""
    _, pull = jax.vjp(lambda a: _gates_and_sums(a, saved.expert, static, saved.inputs), saved.logits)
    (dlogits,) = pull(GatesAndSums(cotangent.gate, cotangent.sums))
    if saved.inputs.mask is not None:
        dlogits = jnp.where(saved.inputs.mask[:, None], dlogits, jnp.float32(0))
    return dlogits


def route_backward(
    static: RouteStatic, saved: RouteSaved, cotangent: Routing, passed: Float[Array, "T D"] | None = None
) -> tuple[Float[Array, "T D"], RouterWeights]:
    """`dx = dA Wᵀ`, plus the cotangent of tokens that were passed on; `dW = xᵀ dA`, `db = Σ dA`."""
    dlogits = logits_gradient(static, saved, cotangent)
    highest = jax.lax.Precision.HIGHEST
    kernel, bias, _ = saved.router
    dtokens = jnp.einsum("te,de->td", dlogits, kernel.astype(jnp.float32), precision=highest)
    if passed is not None:
        dtokens += passed.astype(jnp.float32)
    dkernel = jnp.einsum("td,te->de", _select_masked(saved.tokens, saved.inputs.mask), dlogits, precision=highest)
    dbias = None if bias is None else jnp.sum(dlogits, axis=0).astype(bias.dtype)
    drouter = RouterWeights(dkernel.astype(kernel.dtype), dbias, jax.tree.map(jnp.zeros_like, saved.router.choice_bias))
    return dtokens.astype(saved.tokens.dtype), drouter
