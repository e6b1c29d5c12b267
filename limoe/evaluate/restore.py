"""The model of a work folder, with the parameters of one of its checkpoints."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from limoe.config.schema import Config, MeshConfig
from limoe.data.tokenizer import load_tokenizer
from limoe.evaluate.encode import Encoder
from limoe.model.build import Parameters, placed_model
from limoe.model.describe import describe
from limoe.parallel.mesh import Placement, place
from limoe.workdir.checkpoint import CheckpointError, Checkpoints
from limoe.workdir.data import check_tokenizer
from limoe.workdir.folder import Workdir


class RestoredModel(NamedTuple):
    """A model that is ready to embed."""

    config: Config
    step: int
    encoder: Encoder
    skipped: tuple[str, ...]
    """A message for each damaged checkpoint that was skipped."""


def restored_encoder(
    folder: str | os.PathLike[str], *, step: int | None = None, batch_sizes: Sequence[int] = (128,)
) -> RestoredModel:
    """Read the newest good checkpoint of a work folder, or that of `step`, without the optimiser.

    The folder is not changed. Raises WorkdirError for another folder, and CheckpointError without such a checkpoint or
    for parameters that are not finite.
    """
    workdir = Workdir.existing(os.fspath(folder))
    config = workdir.config
    graph, parameters, placement = model_to_read(config)
    checkpoints = Checkpoints(workdir.checkpoints, config.train.checkpoints_kept, read_only=True)
    restored = checkpoints.restore({"parameters": parameters}, part=True, step=step)
    if restored is None:
        raise CheckpointError(f"{workdir.checkpoints} holds no checkpoint yet; train first")
    parameters = finite(restored.state["parameters"], f"{workdir.checkpoints}, step {restored.step}")
    check_tokenizer(workdir)
    tokenizer = load_tokenizer(workdir.tokenizer, length=config.model.text_length)
    encoder = Encoder(graph, parameters, config, tokenizer, placement=placement, batch_sizes=batch_sizes)
    return RestoredModel(config, restored.step, encoder, restored.skipped)


def model_to_read(config: Config) -> tuple[nnx.GraphDef, Parameters, Placement | None]:
    """Prepare a model that is only evaluated: its static part, its parameters as shapes, and the mesh where they go."""
    placement = place(mesh_to_read_on(config, [_memory_of(device) for device in jax.devices()]))
    return *placed_model(config, placement), placement


def finite(parameters: Parameters, where: str) -> Parameters:
    """Return the parameters. Raises CheckpointError if one of them is not finite; `where` says where they come from."""
    good = jax.jit(lambda tree: jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree))(parameters)
    bad = [jax.tree_util.keystr(path) for path, is_good in jax.tree_util.tree_leaves_with_path(good) if not is_good]
    if bad:
        raise CheckpointError(
            f"{where}: parameters are not finite: {', '.join(bad[:3])}{', ...' * (len(bad) > 3)}; use an earlier step "
            "(to begin with it: limoe export --step=STEP)"
        )
    return parameters


def mesh_to_read_on(config: Config, memories: list[int | None]) -> MeshConfig:
    """Choose the mesh to evaluate on: one device if the parameters take at most half of its memory, else all devices.

    `memories` are the bytes of each device, None if unknown, as on CPUs. On several devices, experts are split over
    `expert` as far as their number allows. The other parameters are split too if they would need more than that half.

    >>> from limoe.config.presets import preset
    >>> mesh = mesh_to_read_on(preset("h14"), [16 * 2**30] * 4)
    >>> mesh.data, mesh.expert, mesh.fully_sharded
    (1, 4, False)
    >>> mesh_to_read_on(preset("h14"), [80 * 2**30] * 4).num_devices
    1
    """
    least = min((memory for memory in memories if memory is not None), default=None)
    found, count = describe(config), len(memories)
    total, of_experts = 4 * found.parameters_total, 4 * found.parameters_experts
    if least is None or total <= least // 2:
        return MeshConfig()
    expert = math.gcd(count, config.model.num_experts) if config.model.moe_layers else 1
    on_each = total - of_experts + of_experts // expert
    return MeshConfig(data=count // expert, expert=expert, fully_sharded=on_each > least // 2)


def _memory_of(device: Any) -> int | None:
    """Ask a device for the bytes that arrays may take; None if it does not say."""
    return (device.memory_stats() or {}).get("bytes_limit")
