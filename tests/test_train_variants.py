"""Runs unlike the usual one: values not finite, evaluation on the way, a profile, a dense twin, other losses."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from run_cases import (
    config,
    final_state,
    metrics,
    ran,
    result,
    summary,
)

import limoe.train.loop as trainer
from limoe.config.schema import ConfigError
from limoe.data import inputs
from limoe.data.batches import BadExamples
from limoe.data.source import Bad
from limoe.train.loop import TrainingError, train
from limoe.train.profiling import Profile
from limoe.train.step import Counts
from limoe.workdir.folder import WorkdirError


def poisoned(monkeypatch: pytest.MonkeyPatch, step: int, harm: Any) -> None:
    """Change what the compiled step returns for one step."""
    steps = trainer._Run.steps

    def with_harm(self: Any, state: Any, step_function: Any, *rest: Any) -> Any:
        def harmful(*inputs: Any) -> Any:
            after, report = step_function(*inputs)
            return harm(after, report) if int(after.step) == step else (after, report)

        return steps(self, state, harmful, *rest)

    monkeypatch.setattr(trainer._Run, "steps", with_harm)


def bad_loss(state: Any, report: Any) -> Any:
    loss = report.loss._replace(auxiliary={**report.loss.auxiliary, "load": jnp.float32(jnp.nan)})
    return state, report._replace(loss=loss)


def bad_parameters(state: Any, report: Any) -> Any:
    parameters = {**state.parameters, "token_table": state.parameters["token_table"] * jnp.inf}
    return state._replace(parameters=parameters), report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "message"), [(bad_loss, "step 8: load=nan"), (bad_parameters, "step 8: token_table is not finite")]
)
def test_what_is_not_finite_stops_the_run_and_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Any], harm: Any, message: str
) -> None:
    with monkeypatch.context() as patch:
        poisoned(patch, 8, harm)
        with pytest.raises(TrainingError, match=f"{message}.*the last good checkpoint is step 4"):
            ran(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000004"]
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 8))
    ran(tmp_path / "run")
    assert result(tmp_path / "run") == expected


@pytest.mark.slow
def test_more_steps_than_at_the_start_end_like_a_longer_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        poisoned(patch, 8, bad_loss)
        with pytest.raises(TrainingError):
            ran(tmp_path / "run")
    with pytest.raises(WorkdirError, match="may grow only while"):
        ran(tmp_path / "run", "train.steps=10")
    again = ran(tmp_path / "run", "train.steps=14", "data.threads=1", "train.checkpoint_every=5", "train.log_every=1")
    assert "changed settings: data.threads (2 before, 1 now), train.steps (12 before, 14 now)" in again.said
    assert result(tmp_path / "run") == result(ran(tmp_path / "whole", "train.steps=14").folder)


@pytest.mark.slow
def test_a_learning_rate_that_is_too_high(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step \d+: .*(=nan|=inf|not finite).*a lower optimizer.learning_rate"):
        ran(tmp_path / "run", "optimizer.learning_rate=1e38", "optimizer.clip_norm=0.0")
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
def test_evaluation_on_the_way_changes_nothing_else(tmp_path: Path, expected: dict[str, Any]) -> None:
    run = ran(tmp_path / "run", "train.evaluate_every=5")
    shots = {line["step"]: line["zero_shot_top1"] for line in metrics(run.folder)}
    assert [step for step, top1 in shots.items() if top1 is not None] == [5, 10]
    assert f"step 5: zero-shot top-1 {shots[5]:.1%}" in run.said
    assert final_state(run.folder) == expected["state"]
    assert summary(run.folder)["zero_shot_top1"] == expected["summary"]["zero_shot_top1"]


@pytest.mark.slow
def test_memory_of_decoded_images_and_threads_change_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Any]
) -> None:
    monkeypatch.setattr(inputs, "CACHE_BYTES", 50_000)  # a part of the world only
    run = ran(tmp_path / "run", "data.threads=1")
    assert final_state(run.folder) == expected["state"]


@pytest.mark.slow
def test_a_profile(tmp_path: Path) -> None:
    run = ran(tmp_path / "run", profile_steps=2)
    assert f"the trace of steps 6 to 7 is in {run.folder / 'profile'}" in run.said
    assert list((run.folder / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("asked", "made", "said"),
    [
        (3, 12, "the trace of steps 26 to 28 is in profile"),
        (20, 8, "the trace of steps 26 to 28 is in profile"),  # stopped on the way
        (3, 5, "--profile has traced nothing: it starts after the first 5 steps of a command, and this one made 5"),
        (3, 0, "--profile has traced nothing: it starts after the first 5 steps of a command, and this one made 0"),
        (0, 12, ""),
    ],
)
def test_a_profile_says_what_it_has_traced(monkeypatch: pytest.MonkeyPatch, asked: int, made: int, said: str) -> None:
    heard: list[str] = []
    calls: list[int] = []
    step = 20
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(step))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(step))
    with Profile(Path("profile"), asked, step, heard.append) as profile:
        for _ in range(made):
            step += 1
            profile.at(step)
    assert heard == [said] * bool(said)
    # It stops before the step after the last one traced, or at the end.
    assert calls == ([26, min(26 + asked, 20 + made)] if asked and made > 5 else [])


@pytest.mark.slow
def test_a_dense_twin_has_no_routing(tmp_path: Path) -> None:
    run = ran(tmp_path / "run", "model.moe_layers=()", "train.steps=5", name="tiny-dense", rendered=True)
    assert {"success_rate", "wanted"}.isdisjoint(metrics(run.folder)[0])
    content = summary(run.folder)
    assert [content[f"success_rate_{name}"] for name in ("image", "text", "bound")] == [None] * 3
    assert content["zero_shot_top1"] is not None and content["parameters_total"] == content["parameters_per_token"]
    assert {path.name for path in (run.folder / "figures").iterdir()} == {"training.png", "examples.png"}


@pytest.mark.slow
def test_sigmoid_loss_with_accumulation_and_two_choices(tmp_path: Path) -> None:
    run = ran(
        tmp_path / "run",
        *("loss.contrastive=sigmoid", "train.accumulation=2", "model.group_examples=4", "model.num_choices=2"),
        *("optimizer.name=adafactor", "optimizer.learning_rate=0.01", "train.steps=8"),
    )
    lines = metrics(run.folder)
    assert lines[-1]["contrastive"] < lines[0]["contrastive"]
    assert sum(lines[0]["wanted"][0][0]) == 2 * 16 * 4
    assert 0 < summary(run.folder)["success_rate_image"] <= 1


@pytest.mark.slow
def test_a_run_that_fails_before_its_first_step_leaves_the_folder_free(tmp_path: Path) -> None:
    model = tmp_path / "large.model"
    shutil.copy(_tokenizer(tmp_path), model)
    with pytest.raises(ConfigError, match=r"more than model\.vocab_size=20; set model\.vocab_size=\d+"):
        ran(tmp_path / "run", f"data.tokenizer={model}", "model.vocab_size=20")
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".lock"}
    ran(tmp_path / "run", "train.steps=4")  # other settings, in the same folder


def test_bad_examples_of_all_processes_are_named_in_the_order_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [
        BadExamples(10, 2, (Bad("a", "no caption"), Bad("b", "cut short"))),
        BadExamples(8, 0, ()),
        BadExamples(12, 4, tuple(Bad(f"c{number}", "größer") for number in range(4))),
    ]
    texts = [json.dumps(share.first) for share in shares]
    monkeypatch.setattr(trainer.processes, "texts_of_all", lambda own: texts if own in texts else [])
    for own in shares:
        bad = trainer._bad_of_all(own, Counts(0, 30, 6), ask=True)
        assert (bad.num_examined, bad.num_bad) == (30, 6)
        assert [one.key for one in bad.first] == ["a", "b", "c0", "c1", "c2"] and bad.first[2].reason == "größer"


def _tokenizer(tmp_path: Path) -> Path:
    source = inputs.training_source(config(), inputs.data_folders(config()))
    inputs.tokenizer_for(config(), tmp_path / "made.model", source)
    return tmp_path / "made.model"


@pytest.mark.slow
def test_two_runs_with_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def second(*args: Any) -> None:
        with pytest.raises(WorkdirError, match="another run"):
            train(config(), tmp_path / "run")
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.inputs, "training_source", second)
    assert train(config(), tmp_path / "run", say=lambda text: None) == 0
