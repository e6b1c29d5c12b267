"""The trainer, to be read from top to bottom: prepare, restore, step, log, save, evaluate, summarise."""

from __future__ import annotations

import contextlib
import math
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from limoe import inputs, report, results
from limoe.checkpoint import Checkpoints
from limoe.config import Config
from limoe.data.batches import BadExamples, Batch
from limoe.encode import Encoder
from limoe.losses import by_name
from limoe.optim import make_optimizer, make_schedule
from limoe.step import StepReport, TrainState, create_model, make_step
from limoe.tokenizer import Tokenizer
from limoe.workdir import MetricsLog, Workdir, read_metrics, write_json

# The first step compiles and the next ones warm up: a profile starts after them.
PROFILE_AFTER = 5


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why, since when, and what to do."""


class _Pending(NamedTuple):
    """A step that was started and whose report has not been read yet."""

    step: int
    report: StepReport
    started: float
    bad: BadExamples


def train(config: Config, folder: str | Path, *, profile_steps: int = 0, say: Callable[[str], None] = print) -> int:
    """Train until `train.steps`, evaluate, and write figures and summary into the work folder; the exit status.

    An unfinished run in the folder goes on where its last good checkpoint is, bit for bit as if it had never stopped;
    of a finished one only its result is shown. SIGTERM or Ctrl-C save a checkpoint and leave. Raises TrainingError
    when the loss is not finite, WorkdirError, CheckpointError, DataError, StorageError and ConfigError as their
    modules say.
    """
    began = time.monotonic()
    with Workdir.open(folder, config) as workdir:
        if workdir.finished:
            say(f"The run in {folder} is finished; its result is in {workdir.summary}.")
            say(f"Start a new one with: limoe train --preset={config.preset} --workdir=NEW_FOLDER")
            return 0
        say(f"limoe train: preset {config.preset}, work folder {folder}")
        folders = inputs.data_folders(config, _bar("writing the embedded world", "pair"))
        source = inputs.training_source(config, folders)
        for damage in source.damages:
            say(f"damaged shard: {damage}")
        tokenizer = inputs.tokenizer_for(config, workdir.path / "tokenizer.model", source)
        batches = inputs.training_batches(config, source, tokenizer)
        evaluation = results.read_evaluation_data(config, folders)

        graph, parameters = create_model(config)
        optimizer = make_optimizer(config, parameters)
        state = TrainState(jnp.zeros((), jnp.int32), parameters, optimizer.init(parameters))
        encoder = Encoder(graph, parameters, config, tokenizer)
        log = MetricsLog(workdir.metrics)
        with Checkpoints(workdir.checkpoints, config.train.checkpoints_kept) as checkpoints:
            state = _restore(checkpoints, state, log, say)
            step_function = jax.jit(make_step(graph, optimizer, config), donate_argnums=0)
            run = _Run(config, workdir, log, checkpoints, encoder, evaluation, say)
            with _stop_signals() as stopping:
                state, finished = run.steps(state, step_function, batches.from_step, stopping, profile_steps)
            if not finished:
                say(f"Stopped after step {int(state.step)}, which is saved; the same command goes on from there.")
                return 0
        encoder.use(state.parameters)
        run.finish(tokenizer, began)
    return 0


class _Run:
    """The loop over steps and what happens between them."""

    def __init__(
        self,
        config: Config,
        workdir: Workdir,
        log: MetricsLog,
        checkpoints: Checkpoints,
        encoder: Encoder,
        evaluation: results.EvaluationData,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.workdir, self.log, self.checkpoints = config, workdir, log, checkpoints
        self.encoder, self.evaluation, self.say = encoder, evaluation, say
        self.schedule = make_schedule(config)
        self.num_bad = 0

    def steps(
        self,
        state: TrainState,
        step_function: Callable[..., tuple[TrainState, StepReport]],
        batches: Callable[[int], Iterator[Batch]],
        stopping: list[str],
        profile_steps: int,
    ) -> tuple[TrainState, bool]:
        """Step until the end or a signal; the state, and whether the end was reached."""
        settings = self.config.train
        first = int(state.step)
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(contextlib.closing(batches(first)))
            bar = stack.enter_context(
                tqdm(
                    total=settings.steps,
                    initial=first,
                    unit="step",
                    desc="training",
                    dynamic_ncols=True,
                    mininterval=0.5,
                )
            )
            profile = stack.enter_context(_Profile(self.workdir.path / "profile", profile_steps, first))
            for step in range(first + 1, settings.steps + 1):
                started = time.monotonic()
                batch = next(stream)
                profile.at(step)
                state, step_report = step_function(state, batch.images, batch.tokens)
                due = step % settings.checkpoint_every == 0 or step == settings.steps
                evaluate = bool(settings.evaluate_every) and step % settings.evaluate_every == 0
                top1 = None
                pending = _Pending(step, jax.device_get(step_report), started, batch.bad)
                self._check(pending)
                seconds = time.monotonic() - started
                if evaluate and self.evaluation.zero_shot:
                    top1 = results.zero_shot(self.encoder.use(state.parameters), self.evaluation.zero_shot).top1
                self._write(pending, seconds, top1)
                self._show(bar, pending, seconds, top1)
                if due or stopping:
                    self.log.sync()
                    self.checkpoints.save(step, state)
                if stopping and step < settings.steps:
                    self.checkpoints.wait()
                    return state, False
            self.checkpoints.wait()
        return state, True

    def _check(self, pending: _Pending) -> None:
        """Stop on a loss or gradient that is not finite, before anything of this step is saved."""
        values = {**by_name(pending.report.loss), "gradient_norm": float(pending.report.gradient_norm)}
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        if wrong:
            saved = self.checkpoints.steps()
            good = f"the last good checkpoint is step {saved[-1]}" if saved else "there is no checkpoint yet"
            raise TrainingError(
                f"step {pending.step}: {', '.join(f'{name}={values[name]}' for name in wrong)}; {good}, in "
                f"{self.workdir.checkpoints}. Look at metrics.jsonl before this step; a lower optimizer.learning_rate in a new "
                "work folder is the usual remedy"
            )

    def _write(self, pending: _Pending, seconds: float, top1: float | None) -> None:
        routing = pending.report.routing
        figures: dict[str, Any] = {
            **by_name(pending.report.loss),
            "gradient_norm": pending.report.gradient_norm,
            "learning_rate": self.schedule(pending.step - 1),
            "scale": pending.report.scale,
            "step_seconds": seconds,
            "pairs_per_second": self.config.train.batch_size / seconds,
            "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "bad_examples": pending.bad.num_bad,
            "bad_first": [f"{bad.key}: {bad.reason}" for bad in pending.bad.first],
            "zero_shot_top1": top1,
        }
        if routing is not None:
            figures |= {name: np.asarray(value) for name, value in routing._asdict().items()}
            for name in ("wanted", "kept"):  # counts, written as such
                figures[name] = figures[name].astype(np.int64)
        self.log.append(pending.step, figures)

    def _show(self, bar: tqdm, pending: _Pending, seconds: float, top1: float | None) -> None:
        bar.update(1)
        if pending.bad.num_bad:
            if not self.num_bad:
                bad = pending.bad.first[0]
                bar.write(f"step {pending.step}: bad example replaced by the next good one: {bad.key}: {bad.reason}")
            self.num_bad += pending.bad.num_bad
        if top1 is not None:
            bar.write(f"step {pending.step}: zero-shot top-1 {top1:.1%}")
        if pending.step % self.config.train.log_every == 0 or pending.step == self.config.train.steps:
            shown = {"loss": f"{float(pending.report.loss.contrastive):.3f}"}
            shown["pairs/s"] = f"{self.config.train.batch_size / seconds:.0f}"
            if pending.report.routing is not None:
                image, text = np.asarray(pending.report.routing.success_rate).mean(axis=0)
                shown |= {"kept image": f"{image:.1%}", "kept text": f"{text:.1%}"}
            if self.num_bad:
                shown["bad"] = str(self.num_bad)
            bar.set_postfix(shown)

    def finish(self, tokenizer: Tokenizer, began: float) -> None:
        """Evaluate, draw, and write the summary, whose presence marks the run as finished."""
        self.say("evaluating (dropless) and drawing figures")
        metrics = read_metrics(self.workdir.metrics)
        scores = results.score(self.encoder, self.evaluation)
        last = results.last_steps(self.config, metrics)
        history = results.training_history(self.config, metrics, scores)
        results.draw(self.workdir.figures, self.config, history, last, self.encoder, self.evaluation, tokenizer)
        train_seconds = sum(line["step_seconds"] for line in metrics)
        content = results.summary(
            self.config, scores, last, seconds=time.monotonic() - began, train_seconds=train_seconds
        )
        bad = [line for line in metrics if line["bad_examples"]]
        if bad:
            count = sum(line["bad_examples"] for line in bad)
            self.say(f"{count} bad examples were replaced; the first: {'; '.join(bad[0]['bad_first'])}")
        write_json(self.workdir.summary, content)
        self.say("")
        self.say(report.summary_table({**content, "figures": str(self.workdir.figures)}))


def _restore(checkpoints: Checkpoints, state: TrainState, log: MetricsLog, say: Callable[[str], None]) -> TrainState:
    """The state of the newest good checkpoint, or the given new one; the log is cut to the same step."""
    restored = checkpoints.restore(state)
    if restored is None:
        log.truncate_after(0)
        return state
    for message in restored.skipped:
        say(f"skipped a damaged checkpoint: {message}")
    say(f"going on from the checkpoint of step {restored.step}")
    log.truncate_after(restored.step)
    return restored.state


def _bar(description: str, unit: str) -> Callable[[int, int], None]:
    """A progress callback `(done, total)` that draws a bar."""
    bar: list[tqdm] = []

    def progress(done: int, total: int) -> None:
        if not bar:
            bar.append(tqdm(total=total, unit=unit, desc=description, dynamic_ncols=True))
        bar[0].update(done - bar[0].n)
        if done == total:
            bar[0].close()

    return progress


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[str]]:
    """Note SIGTERM and SIGINT instead of dying of them; the loop looks at the list after each step.

    A second signal has its usual effect, for those who cannot wait.
    """
    received: list[str] = []
    handlers: dict[signal.Signals, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        print(f"\n{received[-1]}: saving after this step", file=sys.stderr)
        for which, handler in handlers.items():
            signal.signal(which, handler)

    for which in (signal.SIGTERM, signal.SIGINT):
        handlers[which] = signal.signal(which, note)
    try:
        yield received
    finally:
        for which, handler in handlers.items():
            signal.signal(which, handler)


class _Profile:
    """Traces `num_steps` steps with jax.profiler into a folder, after the first ones."""

    def __init__(self, folder: Path, num_steps: int, first: int) -> None:
        self._folder, self._running = folder, False
        self._start = first + PROFILE_AFTER + 1 if num_steps else None
        self._stop = first + PROFILE_AFTER + 1 + num_steps

    def __enter__(self) -> _Profile:
        return self

    def at(self, step: int) -> None:
        """Start or stop before this step."""
        if step == self._start:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif step == self._stop:
            self.__exit__()

    def __exit__(self, *error: object) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
