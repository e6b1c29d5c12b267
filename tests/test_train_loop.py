"""The loop over steps alone: the device never waits for it, reports are read a step late, loggers get each step."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from limoe.config.presets import preset
from limoe.config.schema import Config
from limoe.config.settings import override
from limoe.data.batches import BadExamples, Batch
from limoe.data.source import Bad
from limoe.model.moe import RoutingFigures
from limoe.train import loggers
from limoe.train.journal import Journal
from limoe.train.loop import TrainingError, _Run
from limoe.train.losses import AUXILIARY_LOSSES, LossTerms
from limoe.train.profiling import Profile
from limoe.train.step import StepReport, TrainState
from limoe.train.stopping import StopSignals
from limoe.workdir.metrics import MetricsLog, read_metrics

ROOT = Path(__file__).parents[1]
H14 = preset("h14")
LAYERS, EXPERTS = len(H14.model.moe_layers), H14.model.num_experts


@pytest.fixture(autouse=True)
def _with_stand_ins() -> Iterator[None]:
    """Devices, checkpoints and encoders here are stand-ins, which the suite's check of annotations would refuse."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def report(counts: Any) -> StepReport:
    """As large as one of H/14."""
    random = np.random.default_rng(0)
    by_layer = random.random((5, LAYERS, 2), np.float32)
    counted = random.integers(0, 200_000, (2, LAYERS, 2, EXPERTS)).astype(np.float32)
    total, contrastive, auxiliary, norm, scale, *terms = random.random(12, np.float32)
    losses = LossTerms(total, contrastive, auxiliary, dict(zip(AUXILIARY_LOSSES, terms, strict=True)))
    return StepReport(losses, RoutingFigures(*counted, *by_layer), norm, scale, np.asarray(counts)[0])


class Device:
    """A device that takes `seconds` for a step, one after another, whatever the host does."""

    def __init__(self, seconds: float, *not_finite: int) -> None:
        self.seconds, self.not_finite = seconds, not_finite
        self.given, self.ends = [], []

    def __call__(self, state: TrainState, images: Any, tokens: Any, counts: Any) -> tuple[TrainState, StepReport]:
        now = time.monotonic()
        self.given.append(now)
        end = max(now, self.ends[-1] if self.ends else now) + self.seconds
        self.ends.append(end)
        done = report(counts)
        if len(self.given) in self.not_finite:
            done = done._replace(gradient_norm=np.float32(np.nan))
        return state._replace(step=state.step + 1), done._replace(scale=_Later(end))

    def idle(self) -> float:
        """Share of the time from the first step to the last in which the device had nothing to do."""
        waited = sum(max(0.0, given - end) for given, end in zip(self.given[1:], self.ends, strict=False))
        return waited / (self.ends[-1] - self.given[0])


class _Later:
    """A number that is there when the device is done."""

    def __init__(self, end: float) -> None:
        self.end = end

    def __array__(self, *given: Any, **options: Any) -> np.ndarray:
        time.sleep(max(0.0, self.end - time.monotonic()))
        return np.array(2.0, np.float32)


class Saved:
    """Checkpoints that are only listed."""

    folder = Path("checkpoints")

    def __init__(self) -> None:
        self.listed = []

    def save(self, step: int, state: Any) -> None:
        self.listed.append(step)

    def steps(self) -> list[int]:
        return self.listed

    def wait(self) -> None:
        pass


def batches(size: int, bad_at: int = 0) -> Any:
    image = np.zeros((size, 224, 224, 3), np.uint8)

    def from_step(step: int) -> Iterator[Batch]:
        while True:
            step += 1
            bad = (Bad(f"key{step}", "cut short"),) * (step == bad_at)
            yield Batch(image, np.ones((size, 16), np.int32), ("",) * size, BadExamples(size, len(bad), bad))

    return from_step


def run_steps(folder: Path, config: Config, device: Any, stream: Any, signals: Any = None) -> tuple[_Run, int]:
    """The loop over the steps of `config` without a model; the run and the step that it came to."""
    nothing: Any = SimpleNamespace(placement=None, zero_shot=None)
    run = _Run(config.train, Saved(), nothing, nothing)  # pyright: ignore[reportArgumentType]
    log = MetricsLog(folder / "metrics.jsonl")
    state = TrainState(jnp.int32(log.last_step or 0), {"w": jnp.ones(3)}, ())
    quiet = SimpleNamespace(received="")
    with Journal(log, folder, config, 0.0, lambda text: None) as run.journal:
        state = run.steps(state, device, stream, signals or quiet, Profile(folder, 0, 0, print))
    return run, int(state.step)


def config(steps: int, *more: str) -> Config:
    return override(H14, [f"train.steps={steps}", "warmup_steps=1", "cooldown_steps=1", *more])


@pytest.mark.slow
def test_the_device_of_a_100_ms_step_does_not_wait_for_the_host(tmp_path: Path) -> None:
    """Lines of H/14, and the images of four chips of 512: 168 of 224 x 224 pixels."""
    device = Device(0.1)
    _, last = run_steps(tmp_path, config(40, "train.routing_every=1"), device, batches(168))
    assert last == len(device.given) == 40
    lines = list(read_metrics(tmp_path / "metrics.jsonl"))
    assert [line["step"] for line in lines] == list(range(1, 41)) and len(lines[3]["wanted"]) == LAYERS
    assert np.median([line["step_seconds"] for line in lines]) == pytest.approx(0.1, rel=0.05)
    print(f"idle {device.idle():.2%}")
    assert device.idle() < 0.02


def test_a_step_is_given_before_the_report_of_the_one_before_is_read(tmp_path: Path) -> None:
    """What a slow host does costs nothing up to the length of a step: here half of it, in the logger."""

    class Slow:
        def __init__(self, folder: Path, config: Config) -> None:
            pass

        def log(self, step: int, figures: Any) -> None:
            time.sleep(0.05)

        def close(self) -> None:
            pass

    device = Device(0.1)
    loggers.register("slow", Slow)
    try:
        run_steps(tmp_path, config(20), device, batches(2))
    finally:
        loggers.unregister("slow")
    assert device.idle() < 0.1  # a third, if it waited


def test_what_is_not_finite_is_neither_logged_nor_saved_although_it_is_seen_a_step_late(tmp_path: Path) -> None:
    for not_finite, saved in ((5, [4]), (8, [4]), (4, []), (9, [4, 8])):
        folder = tmp_path / str(not_finite)
        folder.mkdir()
        device = Device(0.0, not_finite)
        checkpoints = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Saved, "save", lambda self, step, state, kept=checkpoints: kept.append(step))
            patch.setattr(Saved, "steps", lambda self, kept=checkpoints: kept)
            with pytest.raises(TrainingError, match=f"step {not_finite}: gradient_norm=nan") as caught:
                run_steps(folder, config(12, "train.checkpoint_every=4"), device, batches(2))
        assert checkpoints == saved
        assert (f"the last good checkpoint is step {saved[-1]}" if saved else "no checkpoint yet") in str(caught.value)
        assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == list(range(1, not_finite))
        # The step after it was under way, unless the loop had waited for this one to save it.
        assert len(device.given) == not_finite + (not_finite % 4 != 0)


def test_steps_that_are_not_finite_are_skipped_until_there_are_too_many_in_a_row(tmp_path: Path) -> None:
    settings = config(14, "train.non_finite=skip", "train.max_skipped=3", "train.checkpoint_every=4")
    with pytest.raises(TrainingError, match=r"step 12: gradient_norm=nan; the last good checkpoint is step 8"):
        run_steps(tmp_path, settings, Device(0.0, 3, 4, 6, 10, 11, 12), batches(2))
    lines = list(read_metrics(tmp_path / "metrics.jsonl"))
    assert [line["skipped_in_row"] for line in lines] == [0, 0, 1, 2, 0, 1, 0, 0, 0, 1, 2]
    assert [line["gradient_norm"] is None for line in lines] == [line["skipped_in_row"] > 0 for line in lines]
    run, last = run_steps(tmp_path, settings, Device(0.0), batches(2))
    assert (run.skipped_in_row, last) == (0, 14)


def test_bad_examples_are_counted_in_the_line_of_their_step(tmp_path: Path) -> None:
    run, _ = run_steps(tmp_path, config(6), Device(0.0), batches(2, bad_at=3))
    lines = {line["step"]: line for line in read_metrics(tmp_path / "metrics.jsonl")}
    assert [line["bad_examples"] for line in lines.values()] == [0, 0, 1, 0, 0, 0]
    assert lines[3]["bad_first"] == ["key3: cut short"] and run.num_bad == 1


@pytest.mark.parametrize("own", [True, False])
def test_a_signal_stops_after_the_step_that_runs_or_the_one_after_all_have_heard(tmp_path: Path, own: bool) -> None:
    """It came while step 5 ran, or another process told of it with step 6, whose report is read while step 7 runs."""
    signals = SimpleNamespace(received="")

    class Signalled(Device):
        def __call__(self, state: TrainState, images: Any, tokens: Any, counts: Any) -> Any:
            step = len(self.given) + 1
            if own and step == 5:
                signals.received = "SIGTERM"
            if not own and step == 6:
                counts = counts + np.array([[1, 0, 0, 0]], np.int32)
            return super().__call__(state, images, tokens, counts)

    run, last = run_steps(tmp_path, config(12), Signalled(0.0), batches(2), signals)
    assert run.stopped and last == (5 if own else 7)
    assert run.checkpoints.steps() == [last]
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, last + 1))


def test_real_signals_are_heard_by_the_loop(tmp_path: Path) -> None:
    class Signalled(Device):
        def __call__(self, *given: Any) -> Any:
            if len(self.given) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(*given)

    with StopSignals() as signals, signals.patiently():
        run, last = run_steps(tmp_path, config(12), Signalled(0.0), batches(2), signals)
    assert run.stopped and last == 3


class Kept:
    """A logger from outside the package."""

    opened: list["Kept"] = []  # noqa: RUF012

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.preset, self.seen, self.closed = folder, config.preset, {}, False
        self.opened.append(self)

    def log(self, step: int, figures: Any) -> None:
        assert not self.closed
        if step == 9:
            raise OSError("the service is away")
        self.seen[step] = figures

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def kept() -> Iterator[list[Kept]]:
    loggers.register("kept", Kept)
    yield Kept.opened
    loggers.unregister("kept")
    Kept.opened.clear()


def test_a_registered_logger_gets_each_step_and_is_closed(tmp_path: Path, kept: list[Kept]) -> None:
    with pytest.raises(ValueError, match="there is a logger 'kept' already"):
        loggers.register("kept", Kept)
    run_steps(tmp_path, config(6), Device(0.0), batches(2))
    (logger,) = kept
    lines = list(read_metrics(tmp_path / "metrics.jsonl"))
    assert list(logger.seen) == [1, 2, 3, 4, 5, 6] and logger.closed
    assert (logger.folder, logger.preset) == (tmp_path, "h14")
    assert set(lines[0]) == {"step", *logger.seen[1]}
    assert float(str(logger.seen[2]["total"])) == lines[1]["total"] == float(str(report([[0, 0, 0]]).loss.total))


def test_an_error_of_a_logger_says_which(tmp_path: Path, kept: list[Kept]) -> None:
    with pytest.raises(
        loggers.LoggerError, match=r"logger 'kept' failed at step 9: OSError: the service is away; fix or unregister it"
    ):
        run_steps(tmp_path, config(12), Device(0.0), batches(2))
    assert kept[0].closed
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 10))


LONG_LOG = """
import json, sys, time
from pathlib import Path
from test_train_loop import write_log
from limoe.config.presets import preset
from limoe.report import pictures, results
from limoe.workdir.metrics import MetricsLog, read_metrics

def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS:")

def resident(which):
    return int(Path("/proc/self/status").read_text().partition(which)[2].split()[0]) / 1024

path, num_steps = Path(sys.argv[1]), int(sys.argv[2])
write_log(path, num_steps)
size, model = path.stat().st_size, preset("h14").model

before = forget_peak()
log = results.read_log(model, read_metrics(path))
assert len(log.history.step) == num_steps and log.last.wanted.shape == (12, 2, 32)
pictures.draw_training(path.parent / "training.png", results.training_history(log, {}, 0.99))
figures = resident("VmHWM:") - before
del log

before, began = forget_peak(), time.monotonic()
log = MetricsLog(path)
assert log.last_step == num_steps
log.truncate_after(num_steps // 2)
assert log.last_step == num_steps // 2
seconds, resume = time.monotonic() - began, resident("VmHWM:") - before
print(json.dumps({"bytes": size, "resume_seconds": seconds, "resume_megabytes": resume, "figures_megabytes": figures}))
"""


def write_log(path: Path, num_steps: int) -> None:
    """The log of a run of H/14, made from the line of one step with counts and that of one without."""
    path.unlink(missing_ok=True)
    settings = override(H14, [f"train.steps={max(num_steps, 20_000)}"])
    log = MetricsLog(path.with_suffix(".template"))
    journal = Journal(log, path.parent, settings, 0.0, lambda text: None)
    done = SimpleNamespace(
        report=report([[0, 0, 0]]), bad=BadExamples(168, 0, ()), skipped_in_row=0, seconds=0.15213123400928453
    )
    lines = []
    for step in (200, 201):
        figures = journal._figures(SimpleNamespace(step=step, **vars(done)), None)  # pyright: ignore
        log.append(step, figures)
        lines.append(log.path.read_bytes().splitlines(keepends=True)[-1].partition(b",")[2])
    log.path.unlink()
    every = settings.train.routing_every
    with open(path, "wb") as file:
        for first in range(0, num_steps, every):
            some = range(first + 1, min(first + every, num_steps) + 1)
            whole = [step % every == 0 or step == 1 or step > num_steps - 100 for step in some]
            file.write(b"".join(b'{"step":%d,' % step + lines[not w] for step, w in zip(some, whole, strict=True)))


@pytest.mark.parametrize("num_steps", [7_000, pytest.param(700_000, marks=pytest.mark.full)])
def test_a_long_log_is_small_and_quick_to_take_up(tmp_path: Path, num_steps: int) -> None:
    """Of 700,000 steps under 1.5 GB, 1 s and 50 MB to go on from the middle, under 1 GB for the figures; or a share."""
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    words = [sys.executable, "-c", LONG_LOG, str(tmp_path / "metrics.jsonl"), str(num_steps)]
    ended = subprocess.run(words, env=variables, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    print(ended.stdout)
    found = json.loads(ended.stdout)
    assert found["bytes"] < 1.5e9 * num_steps / 700_000 + 100 * 12_000
    assert found["resume_seconds"] < 1 and found["resume_megabytes"] < 50
    assert found["figures_megabytes"] < 200 + 800 * num_steps / 700_000
