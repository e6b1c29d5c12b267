"""The expert layer of the tower: the only place (with the planner) where limoe touches moe_kernels."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from limoe.config import ModelConfig
from moe_kernels import (
    SAVED_NAMES,
    MlpWeights,
    Priority,
    RoutingFigures,
    RoutingSums,
    entropy_of_mean,
    moe_mlp,
    route,
    router_noise,
    routing_figures,
)

__all__ = [
    "IMAGE",
    "NUM_MODALITIES",
    "SAVED_NAMES",
    "TEXT",
    "Assignment",
    "LayerRouting",
    "MoeLayer",
    "RoutingContext",
    "RoutingFigures",
    "RoutingSums",
    "entropy_of_mean",
    "layer_figures",
]

IMAGE, TEXT, NUM_MODALITIES = 0, 1, 2

_PRIORITIES: dict[str, tuple[Priority, int]] = {
    "bpr": ("bpr", IMAGE),
    "arrival": ("arrival", IMAGE),
    "random": ("random", IMAGE),
    "image_first": ("modality", IMAGE),
    "text_first": ("modality", TEXT),
}
"""The priority of each setting, and the modality that goes first where that is asked for."""


class RoutingContext(NamedTuple):
    """What routing depends on beside the tokens; None instead of it means evaluation: dropless, without noise."""

    key: Key[Array, ""]
    """A function of the run's seed and the step."""
    first_group: Int[Array, ""] | int
    """Index within the step's batch of the first group of this chunk."""


class LayerRouting(NamedTuple):
    """What a layer, or with a leading axis L every layer, reports: the router's sums and what the plan kept."""

    sums: RoutingSums
    kept: Float[Array, "G M E"]


class Assignment(NamedTuple):
    """First choice and its gate of every token, by layer [L, B, tokens of an example]; for galleries and analyses."""

    expert: Int[Array, "L B T"]
    gate: Float[Array, "L B T"]


class MoeLayer(nnx.Module):
    """Sparse experts shared by image and text tokens (paper, section 2).

    Tokens `[B, S, D]`: of each example image tokens first, then text. Parameters in float32, no bias in the router.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        experts, width, hidden = config.num_experts, config.width, config.mlp_width
        fan_in = nnx.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=(0,))
        self.router = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (width, experts), jnp.float32))
        self.w1 = nnx.Param(fan_in(rngs.params(), (experts, width, hidden), jnp.float32))
        self.b1 = nnx.Param(jnp.zeros((experts, hidden), jnp.float32))
        self.w2 = nnx.Param(fan_in(rngs.params(), (experts, hidden, width), jnp.float32))
        self.b2 = nnx.Param(jnp.zeros((experts, width), jnp.float32))

    def __call__(
        self,
        tokens: Float[Array, "B S D"],
        present: Bool[Array, "B S"] | None,
        context: RoutingContext | None,
        layer: Int[Array, ""],
    ) -> tuple[Float[Array, "B S D"], LayerRouting]:
        """Route the examples in groups of `group_examples`; noise and random order are functions of (key, layer,
        group)."""
        config = self.config
        batch, length, width = tokens.shape
        modality = self._modality(batch)
        weights = MlpWeights(self.w1[...], self.b1[...], self.w2[...], self.b2[...])
        flat = tokens.reshape(batch * length, width)
        mask = None if present is None else present.reshape(-1)
        if context is None:
            result = moe_mlp(
                flat,
                self.router[...],
                weights,
                num_choices=config.num_choices,
                mask=mask,
                modality=modality,
                num_modalities=NUM_MODALITIES,
                activation=config.activation,
            )
        else:
            groups = batch // (config.group_examples or batch)
            noise_key, order_key = jax.random.split(jax.random.fold_in(context.key, layer))
            noise = None
            if config.router_noise > 0:
                noise = config.router_noise * router_noise(
                    noise_key,
                    num_groups=groups,
                    group_size=batch * length // groups,
                    num_experts=config.num_experts,
                    first_group=context.first_group,
                )
            priority, first_modality = _PRIORITIES[config.priority]
            result = moe_mlp(
                flat,
                self.router[...],
                weights,
                num_choices=config.num_choices,
                capacity_factor=config.capacity_factor,
                num_groups=groups,
                priority=priority,
                noise=noise,
                noise_std=config.router_noise / config.num_experts if noise is not None else None,
                mask=mask,
                modality=modality,
                num_modalities=NUM_MODALITIES,
                first_modality=first_modality,
                key=order_key,
                first_group=context.first_group,
                activation=config.activation,
            )
        return result.tokens.reshape(tokens.shape), LayerRouting(result.sums, result.kept)

    def first_choice(
        self, tokens: Float[Array, "B S D"], present: Bool[Array, "B S"] | None
    ) -> tuple[Int[Array, "B S"], Float[Array, "B S"]]:
        """Best expert and its gate of every token, without noise; gate 0 for padding."""
        batch, length, width = tokens.shape
        mask = None if present is None else present.reshape(-1)
        routing = route(tokens.reshape(batch * length, width), self.router[...], mask=mask)
        return routing.expert[:, 0].reshape(batch, length), routing.gate[:, 0].reshape(batch, length)

    def _modality(self, batch: int) -> Int[Array, " T"]:
        image, text = self.config.num_image_tokens, self.config.text_length
        return jnp.tile(jnp.array([IMAGE] * image + [TEXT] * text, jnp.int32), batch)


def layer_figures(routing: LayerRouting) -> RoutingFigures:
    """Figures of every layer, from sums stacked along a leading axis L: each field `[L, M]` or `[L, M, E]`."""
    return jax.vmap(routing_figures)(routing.sums, routing.kept)
