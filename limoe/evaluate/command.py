"""`limoe eval`: the newest good checkpoint of a run, evaluated on its own data or on given shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from limoe.config.schema import MeshConfig
from limoe.data import inputs
from limoe.data.tokenizer import load_tokenizer
from limoe.evaluate import scores
from limoe.evaluate.encode import Encoder
from limoe.evaluate.metrics import Probe
from limoe.train.step import prepare
from limoe.workdir.checkpoint import CheckpointError, Checkpoints
from limoe.workdir.folder import Workdir


def evaluate_run(folder: str, data: str, probe_data: str = "", *, say: Callable[[str], None]) -> dict[str, Any]:
    """Evaluate a work folder's newest good checkpoint, dropless; a mapping with preset, step and all of `Scores`.

    `data` names shards (with classes.json for zero-shot classification); empty means the run's own evaluation data.
    `probe_data` names labelled shards of the same classes, which a linear probe learns from; its figures are None
    without. Nothing in the folder is changed. Raises CheckpointError without a checkpoint, and what reading raises.
    """
    workdir = Workdir.existing(folder)
    config = replace(workdir.config, mesh=MeshConfig())  # one device is enough, whatever trained it
    training = prepare(config)
    checkpoints = Checkpoints(workdir.checkpoints, config.train.checkpoints_kept, read_only=True)
    restored = checkpoints.restore(training.abstract)
    if restored is None:
        raise CheckpointError(f"{workdir.checkpoints} holds no checkpoint yet; train first")
    for message in restored.skipped:
        say(message)
    tokenizer = load_tokenizer(workdir.tokenizer, length=config.model.text_length)
    evaluation = scores.read_evaluation_data(config, inputs.evaluation_folders(config, data))
    encoder = Encoder(training.graph, restored.state.parameters, config, tokenizer)
    probe = scores.probe(encoder, config, evaluation, probe_data)._asdict() if probe_data else {}
    found = scores.score(encoder, evaluation)
    named = {f"probe_{name}": probe.get(name) for name in Probe._fields}
    return {"preset": config.preset, "step": restored.step, "data": data, **found._asdict(), **named}


def evaluation_text(result: dict[str, Any]) -> str:
    """The result for a terminal.

    >>> empty = dict.fromkeys([*scores.Scores._fields, "probe_top1"]) | {"zero_shot_images": 0, "retrieval_pairs": 0}
    >>> print(evaluation_text(empty | {"preset": "tiny", "step": 10, "evaluation_bad_examples": 0}).splitlines()[0])
    tiny, step 10
    """
    lines = [f"{result['preset']}, step {result['step']:,}"]
    if result["zero_shot_top1"] is not None:
        lines.append(
            f"  zero-shot, {result['zero_shot_images']:,} images: top-1 {result['zero_shot_top1']:.1%}, "
            f"top-5 {result['zero_shot_top5']:.1%}, chance {result['zero_shot_chance']:.1%}"
        )
    if result["probe_top1"] is not None:
        lines.append(
            f"  linear probe, {result['probe_shots']} shots: top-1 {result['probe_top1']:.1%}, "
            f"chance {result['probe_chance']:.1%}"
        )
    if result["image_to_text_r1"] is not None:
        for way in ("image_to_text", "text_to_image"):
            recalls = ", ".join(f"R@{k} {result[f'{way}_r{k}']:.1%}" for k in (1, 5, 10))
            lines.append(f"  {way.replace('_', ' ')}, {result['retrieval_pairs']:,} pairs: {recalls}")
    if result["evaluation_bad_examples"]:
        lines.append(f"  {result['evaluation_bad_examples']} bad examples left out")
    if not result["zero_shot_images"] and not result["retrieval_pairs"]:
        lines.append("  nothing to evaluate: give shards with --data")
    return "\n".join(lines)
