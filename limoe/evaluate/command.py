"""`limoe eval`: the newest good checkpoint of a run, evaluated on its own data or on given shards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from limoe.config.schema import Config, MeshConfig
from limoe.data import inputs
from limoe.data.tokenizer import load_tokenizer
from limoe.evaluate.data import read_evaluation_data
from limoe.evaluate.encode import Encoder
from limoe.evaluate.evaluator import evaluate, in_words
from limoe.model.build import placed_model
from limoe.model.describe import describe
from limoe.parallel.mesh import place
from limoe.workdir.checkpoint import CheckpointError, Checkpoints
from limoe.workdir.folder import Workdir


def evaluate_run(folder: str, data: str, probe_data: str = "", *, say: Callable[[str], None]) -> dict[str, Any]:
    """Evaluate a work folder's newest good checkpoint, dropless; a mapping with preset, step and all figures.

    `data` names shards (with classes.json for zero-shot classification); empty means the run's own evaluation data.
    `probe_data` names labelled shards of the same classes, which a linear probe learns from; its figures are None
    without. Nothing in the folder is changed. Raises CheckpointError without a checkpoint, and what reading raises.
    """
    workdir = Workdir.existing(folder)
    config = workdir.config
    placement = place(mesh_to_read_on(config, [_memory_of(device) for device in jax.devices()]))
    graph, parameters = placed_model(config, placement)
    checkpoints = Checkpoints(workdir.checkpoints, config.train.checkpoints_kept, read_only=True)
    restored = checkpoints.restore({"parameters": parameters}, part=True)
    if restored is None:
        raise CheckpointError(f"{workdir.checkpoints} holds no checkpoint yet; train first")
    for message in restored.skipped:
        say(message)
    tokenizer = load_tokenizer(workdir.tokenizer, length=config.model.text_length)
    evaluation = read_evaluation_data(config, inputs.evaluation_folders(config, data), probe_data)
    encoder = Encoder(graph, restored.state["parameters"], config, tokenizer, placement=placement)
    return {"preset": config.preset, "step": restored.step, "data": data, **evaluate(encoder, evaluation)}


def mesh_to_read_on(config: Config, memories: list[int | None]) -> MeshConfig:
    """The mesh on which a model is only read: one device if its parameters take at most half of its memory, else all.

    `memories` are bytes of each device, None where unknown, as on CPUs. On several devices experts lie over `expert`
    as far as their number divides; the rest is split too if else it would take more than that half.

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
    """Bytes that arrays may take on a device, None where it does not say."""
    return (device.memory_stats() or {}).get("bytes_limit")


def evaluation_text(result: dict[str, Any]) -> str:
    """The result for a terminal.

    >>> from limoe.evaluate.evaluator import no_figures
    >>> print(evaluation_text({"preset": "tiny", "step": 10, **no_figures()}))
    tiny, step 10
      nothing to evaluate: give shards with --data
    """
    lines = in_words(result)
    if result["evaluation_bad_examples"]:
        lines.append(f"{result['evaluation_bad_examples']} bad examples left out")
    if not lines:
        lines.append("nothing to evaluate: give shards with --data")
    return "\n  ".join([f"{result['preset']}, step {result['step']:,}", *lines])
