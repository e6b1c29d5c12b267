"""The gradient of a step's loss as a pure function, for the whole batch at once or chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from limoe.config.schema import Config
from limoe.model.build import Parameters, parameter_kinds
from limoe.model.moe import LayerRouting, RoutingChoice, RoutingContext
from limoe.model.tower import Encoded, scale_images
from limoe.parallel.mesh import Placement, gathered
from limoe.train.losses import Compared, LossTerms, total_loss


class Gradient(NamedTuple):
    """The gradient of every parameter, the terms of the loss, and the routing stacked by MoE layer (None if dense)."""

    parameters: Parameters
    loss: LossTerms
    routing: LayerRouting | None


class Chunk(NamedTuple):
    """Some pairs of a batch, and the index of their first routing group in it. Also several chunks, stacked."""

    images: UInt8[Array, "... B H W 3"]
    text: Int[Array, "... B N"]
    first_group: Int[Array, "..."]


Encode = Callable[[Parameters, Chunk, RoutingChoice | None], Encoded]
Loss = Callable[[Parameters, Encoded], tuple[Float[Array, ""], LossTerms]]


def step_key(seed: int, step: Int[Array, ""]) -> Array:
    """Make the key of a step's router noise."""
    return jax.random.fold_in(jax.random.key(seed), step)


def gradient(
    graph: nnx.GraphDef,
    parameters: Parameters,
    images: UInt8[Array, "B H W 3"],
    text: Int[Array, "B N"],
    step: Int[Array, ""],
    config: Config,
    placement: Placement | None = None,
) -> Gradient:
    """Compute the gradient of the whole batch's loss, the loss terms and the routing.

    With `train.accumulation` > 1 the batch is processed in chunks, in two passes. The first pass computes the
    embeddings and routing sums of all chunks. They give the loss of the whole batch, with all negatives and all
    statistics, and its cotangents. The second pass turns each chunk's cotangents into its part of the gradient. It uses
    the experts and places that the first pass chose. The result equals the gradient in one piece up to rounding.
    """
    key = step_key(config.train.seed, step)
    shares = 1 if placement is None else placement.size
    groups = config.num_groups if config.model.moe_layers else 0
    stride = 0 if placement is None else groups // shares
    kinds = parameter_kinds(graph, parameters)

    def encode(parameters: Parameters, chunk: Chunk, choice: RoutingChoice | None) -> Encoded:
        # Segments gather their own parameters, one period at a time.
        outside = {name: value for name, value in parameters.items() if name != "segments"}
        model = nnx.merge(graph, {**parameters, **gathered(outside, kinds, placement)})
        context = RoutingContext(key, chunk.first_group, stride, choice)
        return model(scale_images(chunk.images), chunk.text, context)

    def loss(parameters: Parameters, encoded: Encoded) -> tuple[Float[Array, ""], LossTerms]:
        scale, bias = jnp.exp(parameters["log_scale"]), parameters.get("logit_bias")
        compared = Compared(None if placement is None else placement.mesh, text)
        terms = total_loss(*encoded.embeddings, encoded.routing, scale, bias, config.loss, config.model, compared)
        return terms.total, terms

    chunks = config.train.accumulation
    if chunks == 1:
        return _in_one_piece(encode, loss, parameters, Chunk(images, text, jnp.int32(0)))
    # Each device processes its own rows chunk after chunk.
    parts = Chunk(
        rearrange(images, "(p n b) ... -> n (p b) ...", p=shares, n=chunks),
        rearrange(text, "(p n b) t -> n (p b) t", p=shares, n=chunks),
        groups // (shares * chunks) * jnp.arange(chunks, dtype=jnp.int32),
    )
    return _by_chunks(encode, loss, parameters, parts, shares)


def _in_one_piece(encode: Encode, loss: Loss, parameters: Parameters, batch: Chunk) -> Gradient:
    def whole(parameters: Parameters) -> tuple[Float[Array, ""], tuple[LossTerms, LayerRouting | None]]:
        encoded = encode(parameters, batch, None)
        total, terms = loss(parameters, encoded)
        return total, (terms, encoded.routing)

    (_, (terms, routing)), grads = jax.value_and_grad(whole, has_aux=True)(parameters)
    return Gradient(grads, terms, routing)


def _by_chunks(encode: Encode, loss: Loss, parameters: Parameters, parts: Chunk, shares: int) -> Gradient:
    by_chunk = jax.lax.map(lambda part: encode(parameters, part, None), parts)
    joined = _join(_differentiable(by_chunk), shares)
    (_, terms), (own, cotangent) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(parameters, joined)

    def add(total: Parameters, step: tuple[Chunk, RoutingChoice | None, Encoded]) -> tuple[Parameters, None]:
        part, choice, cotangent = step
        # The second pass could decide a near tie differently, above all in bfloat16.
        _, pull = jax.vjp(lambda p: _differentiable(encode(p, part, choice)), parameters)
        return jax.tree.map(jnp.add, total, pull(cotangent)[0]), None

    chunks = len(parts.first_group)
    grads, _ = jax.lax.scan(add, own, (parts, by_chunk.choice, _cut(cotangent, shares, chunks)))
    return Gradient(grads, terms, joined.routing)


def _differentiable(encoded: Encoded) -> Encoded:
    """Keep what the loss depends on: everything but the choices."""
    return encoded._replace(choice=None)


def _join(encoded: Encoded, shares: int) -> Encoded:
    """Join chunks: embeddings along the batch, sums along the groups (the axis after layers)."""
    embeddings = jax.tree.map(lambda x: rearrange(x, "n (p b) d -> (p n b) d", p=shares), encoded.embeddings)
    routing = jax.tree.map(lambda x: rearrange(x, "n l (p g) ... -> l (p n g) ...", p=shares), encoded.routing)
    return Encoded(embeddings, routing, None)


def _cut(encoded: Encoded, shares: int, chunks: int) -> Encoded:
    """The inverse of `_join`."""
    sizes: dict[str, Any] = {"p": shares, "n": chunks}
    embeddings = jax.tree.map(lambda x: rearrange(x, "(p n b) d -> n (p b) d", **sizes), encoded.embeddings)
    routing = jax.tree.map(lambda x: rearrange(x, "l (p n g) ... -> n l (p g) ...", **sizes), encoded.routing)
    return Encoded(embeddings, routing, None)
