"""One training step as a pure function of the train state: gradient and update."""

from __future__ import annotations

import math
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
from limoe.parallel.mesh import Placement, with_shardings
from limoe.train.gradient import gradient
from limoe.train.losses import LossTerms
from limoe.train.optim import make_optimizer


class TrainState(NamedTuple):
    """All that a run needs to continue: the number of finished steps, the parameters and the optimiser's state."""

    step: Int[Array, ""]
    parameters: Parameters
    optimizer: Any


class Counts(NamedTuple):
    """What a process tells the others together with its rows of a batch.

    They travel in the step's inputs and outputs, so processes need no extra program to agree. They do not affect
    training.
    """

    stop_wishes: int
    examined: int
    bad: int
    equal_captions: int = 0
    """Rows whose caption another row of the same process has too."""


class StepReport(NamedTuple):
    """What a step reports. Fields of `routing` are stacked by MoE layer; None for a dense model."""

    loss: LossTerms
    routing: RoutingFigures | None
    gradient_norm: Float[Array, ""]
    scale: Float[Array, ""]
    counts: Int[Array, " C"]
    """The sum of the `Counts` of all processes."""


class Training(NamedTuple):
    """A run without its state: the model's static part, the optimiser, and the abstract state.

    With a placement, the leaves of `abstract` have shardings.
    """

    graph: nnx.GraphDef
    optimizer: optax.GradientTransformation
    abstract: TrainState


def prepare(config: Config, placement: Placement | None = None) -> Training:
    """Prepare what a run needs before any parameter is allocated.

    >>> from limoe.config.presets import preset
    >>> prepare(preset("b16")).abstract.parameters["token_table"].dtype
    dtype('float32')
    """
    graph, parameters = abstract_model(config, placement)
    kinds = parameter_kinds(graph, parameters)
    optimizer = make_optimizer(config.optimizer, config.train.steps, kinds)
    abstract = jax.eval_shape(lambda: _new_state(config, optimizer, placement))
    if placement is not None:
        abstract = with_shardings(abstract, parameters, kinds, placement)
    return Training(graph, optimizer, abstract)


def new_state(config: Config, training: Training, placement: Placement | None = None) -> TrainState:
    """Make the state before the first step from `train.seed`. On a mesh each device makes only its own part."""
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
"""Maps (state, images, text, counts) to the next state and a report. `counts` has a row for each of P devices."""


def make_step(
    graph: nnx.GraphDef, optimizer: optax.GradientTransformation, config: Config, placement: Placement | None = None
) -> Step:
    """Make the train step of a configuration. Compile it with the state donated."""

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
        if config.loss.max_logit_scale:
            limit = math.log(config.loss.max_logit_scale)
            parameters = {**parameters, "log_scale": jnp.minimum(parameters["log_scale"], limit)}
        updated = TrainState(state.step + 1, parameters, optimizer_state)
        return _without_update(state, updated, report) if config.train.non_finite == "skip" else updated, report

    return train_step


def _without_update(before: TrainState, updated: TrainState, report: StepReport) -> TrainState:
    """Leave the update of a step out if its loss or gradient is not finite. The step counts all the same."""
    finite = jnp.isfinite(jnp.stack([*jax.tree.leaves(report.loss), report.gradient_norm])).all()
    # The last part of the optimiser's state counts steps for the learning rate, which goes on.
    *moments, schedule = updated.optimizer
    parameters, kept = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (updated.parameters, moments),
        (before.parameters, list(before.optimizer[:-1])),
    )
    return updated._replace(parameters=parameters, optimizer=(*kept, schedule))


def compile_step(training: Training, config: Config, placement: Placement | None = None) -> Step:
    """Jit the train step with the state donated. On a mesh every argument has its sharding; the report is
    replicated."""
    step = make_step(training.graph, training.optimizer, config, placement)
    if placement is None:
        return jax.jit(step, donate_argnums=0)
    # Without it, libtpu does not overlap exchanges of rows with other work, however many chunks there are.
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
