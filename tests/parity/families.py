"""Each family in the words of moe_kernels: how the tensors of its public implementation, by name, make a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_kernels import (
    ClampedSwiglu,
    GluWeights,
    JoinedGluWeights,
    MlpWeights,
    MoeSpec,
    RouterSpec,
    RouterWeights,
    Routing,
    WithShared,
    make_routing,
)

Tensors = Mapping[str, jax.Array]


class Layer(NamedTuple):
    """What `moe_mlp` takes beside tokens. A router of the family's own makes a `Routing` of the tokens and the spec."""

    router: jax.Array | RouterWeights | Callable[[jax.Array, MoeSpec], Routing]
    weights: Any
    spec: MoeSpec


def transposed(matrices: jax.Array) -> jax.Array:
    """PyTorch's `[F, D]` as our `[D, F]`."""
    return jnp.swapaxes(matrices, -1, -2)


def glu(p: Tensors) -> GluWeights:
    gate, up = jnp.split(transposed(p["experts.gate_up_proj"]), 2, axis=2)
    return GluWeights(gate, up, transposed(p["experts.down_proj"]))


def one_glu(p: Tensors, name: str) -> GluWeights:
    return GluWeights(*(p[f"{name}.{part}_proj.weight"].T for part in ("gate", "up", "down")))


def mixtral(p: Tensors) -> Layer:
    return Layer(p["gate.weight"].T, glu(p), MoeSpec(num_choices=2, router=RouterSpec(renormalise=True)))


def qwen2_moe(p: Tensors) -> Layer:
    weights = WithShared(glu(p), one_glu(p, "shared_expert"), p["shared_expert_gate.weight"][0])
    return Layer(p["gate.weight"].T, weights, MoeSpec(num_choices=2))


def qwen3_moe(p: Tensors) -> Layer:
    return Layer(p["gate.weight"].T, glu(p), MoeSpec(num_choices=4, router=RouterSpec(renormalise=True)))


def olmoe(p: Tensors) -> Layer:
    return Layer(p["gate.weight"].T, glu(p), MoeSpec(num_choices=3))


def deepseek_v3(p: Tensors) -> Layer:
    router = RouterWeights(p["gate.weight"].T, choice_bias=p["gate.e_score_correction_bias"])
    gates = RouterSpec("sigmoid", renormalise=True, scale=2.5, expert_groups=4, groups_chosen=2)
    return Layer(router, WithShared(glu(p), one_glu(p, "shared_experts")), MoeSpec(num_choices=3, router=gates))


def gpt_oss(p: Tensors) -> Layer:
    weights = JoinedGluWeights(
        p["experts.gate_up_proj"],
        p["experts.down_proj"],
        p["experts.gate_up_proj_bias"],
        p["experts.down_proj_bias"],
    )
    gates, clamped = RouterSpec(renormalise=True), ClampedSwiglu(alpha=1.702, limit=7.0)
    spec = MoeSpec(num_choices=2, router=gates, activation=clamped, interleaved=True)
    return Layer(RouterWeights(p["router.weight"].T, p["router.bias"]), weights, spec)


def llama4(p: Tensors) -> Layer:
    weights = JoinedGluWeights(p["experts.gate_up_proj"], p["experts.down_proj"])
    spec = MoeSpec(num_choices=1, router=RouterSpec("sigmoid"), gates_on="input")
    return Layer(p["router.weight"].T, WithShared(weights, one_glu(p, "shared_expert")), spec)


def granite_moe(p: Tensors) -> Layer:
    return Layer(p["router.weight"].T, glu(p), MoeSpec(num_choices=2, router=RouterSpec(renormalise=True)))


def phi_moe(p: Tensors) -> Layer:
    def router(tokens: jax.Array, spec: MoeSpec) -> Routing:
        left = logits = tokens.astype(jnp.float32) @ p["router.weight"].T
        expert, gate = [], []
        for _ in range(2):  # The best expert shares its gate with those near it; then the same without it.
            best = jnp.max(left, axis=1, keepdims=True)
            near = (best - left) / jnp.maximum(jnp.abs(logits), best) <= 2 * 0.25
            gate.append(jnp.max(jax.nn.softmax(jnp.where(near, left, -jnp.inf)), axis=1))
            expert.append(jnp.argmax(left, axis=1))
            left = jnp.where(jnp.arange(8) == expert[-1][:, None], -jnp.inf, left)
        return make_routing(jnp.stack(expert, axis=1), jnp.stack(gate, axis=1), num_experts=8, spec=spec)

    return Layer(router, glu(p), MoeSpec(num_choices=2))


def jamba(p: Tensors) -> Layer:
    return Layer(p["router.weight"].T, glu(p), MoeSpec(num_choices=2))


def switch_experts(p: Tensors) -> MlpWeights:
    first, second = (jnp.stack([p[f"experts.expert_{e}.{name}.weight"].T for e in range(8)]) for name in ("wi", "wo"))
    return MlpWeights(first, None, second, None)


def switch(p: Tensors) -> Layer:
    return Layer(p["router.classifier.weight"].T, switch_experts(p), MoeSpec(activation="relu"))


def switch_capacity(p: Tensors) -> Layer:
    """A place in each expert for each sequence of 8 tokens; `gelu_new` of Hugging Face is `gelu_tanh`."""
    spec = MoeSpec(num_groups=4, capacity_factor=1, priority="arrival")
    return Layer(p["router.classifier.weight"].T, switch_experts(p), spec)


def v_moe(p: Tensors) -> Layer:
    """Batch Priority Routing: two places in each expert for the 16 choices of a group of 8 tokens."""
    weights = MlpWeights(*(p[f"Mlp.Dense_{n}.{name}"] for n in (0, 1) for name in ("kernel", "bias")))
    return Layer(p["Router.dense.kernel"], weights, MoeSpec(num_choices=2, num_groups=4, capacity_factor=1))


FAMILIES: dict[str, Callable[[Tensors], Layer]] = {
    family.__name__: family
    for family in (
        *(mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v3, gpt_oss, llama4, granite_moe, phi_moe, jamba),
        *(switch, switch_capacity, v_moe),
    )
}
