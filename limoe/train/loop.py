"""The trainer, to be read from top to bottom: prepare, restore, step, log, save, evaluate, summarise."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from limoe.config.presets import preset
from limoe.config.schema import Config, ConfigError
from limoe.config.settings import both_values, differences, from_json, to_json
from limoe.data import inputs
from limoe.data.batches import BadExamples, Batch
from limoe.data.source import Bad
from limoe.data.tokenizer import Tokenizer
from limoe.errors import LimoeError
from limoe.evaluate import evaluate, zero_shot
from limoe.evaluate.data import EvaluationData, read_evaluation_data
from limoe.evaluate.encode import Encoder
from limoe.model.build import Parameters
from limoe.parallel import processes
from limoe.parallel.mesh import joined, own_rows, place
from limoe.report import pictures, results
from limoe.train.losses import by_name
from limoe.train.optim import make_schedule
from limoe.train.profiling import Profile
from limoe.train.progress import progress_bar
from limoe.train.step import StepReport, TrainState, compile_step, new_state, prepare
from limoe.train.stopping import StopSignals
from limoe.workdir.checkpoint import Checkpoints
from limoe.workdir.folder import Workdir, WorkdirError
from limoe.workdir.metrics import MetricsLog, read_metrics, write_json

# Bad examples of a step whose keys are kept, and of a run whose keys are shown.
BAD_SHOWN = 5


class TrainingError(LimoeError, RuntimeError):
    """Training cannot go on; the message says why, since when, and what to do."""


def train(config: Config, folder: str | Path, *, profile_steps: int = 0, say: Callable[[str], None] = print) -> int:
    """Train until `train.steps`, evaluate, and write figures and summary into the work folder; the exit status.

    An unfinished run in the folder goes on where its last good checkpoint is, bit for bit as if it had never stopped;
    of a finished one only its result is shown. SIGTERM or Ctrl-C end the run at once, or in the loop over steps after
    the step that is going on and a checkpoint of it. Raises TrainingError when a loss, a gradient or the parameters are
    not finite, WorkdirError, CheckpointError, DataError, StorageError and ConfigError as their modules say. No example
    here: the shortest run takes ten seconds.
    """
    first = processes.is_first()
    say = say if first else _silent
    with processes.Watch() as watch, _open(folder, config) as workdir, StopSignals() as signals:
        if processes.from_first(workdir.finished):
            say(f"The run in {folder} is finished; its result is in {workdir.summary}.")
            again = " and the same --set" if config != preset(config.preset) else ""
            say(f"Start a new one with: limoe train --preset={config.preset} --workdir=NEW_FOLDER{again}")
            return 0
        say(f"limoe train: preset {config.preset}, work folder {folder}")
        try:
            _train(config, workdir, signals, profile_steps, say)
        except KeyboardInterrupt:
            if first and workdir.discard_unstarted():
                say(f"Stopped by {signals.received} before the first step; the work folder is free for any settings.")
            else:
                say(f"Stopped by {signals.received}; what was saved is kept, and the same command goes on from there.")
            watch.part()
        except BaseException:
            if first:
                workdir.discard_unstarted()
            raise
    return 0


def _silent(text: str) -> None:
    """What the processes say that are not the first one."""


def _open(folder: str | Path, config: Config) -> Workdir:
    """The work folder, which the first process makes and locks for all."""
    _refuse_other_settings(config)
    with processes.first_before_others("the work folder is there"):
        return Workdir.open(folder, config) if processes.is_first() else Workdir.existing(folder)


def _refuse_other_settings(config: Config) -> None:
    """Raise ConfigError in every process if one has other settings than the first: it would train something else."""
    first, *others = map(from_json, processes.texts_of_all(to_json(config)))
    for number, other in enumerate(others, 1):
        if names := differences(first, other):
            listed = both_values(names, first, other, "in process 0", f"in process {number}")
            raise ConfigError(
                f"process {number} was started with other settings than process 0: {listed}; "
                "start the same command on every host"
            )


def _train(
    config: Config, workdir: Workdir, signals: StopSignals, profile_steps: int, say: Callable[[str], None]
) -> None:
    began = time.monotonic()
    with processes.first_before_others("data and tokenizer are there"):
        inputs.ready_tokenizer(config, workdir.tokenizer)  # refused before minutes of writing and indexing, not after
        folders = inputs.data_folders(config, _bar("writing the embedded world", "pair"))
        source = inputs.training_source(config, folders)
        for damage in source.damages:
            say(f"damaged shard: {damage}")
        tokenizer = inputs.tokenizer_for(config, workdir.tokenizer, source)
    placement = place(config.mesh)
    rows = own_rows(config.train.batch_size, placement)
    batches = inputs.training_batches(config, source, tokenizer, rows)
    evaluation = read_evaluation_data(config, folders)
    if evaluation.num_bad:
        say(f"{evaluation.num_bad} bad examples of the evaluation data are left out")

    training = prepare(config, placement)
    log = MetricsLog(workdir.metrics) if processes.is_first() else None
    began -= _seconds_before(log)
    with Checkpoints(workdir.checkpoints, config.train.checkpoints_kept) as checkpoints:
        state = _restore(checkpoints, training.abstract, log, say) or new_state(config, training, placement)
        encoder = Encoder(training.graph, state.parameters, config, tokenizer, placement=placement)
        step_function = compile_step(training, config, placement)
        run = _Run(config, workdir, log, checkpoints, encoder, evaluation, began, say)
        with signals.patiently():
            state = run.steps(state, step_function, batches.from_step, signals, profile_steps)
        if run.stopped:
            say(f"Stopped after step {int(state.step)}, which is saved; the same command goes on from there.")
            return
    encoder.use(state.parameters)
    run.finish(tokenizer)


class _Run:
    """The loop over steps and what happens between them."""

    def __init__(
        self,
        config: Config,
        workdir: Workdir,
        log: MetricsLog | None,
        checkpoints: Checkpoints,
        encoder: Encoder,
        evaluation: EvaluationData,
        began: float,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.workdir, self.log, self.checkpoints = config, workdir, log, checkpoints
        self.encoder, self.evaluation, self.began, self.say = encoder, evaluation, began, say
        self.schedule = make_schedule(config)
        self.num_bad = 0
        self.stopped = False

    def steps(
        self,
        state: TrainState,
        step_function: Callable[..., tuple[TrainState, StepReport]],
        batches: Callable[[int], Generator[Batch, None, None]],
        signals: StopSignals,
        profile_steps: int,
    ) -> TrainState:
        """Step until the end or a signal; the state then, which is saved."""
        settings = self.config.train
        first = int(state.step)
        with contextlib.ExitStack() as stack:
            profile = stack.enter_context(Profile(self.workdir.path / "profile", profile_steps, first, self._tell))
            if first == settings.steps:
                return state
            stream = stack.enter_context(contextlib.closing(batches(first)))
            bar = stack.enter_context(
                progress_bar(
                    "compiling the first step",
                    total=settings.steps,
                    done=first,
                    unit="step",
                    shown=self.log is not None,
                )
            )
            for step in range(first + 1, settings.steps + 1):
                started = time.monotonic()
                batch = next(stream)
                profile.at(step)
                rows = [joined(part, self.encoder.placement) for part in (batch.images, batch.tokens)]
                state, device_report = step_function(state, *rows)
                step_report = jax.device_get(device_report)
                seconds = time.monotonic() - started
                self._check_report(step, step_report)
                # Whoever got the signal: all save after the same step.
                wishes, *counts = processes.added_up(int(bool(signals.received)), *batch.bad[:2])
                bad = _bad_of_all(batch.bad, *counts)
                self.stopped = wishes > 0
                save = step % settings.checkpoint_every == 0 or step == settings.steps or self.stopped
                if save:
                    self._check_parameters(step, state.parameters)
                top1 = self._evaluate(step, state.parameters)
                if self.log is not None:
                    self._write(self.log, step, step_report, bad, seconds, top1)
                    self._show(bar, step, step_report, bad, seconds, top1)
                    if save:
                        self.log.sync()
                if save:
                    self.checkpoints.save(step, state)
                if self.stopped:
                    break
            self.checkpoints.wait()
        if not self.stopped:
            # A signal that came while the last step was written has not been seen.
            self.stopped = processes.added_up(int(bool(signals.received)), 0)[0] > 0
        return state

    def _evaluate(self, step: int, parameters: Parameters) -> float | None:
        """Zero-shot top-1 where `train.evaluate_every` asks for it."""
        every = self.config.train.evaluate_every
        if not every or step % every or self.evaluation.zero_shot is None:
            return None
        return zero_shot.of_images(self.encoder.use(parameters), self.evaluation.zero_shot).top1

    def _check_report(self, step: int, step_report: StepReport) -> None:
        """Stop on a loss or gradient that is not finite, before anything of this step is written or saved."""
        values = {**by_name(step_report.loss), "gradient_norm": float(step_report.gradient_norm)}
        self._refuse(step, [f"{name}={value}" for name, value in values.items() if not math.isfinite(value)])

    def _check_parameters(self, step: int, parameters: Parameters) -> None:
        """Stop before saving parameters that an update from a finite loss and gradient has ruined."""
        finite = jax.device_get(_all_finite(parameters))
        paths = [
            (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(finite)
        ]
        self._refuse(step, [f"{name} is not finite after the update" for name, is_finite in paths if not is_finite])

    def _refuse(self, step: int, wrong: list[str]) -> None:
        if not wrong:
            return
        self.checkpoints.wait()
        saved = self.checkpoints.steps()
        good = f"the last good checkpoint is step {saved[-1]}" if saved else "there is no checkpoint yet"
        raise TrainingError(
            f"step {step}: {', '.join(wrong)}; {good}, in {self.workdir.checkpoints}. Look at metrics.jsonl before "
            "this step; a lower optimizer.learning_rate in a new work folder is the usual remedy"
        )

    def _write(
        self, log: MetricsLog, step: int, step_report: StepReport, bad: BadExamples, seconds: float, top1: float | None
    ) -> None:
        figures: dict[str, Any] = {
            **by_name(step_report.loss),
            "gradient_norm": step_report.gradient_norm,
            "learning_rate": self.schedule(step - 1),
            "scale": step_report.scale,
            "step_seconds": seconds,
            "pairs_per_second": self.config.train.batch_size / seconds,
            "elapsed_seconds": time.monotonic() - self.began,
            "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "bad_examples": bad.num_bad,
            "bad_first": [_bad_text(example) for example in bad.first],
            "zero_shot_top1": top1,
        }
        if step_report.routing is not None:
            figures |= {name: np.asarray(value) for name, value in step_report.routing._asdict().items()}
            for name in ("wanted", "kept"):  # counts, written as such
                figures[name] = figures[name].astype(np.int64)
        log.append(step, figures)

    def _show(
        self, bar: tqdm, step: int, step_report: StepReport, bad: BadExamples, seconds: float, top1: float | None
    ) -> None:
        for example in bad.first[: max(0, BAD_SHOWN - self.num_bad)]:
            self._tell(f"step {step}: bad example replaced by the next good one: {_bad_text(example)}")
        self.num_bad += bad.num_bad
        if top1 is not None:
            self._tell(f"step {step}: zero-shot top-1 {top1:.1%}")
        if step % self.config.train.log_every == 0 or step == self.config.train.steps:
            shown = [f"loss {float(step_report.loss.contrastive):.3f}"]
            if step_report.routing is not None:
                image, text = np.asarray(step_report.routing.success_rate).mean(axis=0)
                shown.append(f"kept image {image:.1%} text {text:.1%}")
            shown.append(f"{self.config.train.batch_size / seconds:.0f} pairs/s")
            if self.num_bad:
                shown.append(f"{self.num_bad} bad")
            bar.set_postfix_str(", ".join(shown), refresh=False)
        bar.set_description("training", refresh=False)
        bar.update(1)

    def _tell(self, text: str) -> None:
        """Say something while a bar is drawn."""
        with tqdm.external_write_mode():
            self.say(text)

    def finish(self, tokenizer: Tokenizer) -> None:
        """Evaluate, draw, and write the summary, whose presence marks the run as finished.

        Killed at any moment before that, the next start comes here again with the parameters of the last checkpoint.
        """
        self.say("evaluating (dropless) and drawing figures")
        metrics = read_metrics(self.workdir.metrics)
        reached = evaluate(self.encoder, self.evaluation)
        last = results.last_steps(self.config, metrics)
        history = results.training_history(self.config, metrics, reached)
        with contextlib.ExitStack() as stack:
            # All processes compute what is drawn, each with its part of the model.
            mine = processes.is_first()
            figures = self.workdir.figures if mine else Path(stack.enter_context(tempfile.TemporaryDirectory()))
            results.draw(figures, self.config, history, last, self.encoder, self.evaluation, tokenizer)
        if not mine:
            return
        num_bad = sum(line["bad_examples"] for line in metrics)
        if num_bad:
            first = [text for line in metrics for text in line["bad_first"]][:BAD_SHOWN]
            self.say(f"{num_bad} bad examples were replaced; the first: {'; '.join(first)}")
        times = results.Times(
            seconds=time.monotonic() - self.began, train_seconds=sum(line["step_seconds"] for line in metrics)
        )
        content = results.summary(self.config, reached, last, times, num_bad=num_bad)
        write_json(self.workdir.summary, content)
        self.say("")
        self.say(pictures.summary_table({**content, "figures": str(self.workdir.figures)}))


def _bad_of_all(own: BadExamples, num_examined: int, num_bad: int) -> BadExamples:
    """The bad examples of all processes, given how many there are; the first few of them process by process."""
    first: list[Bad] = []
    if num_bad:
        for text in processes.texts_of_all(json.dumps(own.first)):
            first += [Bad(*fields) for fields in json.loads(text)]
    return BadExamples(num_examined, num_bad, tuple(first[:BAD_SHOWN]))


def _bad_text(bad: Bad) -> str:
    return f"{bad.key}: {bad.reason}"


@jax.jit
def _all_finite(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree)


def _seconds_before(log: MetricsLog | None) -> float:
    """Seconds that earlier commands of this run took, up to the last step that they logged."""
    return 0.0 if log is None or log.last_step is None else float(read_metrics(log.path)[-1]["elapsed_seconds"])


def _restore(
    checkpoints: Checkpoints, abstract: TrainState, log: MetricsLog | None, say: Callable[[str], None]
) -> TrainState | None:
    """The state of the newest good checkpoint, None without one; the log is cut to the same step."""
    restored = checkpoints.restore(abstract)
    if log is None:
        return None if restored is None else restored.state
    if restored is None:
        log.truncate_after(0)
        return None
    if log.last_step is None or log.last_step < restored.step:
        raise WorkdirError(
            f"{log.path} ends at step {log.last_step or 0}, but the newest good checkpoint is of step {restored.step}; "
            "put the whole metrics.jsonl back, or start a new run with --workdir=DIR"
        )
    for message in restored.skipped:
        say(message)
    say(f"going on from the checkpoint of step {restored.step}")
    log.truncate_after(restored.step)
    return restored.state


def _bar(description: str, unit: str) -> Callable[[int, int], None]:
    """A progress callback `(done, total)` that draws a bar."""
    bar: list[tqdm] = []

    def progress(done: int, total: int) -> None:
        if not bar:
            bar.append(progress_bar(description, total=total, unit=unit, delay=1.0))
        bar[0].update(done - bar[0].n)
        if done == total:
            bar[0].close()

    return progress
