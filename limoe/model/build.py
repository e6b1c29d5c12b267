"""Build the model of a configuration: its static part, and its parameters as values or as shapes."""

from __future__ import annotations

from typing import Any

from flax import nnx

from limoe.config.schema import Config
from limoe.model.tower import Limoe
from limoe.parallel.mesh import Placement, with_shardings
from limoe.parallel.parameters import Kinds, kinds_of

Parameters = dict[str, Any]


def create_model(config: Config, placement: Placement | None = None) -> tuple[nnx.GraphDef, Parameters]:
    """Build a model's static part and its parameters, a plain nested dict, from `train.seed`."""
    graph, state = nnx.split(_model(config, placement))
    return graph, nnx.to_pure_dict(state)


def abstract_model(config: Config, placement: Placement | None = None) -> tuple[nnx.GraphDef, Parameters]:
    """Build the same with shapes instead of values. Nothing is allocated, so the size does not matter.

    >>> from limoe.config.presets import preset
    >>> abstract_model(preset("h14"))[1]["token_table"].shape
    (32000, 1280)
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: _model(config, placement)))
    return graph, nnx.to_pure_dict(state)


def placed_model(config: Config, placement: Placement | None) -> tuple[nnx.GraphDef, Parameters]:
    """Build `abstract_model` with the parameters' shardings on a mesh, as the target for reading a checkpoint."""
    graph, parameters = abstract_model(config, placement)
    if placement is None:
        return graph, parameters
    return graph, with_shardings(parameters, parameters, parameter_kinds(graph, parameters), placement)


def _model(config: Config, placement: Placement | None) -> Limoe:
    return Limoe(config.model, config.loss, rngs=nnx.Rngs(config.train.seed), placement=placement)


def parameter_kinds(graph: nnx.GraphDef, parameters: Parameters) -> Kinds:
    """Find the kind of each parameter of a model, given values or shapes.

    >>> from limoe.config.presets import preset
    >>> parameter_kinds(*abstract_model(preset("tiny")))["token_table"].role
    'table'
    """
    return kinds_of(nnx.merge(graph, parameters))
