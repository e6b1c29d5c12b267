"""Count the parameters and FLOPs of a configuration from its model, without allocating it."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax

from limoe.config.schema import Config, ModelConfig
from limoe.model.build import abstract_model, parameter_kinds
from limoe.parallel.parameters import parameter_path


class Description(NamedTuple):
    """The size and work of a model, with the fields of `limoe describe --json`."""

    preset: str
    parameters_total: int
    parameters_per_token: int
    """Parameters used for one token: all but the experts that it does not choose. The whole vocabulary table
    counts."""
    parameters_experts: int
    parameters_routers: int
    parameters_dense_twin: int
    """Parameters of the same model with an ordinary MLP in every block."""
    flops_per_example: int
    """FLOPs of the matmuls for one training example: 3 times those of the forward pass, without recomputation."""
    moe_layers: tuple[int, ...]
    num_experts: int
    num_choices: int
    depth: int
    width: int
    mlp_width: int
    image_tokens: int
    text_tokens: int
    batch_size: int
    steps: int


def describe(config: Config) -> Description:
    """Count the parameters and FLOPs of a configuration (paper, section 1).

    >>> from limoe.config.presets import preset
    >>> f"{describe(preset('h14')).parameters_total:.3e}"
    '5.554e+09'
    """
    model = config.model
    graph, parameters = abstract_model(config)
    kinds = parameter_kinds(graph, parameters)
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    sizes = [(kinds[parameter_path(path)], math.prod(leaf.shape)) for path, leaf in leaves]
    total = sum(size for _, size in sizes)
    experts = sum(size for kind, size in sizes if kind.per_expert)
    routers = sum(size for kind, size in sizes if kind.role == "router")
    unused = experts // model.num_experts * (model.num_experts - model.num_choices)
    one_mlp = experts // model.num_experts
    return Description(
        preset=config.preset,
        parameters_total=total,
        parameters_per_token=total - unused,
        parameters_experts=experts,
        parameters_routers=routers,
        parameters_dense_twin=total - experts - routers + one_mlp,
        flops_per_example=3 * _forward_flops(model),
        moe_layers=model.moe_layers,
        num_experts=model.num_experts,
        num_choices=model.num_choices,
        depth=model.depth,
        width=model.width,
        mlp_width=model.mlp_width,
        image_tokens=model.num_image_tokens,
        text_tokens=model.text_length,
        batch_size=config.train.batch_size,
        steps=config.train.steps,
    )


def _forward_flops(model: ModelConfig) -> int:
    """Count two FLOPs for each multiplication: patches, attention, MLPs or chosen experts, routers, projections."""
    tokens, width = model.tokens_per_example, model.width
    patches = model.num_image_tokens * 3 * model.patch_size**2 * width
    attention = tokens * 4 * width**2 + 2 * width * (model.num_image_tokens**2 + model.text_length**2)
    mlp = tokens * 2 * width * model.mlp_width
    sparse = len(model.moe_layers)
    blocks = model.depth * attention + (model.depth - sparse) * mlp
    blocks += sparse * (model.num_choices * mlp + tokens * width * model.num_experts)
    return 2 * (patches + blocks + 2 * width**2)


def as_text(description: Description) -> str:
    """Format the description for a terminal.

    >>> from limoe.config.presets import preset
    >>> print(as_text(describe(preset("tiny"))).splitlines()[0])
    tiny: 4 blocks of width 128, experts in blocks 1, 3
    """
    d = description
    experts = f"experts in blocks {', '.join(map(str, d.moe_layers))}" if d.moe_layers else "dense"
    rows = [
        ("parameters", f"{d.parameters_total:,}"),
        ("applied per token", f"{d.parameters_per_token:,}"),
        ("in experts", f"{d.parameters_experts:,}"),
        ("in routers", f"{d.parameters_routers:,}"),
        ("of the dense twin", f"{d.parameters_dense_twin:,}"),
        ("training FLOPs per example", f"{d.flops_per_example:.4g}"),
        ("tokens per example", f"{d.image_tokens} image + {d.text_tokens} text"),
        ("experts, choices per token", f"{d.num_experts}, {d.num_choices}" if d.moe_layers else "none"),
        ("schedule", f"{d.steps:,} steps of {d.batch_size:,} pairs"),
    ]
    lines = [f"{d.preset}: {d.depth} blocks of width {d.width}, {experts}", ""]
    return "\n".join(lines + [f"  {name:<28} {value}" for name, value in rows])
