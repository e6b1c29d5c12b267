"""The expert layer of the tower: the only place (with the planner) where limoe touches moe_kernels."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from limoe.config import schema
from limoe.config.schema import Lengths, ModelConfig
from limoe.parallel.mesh import EXPERT, Placement, by_rows
from limoe.parallel.parameters import EXPERT_KERNEL, EXPERT_VECTOR, ROUTER
from moe_kernels import (
    ACTIVATIONS,
    EXCHANGE_NAMES,
    SAVED_NAMES,
    ExchangeSpec,
    MlpWeights,
    MoeSpec,
    Priority,
    RouteInputs,
    RoutingFigures,
    RoutingSums,
    entropy_of_mean,
    expert_capacity,
    moe_mlp,
    route,
    router_noise,
    routing_figures,
)
from moe_kernels.activations import ActivationFunction, function_of

__all__ = [
    "IMAGE",
    "NUM_MODALITIES",
    "TEXT",
    "Assignment",
    "LayerReport",
    "LayerRouting",
    "MoeLayer",
    "RoutingChoice",
    "RoutingContext",
    "RoutingFigures",
    "RoutingSums",
    "entropy_of_mean",
    "expert_capacity",
    "function_of",
    "layer_figures",
    "register_activation",
    "saved_names",
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


def register_activation(name: str, function: ActivationFunction) -> None:
    """Add an activation of one's own to the dense MLPs and, on the XLA back end, the experts: `model.activation=name`.

    Raises ValueError for a name that an activation has already.
    """
    schema.ACTIVATIONS.add(name)
    ACTIVATIONS[name] = function


def saved_names(placement: Placement | None) -> tuple[str, ...]:
    """Names of the values of a layer that are kept for the backward pass when the rest is computed again."""
    keeps = placement is not None and placement.config.keep_exchanged
    return SAVED_NAMES + EXCHANGE_NAMES if keeps else SAVED_NAMES


class RoutingChoice(NamedTuple):
    """What a layer, or with a leading axis L every layer, decided: the experts of each token, best first, and the
    numbers by which tokens claimed their places (None in order of arrival)."""

    expert: Int[Array, "... T K"]
    priority: Float[Array, "... T"] | None


class RoutingContext(NamedTuple):
    """What routing depends on beside the tokens; None instead of it means evaluation: dropless, without noise."""

    key: Key[Array, ""]
    """A function of the run's seed and the step."""
    first_group: Int[Array, ""] | int
    """Index within the step's batch of the first group of this chunk."""
    group_stride: int
    """From the first group of a device to that of the next one, within the step's batch; 0 without a mesh.

    Without a default: on a mesh 0 would give the groups of every device the same noise."""
    choice: RoutingChoice | None = None
    """What every layer decided in an earlier pass over the same tokens, to be decided again."""


class LayerRouting(NamedTuple):
    """What a layer, or with a leading axis L every layer, reports: the router's sums and what the plan kept."""

    sums: RoutingSums
    kept: Float[Array, "G M E"]


class LayerReport(NamedTuple):
    """All that a layer, or with a leading axis L every layer, says beside its tokens."""

    routing: LayerRouting
    choice: RoutingChoice


class Assignment(NamedTuple):
    """First choice and its gate of every token, by layer [L, B, tokens of an example]; for galleries and analyses."""

    expert: Int[Array, "L B T"]
    gate: Float[Array, "L B T"]


class MoeLayer(nnx.Module):
    """Sparse experts shared by image and text tokens (paper, section 2).

    Tokens `[T, D]`: example after example, of each image tokens first, then text. Parameters in float32, no
    bias in the router.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, placement: Placement | None = None) -> None:
        self.config, self.placement = config, placement
        experts, width, hidden = config.num_experts, config.width, config.mlp_width
        # Each expert as if alone, like the dense MLP in its place.
        initial = nnx.initializers.xavier_uniform(in_axis=-2, out_axis=-1, batch_axis=(0,))
        router = nnx.initializers.lecun_normal()(rngs.params(), (width, experts), jnp.float32)
        self.router = nnx.Param(router, kind=ROUTER)
        self.w1 = nnx.Param(initial(rngs.params(), (experts, width, hidden), jnp.float32), kind=EXPERT_KERNEL)
        self.b1 = nnx.Param(jnp.zeros((experts, hidden), jnp.float32), kind=EXPERT_VECTOR)
        self.w2 = nnx.Param(initial(rngs.params(), (experts, hidden, width), jnp.float32), kind=EXPERT_KERNEL)
        self.b2 = nnx.Param(jnp.zeros((experts, width), jnp.float32), kind=EXPERT_VECTOR)

    def __call__(
        self,
        tokens: Float[Array, "T D"],
        present: Bool[Array, "B S"] | None,
        context: RoutingContext | None,
        layer: Int[Array, ""],
        lengths: Lengths,
    ) -> tuple[Float[Array, "T D"], LayerReport]:
        """Route the examples in groups of `group_examples`; noise and random order are functions of (key, layer,
        group)."""
        mesh = None if self.placement is None else self.placement.mesh
        batch = tokens.shape[0] // lengths.total
        inputs = RouteInputs(modality=_modality(batch, lengths), mask=None if present is None else present.reshape(-1))
        if context is None:
            # Nothing is dropped, so it does not matter which groups there are.
            spec = self._spec(num_groups=1 if self.placement is None else self.placement.size)
        else:
            spec = self._training_spec(batch, context)
            inputs = self._training_inputs(inputs, spec, batch, context, layer)
        weights = MlpWeights(self.w1[...], self.b1[...], self.w2[...], self.b2[...])
        result = moe_mlp(tokens, self.router[...], weights, spec, inputs, mesh=mesh)
        choice = RoutingChoice(result.expert, result.priority)
        return result.tokens, LayerReport(LayerRouting(result.sums, result.kept), choice)

    def _spec(self, num_groups: int) -> MoeSpec:
        """The layer without a capacity limit, as in evaluation: rows are exchanged in one piece."""
        return MoeSpec(
            num_choices=self.config.num_choices,
            num_groups=num_groups,
            num_modalities=NUM_MODALITIES,
            activation=self.config.activation,
            exchange=ExchangeSpec(expert_axis=EXPERT),
        )

    def _training_spec(self, batch: int, context: RoutingContext) -> MoeSpec:
        """The layer with the capacity, noise and order of the training step."""
        config = self.config
        priority, first_modality = _PRIORITIES[config.priority]
        exchange = ExchangeSpec(expert_axis=EXPERT)
        if self.placement is not None:
            chunks = self.placement.config.exchange_chunks
            exchange = ExchangeSpec(expert_axis=EXPERT, num_chunks=chunks, group_stride=context.group_stride)
        return dataclasses.replace(
            self._spec(num_groups=batch // (config.group_examples or batch)),
            capacity_factor=config.capacity_factor,
            priority=priority,
            first_modality=first_modality,
            noise_std=config.router_noise / config.num_experts if config.router_noise > 0 else None,
            exchange=exchange,
        )

    def _training_inputs(
        self, inputs: RouteInputs, spec: MoeSpec, batch: int, context: RoutingContext, layer: Int[Array, ""]
    ) -> RouteInputs:
        """The noise, and the key of a random order, which are functions of (key, layer, group)."""
        noise_key, order_key = jax.random.split(jax.random.fold_in(context.key, layer))
        noise = None
        if self.config.router_noise > 0:
            group_size = batch * self.config.tokens_per_example // spec.num_groups
            noise = self.config.router_noise * self._noise(noise_key, spec.num_groups, group_size, context)
        inputs = inputs._replace(noise=noise, key=order_key, first_group=context.first_group)
        if context.choice is None:
            return inputs
        choice = jax.tree.map(lambda leaf: leaf[layer], context.choice)
        return inputs._replace(expert=choice.expert, token_priority=choice.priority)

    def _noise(self, key: Key[Array, ""], groups: int, group_size: int, context: RoutingContext) -> Float[Array, "T E"]:
        """Noise of the groups of this call, drawn where they lie."""
        shards = 1 if self.placement is None else self.placement.size
        first = context.first_group + context.group_stride * jnp.arange(shards, dtype=jnp.int32)
        draw = lambda first: router_noise(  # noqa: E731
            key,
            num_groups=groups // shards,
            group_size=group_size,
            num_experts=self.config.num_experts,
            first_group=first,
        )
        return by_rows(jax.vmap(draw)(first).reshape(groups * group_size, self.config.num_experts), self.placement)

    def first_choice(
        self, tokens: Float[Array, "T D"], present: Bool[Array, "B S"] | None, lengths: Lengths
    ) -> tuple[Int[Array, "B S"], Float[Array, "B S"]]:
        """Best expert and its gate of every token, without noise; gate 0 for padding."""
        examples = (-1, lengths.total)
        mask = None if present is None else present.reshape(-1)
        routing = route(tokens, self.router[...], inputs=RouteInputs(mask=mask))
        return routing.expert[:, 0].reshape(examples), routing.gate[:, 0].reshape(examples)


def _modality(batch: int, lengths: Lengths) -> Int[Array, " T"]:
    return jnp.tile(jnp.array([IMAGE] * lengths.image + [TEXT] * lengths.text, jnp.int32), batch)


def layer_figures(routing: LayerRouting) -> RoutingFigures:
    """Figures of every layer, from sums stacked along a leading axis L: each field `[L, M]` or `[L, M, E]`."""
    return jax.vmap(routing_figures)(routing.sums, routing.kept)
