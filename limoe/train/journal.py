"""What the first process reports of each finished step: to the log, to registered loggers and to the progress bar."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from limoe.config.schema import Config, TrainConfig
from limoe.data.batches import BadExamples
from limoe.data.source import Bad
from limoe.report.results import BAD_SHOWN, LAST_STEPS
from limoe.train.loggers import Loggers
from limoe.train.losses import by_name
from limoe.train.optim import make_schedule
from limoe.train.progress import progress_bar
from limoe.train.step import Counts, StepReport
from limoe.workdir.metrics import MetricsLog


class FinishedStep(NamedTuple):
    """A step whose report was read."""

    step: int
    report: StepReport
    bad: BadExamples
    skipped_in_row: int
    """Steps in a row, this one the last, whose update was left out because loss or gradient was not finite."""
    seconds: float
    """Time since the report before it, or since the device got work again. For steps in a row it is their length."""


class Journal:
    """The record of one command of a run, from the step after the last one in `log`. Use it in a `with` block.

    `began` is the start of the run by `time.monotonic`, as if its commands had run without pauses.
    """

    def __init__(self, log: MetricsLog, folder: Path, config: Config, began: float, say: Callable[[str], None]) -> None:
        self._log, self._settings, self._began, self._say = log, config.train, began, say
        self._first, self._num_bad = log.last_step or 0, 0
        # Computed now, all at once: a small program between two steps would wait for the running one.
        self._learning_rate = np.asarray(
            jax.vmap(make_schedule(config.optimizer, config.train.steps))(np.arange(self._first, config.train.steps))
        )
        self._loggers = Loggers(folder, config)
        self._bar = progress_bar("compiling the first step", total=config.train.steps, done=self._first, unit="step")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        self._loggers.close()

    def write(self, done: FinishedStep, top1: float | None) -> None:
        """Log a step and show it. `top1` is its zero-shot accuracy, if it was evaluated."""
        figures = self._figures(done, top1)
        self._log.append(done.step, figures)
        self._loggers.log(done.step, figures)
        self._show(done, top1)

    def sync(self) -> None:
        """Wait until all lines are on disk."""
        self._log.sync()

    def _figures(self, done: FinishedStep, top1: float | None) -> dict[str, Any]:
        report = done.report
        figures: dict[str, Any] = {
            **{name: np.float32(value) for name, value in by_name(report.loss).items()},
            "gradient_norm": report.gradient_norm,
            "learning_rate": self._learning_rate[done.step - 1 - self._first],
            "scale": report.scale,
            "step_seconds": np.float32(done.seconds),
            "pairs_per_second": np.float32(self._settings.batch_size / done.seconds),
            "elapsed_seconds": round(time.monotonic() - self._began, 3),
            "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "skipped_in_row": done.skipped_in_row,
            "equal_captions": Counts(*done.report.counts.tolist()).equal_captions,
            "bad_examples": done.bad.num_bad,
            "bad_first": [_text(example) for example in done.bad.first],
            "zero_shot_top1": top1,
        }
        if report.routing is not None:
            whole = is_whole(done.step, self._settings)
            for name, value in report.routing._asdict().items():
                if name in ("wanted", "kept"):  # written as whole numbers
                    figures[name] = np.asarray(value).astype(np.int64) if whole else None
                else:
                    figures[name] = np.asarray(value) if whole else np.round(value, 6)
        return figures

    def _show(self, done: FinishedStep, top1: float | None) -> None:
        for example in done.bad.first[: max(0, BAD_SHOWN - self._num_bad)]:
            self._say(f"step {done.step}: bad example replaced by the next good one: {_text(example)}")
        self._num_bad += done.bad.num_bad
        if done.skipped_in_row:
            self._say(f"step {done.step}: loss or gradient is not finite; its update is left out")
        if top1 is not None:
            self._say(f"step {done.step}: zero-shot top-1 {top1:.1%}")
        if done.step % self._settings.log_every == 0 or done.step == self._settings.steps:
            shown = [f"loss {float(done.report.loss.contrastive):.3f}"]
            if done.report.routing is not None:
                image, text = np.asarray(done.report.routing.success_rate).mean(axis=0)
                shown.append(f"kept image {image:.1%} text {text:.1%}")
            shown.append(f"{self._settings.batch_size / done.seconds:.0f} pairs/s")
            if self._num_bad:
                shown.append(f"{self._num_bad} bad")
            self._bar.set_postfix_str(", ".join(shown), refresh=False)
        self._bar.set_description("training", refresh=False)
        self._bar.update(1)


def is_whole(step: int, settings: TrainConfig) -> bool:
    """Say whether a line is whole: with counts by layer, modality and expert, and all digits of other figures.

    Other lines have null for counts, which are five sixths of a whole line, and six decimals. Figures and summary are
    means over the last steps, whose lines are all whole.

    >>> settings = TrainConfig(steps=500, batch_size=2)
    >>> [step for step in range(1, 403) if is_whole(step, settings)]
    [1, 200, 400, 401, 402]
    """
    return step == 1 or step % settings.routing_every == 0 or step > settings.steps - LAST_STEPS


def _text(bad: Bad) -> str:
    # A file name need not be UTF-8, a log is.
    return f"{bad.key}: {bad.reason}".encode(errors="backslashreplace").decode()
