"""One training step, gradient and update, as a pure function of the train state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from limoe.config.schema import Config
from limoe.model.build import Parameters, abstract_model, create_model, parameter_kinds
from limoe.model.moe import RoutingFigures, layer_figures
from limoe.parallel.mesh import Placement, parameter_specs, state_shardings
from limoe.train.gradient import gradient
from limoe.train.losses import LossTerms
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
