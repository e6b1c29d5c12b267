"""The expert layer of the tower. Only this module and the planner use the layer of moe_kernels."""

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
    moe_mlp,
    route,
    router_noise,
    routing_figures,
)
from moe_kernels import balance as balance
from moe_kernels import entropy_of_mean as entropy_of_mean
from moe_kernels import expert_capacity as expert_capacity
from moe_kernels.activations import ActivationFunction
from moe_kernels.activations import function_of as function_of

IMAGE, TEXT, NUM_MODALITIES = 0, 1, 2

_PRIORITIES: dict[str, tuple[Priority, int]] = {
    "bpr": ("bpr", IMAGE),
    "arrival": ("arrival", IMAGE),
    "random": ("random", IMAGE),
    "image_first": ("modality", IMAGE),
    "text_first": ("modality", TEXT),
}
"""The priority for each setting, and the modality that goes first with priority "modality"."""


def register_activation(name: str, function: ActivationFunction) -> None:
    """Add an activation of your own for `model.activation=name`: for dense MLPs and, on the XLA back end, for experts.

    Raises ValueError if an activation has that name already.
    """
    if name in schema.ACTIVATIONS:
        raise ValueError(f"there is an activation {name!r} already; take another name")
    schema.ACTIVATIONS.append(name)
    ACTIVATIONS[name] = function


def saved_names(placement: Placement | None) -> tuple[str, ...]:
    """List the names of the layer's values that are saved for the backward pass under rematerialisation."""
    keeps = placement is not None and placement.config.keep_exchanged
    return SAVED_NAMES + EXCHANGE_NAMES if keeps else SAVED_NAMES


class RoutingChoice(NamedTuple):
    """The decision of a layer, or with a leading axis L of all layers: the experts of each token, best first, and the
    numbers by which tokens claimed their places (None in order of arrival)."""

    expert: Int[Array, "... T K"]
    priority: Float[Array, "... T"] | None


class RoutingContext(NamedTuple):
    """The inputs of routing in training besides the tokens. Evaluation has none: it is dropless, without noise."""

    key: Key[Array, ""]
    """Made from the run's seed and the step."""
    first_group: Int[Array, ""] | int
    """Index of the chunk's first group within the step's batch."""
    group_stride: int
    """Distance between the first groups of two neighbouring devices, within the step's batch; 0 without a mesh.

    It has no default: on a mesh, 0 would give the same noise to the groups of every device."""
    choice: RoutingChoice | None = None
    """The choices of all layers in an earlier pass over the same tokens, to be reused."""


class LayerRouting(NamedTuple):
    """The router's sums and the kept choices of a layer, or with a leading axis L of all layers."""

    sums: RoutingSums
    kept: Float[Array, "G M E"]


class LayerReport(NamedTuple):
    """All results of a layer but its tokens, or with a leading axis L of all layers."""

    routing: LayerRouting
    choice: RoutingChoice


class Assignment(NamedTuple):
    """The first choice of every token and its gate, by layer; T counts the tokens of an example."""

    expert: Int[Array, "L B T"]
    gate: Float[Array, "L B T"]


class MoeLayer(nnx.Module):
    """Sparse experts shared by image and text tokens (paper, section 2).

    Tokens `[T, D]` are ordered by example, with the image tokens of an example before its text tokens. Parameters are
    float32; the router has no bias.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, placement: Placement | None = None) -> None:
        self.config, self.placement = config, placement
        experts, width, hidden = config.num_experts, config.width, config.mlp_width
        # Initialise each expert by itself, like the dense MLP in its place.
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
        """Route the examples in groups of `group_examples`. Noise and random order depend on (key, layer, group)."""
        mesh = None if self.placement is None else self.placement.mesh
        batch = tokens.shape[0] // lengths.total
        inputs = RouteInputs(modality=_modality(batch, lengths), mask=None if present is None else present.reshape(-1))
        spec = self._spec(batch, context)
        if context is not None:
            inputs = self._training_inputs(inputs, spec, batch, context, layer)
        weights = MlpWeights(self.w1[...], self.b1[...], self.w2[...], self.b2[...])
        result = moe_mlp(tokens, self.router[...], weights, spec, inputs, mesh=mesh)
        choice = RoutingChoice(result.expert, result.priority)
        return result.tokens, LayerReport(LayerRouting(result.sums, result.kept), choice)

    def _spec(self, batch: int, context: RoutingContext | None) -> MoeSpec:
        """Describe the layer: with the capacity, noise and order of the training step, or dropless for evaluation."""
        config, placement = self.config, self.placement
        evaluated = MoeSpec(
            num_choices=config.num_choices,
            # Nothing is dropped, so the result does not depend on the groups.
            num_groups=1 if placement is None else placement.size,
            num_modalities=NUM_MODALITIES,
            activation=config.activation,
            exchange=ExchangeSpec(expert_axis=EXPERT),
        )
        if context is None:
            return evaluated
        priority, first_modality = _PRIORITIES[config.priority]
        exchange = evaluated.exchange
        if placement is not None:
            chunks = placement.config.exchange_chunks
            exchange = ExchangeSpec(expert_axis=EXPERT, num_chunks=chunks, group_stride=context.group_stride)
        return dataclasses.replace(
            evaluated,
            num_groups=batch // (config.group_examples or batch),
            capacity_factor=config.capacity_factor,
            priority=priority,
            first_modality=first_modality,
            noise_std=config.router_noise / config.num_experts if config.router_noise > 0 else None,
            exchange=exchange,
        )

    def _training_inputs(
        self, inputs: RouteInputs, spec: MoeSpec, batch: int, context: RoutingContext, layer: Int[Array, ""]
    ) -> RouteInputs:
        """Add the noise, the key of a random order and an earlier choice to the inputs."""
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
        """Draw the noise of the groups of this call, each on its own device."""
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
        """Find the best expert of every token and its gate, without noise. Padding has gate 0."""
        examples = (-1, lengths.total)
        mask = None if present is None else present.reshape(-1)
        routing = route(tokens, self.router[...], inputs=RouteInputs(mask=mask))
        return routing.expert[:, 0].reshape(examples), routing.gate[:, 0].reshape(examples)


def _modality(batch: int, lengths: Lengths) -> Int[Array, " T"]:
    return jnp.tile(jnp.array([IMAGE] * lengths.image + [TEXT] * lengths.text, jnp.int32), batch)


def layer_figures(routing: LayerRouting) -> RoutingFigures:
    """Compute the figures of every layer from stacked sums: each field is `[L, M]` or `[L, M, E]`."""
    return jax.vmap(routing_figures)(routing.sums, routing.kept)
