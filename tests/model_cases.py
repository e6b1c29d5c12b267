"""A small LIMoE for tests: its configuration, parameters that are zero nowhere, data, and its twin in the reference."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from limoe.config.presets import preset
from limoe.config.schema import Config
from limoe.config.settings import override
from limoe.model.build import abstract_model
from limoe.model.moe import RoutingContext
from limoe.model.segments import cut
from limoe.model.tower import PAD_ID
from moe_kernels import random_priority, router_noise

BASE = (
    *("depth=3", "width=8", "mlp_width=16", "num_heads=2", "patch_size=4", "image_size=8", "text_length=3"),
    *("vocab_size=11", "moe_layers=1", "num_experts=4", "group_examples=2", "capacity_factor=1.0", "batch_size=4"),
    *("scan_unroll=1", "steps=500", "compute_dtype=float32"),
)


def small_config(*settings: str) -> Config:
    """Later settings replace earlier ones of the same name."""
    latest = dict(setting.split("=", 1) for setting in (*BASE, *settings))
    return override(preset("tiny"), [f"{name}={value}" for name, value in latest.items()])


def small_model(config: Config, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """Graph and random parameters, also where a new model has 0 or 1, which would hide what they do.

    From shapes alone: initialising op by op takes ten times as long as the test.
    """
    graph, shapes = abstract_model(config)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        mean = {"scale": 1.0, "log_scale": 2.0, "logit_bias": -2.0}.get(path[-1].key, 0.0)
        return jnp.asarray(mean + rng.normal(scale=0.3, size=leaf.shape), jnp.float32)

    return graph, jax.tree_util.tree_map_with_path(draw, shapes)


# The most that moving every parameter by one rounding may move a figure, of itself, in a run of some steps. What was
# measured is a few 2^-20; a near tie that falls the other way, or a bound that anything passes, is above.
LID = 2.0**-16


def neighbour(rng: np.random.Generator, array: jax.Array) -> jax.Array:
    """Every entry one float32 up or down."""
    towards = np.where(rng.random(array.shape) < 0.5, -np.inf, np.inf).astype(np.float32)
    return jnp.asarray(np.nextafter(np.asarray(array), towards))


def small_batch(config: Config, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Bytes [B, H, W, 3] and ids [B, N] that end in padding, at least one token in each caption."""
    rng = np.random.default_rng(seed)
    model, batch = config.model, config.train.batch_size
    images = rng.integers(0, 256, (batch, model.image_size, model.image_size, 3)).astype(np.uint8)
    text = rng.integers(1, model.vocab_size, (batch, model.text_length)).astype(np.int32)
    length = rng.integers(1, model.text_length + 1, batch)
    return images, np.where(np.arange(model.text_length) < length[:, None], text, PAD_ID)


def reference_parameters(config: Config, parameters: dict[str, Any]) -> dict[str, Any]:
    """The plain dict of the reference: segments and their repeats unrolled into a list of blocks."""
    parameters = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), parameters)
    blocks = []
    for number, segment in enumerate(cut(config.model.depth, config.model.moe_layers)):
        period = parameters["segments"][number]["blocks"]
        for repeat in range(segment.repeats):
            for position, experts in enumerate(segment.pattern):
                block = period[position]
                if segment.repeats > 1:
                    block = jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], block)
                assert ("moe" in block) == experts
                blocks.append(dict(block) if experts else {**block, "mlp": _dense(block["mlp"])})
    names = ("patch", "token_table", "image_position", "text_position", "norm")
    projections = {name: parameters[name]["kernel"] for name in ("image_projection", "text_projection")}
    return {**{name: parameters[name] for name in names}, **projections, "blocks": blocks}


def _dense(mlp: dict[str, Any]) -> dict[str, np.ndarray]:
    return {"w1": mlp["w1"]["kernel"], "b1": mlp["w1"]["bias"], "w2": mlp["w2"]["kernel"], "b2": mlp["w2"]["bias"]}


def draws(config: Config, context: RoutingContext) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Router noise [T, E] and random priorities [T] of every MoE layer, for the groups of one whole batch.

    Noise is a function of (key, layer, group): this says which.
    """
    model = config.model
    size = config.num_groups, config.train.batch_size // config.num_groups * model.tokens_per_example
    noise, order = [], []
    for layer in range(len(model.moe_layers)):
        noise_key, order_key = jax.random.split(jax.random.fold_in(context.key, layer))
        kind = {"num_groups": size[0], "group_size": size[1], "first_group": context.first_group}
        draw = router_noise(noise_key, num_experts=model.num_experts, **kind)
        noise.append(np.asarray(model.router_noise * draw))
        order.append(np.asarray(random_priority(order_key, **kind)))
    return noise, order


def scaled(images: np.ndarray) -> np.ndarray:
    """Bytes to -1..1, as the model sees them."""
    return np.asarray(jnp.asarray(images, jnp.float32) / 127.5 - 1.0)
