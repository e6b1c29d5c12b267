"""Evaluation of runs and of given shards, the figures' data, and counts of the presets."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from data_cases import caption, classes_json, colour_examples, picture, write_raw
from run_cases import config, ran, summary
from test_workdir_changes import as_in_0_1_0

from limoe.config.presets import PRESETS, preset
from limoe.config.schema import MeshConfig
from limoe.data.files import DataError
from limoe.data.inputs import DataFolders, evaluation_folders
from limoe.data.shards import write_shard
from limoe.data.tokenizer import train_tokenizer
from limoe.evaluate import command, probe, restore, retrieval, zero_shot
from limoe.evaluate.command import evaluate_run, evaluation_text
from limoe.evaluate.data import read_evaluation_data
from limoe.evaluate.encode import Encoder
from limoe.model.build import create_model
from limoe.model.describe import as_text, describe
from limoe.report import results
from limoe.train.step import new_state, prepare
from limoe.workdir.checkpoint import CheckpointError, Checkpoints
from limoe.workdir.folder import Workdir, WorkdirError


def silent(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ran(tmp_path_factory.mktemp("results") / "run", "train.steps=4").folder


@pytest.mark.slow
def test_a_run_on_its_own_data_scores_as_in_its_summary(run: Path) -> None:
    result = evaluate_run(str(run), "", say=silent)
    content = summary(run)
    fields = {*zero_shot.Figures._fields, *retrieval.Figures._fields, *probe.Figures._fields, "evaluation_bad_examples"}
    assert fields | {"preset", "step", "data"} == set(result)
    assert {result[name] for name in probe.Figures._fields} == {None}
    assert {name: result[name] for name in fields} == {name: content[name] for name in fields}
    assert (result["preset"], result["step"], result["zero_shot_images"], result["retrieval_pairs"]) == (
        *("tiny", 4, 480, 512),
    )
    rule = "images by equal pictures; captions equal to one of the image are right"
    assert (result["retrieval_images"], result["retrieval_rule"]) == (512, rule)
    text = evaluation_text(result)
    assert "zero-shot, 480 images" in text and "text to image, 512 pairs: R@1" in text


@pytest.mark.slow
def test_given_shards_without_classes_give_retrieval_alone(run: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", colour_examples(12))
    result = evaluate_run(str(run), str(tmp_path), say=silent)
    assert result["zero_shot_top1"] is None and result["zero_shot_images"] == 0
    # Only three pictures, each with four of the captions: of 12 candidates, 10 cannot all be wrong.
    assert result["retrieval_pairs"] == 12 and result["image_to_text_r10"] == 1
    assert (result["retrieval_images"], result["retrieval_rule"]) == (
        *(3, "images by equal pictures; captions of the image are right"),
    )
    assert json.loads(json.dumps(result)) == result


@pytest.mark.slow
def test_given_shards_with_classes_count_each_bad_example_once(run: Path, tmp_path: Path) -> None:
    examples = [
        (example.key, picture(n), b"a caption", {"class": n % 3}) for n, example in enumerate(colour_examples(9))
    ]
    write_raw(tmp_path / "0.tar", [*examples, ("broken", b"no picture", b"a caption", {"class": 0})])
    classes_json(tmp_path)
    result = evaluate_run(str(run), str(tmp_path), say=silent)
    assert (result["zero_shot_images"], result["retrieval_pairs"], result["evaluation_bad_examples"]) == (9, 9, 1)
    assert result["zero_shot_chance"] == pytest.approx(1 / 3)
    assert result["zero_shot_top5"] == 1  # of three classes
    assert "1 bad examples left out" in evaluation_text(result) and "probe" not in evaluation_text(result)


@pytest.mark.slow
def test_a_linear_probe_learns_from_labelled_shards(run: Path, tmp_path: Path) -> None:
    def labelled(name: str, count: int) -> str:
        folder = tmp_path / name
        folder.mkdir()
        examples = [(f"{n:03d}", picture(n), b"a caption", {"class": n % 3}) for n in range(count)]
        write_raw(folder / "0.tar", examples)
        return str(folder)

    test = labelled("test", 9)
    classes_json(tmp_path / "test")
    # Pictures of one colour each: the colours of the shots are those of the test.
    result = evaluate_run(str(run), test, labelled("shots", 30), say=silent)
    assert (result["probe_top1"], result["probe_shots"]) == (1.0, 10)
    assert "  linear probe, 10 shots: top-1 100.0%, chance 33.3%" in evaluation_text(result).splitlines()
    with pytest.raises(DataError, match=r"few has 9 examples of class 1 \('green'\); a linear probe needs 10 of every"):
        evaluate_run(str(run), test, labelled("few", 28), say=silent)
    with pytest.raises(
        DataError, match=r"a probe needs evaluation data with classes\.json; give its folder with --data"
    ):
        evaluate_run(str(run), labelled("no classes", 9), test, say=silent)


@pytest.mark.devices(8)
def test_parameters_are_read_alone_onto_the_devices_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same scores on one device and on eight that are too small for all parameters, without the optimiser."""
    small = config("model.width=128", "model.mlp_width=128")
    training = prepare(small)
    with Workdir.open(tmp_path / "run", small) as workdir, Checkpoints(workdir.checkpoints) as checkpoints:
        checkpoints.save(3, new_state(small, training))
        train_tokenizer([caption(n) for n in range(3)], vocab_size=40, length=8).save(workdir.tokenizer)
    write_shard(tmp_path / "0.tar", colour_examples(12))
    read: list[Any] = []
    of_orbax = ocp.Checkpointer.restore

    def watched(*args: Any, **kwargs: Any) -> Any:
        read.append(of_orbax(*args, **kwargs))
        return read[-1]

    monkeypatch.setattr(ocp.Checkpointer, "restore", watched)
    one = command.evaluate_run(str(tmp_path / "run"), str(tmp_path), say=silent)
    monkeypatch.setattr(restore, "_memory_of", lambda device: 2**19)
    assert command.evaluate_run(str(tmp_path / "run"), str(tmp_path), say=silent) == one
    bytes_of = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert [bytes_of(arrays) for arrays in read] == 2 * [bytes_of(training.abstract.parameters)]
    assert bytes_of(training.abstract.parameters) < bytes_of(training.abstract) / 2.9  # AdamW keeps two numbers each
    on_one, on_eight = (
        max(
            sum(part.data.nbytes for leaf in arrays.values() for part in leaf.addressable_shards if part.device == here)
            for here in jax.devices()
        )
        for arrays in read
    )
    assert on_one == bytes_of(training.abstract.parameters) and on_eight < on_one / 2


MEMORY_OF_V5E = int(15.75 * 2**30)


@pytest.mark.parametrize(
    ("name", "memories", "expected"),
    [
        ("tiny", [MEMORY_OF_V5E] * 8, MeshConfig()),
        ("h14", [None] * 8, MeshConfig()),
        ("h14", [MEMORY_OF_V5E] * 8, MeshConfig(expert=8)),
        ("h14", [MEMORY_OF_V5E] * 64, MeshConfig(data=2, expert=32)),
        ("h14", [2**32] * 12, MeshConfig(data=3, expert=4, fully_sharded=True)),
        ("h14-dense", [2**32] * 2, MeshConfig(data=2, fully_sharded=True)),
    ],
)
def test_the_mesh_on_which_a_model_is_read(name: str, memories: list[int | None], expected: MeshConfig) -> None:
    assert restore.mesh_to_read_on(preset(name), memories) == expected


def test_image_features_are_what_is_projected() -> None:
    small = config()
    graph, parameters = create_model(small)
    captions = ["a red ring", "two blue squares"] * 9
    encoder = Encoder(graph, parameters, small, train_tokenizer(captions, vocab_size=40, length=8), batch_sizes=[4])
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    embeddings, features = encoder.images(images), encoder.image_features(images)
    projected = features.astype(np.float64) @ np.asarray(parameters["image_projection"]["kernel"], np.float64)
    projected /= np.linalg.norm(projected, axis=1, keepdims=True)
    width = small.model.width
    np.testing.assert_allclose(projected, embeddings, atol=2 * np.finfo(np.float32).eps * math.sqrt(width))
    assert abs(features - embeddings).max() > 0.01
    np.testing.assert_array_equal(encoder.images(images), embeddings)


@pytest.mark.slow
def test_evaluation_changes_nothing_in_the_folder(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    evaluate_run(str(run), "", say=silent)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.slow
def test_a_run_of_the_first_version_can_be_evaluated(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "old")
    (tmp_path / "old" / "config.json").write_text(as_in_0_1_0(Workdir.existing(run).config))
    assert evaluate_run(str(tmp_path / "old"), "", say=silent) == evaluate_run(str(run), "", say=silent)


def test_what_cannot_be_evaluated(tmp_path: Path) -> None:
    with pytest.raises(WorkdirError, match=r"it has no config\.json"):
        evaluate_run(str(tmp_path), "", say=silent)
    Workdir.open(tmp_path, config()).close()
    with pytest.raises(CheckpointError, match="holds no checkpoint yet; train first"):
        evaluate_run(str(tmp_path), "", say=silent)


@pytest.mark.parametrize(
    ("label", "message"),
    [(7, "1 examples in .* have no class between 0 and 2"), (True, "have no class"), (-1, "class")],
)
def test_a_label_that_is_no_class(tmp_path: Path, label: Any, message: str) -> None:
    write_raw(
        tmp_path / "0.tar", [("a", picture(0), b"one", {"class": 1}), ("b", picture(1), b"two", {"class": label})]
    )
    classes_json(tmp_path)
    with pytest.raises(DataError, match=message):
        read_evaluation_data(config(), evaluation_folders(config(), str(tmp_path)))


def test_evaluation_shards_without_a_usable_example(tmp_path: Path) -> None:
    write_raw(tmp_path / "0.tar", [("a", b"nothing", b"one", None)])
    with pytest.raises(DataError, match=r"none of the 1 examples in .* is usable, a: the image does not decode"):
        read_evaluation_data(config(), DataFolders("", "", str(tmp_path)))


def test_last_steps_are_the_mean_over_layers_and_the_last_hundred() -> None:
    sparse = preset("tiny").model
    lines = [
        {"success_rate": [[0.0, 0.5], [1.0, 0.5]], "wanted": np.ones((2, 2, 8)), "kept": np.ones((2, 2, 8))}
        for _ in range(100)
    ]
    first = {"success_rate": [[0.9, 0.9]] * 2, "wanted": np.zeros((2, 2, 8)), "kept": np.zeros((2, 2, 8))}
    blank = {"total": 0.0, "contrastive": 0.0, "effective_experts": [[1.0, 1.0]] * 2, "zero_shot_top1": None}
    blank |= {"step_seconds": 0.5, "bad_examples": 2, "bad_first": ["a: cut", "b: cut"]}
    log = results.read_log(sparse, [blank | line | {"step": step} for step, line in enumerate([first, *lines], 1)])
    history = log.history
    assert history.step.tolist() == list(range(1, 102)) and history.success_rate.shape == (101, 2)
    assert history.success_rate[:2].tolist() == [[0.9, 0.9], [0.5, 0.5]]
    assert history.effective_experts.shape == (101, 2, 2)
    assert (log.num_bad, log.first_bad) == (202, ("a: cut", "b: cut", "a: cut", "b: cut", "a: cut"))
    assert log.train_seconds == 50.5
    last = log.last
    assert (last.success_rate_image, last.success_rate_text) == (0.5, 0.5)
    assert last.wanted is not None and (last.wanted == 1).all()
    assert results.last_steps(preset("tiny-dense").model, lines) == results.LastSteps(None, None, None, None)
    assert results.bound(preset("tiny-dense").model, 128) is None
    assert 0.9 < (results.bound(sparse, 128) or 0) < 1


# Paper, section 1: totals of the dense models, and of the largest sparse one.
DENSE_PARAMETERS = {"s32": 43.7e6, "b32": 113.2e6, "b16": 111.6e6, "l16": 338.2e6, "h14": 675.0e6}


@pytest.mark.parametrize("name", DENSE_PARAMETERS)
def test_parameters_of_the_papers_sizes(name: str) -> None:
    sparse, dense = describe(preset(name)), describe(preset(f"{name}-dense"))
    assert dense.parameters_total == pytest.approx(DENSE_PARAMETERS[name], rel=0.005)
    assert dense.parameters_per_token == dense.parameters_total == sparse.parameters_dense_twin
    assert dense.parameters_experts == dense.parameters_routers == 0 and dense.moe_layers == ()
    assert sparse.parameters_per_token == dense.parameters_total + sparse.parameters_routers
    if name == "h14":
        assert sparse.parameters_total == pytest.approx(5.554e9, rel=0.005)
        assert sparse.parameters_per_token == pytest.approx(675.0e6, rel=0.005)
        assert sparse.parameters_routers == pytest.approx(0.4915e6, rel=0.005)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_described(name: str) -> None:
    found = describe(PRESETS[name])
    again = json.loads(json.dumps(found._asdict()))
    assert again["preset"] == name and all(
        again[key] > 0 for key in ("parameters_total", "parameters_per_token", "flops_per_example")
    )
    # Every parameter but embeddings is in a matmul over at least the text's tokens.
    assert found.flops_per_example > 6 * found.text_tokens * found.depth * 4 * found.width**2
    assert math.isfinite(found.flops_per_example) and as_text(found).startswith(f"{name}: ")
