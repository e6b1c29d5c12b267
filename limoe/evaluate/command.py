"""`limoe eval`: the newest good checkpoint of a run, evaluated on its own data or on given shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from limoe.data import inputs
from limoe.evaluate.data import read_evaluation_data
from limoe.evaluate.evaluator import evaluate, in_words
from limoe.evaluate.restore import restored_encoder


def evaluate_run(folder: str, data: str, probe_data: str = "", *, say: Callable[[str], None]) -> dict[str, Any]:
    """Evaluate a work folder's newest good checkpoint, dropless. Returns a mapping with preset, step and all figures.

    `data` names shards (with classes.json for zero-shot classification); empty means the run's own evaluation data.
    `probe_data` names labelled shards of the same classes, from which a linear probe learns; without them its figures
    are None. The folder is not changed. Raises CheckpointError without a checkpoint, and the errors of reading.
    """
    model = restored_encoder(folder)
    for message in model.skipped:
        say(message)
    evaluation = read_evaluation_data(model.config, inputs.evaluation_folders(model.config, data), probe_data)
    return {"preset": model.config.preset, "step": model.step, "data": data, **evaluate(model.encoder, evaluation)}


def evaluation_text(result: dict[str, Any]) -> str:
    """Format the result for a terminal.

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
