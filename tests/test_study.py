"""Studies: their table, statistics against numbers made by hand, what is kept, and that a stopped one goes on."""

import csv
import json
import math

import numpy as np
import pytest
import run_cases

from limoe import cli
from limoe.config.presets import preset
from limoe.config.settings import override
from limoe.study import command
from limoe.study.command import list_text, run_study
from limoe.study.findings import correlation, rows_of
from limoe.study.runner import PRESET, cells, merged, read_cell, run_cells, train_in_child
from limoe.study.statistics import difference, mean_of, rank_correlation, relative
from limoe.study.studies import SCALES, STUDIES, Arm, Study, StudyError
from limoe.workdir.folder import Workdir
from limoe.workdir.metrics import MetricsLog, write_json

SMALL = Study(
    "sparse with dense",
    "sparse is ahead",
    (
        Arm("dense", ("model.moe_layers=()",)),
        Arm("limoe"),
        Arm("dense, time", ("model.moe_layers=()",), as_long_as="limoe", rate_of="dense"),
    ),
    measures=("zero_shot_top1", "effective_experts_text"),
    curves=("success_rate_text",),
    settings=run_cases.SETTINGS,
)


def stand_in(settings, folder):
    """Leave what a finished training leaves, at once. LIMoE takes 3 times as long and is ahead by (seed + 2)%."""
    config = override(preset(PRESET), settings)
    layers, seed = len(config.model.moe_layers), config.train.seed
    routing = {
        "success_rate": [[0.9, 0.8]] * layers,
        "effective_experts": [[4.0, 2.0 + seed]] * layers,
        "wanted": [[[6, 2], [1, 3]]] * layers,
        "kept": [[[5, 2], [1, 3]]] * layers,
    }
    common = {"total": 1.0, "contrastive": 0.5, "zero_shot_top1": None, "bad_examples": 0, "bad_first": []}
    with Workdir.open(folder, config) as workdir:
        log = MetricsLog(workdir.metrics)
        for step in range(1, config.train.steps + 1):
            log.append(step, {**common, **(routing if layers else {}), "step_seconds": 0.3 if layers else 0.1})
        top1 = 0.5 + 0.1 * seed + bool(layers) * (seed + 2) / 100
        figures = dict.fromkeys(
            ("image_to_text_r1", "text_to_image_r1", "zero_shot_chance", "success_rate_bound"), 0.25
        )
        rates = dict.fromkeys(("success_rate_text", "success_rate_image"), 0.8 if layers else None)
        counts = {"parameters_total": 9, "parameters_per_token": 5}
        write_json(workdir.summary, {"zero_shot_top1": top1, **figures, **rates, **counts})


def mean(found):
    assert found is not None
    return found.mean


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(STUDIES, "small", SMALL)
    return SMALL


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_settings_that_exist_and_arms_that_differ(name, scale):
    study, seen = STUDIES[name], set()
    for size, model in SCALES[scale].sizes.items():
        for arm in study.arms:
            smoke = study.smoke if scale == "smoke" else ()
            seen.add(
                (size, arm.as_long_as, override(preset(PRESET), merged(model, study.settings, smoke, arm.settings)))
            )
    assert len(seen) == len(SCALES[scale].sizes) * len(study.arms)
    assert len({cell.name for cell in cells(study, scale, 3)}) == len(cells(study, scale, 3))


def test_means_and_intervals_are_those_of_a_table():
    def half(found):
        assert found.half is not None
        return found.half

    # 1, 2, 4: mean 7/3, standard deviation sqrt(7/3), t(2) = 4.303.
    found = mean_of([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3) and half(found) == pytest.approx(4.303 * math.sqrt(7 / 3) / math.sqrt(3))
    assert mean_of([5.0]) == (5.0, None, 1)
    # Pairs far apart whose differences are nearly equal have a narrow interval; alone they have wide ones.
    first, base = [0.2, 0.5, 0.81], [0.1, 0.4, 0.7]
    assert half(difference(first, base)) < 0.02 < 0.5 < half(mean_of(first))
    assert relative([0.6, 0.9], [0.5, 0.6]) == difference([1.2, 1.5], [1.0, 1.0]) and relative([1.0], [0.0]) is None
    with pytest.raises(ValueError, match="shorter"):
        difference([1.0, 2.0], [1.0])


def test_rank_correlation_is_that_of_a_table():
    # Spearman: 1 - 6 * sum(d^2) / (n (n^2 - 1)) = 1 - 6 * 4 / 120.
    assert rank_correlation([10.0, 20.0, 30.0, 40.0, 50.0], [1.0, 3.0, 2.0, 5.0, 4.0]) == 0.8
    assert (
        rank_correlation([1.0, 1.0, 2.0], [5.0, 5.0, 6.0]) == 1.0 and rank_correlation([1.0, 2.0], [3.0, 3.0]) is None
    )


def test_a_study_leaves_rows_with_paired_differences_a_table_and_a_picture(small, tmp_path):
    said = []
    finished = run_study("small", tmp_path, scale="smoke", num_seeds=2, train=stand_in, say=said.append)
    place = tmp_path / "small-smoke"
    dense, sparse, longer = rows_of(small, finished)
    assert mean(dense.means["zero_shot_top1"]) == pytest.approx(0.55) and dense.differences["zero_shot_top1"] is None
    assert mean(sparse.differences["zero_shot_top1"]) == pytest.approx(0.025)
    assert mean(sparse.relatives["zero_shot_top1"]) == pytest.approx((0.02 / 0.5 + 0.03 / 0.6) / 2)
    assert dense.means["effective_experts_text"] is None and mean(sparse.means["effective_experts_text"]) == 2.5
    steps = override(preset(PRESET), finished[2].settings).train.steps
    assert (longer.arm, steps) == ("dense, time", 3 * run_cases.STEPS), "three times the steps in the time of limoe"
    table = (place / "table.md").read_text()
    assert "| smallest | limoe | 2 | 57.5 ± " in table and "| +2.5 ± " in table and table in said[-1]
    rows = list(csv.DictReader((place / "table.csv").read_text().splitlines()))
    assert [row["seeds"] for row in rows if row["measure"] == "zero_shot_top1"] == ["2", "2", "2"]
    assert json.loads((place / "table.json").read_text())["rows"][1]["arm"] == "limoe"
    run_cases.assert_figure(place / "picture.png")
    assert finished[0].machine and finished[0].commit and finished[0].command.startswith("limoe train --preset=tiny")
    assert not [text for text in finished[0].settings if "cache_dir" in text]


def test_a_killed_study_goes_on_and_what_is_kept_is_enough_for_the_table(small, tmp_path):
    trained = []

    def dies_in_the_third(settings, folder):
        trained.append(folder.name)
        if len(trained) == 3:
            raise KeyboardInterrupt
        stand_in(settings, folder)

    assert len(run_study("small", tmp_path, scale="smoke", num_seeds=2, train=dies_in_the_third)) == 2
    whole = run_study("small", tmp_path, scale="smoke", num_seeds=2, train=dies_in_the_third)
    assert len(whole) == 6 and len(trained) == 7 and trained[3] == trained[2], "it goes on in the folder of before"
    place = tmp_path / "small-smoke"
    before = {name: (place / name).read_bytes() for name in ("table.md", "table.csv", "table.json", "picture.png")}
    for name in before:
        (place / name).unlink()
    again = run_study("small", tmp_path, scale="smoke", num_seeds=2, train=lambda *_: pytest.fail("trained again"))
    assert again == whole and before == {name: (place / name).read_bytes() for name in before}


def test_a_training_that_fails_leaves_its_reason_and_the_others_go_on(small, tmp_path):
    def fails_once(settings, folder):
        if "-limoe-" in folder.name and "train.seed=0" in settings:
            raise StudyError("no memory")
        stand_in(settings, folder)

    def run(train):
        return run_study("small", tmp_path, scale="smoke", num_seeds=2, train=train)

    with pytest.raises(StudyError, match=r"2 of 6 trainings failed: \S+-limoe-seed0, \S+-dense-time-seed0; why"):
        run(fails_once)
    place = tmp_path / "small-smoke"
    reasons = {path.name.partition("-")[2]: path.read_text() for path in place.glob("*.failed.txt")}
    assert reasons["limoe-seed0.failed.txt"] == "no memory\n" and "'limoe'" in reasons["dense-time-seed0.failed.txt"]
    rows = {row["arm"]: row["seeds"] for row in csv.DictReader((place / "table.csv").read_text().splitlines())}
    assert rows == {"dense": "2", "limoe": "1", "dense, time": "1"}
    assert len(json.loads((place / "table.json").read_text())["failed"]) == 2
    assert "-limoe-seed0" in (place / "table.md").read_text()
    assert len(run(stand_in)) == 6 and not [*place.glob("*.failed.txt")]
    assert "Failed" not in (place / "table.md").read_text()


def test_other_settings_are_trained_anew_and_places_are_not_settings(small, tmp_path):
    trained = []

    def train(settings, folder):
        trained.append(folder.name)
        stand_in(settings, folder)

    def run(*settings):
        trained.clear()
        list(run_cells(small, "smoke", 1, tmp_path, settings=settings, train=train))
        return len(trained)

    assert [run(), run("data.cache_dir=elsewhere"), run("train.batch_size=8"), run("train.batch_size=8")] == [
        3,
        0,
        3,
        0,
    ]


def test_the_arm_of_equal_time_keeps_its_steps_whatever_is_set(small, tmp_path):
    found = list(run_cells(small, "smoke", 1, tmp_path, settings=["train.steps=20"], train=stand_in))
    assert [override(preset(PRESET), one.settings).train.steps for one in found] == [20, 20, 60]


def test_a_numeric_study_gives_its_rank_correlation(tmp_path):
    arms = tuple(Arm(f"seeds={n}", (f"model.num_experts={n}",), float(n)) for n in (2, 4, 8))
    study = Study("experts", "", arms, ("zero_shot_top1",), settings=run_cases.SETTINGS)
    finished = list(run_cells(study, "smoke", 1, tmp_path, train=stand_in))
    assert correlation(study, finished) is None, "all equal"
    better = [one._replace(figures={"zero_shot_top1": float(n)}) for n, one in enumerate(finished)]
    assert correlation(study, better) == 1.0 and correlation(SMALL, better[:0]) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("study", "losses"), "there is no study 'losses'; did you mean 'losses-bpr'"),
        (("study", "order", "--scale=tiny"), "there is no scale 'tiny'; scales are smoke, small, full"),
        (("study", "order", "--seeds=11"), "--seeds=11 is not possible; use 1 to 10"),
        (("study",), "needs the name of one study; limoe study --list"),
        (("study", "order", "--set", "depht=1"), "there is no setting 'depht'"),
    ],
)
def test_what_cannot_be_run_is_refused_before_it_begins(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) in (1, 2) and message in capsys.readouterr().err


def test_what_is_no_finished_training_is_named(tmp_path):
    (tmp_path / "one.json").write_text("{}")
    with pytest.raises(StudyError, match=r"one.json is no finished training.*remove it"):
        read_cell(tmp_path / "one.json")
    assert read_cell(tmp_path / "none.json") is None


def test_studies_are_listed_with_their_cost(capsys):
    assert cli.main(["study", "--list", "--seeds=2"]) == 0
    out = capsys.readouterr().out
    assert out == f"{list_text(2)}\n" and all(name in out for name in STUDIES)
    assert "24 min" in next(line for line in out.splitlines() if line.startswith("each-loss")), "8 arms x 2 x 1.5"


@pytest.mark.slow
def test_a_cell_is_trained_by_the_command_itself(small, tmp_path, monkeypatch):
    for name, value in run_cases.environment().items():
        monkeypatch.setenv(name, value)
    settings = [*run_cases.settings("train.steps=4", "train.checkpoint_every=2"), "model.moe_layers=()"]
    train_in_child(merged(settings), tmp_path / "run")
    assert np.isfinite(run_cases.summary(tmp_path / "run")["zero_shot_top1"])
    with pytest.raises(StudyError, match=r"ended with status 1: .*batch_size"):
        train_in_child(merged(settings, ["train.batch_size=8"]), tmp_path / "run")


def test_a_training_that_was_stopped_ends_the_study(small, tmp_path):
    def stopped(settings, folder):
        with Workdir.open(folder, override(preset(PRESET), settings)):
            pass

    with pytest.raises(StudyError, match="was stopped before its end; the same command continues it"):
        run_study("small", tmp_path, scale="smoke", num_seeds=1, train=stopped)
    assert command.study("small") is small


def test_a_table_of_the_dense_arm_alone_is_drawn(small, tmp_path):
    def only_dense(settings, folder):
        if "-dense-seed" not in folder.name:
            raise StudyError("no memory")
        stand_in(settings, folder)

    with pytest.raises(StudyError, match="2 of 3 trainings failed"):
        run_study("small", tmp_path, scale="smoke", num_seeds=1, train=only_dense)
    run_cases.assert_figure(tmp_path / "small-smoke" / "picture.png")
