"""One training step: loss, gradient (in one piece or by chunks) and update, as a pure function of the train state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from limoe.config.schema import Config
from limoe.model.build import Parameters, abstract_model, create_model, parameter_kinds
from limoe.model.moe import LayerRouting, RoutingContext, RoutingFigures, layer_figures
from limoe.model.tower import Embeddings, Encoded, scale_images
from limoe.parallel.mesh import Placement, gathered, parameter_specs, state_shardings
from limoe.train.losses import LossTerms, total_loss
from limoe.train.optim import make_optimizer


class TrainState(NamedTuple):
    """All that a run needs to go on: the number of steps done, parameters and the optimiser's state."""

    step: Int[Array, ""]
    parameters: Parameters
    optimizer: Any


class Counts(NamedTuple):
    """What a process tells the others with its rows of a batch.

    They ride in the step's own inputs and outputs, so that processes agree without a program of its own; the result of
    training does not depend on them.
    """

    stop_wishes: int
    examined: int
    bad: int


class StepReport(NamedTuple):
    """What a step reports; `routing` fields are stacked by MoE layer, None for a dense model."""

    loss: LossTerms
    routing: RoutingFigures | None
    gradient_norm: Float[Array, ""]
    scale: Float[Array, ""]
    counts: Int[Array, " C"]
    """The `Counts` of all processes, added up."""


class Training(NamedTuple):
    """What makes a run besides its state: the model's static part, the optimiser, and the abstract state.

    With a placement the leaves of `abstract` carry their shardings.
    """

    graph: nnx.GraphDef
    optimizer: optax.GradientTransformation
    abstract: TrainState


def prepare(config: Config, placement: Placement | None = None) -> Training:
    """All of a run that is known before a parameter is allocated.

    >>> from limoe.config.presets import preset
    >>> prepare(preset("b16")).abstract.parameters["token_table"].dtype
    dtype('float32')
    """
    graph, parameters = abstract_model(config, placement)
    kinds = parameter_kinds(graph, parameters)
    optimizer = make_optimizer(config.optimizer, config.train.steps, kinds)
    abstract = jax.eval_shape(lambda: _new_state(config, optimizer, placement))
    if placement is not None:
        specs = parameter_specs(parameters, kinds, config.mesh)
        shardings = state_shardings(abstract, specs, parameters, placement)
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
        )
    return Training(graph, optimizer, abstract)


def new_state(config: Config, training: Training, placement: Placement | None = None) -> TrainState:
    """The state before the first step, from `train.seed`; on a mesh each device makes its own part only."""
    create = lambda: _new_state(config, training.optimizer, placement)  # noqa: E731
    if placement is None:
        return create()
    return jax.jit(create, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, training.abstract))()


def _new_state(config: Config, optimizer: optax.GradientTransformation, placement: Placement | None) -> TrainState:
    parameters = create_model(config, placement)[1]
    return TrainState(jnp.zeros((), jnp.int32), parameters, optimizer.init(parameters))


def step_key(seed: int, step: Int[Array, ""]) -> Array:
    """The key of a step's router noise."""
    return jax.random.fold_in(jax.random.key(seed), step)


def gradient(
    graph: nnx.GraphDef,
    parameters: Parameters,
    images: UInt8[Array, "B H W 3"],
    text: Int[Array, "B N"],
    step: Int[Array, ""],
    config: Config,
    placement: Placement | None = None,
) -> tuple[Parameters, LossTerms, LayerRouting | None]:
    """Gradient of the loss of the whole batch, its terms and its routing.

    With `train.accumulation` > 1 the batch is worked in chunks, twice: first embeddings and routing sums of all
    chunks, from which the loss of the whole batch (all negatives, all statistics) and its cotangents follow; then each
    chunk's share of the gradient from its cotangents. Equal to the gradient in one piece within rounding.
    """
    key, chunks = step_key(config.train.seed, step), config.train.accumulation

    groups = config.num_groups if config.model.moe_layers else 0
    stride = 0 if placement is None else groups // placement.size
    kinds = parameter_kinds(graph, parameters)

    def encode(parameters: Parameters, images: Array, text: Array, first_group: Array) -> Encoded:
        # Segments gather their own, a period at a time.
        outside = {name: value for name, value in parameters.items() if name != "segments"}
        model = nnx.merge(graph, {**parameters, **gathered(outside, kinds, placement)})
        return model(scale_images(images), text, RoutingContext(key, first_group, stride))

    def loss(parameters: Parameters, encoded: Encoded) -> tuple[Float[Array, ""], LossTerms]:
        scale, bias = jnp.exp(parameters["log_scale"]), parameters.get("logit_bias")
        mesh = None if placement is None else placement.mesh
        image, text = encoded.embeddings
        terms = total_loss(image, text, encoded.routing, scale, bias, config.loss, config.model, mesh)
        return terms.total, terms

    if chunks == 1:

        def whole(parameters: Parameters) -> tuple[Float[Array, ""], tuple[LossTerms, LayerRouting | None]]:
            encoded = encode(parameters, images, text, jnp.int32(0))
            total, terms = loss(parameters, encoded)
            return total, (terms, encoded.routing)

        (_, (terms, routing)), grads = jax.value_and_grad(whole, has_aux=True)(parameters)
        return grads, terms, routing

    # Each device works its own rows chunk after chunk.
    shares = 1 if placement is None else placement.size
    first_group = groups // (shares * chunks) * jnp.arange(chunks, dtype=jnp.int32)
    parts = (
        rearrange(images, "(p n b) ... -> n (p b) ...", p=shares, n=chunks),
        rearrange(text, "(p n b) t -> n (p b) t", p=shares, n=chunks),
        first_group,
    )
    by_chunk = jax.lax.map(lambda part: encode(parameters, *part), parts)
    (_, (terms)), (own, cotangent) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        parameters, _join(by_chunk, shares)
    )

    def add(total: Parameters, step: tuple[tuple[Array, Array, Array], Encoded]) -> tuple[Parameters, None]:
        part, cotangent = step
        _, pull = jax.vjp(lambda p: encode(p, *part), parameters)
        return jax.tree.map(jnp.add, total, pull(cotangent)[0]), None

    grads, _ = jax.lax.scan(add, own, (parts, _cut(cotangent, shares, chunks)))
    return grads, terms, _join(by_chunk, shares).routing


def _join(encoded: Encoded, shares: int) -> Encoded:
    """Chunks to the whole: embeddings along the batch, sums along the groups (the second axis after layers)."""
    embeddings = jax.tree.map(lambda x: rearrange(x, "n (p b) d -> (p n b) d", p=shares), encoded.embeddings)
    routing = jax.tree.map(lambda x: rearrange(x, "n l (p g) ... -> l (p n g) ...", p=shares), encoded.routing)
    return Encoded(Embeddings(*embeddings), routing)


def _cut(encoded: Encoded, shares: int, chunks: int) -> Encoded:
    """The inverse of `_join`."""
    sizes = {"p": shares, "n": chunks}
    embeddings = jax.tree.map(lambda x: rearrange(x, "(p n b) d -> n (p b) d", **sizes), encoded.embeddings)
    routing = jax.tree.map(lambda x: rearrange(x, "l (p n g) ... -> n l (p g) ...", **sizes), encoded.routing)
    return Encoded(Embeddings(*embeddings), routing)


Step = Callable[
    [TrainState, UInt8[Array, "B H W 3"], Int[Array, "B N"], Int[Array, "P C"]], tuple[TrainState, StepReport]
]
"""(state, images, text, counts) to the next state and a report; a row of `counts` for each of P devices."""


def make_step(
    graph: nnx.GraphDef, optimizer: optax.GradientTransformation, config: Config, placement: Placement | None = None
) -> Step:
    """The train step of a configuration, to be compiled with the state donated."""

    def train_step(
        state: TrainState, images: UInt8[Array, "B H W 3"], text: Int[Array, "B N"], counts: Int[Array, "P C"]
    ) -> tuple[TrainState, StepReport]:
        grads, terms, routing = gradient(graph, state.parameters, images, text, state.step, config, placement)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.parameters)
        report = StepReport(
            loss=terms,
            routing=None if routing is None else layer_figures(routing),
            gradient_norm=optax.tree.norm(grads),
            scale=jnp.exp(state.parameters["log_scale"]),
            counts=counts.sum(axis=0),
        )
        parameters = jax.tree.map(jnp.add, state.parameters, updates)
        return TrainState(state.step + 1, parameters, optimizer_state), report

    return train_step


def compile_step(training: Training, config: Config, placement: Placement | None = None) -> Step:
    """The train step under jit, the state donated; on a mesh every argument has its place, the report is everywhere."""
    step = make_step(training.graph, training.optimizer, config, placement)
    if placement is None:
        return jax.jit(step, donate_argnums=0)
    # Else libtpu compiles exchanges of rows as steps of their own, however many chunks there are.
    on_tpu = placement.mesh.devices.flat[0].platform == "tpu"
    options = {"xla_tpu_enable_async_all_to_all": True} if on_tpu else None
    state, rows = jax.tree.map(lambda leaf: leaf.sharding, training.abstract), placement.rows
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(state, rows, rows, rows),
        out_shardings=(state, placement.everywhere),
        compiler_options=options,
    )
