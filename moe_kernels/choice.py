"""The choice of back ends for all spans of a layer, made once, from its spec, its shapes and the device."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax

from moe_kernels import backends
from moe_kernels.activations import ClampedSwiglu
from moe_kernels.backends import Choice, Traced
from moe_kernels.backends.base import Epilogue, Problem, RouteStatic
from moe_kernels.experts import GluMatmuls
from moe_kernels.types import Layout


@dataclasses.dataclass(frozen=True)
class LayerShapes:
    """Sizes and dtypes of a layer on one device. `num_experts` counts the experts of all devices."""

    num_tokens: int
    width: int
    expert_width: int
    num_experts: int
    dtype: str
    weight_dtype: str
    activation: str | ClampedSwiglu
    glu: GluMatmuls | None = None
    gates_on_input: bool = False


class LayerChoice(NamedTuple):
    """The back end of each verb, and of the span `layer`, which stands for dispatch, experts and combine together.

    Gated experts with something between their matmuls that no `expert_glu` has (see `GluMatmuls`) are two matmuls:
    `experts` is the first, and `down` the second. Otherwise `down` is None.
    """

    route: Choice
    dispatch: Choice
    experts: Choice
    down: Choice | None
    combine: Choice
    layer: Choice


def choose_layer(
    shapes: LayerShapes,
    route: RouteStatic,
    layout: Layout,
    received: Layout | None = None,
    *,
    backend: str | None = None,
    on: Traced | None = None,
) -> LayerChoice:
    """Choose all spans of a layer. `received` is the layout of the rows that other shards send to its experts, if any.

    >>> from moe_kernels.capacity import plan_layout
    >>> shapes = LayerShapes(8, 4, 16, 2, "float32", "float32", "gelu_tanh")
    >>> choose_layer(shapes, RouteStatic(1, 1, 1, 0.5), plan_layout(8, 1, 1, 2, None, None)).experts.backend
    'xla'
    """
    tokens = jax.ShapeDtypeStruct((shapes.num_tokens, shapes.width), shapes.dtype)
    common = backends.problem_of(
        "route",
        tokens,
        shapes.num_experts,
        on=on,
        route=route,
        layout=layout,
        weight_dtype=shapes.weight_dtype,
        activation=shapes.activation if isinstance(shapes.activation, str) else "",
    )
    rows = dataclasses.replace(common, shape=(layout.num_rows, shapes.width))
    here = layout if received is None else received
    experts = dataclasses.replace(
        common,
        span="expert_mlp",
        shape=(here.num_rows, shapes.width),
        num_experts=here.num_experts,
        expert_width=shapes.expert_width,
        layout=here,
    )
    down = None
    if shapes.glu is not None and shapes.glu.first == "gated":
        experts = dataclasses.replace(experts, span="expert_glu", epilogue=shapes.glu.down)
    elif shapes.glu is not None:
        plain = dataclasses.replace(experts, activation="")
        down = backends.choice_of(_matmul(plain, shapes.expert_width, shapes.width, shapes.glu.down), backend)
        experts = _matmul(plain, shapes.width, shapes.glu.columns, shapes.glu.first)
    return LayerChoice(
        route=backends.choice_of(common, backend),
        dispatch=backends.choice_of(dataclasses.replace(common, span="dispatch"), backend),
        experts=backends.choice_of(experts, backend),
        down=down,
        combine=backends.choice_of(dataclasses.replace(rows, span="combine"), backend),
        layer=_whole(common, shapes, received, backend),
    )


def _matmul(problem: Problem, width: int, expert_width: int, epilogue: Epilogue) -> Problem:
    return dataclasses.replace(
        problem,
        span="grouped_matmul",
        shape=(problem.shape[0], width),
        expert_width=expert_width,
        epilogue=epilogue,
    )


def _whole(common: Problem, shapes: LayerShapes, received: Layout | None, backend: str | None) -> Choice:
    """Choose a span for dispatch, experts and combine together, if a back end has one."""
    reason = None if shapes.glu is None else "its kernel has no gated experts"
    if shapes.gates_on_input:
        reason = "gates are on the input of the experts"
    if received is not None:
        reason = "its experts get rows from other shards"
    if reason is not None:
        return Choice(None, None, "", {each.name: reason for each in backends.BACKENDS}, "dispatch_mlp_combine")
    problem = dataclasses.replace(common, span="dispatch_mlp_combine", expert_width=shapes.expert_width)
    return backends.choice_of(problem, backend)
