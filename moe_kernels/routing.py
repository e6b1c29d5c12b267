"""The router: choices, gates, and the sums that losses and figures need."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key

from moe_kernels import backends
from moe_kernels.axes import refuse_symbolic
from moe_kernels.backends.base import RouteStatic, Span, apply
from moe_kernels.routers import family_of
from moe_kernels.spec import MoeSpec, RouteInputs, RouterSpec
from moe_kernels.sums import counts, members_of, total
from moe_kernels.types import RouterWeights, Routing, RoutingSums


def route(
    tokens: Float[Array, "T D"],
    router: Float[Array, "D E"] | RouterWeights,
    spec: MoeSpec = MoeSpec(),  # noqa: B008 (frozen)
    inputs: RouteInputs = RouteInputs(),  # noqa: B008 (a tuple)
) -> Routing:
    """Choose the `spec.num_choices` best experts of every token (paper, section 2), in float32.

    `tokens [T, D]` come group after group, `T / num_groups` in each. Noise is added to the logits for the choice and
    the gates. Ties go to the lower expert index. `spec.router` says how logits become gates; by default gates are
    probabilities, not renormalised. Padding has gate 0. Differentiable once in tokens and router. Raises ValueError for
    shapes that do not fit.

    >>> import jax.numpy as jnp
    >>> routing = route(jnp.eye(3), jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]))
    >>> routing.expert[:, 0].tolist()
    [0, 1, 1]
    """
    weights = router_weights(router)
    check_route(tokens, weights, spec, inputs)
    static = route_static(spec, weights.kernel.shape[1], inputs, biased=is_biased(weights))
    problem = backends.problem_of("route", tokens, weights.kernel.shape[1], route=static)
    return apply(backends.choose(problem, spec.backend), static, (tokens, weights), (_arrays(inputs),))


class Routed(NamedTuple):
    """A routing, and the tokens as the router passes them on.

    The layer dispatches these tokens, so their cotangent comes back to the router. The router adds it in float32 to its
    own cotangent of the tokens, which saves a pass over them. (On GPUs, XLA adds it to the rounded product.)
    """

    routing: Routing
    tokens: Float[Array, "T D"]


def routed(
    span: Span, static: RouteStatic, tokens: Float[Array, "T D"], router: RouterWeights, inputs: RouteInputs
) -> Routed:
    """Route with a chosen span."""
    return apply(_passing(span), static, (tokens, router), (_arrays(inputs),))


def _arrays(inputs: RouteInputs) -> RouteInputs:
    """Keep only the inputs that a router reads."""
    noise = None if inputs.noise is None else _without_gradient(inputs.noise)
    return inputs._replace(noise=noise, token_priority=None, key=None, first_group=0)


@jax.custom_jvp
def _without_gradient(noise: Float[Array, "T E"]) -> Float[Array, "T E"]:
    return noise


@_without_gradient.defjvp
def _refuse_gradient(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    raise TypeError(
        "RouteInputs.noise has no gradient: pass a bias of the router in RouterWeights(kernel, bias), and noise that "
        "depends on what is differentiated through jax.lax.stop_gradient"
    )


@functools.lru_cache
def _passing(span: Span) -> Span:
    """Make a routing span that also passes its tokens on. The cache lets JAX find earlier traces."""

    def forward(static: RouteStatic, tokens: Array, router: Any, inputs: RouteInputs) -> tuple[Routed, Any]:
        routing, saved = span.forward(static, tokens, router, inputs)
        return Routed(routing, tokens), saved

    def backward(static: RouteStatic, saved: Any, cotangent: Routed) -> Any:
        return span.backward(static, saved, *cotangent)

    return Span(forward, backward)


def router_weights(router: Float[Array, "D E"] | RouterWeights) -> RouterWeights:
    """Convert a router to `RouterWeights`.

    >>> router_weights(jnp.eye(2)).bias is None
    True
    """
    return router if isinstance(router, RouterWeights) else RouterWeights(jnp.asarray(router))


def is_biased(router: RouterWeights) -> bool:
    """Say whether the router has a bias of either kind.

    >>> is_biased(RouterWeights(jnp.eye(2)))
    False
    """
    return router.bias is not None or router.choice_bias is not None


def route_static(spec: MoeSpec, num_experts: int, inputs: RouteInputs, *, biased: bool) -> RouteStatic:
    """Collect what back ends need to know about a routing call.

    >>> route_static(MoeSpec(), 2, RouteInputs(), biased=False).noise_std
    0.5
    """
    return RouteStatic(
        num_choices=spec.num_choices,
        num_groups=spec.num_groups,
        num_modalities=spec.num_modalities,
        noise_std=1.0 / num_experts if spec.noise_std is None else spec.noise_std,
        router=spec.router,
        biased=biased,
        chosen=inputs.expert is not None,
    )


def make_routing(
    expert: Int[Array, "T K"],
    gate: Float[Array, "T K"],
    *,
    num_experts: int,
    probability: Float[Array, "T E"] | None = None,
    spec: MoeSpec = MoeSpec(),  # noqa: B008 (frozen)
    inputs: RouteInputs = RouteInputs(),  # noqa: B008 (a tuple)
) -> Routing:
    """Make a `Routing` from your own router's experts and gates, with correct sums over the tokens.

    `probability` is the distribution over experts that losses use; without it, its sums are 0. `spec` and `inputs` give
    groups and modalities; padding (`mask`) gets gate 0, whatever its gates were. Gates may be negative or 0; a token
    whose gates are all 0 takes no place. JAX differentiates the gates. Raises ValueError for shapes that do not fit.
    Also raises ValueError if a token has an expert twice or out of range; under `jit`, where values are not known, such
    a token takes no place and is NaN.

    >>> import jax.numpy as jnp
    >>> routing = make_routing(jnp.array([[1], [0]]), jnp.array([[0.5], [-2.0]]), num_experts=2)
    >>> routing.sums.wanted.tolist()
    [[[1.0, 1.0]]]
    """
    expert, gate = jnp.asarray(expert), jnp.asarray(gate, jnp.float32)
    _check_choice(expert, gate, num_experts, probability)
    num_tokens, num_choices = expert.shape
    spec = MoeSpec(num_choices=num_choices, num_groups=spec.num_groups, num_modalities=spec.num_modalities)
    _check_groups(num_tokens, spec)
    _check_inputs(num_tokens, num_experts, spec, inputs._replace(expert=None))
    valid = _is_choice(expert, num_experts)
    gate = jnp.where(valid[:, None], gate, jnp.float32(jnp.nan))
    if inputs.mask is not None:
        gate = jnp.where(inputs.mask[:, None], gate, jnp.float32(0))
    members = members_of(num_tokens, spec.num_modalities, inputs.modality, inputs.mask)
    chance = jnp.zeros((num_tokens, num_experts), jnp.float32) if probability is None else probability
    positive = jnp.where(chance > 0, chance, jnp.float32(1))

    def summed(values: Array) -> Array:
        return total(values, members, spec.num_groups)

    nothing = jnp.zeros(num_tokens, jnp.float32)
    sums = RoutingSums(
        tokens=summed(jnp.ones(num_tokens, jnp.int32)),
        wanted=summed(counts(expert, valid, num_experts)),
        probability=summed(chance.astype(jnp.float32)),
        entropy=summed(-jnp.sum(chance * jnp.log(positive), axis=1)),
        logsumexp_squared=summed(nothing),
        load=summed(jnp.zeros((num_tokens, num_experts), jnp.float32)),
        largest_gate=summed(jnp.max(gate, axis=1, initial=-jnp.inf)),
    )
    return Routing(expert.astype(jnp.int32), gate, sums)


def _is_choice(expert: Int[Array, "T K"], num_experts: int) -> Bool[Array, " T"]:
    """Say for each token whether its experts exist and are all different."""
    inside = jnp.all((expert >= 0) & (expert < num_experts), axis=1)
    ordered = jnp.sort(expert, axis=1)
    return inside & jnp.all(ordered[:, 1:] != ordered[:, :-1], axis=1)


def _check_choice(expert: Array, gate: Array, num_experts: int, probability: Array | None) -> None:
    if expert.ndim != 2 or gate.shape != expert.shape or not jnp.issubdtype(expert.dtype, jnp.integer):
        raise ValueError(
            f"expert {expert.dtype}{expert.shape} must be integers [T, K], and gate {gate.shape} of the same shape"
        )
    if probability is not None and probability.shape != (len(expert), num_experts):
        raise ValueError(f"probability has shape {probability.shape}; it must be [T, E] = {(len(expert), num_experts)}")
    if isinstance(expert, Tracer):
        return
    wrong = np.flatnonzero(~np.asarray(_is_choice(expert, num_experts)))
    if len(wrong):
        raise ValueError(
            f"token {wrong[0]} has experts {np.asarray(expert[wrong[0]]).tolist()}; use different ones from 0 "
            f"to {num_experts - 1} (mark padding with inputs.mask)"
        )


def balance_bias(bias: Float[Array, " E"], wanted: Float[Array, "... E"], rate: float) -> Float[Array, " E"]:
    """Compute the next `RouterWeights.choice_bias`: `rate` higher for experts wanted less than the mean, `rate` lower
    above.

    This balances experts without an auxiliary loss (Wang et al. 2024; DeepSeek-V3, section 2.1.2). `wanted` is
    `routing.sums.wanted` of the whole step; leading axes are summed.

    >>> import jax.numpy as jnp
    >>> balance_bias(jnp.zeros(3), jnp.array([[4.0, 1.0, 1.0]]), 0.5).tolist()
    [-0.5, 0.5, 0.5]
    """
    load = wanted.reshape(-1, wanted.shape[-1]).sum(axis=0)
    return bias + rate * jnp.sign(load.mean() - load).astype(bias.dtype)


def router_noise(
    key: Key[Array, ""], *, num_groups: int, group_size: int, num_experts: int, first_group: int | Int[Array, ""] = 0
) -> Float[Array, "T E"]:
    """Draw the training noise N(0, 1/E²) for `num_groups` groups of `group_size` tokens (paper, section 2).

    Each group has its own stream, `fold_in(key, first_group + g)`, so no draw depends on how groups are spread over
    devices or accumulation chunks.

    >>> import jax
    >>> both = router_noise(jax.random.key(0), num_groups=2, group_size=3, num_experts=4)
    >>> second = router_noise(jax.random.key(0), num_groups=1, group_size=3, num_experts=4, first_group=1)
    >>> bool((both[3:] == second).all())
    True
    """
    groups = first_group + jnp.arange(num_groups, dtype=jnp.int32)
    draw = jax.vmap(lambda g: jax.random.normal(jax.random.fold_in(key, g), (group_size, num_experts), jnp.float32))
    return draw(groups).reshape(num_groups * group_size, num_experts) / num_experts


def check_route(tokens: Array, router: RouterWeights, spec: MoeSpec, inputs: RouteInputs) -> None:
    """Refuse arguments that do not fit together. The error names the argument, its value and what to do."""
    kernel = router.kernel
    refuse_symbolic(tokens=tokens, router=kernel)
    if tokens.ndim != 2 or kernel.ndim != 2:
        raise ValueError(
            f"tokens and router must be [T, D] and [D, E], not {tokens.shape} and {kernel.shape}; "
            "reshape leading axes away"
        )
    num_tokens, num_experts = tokens.shape[0], kernel.shape[1]
    if kernel.shape[0] != tokens.shape[1]:
        raise ValueError(
            f"router of shape {kernel.shape} does not take tokens of width {tokens.shape[1]}; make it [D, E]"
        )
    if num_experts < 1:
        raise ValueError(f"router of shape {kernel.shape} has no expert; make it [D, E] with E >= 1")
    for name, bias in (("bias", router.bias), ("choice_bias", router.choice_bias)):
        if bias is not None and bias.shape != (num_experts,):
            raise ValueError(f"router.{name} has shape {bias.shape}; it must be [E] = {(num_experts,)}")
    if spec.num_choices > num_experts:
        raise ValueError(
            f"num_choices={spec.num_choices} is more than the {num_experts} experts; choose at most {num_experts}"
        )
    _check_router(spec.router, spec.num_choices, num_experts)
    _check_groups(num_tokens, spec)
    _check_inputs(num_tokens, num_experts, spec, inputs)


def _check_router(router: RouterSpec, num_choices: int, num_experts: int) -> None:
    family_of(router.family)
    groups, chosen = router.expert_groups, router.groups_chosen
    if groups == 1:
        return
    if groups < 1 or num_experts % groups or not 1 <= chosen <= groups:
        raise ValueError(
            f"expert_groups={groups} with groups_chosen={chosen} do not fit {num_experts} experts; use a divisor of "
            f"{num_experts}, and choose at least 1 group and at most all"
        )
    if num_choices > chosen * (num_experts // groups):
        raise ValueError(
            f"num_choices={num_choices} is more than the {chosen * (num_experts // groups)} experts of "
            f"groups_chosen={chosen} groups; choose more groups"
        )


def _check_groups(num_tokens: int, spec: MoeSpec) -> None:
    if num_tokens % spec.num_groups:
        raise ValueError(
            f"{num_tokens} tokens cannot be split into num_groups={spec.num_groups}; use a divisor of {num_tokens}"
        )


def _check_inputs(num_tokens: int, num_experts: int, spec: MoeSpec, inputs: RouteInputs) -> None:
    """Refuse arrays of the wrong shape or dtype."""
    modality, mask = inputs.modality, inputs.mask
    for name, value, shape, axes in (
        ("noise", inputs.noise, (num_tokens, num_experts), "[T, E]"),
        ("modality", modality, (num_tokens,), "[T]"),
        ("mask", mask, (num_tokens,), "[T]"),
        ("expert", inputs.expert, (num_tokens, spec.num_choices), "[T, K]"),
        ("token_priority", inputs.token_priority, (num_tokens,), "[T]"),
    ):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}; it must be {axes} = {shape}")
    if modality is not None and not jnp.issubdtype(modality.dtype, jnp.integer):
        raise ValueError(f"modality has dtype {modality.dtype}; pass integer ids from 0 to {spec.num_modalities - 1}")
    if mask is not None and mask.dtype != jnp.bool_:
        raise ValueError(f"mask has dtype {mask.dtype}; pass booleans, False for padding")
    if modality is None and spec.num_modalities > 1:
        raise ValueError(f"num_modalities={spec.num_modalities} needs modality ids; pass modality=[T] integers")
