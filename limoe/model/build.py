"""The model of a configuration: its static part and its parameters, as values or as shapes."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from limoe.config.schema import Config
from limoe.model.segments import cut
from limoe.model.tower import Limoe
from limoe.parallel.mesh import Placement, parameter_specs, state_shardings

Parameters = dict[str, Any]


def create_model(config: Config, placement: Placement | None = None) -> tuple[nnx.GraphDef, Parameters]:
    """Build the model of a configuration: its static part and its parameters (a plain nested dict), from
    `train.seed`."""
    graph, state = nnx.split(Limoe(config, rngs=nnx.Rngs(config.train.seed), placement=placement))
    return graph, nnx.to_pure_dict(state)


def abstract_model(config: Config, placement: Placement | None = None) -> tuple[nnx.GraphDef, Parameters]:
    """The same with shapes instead of values: nothing is allocated, whatever the size.

    >>> from limoe.config.presets import preset
    >>> abstract_model(preset("h14"))[1]["token_table"].shape
    (32000, 1280)
    """
    graph, state = nnx.split(
        nnx.eval_shape(lambda: Limoe(config, rngs=nnx.Rngs(config.train.seed), placement=placement))
    )
    return graph, nnx.to_pure_dict(state)


def placed_model(config: Config, placement: Placement | None) -> tuple[nnx.GraphDef, Parameters]:
    """`abstract_model` whose parameters carry their shardings on a mesh: what a checkpoint is read into."""
    graph, parameters = abstract_model(config, placement)
    if placement is None:
        return graph, parameters
    repeats = [segment.repeats for segment in cut(config.model.depth, config.model.moe_layers)]
    specs = parameter_specs(parameters, placement.config, repeats)
    shardings = state_shardings(parameters, specs, parameters, placement)
    return graph, jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), parameters, shardings
    )
