"""The trainer, in reading order: prepare, restore, step, log, save, evaluate, summarise."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from limoe.config.presets import preset
from limoe.config.schema import Config, ConfigError, TrainConfig
from limoe.config.settings import both_values, differences, from_json, to_json
from limoe.data import files, inputs
from limoe.data.batches import BadExamples, Batch, equal_captions
from limoe.data.source import Bad
from limoe.data.tokenizer import Tokenizer
from limoe.errors import LimoeError
from limoe.evaluate import evaluate, zero_shot
from limoe.evaluate.data import EvaluationData, EvaluationReader, evaluation_when_needed
from limoe.evaluate.encode import Encoder
from limoe.model.build import Parameters
from limoe.parallel import processes
from limoe.parallel.mesh import joined, own_rows, place
from limoe.parallel.parameters import parameter_path
from limoe.report import pictures, results
from limoe.report.results import BAD_SHOWN
from limoe.train.init_from import first_state, take_tokenizer
from limoe.train.journal import FinishedStep, Journal
from limoe.train.losses import by_name
from limoe.train.profiling import Profile
from limoe.train.progress import beside_bars, progress_callback
from limoe.train.resume import restore
from limoe.train.step import Counts, StepReport, TrainState, compile_step, prepare
from limoe.train.stopping import StopSignals
from limoe.workdir.checkpoint import Checkpoints
from limoe.workdir.data import check_data
from limoe.workdir.folder import Workdir
from limoe.workdir.metrics import MetricsLog, read_metrics, skipped_in_row, write_json
from limoe.workdir.rewind import rewind as rewound
from limoe.workdir.versions import keep_versions


class TrainingError(LimoeError, RuntimeError):
    """Training cannot continue. The message says why, since which step, and what to do."""


# After this many bad examples in a command, processes no longer exchange the examples' keys at each step.
_BAD_ASKED_FOR = 100


def train(
    config: Config,
    folder: str | Path,
    *,
    rewind: int | None = None,
    profile_steps: int = 0,
    accept_new_data: bool = False,
    say: Callable[[str], None] = print,
) -> int:
    """Train until `train.steps`, evaluate, and write figures and summary into the work folder. Returns the exit status.

    An unfinished run in the folder continues from its last good checkpoint, bit for bit as if it had never stopped,
    with other data only if `accept_new_data`. For a finished run only its result is shown. `rewind` first takes the run
    back to the checkpoint of that step. SIGTERM or Ctrl-C ends the command: at once, or in the loop over steps after
    the current step is done and saved. Raises TrainingError if a loss, a gradient or the parameters are not finite; and
    InitError, WorkdirError, CheckpointError, DataError, StorageError and ConfigError as their modules say. There is no
    example, because the shortest run takes ten seconds.
    """
    first = processes.is_first()
    if not first:
        say = lambda text: None  # noqa: E731
    with processes.Watch() as watch, _open(folder, config, rewind, say) as workdir, StopSignals() as signals:
        if processes.from_first(workdir.finished):
            say(f"The run in {folder} is finished; its result is in {workdir.summary}.")
            again = " and the same --set" if config != preset(config.preset) else ""
            say(f"Start a new one with: limoe train --preset={config.preset} --workdir=NEW_FOLDER{again}")
            return 0
        say(f"limoe train: preset {config.preset}, work folder {folder}")
        for change in workdir.changes:
            say(change)
        try:
            _train(workdir, signals, profile_steps, accept_new_data, say)
        except KeyboardInterrupt:
            if first and workdir.discard_unstarted():
                say(f"Stopped by {signals.received} before the first step; the work folder is free for any settings.")
            else:
                say(f"Stopped by {signals.received}; the same command continues from the last checkpoint.")
            watch.part()
        except BaseException:
            if first:
                workdir.discard_unstarted()
            raise
    return 0


def _open(folder: str | Path, config: Config, rewind: int | None, say: Callable[[str], None]) -> Workdir:
    """Open the work folder; the first process makes, locks and rewinds it for all."""
    _refuse_other_settings(config)
    with processes.first_before_others("the work folder is there"):
        if not processes.is_first():
            return Workdir.existing(folder)
        workdir = Workdir.open(folder, config)
        try:
            if rewind is not None:
                say(rewound(workdir, rewind))
        except BaseException:
            workdir.close()
            raise
        return workdir


def _refuse_other_settings(config: Config) -> None:
    """Raise ConfigError in every process if one of them has other settings than the first."""
    first, *others = map(from_json, processes.texts_of_all(to_json(config)))
    for number, other in enumerate(others, 1):
        if names := differences(first, other):
            listed = both_values(names, first, other, "in process 0", f"in process {number}")
            raise ConfigError(
                f"process {number} was started with other settings than process 0: {listed}; "
                "start the same command on every host"
            )


def _train(
    workdir: Workdir, signals: StopSignals, profile_steps: int, accept_new_data: bool, say: Callable[[str], None]
) -> None:
    began, config = time.monotonic(), workdir.config
    with processes.first_before_others("data and tokenizer are there"):
        take_tokenizer(config, workdir)
        inputs.ready_tokenizer(config, workdir.tokenizer)  # refuses before minutes of writing and indexing
        folders = inputs.data_folders(config, progress_callback("writing the embedded world", "pair"))
        source = inputs.training_source(config, folders)
        for note in [*(f"damaged shard: {damage}" for damage in source.damages), *source.notes]:
            say(note)
        tokenizer = inputs.tokenizer_for(config, workdir.tokenizer, source)
        for note in inputs.cut_captions(source, tokenizer):
            say(note)
    for change in check_data(workdir, inputs.data_facts(config, source, tokenizer), accept=accept_new_data):
        say(change)
    placement = place(config.mesh)
    rows = own_rows(config.train.batch_size, placement)
    batches = inputs.training_batches(config, source, tokenizer, rows)
    evaluation = evaluation_when_needed(config, folders, say)

    training = prepare(config, placement)
    log = MetricsLog(workdir.metrics) if processes.is_first() else None
    if log is not None and log.last is not None:
        began -= float(log.last["elapsed_seconds"])  # the time of earlier commands
    with Checkpoints(workdir.checkpoints, config.train.checkpoints_kept) as checkpoints:
        state = restore(checkpoints, training.abstract, log, config.train.steps, say)
        state = state or first_state(workdir, training, placement, say)
        encoder = Encoder(training.graph, state.parameters, config, tokenizer, placement=placement)
        step_function = compile_step(training, config, placement)
        run = _Run(config.train, checkpoints, encoder, evaluation if folders.zero_shot else None)
        run.skipped_in_row = processes.from_first(skipped_in_row(log.last) if log and log.last else 0)
        with signals.patiently(), contextlib.ExitStack() as stack:
            if log is not None:
                keep_versions(workdir.versions, int(state.step))
                run.journal = stack.enter_context(Journal(log, workdir.path, config, began, beside_bars(say)))
            first = int(state.step)
            profile = stack.enter_context(Profile(workdir.path / "profile", profile_steps, first, beside_bars(say)))
            state = run.steps(state, step_function, batches.from_step, signals, profile)
        if run.stopped:
            say(f"Stopped after step {int(state.step)}, which is saved; the same command continues from there.")
            return
    encoder.use(state.parameters)
    _finish(workdir, encoder, evaluation(), tokenizer, began, say)


class _Ahead(NamedTuple):
    """A batch on its way to the devices."""

    images: np.ndarray | Array
    tokens: np.ndarray | Array
    bad: BadExamples
    equal_captions: int


class _Running(NamedTuple):
    """A step that was given to the devices, and the bad examples among this process's rows."""

    step: int
    report: StepReport
    bad: BadExamples


class _Run:
    """The loop over steps and what happens between them.

    The devices never wait for this process. While step n runs, this process sends batch n + 1 to them, then reads,
    checks and logs the report of step n - 1. It therefore learns what a report says one step late:

    - A loss or gradient that is not finite ends the run before anything of its step is logged or saved. The step after
      it was computed in vain. With `train.non_finite=skip` the step itself left its update out; it is logged, and the
      run ends at the last of `train.max_skipped` such steps in a row.
    - Bad examples are counted in the line of the step for which they were read.
    - A single process stops after the step that runs when the signal comes. One of several processes tells the others
      of its signal with its next step. They read that step's report while the following step runs, and all stop after
      that one.

    The loop waits for the last step, and for each step after which it saves or evaluates.
    """

    def __init__(
        self, settings: TrainConfig, checkpoints: Checkpoints, encoder: Encoder, evaluation: EvaluationReader | None
    ) -> None:
        self.settings, self.checkpoints, self.encoder, self.evaluation = settings, checkpoints, encoder, evaluation
        self.placement = encoder.placement
        self.journal: Journal | None = None  # only in the first process
        self.alone = jax.process_count() == 1
        self.num_bad = 0
        self.skipped_in_row = 0
        self.stopped = False
        self.read_at = 0.0

    def steps(
        self,
        state: TrainState,
        step_function: Callable[..., tuple[TrainState, StepReport]],
        batches: Callable[[int], Generator[Batch, None, None]],
        signals: StopSignals,
        profile: Profile,
    ) -> TrainState:
        """Step until the end or a signal, save, and return the state."""
        first = int(state.step)
        if first == self.settings.steps:
            return state
        with contextlib.closing(batches(first)) as stream:
            before: _Running | None = None
            ahead: _Ahead | None = None
            self.read_at = time.monotonic()
            for step in range(first + 1, self.settings.steps + 1):
                batch = ahead or self._send(next(stream))
                profile.at(step, before and before.report)
                counts = self._counts(Counts(int(bool(signals.received)), *batch.bad[:2], batch.equal_captions))
                state, report = step_function(state, batch.images, batch.tokens, counts)
                running = _Running(step, report, batch.bad)
                waited_for = self._is_saved(step) or self._is_evaluated(step)
                ahead = None if waited_for else self._send(next(stream))
                if before is not None:
                    self._write(self._read(before))
                self.stopped |= self.alone and bool(signals.received)
                if waited_for or self.stopped:
                    self._wait_for(running, state)
                before = None if waited_for else running
                if self.stopped:
                    break
            self.checkpoints.wait()
        if not self.stopped:
            # A signal may have come while the last step was written.
            self.stopped = processes.added_up(bool(signals.received)) > 0
        return state

    def _is_saved(self, step: int) -> bool:
        return step % self.settings.checkpoint_every == 0 or step == self.settings.steps

    def _is_evaluated(self, step: int) -> bool:
        every = self.settings.evaluate_every
        return bool(every) and step % every == 0 and self.evaluation is not None

    def _send(self, batch: Batch) -> _Ahead:
        """Start to send this process's rows to its devices."""
        images, tokens = (
            jax.device_put(part) if self.placement is None else joined(part, self.placement)
            for part in (batch.images, batch.tokens)
        )
        return _Ahead(images, tokens, batch.bad, equal_captions(batch.tokens))

    def _counts(self, counts: Counts) -> np.ndarray | Array:
        """Write what this process tells the others into the row of one of its devices; its other rows are 0."""
        devices = 1 if self.placement is None else self.placement.size // jax.process_count()
        rows = np.zeros((devices, len(counts)), np.int32)
        rows[0] = counts
        return joined(rows, self.placement)

    def _wait_for(self, running: _Running, state: TrainState) -> None:
        """Finish a step while the devices are idle: log it, and evaluate and save if that is due."""
        done = self._read(running)
        save = self._is_saved(done.step) or self.stopped
        if save:
            self._check_parameters(done.step, state.parameters)
        top1 = None
        if self._is_evaluated(done.step):
            labelled = self.evaluation and self.evaluation().zero_shot
            assert labelled is not None
            top1 = zero_shot.of_images(self.encoder.use(state.parameters), labelled).top1
        self._write(done, top1)
        if save:
            if self.journal is not None:
                self.journal.sync()
            self.checkpoints.save(done.step, state)
        self.read_at = time.monotonic()

    def _read(self, running: _Running) -> FinishedStep:
        """Wait for a step's report and read from it what all processes told each other."""
        report = jax.device_get(running.report)
        now = time.monotonic()
        seconds, self.read_at = now - self.read_at, now
        self._count_skipped(running.step, report)
        counts = Counts(*report.counts.tolist())
        bad = _bad_of_all(running.bad, counts, ask=self.num_bad < _BAD_ASKED_FOR)
        self.num_bad += counts.bad
        self.stopped |= counts.stop_wishes > 0
        return FinishedStep(running.step, report, bad, self.skipped_in_row, seconds)

    def _write(self, done: FinishedStep, top1: float | None = None) -> None:
        if self.journal is not None:
            self.journal.write(done, top1)

    def _count_skipped(self, step: int, report: StepReport) -> None:
        """Count a loss or gradient that is not finite, or stop before anything of this step is logged or saved."""
        values = {**by_name(report.loss), "gradient_norm": float(report.gradient_norm)}
        wrong = [f"{name}={value}" for name, value in values.items() if not math.isfinite(value)]
        self.skipped_in_row = self.skipped_in_row + 1 if wrong else 0
        if self.settings.non_finite == "stop" or self.skipped_in_row >= self.settings.max_skipped:
            self._refuse(step, wrong)

    def _check_parameters(self, step: int, parameters: Parameters) -> None:
        """Stop before saving parameters that are not finite although loss and gradient were."""
        finite = jax.tree_util.tree_leaves_with_path(jax.device_get(_all_finite(parameters)))
        wrong = [parameter_path(path) for path, is_finite in finite if not is_finite]
        self._refuse(step, [f"{name} is not finite after the update" for name in wrong])

    def _refuse(self, step: int, wrong: list[str]) -> None:
        if not wrong:
            return
        self.checkpoints.wait()
        saved = self.checkpoints.steps()
        good = f"the last good checkpoint is step {saved[-1]}" if saved else "there is no checkpoint yet"
        raise TrainingError(
            f"step {step}: {', '.join(wrong)}; {good}, in {self.checkpoints.folder}. Look at metrics.jsonl before "
            "this step. Ways on: --rewind=STEP, a checkpoint with the data in another order; train.non_finite=skip or "
            "a larger train.max_skipped; or a new work folder with a lower optimizer.learning_rate"
        )


def _finish(
    workdir: Workdir,
    encoder: Encoder,
    evaluation: EvaluationData,
    tokenizer: Tokenizer,
    began: float,
    say: Callable[[str], None],
) -> None:
    """Evaluate, draw figures, and write the summary, which marks the run as finished.

    If the command is killed before that, the next start does this again with the parameters of the last checkpoint.
    """
    say("evaluating (dropless) and drawing figures")
    config, model, batch_size = workdir.config, workdir.config.model, workdir.config.train.batch_size
    log = results.read_log(model, read_metrics(workdir.metrics))
    reached = evaluate(encoder, evaluation)
    history = results.training_history(log, reached, results.bound(model, batch_size))
    with contextlib.ExitStack() as stack:
        # All processes compute the figures together, each with its part of the model.
        mine = processes.is_first()
        figures = workdir.figures if mine else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        results.draw(figures, model, batch_size, history, log.last, encoder, evaluation, tokenizer)
    if not mine:
        return
    if log.num_bad:
        say(f"{log.num_bad} bad examples were replaced; the first: {'; '.join(log.first_bad)}")
    begun = json.loads(files.read_text(workdir.init)) if config.init.source else None
    content = {**results.summary(config, reached, log, seconds=time.monotonic() - began), "init": begun}
    write_json(workdir.summary, content)
    say("\n" + pictures.summary_table({**content, "figures": str(workdir.figures)}))


def _bad_of_all(own: BadExamples, counts: Counts, *, ask: bool) -> BadExamples:
    """Collect the bad examples of all processes: the total count, and the first few keys in order of processes.

    With `ask=False` the keys are those of this process only.
    """
    first = own.first
    if counts.bad and ask:
        of_all = [json.loads(text) for text in processes.texts_of_all(json.dumps(own.first))]
        first = tuple(Bad(*fields) for fields in itertools.chain(*of_all))
    return BadExamples(counts.examined, counts.bad, first[:BAD_SHOWN])


@jax.jit
def _all_finite(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree)
