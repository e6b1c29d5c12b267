"""Tokens to experts: the router's decision, its gates and the sums that losses and figures need."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moe_kernels import backends
from moe_kernels.backends.base import RouteInputs, RouteStatic, Span, apply
from moe_kernels.types import Routing


def route(
    tokens: Float[Array, "T D"],
    router: Float[Array, "D E"],
    *,
    num_choices: int = 1,
    num_groups: int = 1,
    noise: Float[Array, "T E"] | None = None,
    noise_std: float | None = None,
    modality: Int[Array, " T"] | None = None,
    num_modalities: int = 1,
    mask: Bool[Array, " T"] | None = None,
    backend: str | None = None,
) -> Routing:
    """Choose the `num_choices` best experts of every token (paper, section 2), in float32.

    `tokens [T, D]` lie group after group, `T / num_groups` in each. `noise [T, E]` is added to the logits for the
    decision and the gates; `noise_std` is its standard deviation (default 1/E), which the smooth load needs. `modality
    [T]` holds ids from 0 to `num_modalities - 1`; `mask [T]` is False for padding, which gets gate 0 and is in no sum.
    Ties go to the lower expert index. Gates are probabilities, not renormalised. Differentiable in tokens and router,
    once. Raises ValueError for shapes that do not fit.

    >>> import jax.numpy as jnp
    >>> routing = route(jnp.eye(3), jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]))
    >>> routing.expert[:, 0].tolist()
    [0, 1, 1]
    """
    call = _call(tokens, router, num_choices, num_groups, noise, noise_std, modality, num_modalities, mask, backend)
    return apply(call.span, call.static, (tokens, router), (call.inputs,))


def route_and_pass(
    tokens: Float[Array, "T D"],
    router: Float[Array, "D E"],
    *,
    num_choices: int,
    num_groups: int,
    noise: Float[Array, "T E"] | None,
    noise_std: float | None,
    modality: Int[Array, " T"] | None,
    num_modalities: int,
    mask: Bool[Array, " T"] | None,
    backend: str | None,
) -> tuple[Routing, Float[Array, "T D"]]:
    """As `route`, with the tokens: who uses these has their cotangent added to that of the router where that is made,
    in float32 (on GPUs to the rounded product, by XLA), and not by a pass of its own over both."""
    call = _call(tokens, router, num_choices, num_groups, noise, noise_std, modality, num_modalities, mask, backend)
    return apply(_passing(call.span), call.static, (tokens, router), (call.inputs,))


class _Call(NamedTuple):
    span: Span
    static: RouteStatic
    inputs: RouteInputs


def _call(tokens, router, num_choices, num_groups, noise, noise_std, modality, num_modalities, mask, backend) -> _Call:  # noqa: ANN001
    check_route(tokens, router, num_choices, num_groups, noise, modality, num_modalities, mask)
    num_experts = router.shape[1]
    static = RouteStatic(num_choices, num_groups, num_modalities, 1.0 / num_experts if noise_std is None else noise_std)
    span = backends.choose(backends.problem_of("route", tokens, num_experts, route=static), backend)
    return _Call(span, static, RouteInputs(noise, modality, mask))


@functools.lru_cache
def _passing(span: Span) -> Span:
    """A routing span that also gives its tokens on; one for each, so that JAX finds what it has traced before."""

    def forward(static: RouteStatic, tokens: Array, router: Array, inputs: RouteInputs) -> tuple[Any, Any]:
        routing, saved = span.forward(static, tokens, router, inputs)
        return (routing, tokens), saved

    def backward(static: RouteStatic, saved: Any, cotangent: tuple[Routing, Array]) -> Any:
        return span.backward(static, saved, *cotangent)

    return Span(forward, backward)


def router_noise(
    key: Key[Array, ""], *, num_groups: int, group_size: int, num_experts: int, first_group: int | Int[Array, ""] = 0
) -> Float[Array, "T E"]:
    """Draw the training noise N(0, 1/E²) for `num_groups` groups of `group_size` tokens (paper, section 2).

    Each group has its own stream, `fold_in(key, first_group + g)`: how groups are spread over devices or accumulation
    chunks does not change a single draw.

    >>> import jax
    >>> both = router_noise(jax.random.key(0), num_groups=2, group_size=3, num_experts=4)
    >>> second = router_noise(jax.random.key(0), num_groups=1, group_size=3, num_experts=4, first_group=1)
    >>> bool((both[3:] == second).all())
    True
    """
    groups = first_group + jnp.arange(num_groups, dtype=jnp.int32)
    draw = jax.vmap(lambda g: jax.random.normal(jax.random.fold_in(key, g), (group_size, num_experts), jnp.float32))
    return draw(groups).reshape(num_groups * group_size, num_experts) / num_experts


def check_route(tokens, router, num_choices, num_groups, noise, modality, num_modalities, mask) -> None:  # noqa: ANN001
    """Refuse arguments that do not fit together, naming the argument, its value and what to do."""
    if tokens.ndim != 2 or router.ndim != 2:
        raise ValueError(
            f"tokens and router must be [T, D] and [D, E], not {tokens.shape} and {router.shape}; "
            "reshape leading axes away"
        )
    num_tokens, num_experts = tokens.shape[0], router.shape[1]
    if router.shape[0] != tokens.shape[1]:
        raise ValueError(
            f"router of shape {router.shape} does not take tokens of width {tokens.shape[1]}; make it [D, E]"
        )
    if num_experts < 1:
        raise ValueError(f"router of shape {router.shape} has no expert; make it [D, E] with E >= 1")
    if not 1 <= num_choices <= num_experts:
        raise ValueError(f"num_choices={num_choices} is not between 1 and the {num_experts} experts; choose at most E")
    if num_groups < 1 or num_tokens % num_groups:
        raise ValueError(
            f"{num_tokens} tokens cannot be split into num_groups={num_groups}; use a divisor of {num_tokens}"
        )
    if num_modalities < 1:
        raise ValueError(f"num_modalities={num_modalities} must be at least 1")
    if noise is not None and noise.shape != (num_tokens, num_experts):
        raise ValueError(f"noise has shape {noise.shape}; it must be [T, E] = {(num_tokens, num_experts)}")
    for name, value in (("modality", modality), ("mask", mask)):
        if value is not None and value.shape != (num_tokens,):
            raise ValueError(f"{name} has shape {value.shape}; it must be [T] = {(num_tokens,)}")
    if modality is not None and not jnp.issubdtype(modality.dtype, jnp.integer):
        raise ValueError(f"modality has dtype {modality.dtype}; pass integer ids from 0 to {num_modalities - 1}")
    if mask is not None and mask.dtype != jnp.bool_:
        raise ValueError(f"mask has dtype {mask.dtype}; pass booleans, False for padding")
    if modality is None and num_modalities > 1:
        raise ValueError(f"num_modalities={num_modalities} needs modality ids; pass modality=[T] integers")
