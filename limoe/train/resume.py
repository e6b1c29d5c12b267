"""Where a run goes on: its newest good checkpoint, and the log up to that step."""

from __future__ import annotations

from collections.abc import Callable

from limoe.train.step import TrainState
from limoe.workdir.checkpoint import Checkpoints
from limoe.workdir.folder import WorkdirError
from limoe.workdir.metrics import MetricsLog


def restore(
    checkpoints: Checkpoints, abstract: TrainState, log: MetricsLog | None, num_steps: int, say: Callable[[str], None]
) -> TrainState | None:
    """Restore the newest good checkpoint, if there is one, and cut the log to the same step.

    A log that lost its end, or all of it, does not end the run: the figures of those steps are missing, which is said.
    Raises WorkdirError if all steps are done and the whole log is lost: no summary can be made of nothing.
    """
    restored = checkpoints.restore(abstract)
    if log is None:
        return None if restored is None else restored.state
    if restored is None:
        log.truncate_after(0)
        return None
    for message in restored.skipped:
        say(message)
    say(f"continuing from the checkpoint of step {restored.step}")
    known = log.last_step or 0
    if not known and restored.step >= num_steps:
        raise WorkdirError(
            f"all {num_steps} steps are done, but {log.path} is lost, from which the summary is made; put it back, or "
            f"use the checkpoint as it is: limoe eval --workdir={log.path.parent}"
        )
    if known < restored.step:
        say(f"{log.path} lost the lines of steps {known + 1} to {restored.step}; curves and figures are without them")
    log.truncate_after(restored.step)
    return restored.state
