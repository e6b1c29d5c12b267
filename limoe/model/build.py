"""The model of a configuration: its static part and its parameters, as values or as shapes."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from limoe.config.schema import Config
from limoe.model.tower import Limoe
from limoe.parallel.mesh import Placement, parameter_specs, state_shardings
from limoe.parallel.parameters import Kinds, kinds_of

Parameters = dict[str, Any]


def create_model(config: Config, placement: Placement | None = None) -> tuple[nnx.GraphDef, Parameters]:
    """Build the model of a configuration: its static part and its parameters (a plain nested dict), from
    `train.seed`."""
    graph, state = nnx.split(_model(config, placement))
    return graph, nnx.to_pure_dict(state)


def abstract_model(config: Config, placement: Placement | None = None) -> tuple[nnx.GraphDef, Parameters]:
    """The same with shapes instead of values: nothing is allocated, whatever the size.

    >>> from limoe.config.presets import preset
    >>> abstract_model(preset("h14"))[1]["token_table"].shape
    (32000, 1280)
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: _model(config, placement)))
    return graph, nnx.to_pure_dict(state)


def placed_model(config: Config, placement: Placement | None) -> tuple[nnx.GraphDef, Parameters]:
    """`abstract_model` whose parameters carry their shardings on a mesh: what a checkpoint is read into."""
    graph, parameters = abstract_model(config, placement)
    if placement is None:
        return graph, parameters
    specs = parameter_specs(parameters, parameter_kinds(graph, parameters), placement.config)
    shardings = state_shardings(parameters, specs, parameters, placement)
    return graph, jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), parameters, shardings
    )


def _model(config: Config, placement: Placement | None) -> Limoe:
    return Limoe(config.model, config.loss, rngs=nnx.Rngs(config.train.seed), placement=placement)


def parameter_kinds(graph: nnx.GraphDef, parameters: Parameters) -> Kinds:
    """What each parameter of a model is; values or shapes will do.

    >>> from limoe.config.presets import preset
    >>> parameter_kinds(*abstract_model(preset("tiny")))["token_table"].role
    'table'
    """
    return kinds_of(nnx.merge(graph, parameters))
