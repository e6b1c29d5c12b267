"""A whole run: what it writes, and that stopped at any moment and started again it ends with the same bits."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from run_cases import (
    CHECKPOINT_EVERY,
    STEPS,
    Ran,
    assert_figure,
    config,
    final_state,
    metrics,
    ran,
    result,
    start,
    summary,
)

import limoe.train.loop as trainer
import limoe.workdir.seal
from limoe.config.schema import ConfigError
from limoe.data.files import DataError
from limoe.data.tokenizer import train_tokenizer
from limoe.model.describe import describe
from limoe.model.moe import RoutingFigures
from limoe.report.results import bound
from limoe.train.losses import AUXILIARY_LOSSES
from limoe.workdir.folder import WorkdirError
from limoe.workdir.metrics import MetricsLog

SUMMARY_KEYS = {
    *("preset", "steps", "seconds", "zero_shot_top1", "zero_shot_chance", "image_to_text_r1", "text_to_image_r1"),
    *("success_rate_image", "success_rate_text", "success_rate_bound", "parameters_total", "parameters_per_token"),
}
TERMS = {"total", "contrastive", "auxiliary_total", *AUXILIARY_LOSSES}


@pytest.mark.slow
@pytest.mark.compat
def test_the_log_has_each_step_once_with_every_figure(finished: Ran) -> None:
    lines = metrics(finished.folder)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    names = {
        *("step", "gradient_norm", "learning_rate", "scale", "step_seconds", "pairs_per_second", "elapsed_seconds"),
        *("memory_bytes", "skipped_in_row", "equal_captions", "bad_examples", "bad_first", "zero_shot_top1"),
    }
    for line in lines:
        assert set(line) == names | TERMS | set(RoutingFigures._fields)
        assert all(line[name] is not None for name in names - {"zero_shot_top1"} | TERMS)
        assert line["step_seconds"] > 0 and line["pairs_per_second"] == pytest.approx(16 / line["step_seconds"])
        assert 50e6 < line["memory_bytes"] < 100e9
        # One MoE layer; 16 pairs of 4 patches and 8 pieces, the padding of which is masked.
        assert sum(line["wanted"][0][0]) == 16 * 4 and 16 <= sum(line["wanted"][0][1]) <= 16 * 8
        kept = sum(line["kept"][0][0]) / sum(line["wanted"][0][0])
        assert line["success_rate"][0][0] == pytest.approx(kept)
    elapsed = [line["elapsed_seconds"] for line in lines]
    assert all(before < after for before, after in itertools.pairwise(elapsed))
    assert lines[-1]["learning_rate"] < lines[2]["learning_rate"]


@pytest.mark.slow
@pytest.mark.compat
def test_the_folder_of_a_finished_run(finished: Ran) -> None:
    names = {path.name for path in finished.folder.iterdir()} - {".lock"}
    files = {"config.json", "metrics.jsonl", "summary.json", "tokenizer.model", "data.json", "versions.json"}
    assert names == files | {"checkpoints", "figures"}
    kept = [f"step_{step:08d}" for step in (STEPS - CHECKPOINT_EVERY, STEPS)]
    assert sorted(path.name for path in (finished.folder / "checkpoints").iterdir()) == kept
    figures = {"training", "examples", "expert_shares", "gallery_block1", "overview"}
    assert {path.name for path in (finished.folder / "figures").iterdir()} == {f"{name}.png" for name in figures}
    for path in (finished.folder / "figures").iterdir():
        assert_figure(path)


@pytest.mark.slow
@pytest.mark.compat
def test_the_summary(finished: Ran) -> None:
    content, lines = summary(finished.folder), metrics(finished.folder)
    assert set(content) >= SUMMARY_KEYS and all(content[name] is not None for name in SUMMARY_KEYS)
    assert (content["preset"], content["steps"]) == ("tiny", STEPS)
    assert content["zero_shot_chance"] == pytest.approx(1 / 24)
    assert all(0 <= content[name] <= 1 for name in SUMMARY_KEYS if name.startswith(("zero", "image", "text")))
    for number, modality in enumerate(("image", "text")):
        rates = [line["success_rate"][0][number] for line in lines]
        assert content[f"success_rate_{modality}"] == pytest.approx(sum(rates) / STEPS)
    assert content["success_rate_bound"] == bound(config().model, config().train.batch_size)
    assert content["parameters_total"] == describe(config()).parameters_total
    assert content["parameters_per_token"] == describe(config()).parameters_per_token
    assert content["seconds"] > content["train_seconds"] > 0
    assert content["training_bad_examples"] == content["evaluation_bad_examples"] == 0
    assert f"tiny: {STEPS} steps in" in finished.said and "zero-shot top-1" in finished.said


@pytest.mark.slow
def test_a_finished_run_names_the_command_for_a_new_one(finished: Ran, expected: dict[str, Any]) -> None:
    again = ran(finished.folder)
    assert "is finished" in again.said and "limoe train --preset=tiny --workdir=" in again.said
    assert result(finished.folder) == expected


@pytest.mark.slow
def test_the_folder_of_another_config_is_refused(finished: Ran, expected: dict[str, Any]) -> None:
    with pytest.raises(WorkdirError, match=r"optimizer\.learning_rate \(0\.001 there, 0\.01 now\).*train\.seed \(0 "):
        ran(finished.folder, "train.seed=3", "optimizer.learning_rate=0.01")
    assert result(finished.folder) == expected


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
    """Send this process a signal as soon as a step is in the log."""
    append = MetricsLog.append

    def and_signal(self: MetricsLog, here: int, figures: Any) -> None:
        append(self, here, figures)
        if here == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(MetricsLog, "append", and_signal)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 6), (signal.SIGINT, 1), (signal.SIGTERM, STEPS)])
def test_a_signal_saves_and_the_restart_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Any], number: signal.Signals, step: int
) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        stop_after(patch, step, number)
        stopped = ran(tmp_path / "run")
    # The signal is seen after the step in whose middle it came, or after the next one.
    saved = max(line["step"] for line in metrics(tmp_path / "run"))
    assert step <= saved <= step + 1 and f"Stopped after step {saved}, which is saved" in stopped.said
    assert (tmp_path / "run" / "checkpoints" / f"step_{saved:08d}").is_dir()
    assert not (tmp_path / "run" / "summary.json").exists()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    again = ran(tmp_path / "run")
    assert f"continuing from the checkpoint of step {saved}" in again.said
    assert result(tmp_path / "run") == expected


@pytest.mark.slow
@pytest.mark.parametrize("where", ["evaluation_when_needed", "evaluate"])
def test_a_signal_outside_the_loop_ends_the_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Any], where: str
) -> None:
    def interrupted(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, where, interrupted)
        said = ran(tmp_path / "run").said
    if where == "evaluation_when_needed":
        assert "Stopped by SIGTERM before the first step; the work folder is free for any settings" in said
        assert os.listdir(tmp_path / "run") == [".lock"]
    else:
        assert "Stopped by SIGTERM; the same command continues" in said
    assert not (tmp_path / "run" / "summary.json").exists()
    ran(tmp_path / "run")
    assert result(tmp_path / "run") == expected


def test_a_given_tokenizer_is_refused_before_the_world_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "large.model"
    train_tokenizer(["a red ring", "two blue squares"] * 9, vocab_size=40, length=8).save(model)
    monkeypatch.setattr(trainer.inputs, "data_folders", lambda *_: pytest.fail("the world is written first"))
    with pytest.raises(ConfigError, match=r"large\.model has \d+ pieces, more than model\.vocab_size=20; set"):
        ran(tmp_path / "run", f"data.tokenizer={model}", "model.vocab_size=20")
    with pytest.raises(DataError, match=r"there is no tokenizer model .*none\.model"):
        ran(tmp_path / "run", f"data.tokenizer={tmp_path / 'none.model'}")


class Snapshots:
    """Copies of a work folder as a SIGKILL at that moment would leave it."""

    def __init__(self, run: Path, folder: Path) -> None:
        self._run, self._folder = run, folder

    def take(self, name: str) -> None:
        target = self._folder / name / "run"
        if target.exists():
            return
        # The log last: it may only be ahead of the checkpoints.
        shutil.copytree(self._run, target, ignore=shutil.ignore_patterns("metrics.jsonl"))
        if (self._run / "metrics.jsonl").exists():
            shutil.copy(self._run / "metrics.jsonl", target)

    def before(self, monkeypatch: pytest.MonkeyPatch, owner: Any, function: str, name: str, call: int = 1) -> None:
        """Take one before the given call of a function."""
        original, calls = getattr(owner, function), itertools.count(1)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == call:
                self.take(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, function, wrapped)


@pytest.mark.slow
def test_what_a_kill_leaves_at_any_moment_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Any]
) -> None:
    snapshots = Snapshots(tmp_path / "whole" / "run", tmp_path)
    with monkeypatch.context() as patch:
        snapshots.before(patch, trainer, "prepare", "tokenizer written")
        snapshots.before(patch, MetricsLog, "append", "before the first checkpoint", call=3)
        snapshots.before(patch, MetricsLog, "append", "half a line", call=7)
        snapshots.before(patch, limoe.workdir.seal, "write_seal", "first checkpoint being written")
        snapshots.before(patch, limoe.workdir.seal, "digests_of_own_files", "checkpoint being written", call=2)
        snapshots.before(patch, trainer, "evaluate", "before the evaluation")
        snapshots.before(patch, trainer.results.pictures, "draw_gallery", "while drawing")
        snapshots.before(patch, trainer, "write_json", "before the summary")
        ran(tmp_path / "whole" / "run")
    assert result(tmp_path / "whole" / "run") == expected
    with open(tmp_path / "half a line" / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "total": 2.')
    leftover = tmp_path / "while drawing" / "run" / "figures" / ".gallery_block1.png.1-00.tmp"
    leftover.write_bytes(b"half")
    names = sorted(path.name for path in tmp_path.iterdir() if path.name != "whole")
    assert len(names) == 8
    for name in names:
        ran(tmp_path / name / "run")
        assert result(tmp_path / name / "run") == expected, name
        assert not list((tmp_path / name / "run" / "checkpoints").glob(".partial*")), name
    assert not leftover.exists()


def wait_until(condition: Any, process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


@pytest.mark.slow
def test_a_killed_process_started_again_ends_with_the_same_bits(tmp_path: Path, expected: dict[str, Any]) -> None:
    folder, cache = tmp_path / "run", tmp_path / "cache"
    chance = random.Random(0)
    mine = f"data.cache_dir={cache}"

    process = start(folder, mine)
    wait_until(lambda: list(cache.rglob("*.tmp")), process)
    time.sleep(chance.uniform(0, 0.3))
    process.kill()
    process.communicate()
    assert not (folder / "summary.json").exists() and not (folder / "checkpoints").exists()

    process = start(folder, mine)
    log = folder / "metrics.jsonl"
    wait_until(lambda: log.exists() and log.read_bytes().count(b"\n") >= chance.randrange(1, STEPS), process)
    time.sleep(chance.uniform(0, 0.05))
    process.kill()
    process.communicate()

    process = start(folder, mine)
    wait_until(lambda: (folder / "figures" / "training.png").exists(), process)
    time.sleep(chance.uniform(0, 0.3))
    process.kill()
    process.communicate()

    process = start(folder, mine)
    said, complained = process.communicate()
    assert process.returncode == 0, complained
    assert f"continuing from the checkpoint of step {STEPS}" in said or "is finished" in said
    assert "Traceback" not in complained
    assert not list(cache.rglob("*.tmp")), "what the killed writer of the world left"
    assert result(folder) == expected


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_falls_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Any]
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 9, signal.SIGTERM)
        ran(tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)
    again = ran(tmp_path / "run")
    assert f"skipped checkpoint {newest}" in again.said and "continuing from the checkpoint of step 8" in again.said
    assert result(tmp_path / "run") == expected
    assert newest.with_name(f"{newest.name}.damaged").is_dir()


@pytest.mark.slow
def test_a_log_that_lost_its_end_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Any]
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 5, signal.SIGTERM)
        ran(tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    saved = metrics(tmp_path / "run")[-1]["step"]
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:3]))
    said = ran(tmp_path / "run").said
    assert f"lost the lines of steps 4 to {saved}; curves and figures are without them" in said
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, *range(saved + 1, STEPS + 1)]
    assert final_state(tmp_path / "run") == expected["state"]

    # Of a run that is done, the summary is made from the log.
    (tmp_path / "run" / "summary.json").unlink()
    log.unlink()
    with pytest.raises(WorkdirError, match=r"all 12 steps are done, but .*metrics\.jsonl is lost.*limoe eval"):
        ran(tmp_path / "run")


@pytest.mark.slow
def test_seconds_count_all_commands_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 5, signal.SIGTERM)
        began = time.monotonic()
        ran(tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    assert metrics(tmp_path / "run")[-1]["elapsed_seconds"] <= time.monotonic() - began
    log.write_bytes(b"".join(_an_hour_later(log.read_bytes().splitlines(keepends=True))))
    ran(tmp_path / "run")
    assert 3600 < summary(tmp_path / "run")["seconds"] < 3600 + time.monotonic() - began


def _an_hour_later(lines: list[bytes]) -> list[bytes]:
    last, rest = lines[-1].split(b'"elapsed_seconds":')
    seconds, rest = rest.split(b",", 1)
    return [*lines[:-1], last + b'"elapsed_seconds":' + str(float(seconds) + 3600).encode() + b"," + rest]
