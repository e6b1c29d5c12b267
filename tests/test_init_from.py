"""A run that begins with the parameters of another: what fits is taken, and upcycling keeps the function."""

import functools
import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from run_cases import Ran, config, metrics, ran, summary
from test_train import stop_after

from limoe.config.schema import Config
from limoe.config.settings import override
from limoe.data.tokenizer import train_tokenizer
from limoe.evaluate.restore import restored_encoder
from limoe.model.build import create_model
from limoe.model.moe import RoutingContext
from limoe.model.tower import scale_images
from limoe.train.init_from import InitError, first_state, take_tokenizer
from limoe.train.step import prepare
from limoe.use.export import write_export
from limoe.workdir.checkpoint import Checkpoints
from limoe.workdir.folder import Workdir
from limoe.workdir.weights import by_name

CAPTIONS = ["a red ring", "two blue squares", "one green star"] * 10
DEEP = ("model.depth=4", "model.moe_layers=1,3", "model.vocab_size=40")


def deep(*settings: str) -> Config:
    return override(config(*DEEP), settings)


def make_source(folder: Path, settings: Config, seed: int = 3) -> Path:
    """The work folder of a run without training: parameters of a seed, with noise so that none is constant."""
    with Workdir.open(folder, settings) as workdir, Checkpoints(workdir.checkpoints) as checkpoints:
        _, parameters = create_model(settings)
        key = jax.random.key(seed)
        shaken = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf in jax.tree.leaves(parameters)]
        checkpoints.save(5, {"parameters": jax.tree.unflatten(jax.tree.structure(parameters), shaken)})
        train_tokenizer(CAPTIONS, vocab_size=settings.model.vocab_size, length=8).save(workdir.tokenizer)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("dense") / "run", deep("model.moe_layers=()"))


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("sparse") / "run", deep())


def begin(folder: Path, settings: Config):
    """The parameters that a run would begin with, its record, and what is said."""
    said: list[str] = []
    with Workdir.open(folder, settings) as workdir:
        take_tokenizer(settings, workdir)
        if not workdir.tokenizer.exists():
            train_tokenizer(CAPTIONS, vocab_size=settings.model.vocab_size, length=8).save(workdir.tokenizer)
        state = first_state(workdir, prepare(settings), None, said.append)
    return state.parameters, json.loads(workdir.init.read_text()), said[-1]


def parameters_of(folder: Path):
    return restored_encoder(folder).encoder.parameters


def encode(settings: Config, parameters, context=None):
    random = np.random.default_rng(0)
    size, model = settings.model.image_size, settings.model
    images = random.integers(0, 256, (16, size, size, 3), dtype=np.uint8)
    text = random.integers(2, model.vocab_size, (16, model.text_length), dtype=np.int32)
    graph = create_model(settings)[0]
    run = jax.jit(lambda parameters, text: nnx.merge(graph, parameters)(scale_images(images), text, context).embeddings)
    return np.concatenate(run(parameters, text))


def test_equal_models_give_all_parameters(tmp_path: Path, sparse: Path) -> None:
    parameters, record, said = begin(tmp_path / "run", deep(f"init.source={sparse}"))
    jax.tree.map(np.testing.assert_array_equal, parameters, parameters_of(sparse))
    names, arrays = record["parameters"], by_name(parameters)
    # Two repeats lie in each array of the scan.
    count = len(arrays) + sum(name.startswith("segments.") for name in arrays)
    assert len(names.pop("taken")) == count and not any(names.values())
    assert said == f"beginning with the parameters of {sparse}, step 5: {count} taken"
    written = json.loads((tmp_path / "run" / "config.json").read_text())["init"]
    assert written["source"] == record["source"] == str(sparse) and written["digest"] == record["digest"] != ""


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            ["model.image_size=32", "model.text_length=12"],
            {"interpolated": ["image_position"], "first_rows": ["text_position"]},
        ),
        (["model.vocab_size=44"], {"anew": ["token_table"]}),
        (["model.depth=2", "model.moe_layers=1"], {}),
        (
            ["model.moe_layers=1"],
            {"anew": [f"blocks.3.mlp.{name}" for name in ("w1.bias", "w1.kernel", "w2.bias", "w2.kernel")]},
        ),
        (
            ["model.num_experts=2"],
            {"anew": [f"blocks.{b}.moe.{n}" for b in (1, 3) for n in ("b1", "b2", "router", "w1", "w2")]},
        ),
    ],
    ids=["positions", "vocabulary", "depth", "other layers", "experts"],
)
def test_what_does_not_fit_starts_anew_and_is_told(tmp_path: Path, sparse: Path, settings, expected) -> None:
    chosen = deep(f"init.source={sparse}", *settings)
    parameters, record, said = begin(tmp_path / "run", chosen)
    found = {how: sorted(names) for how, names in record["parameters"].items() if names and how != "taken"}
    assert found == expected
    source = parameters_of(sparse)
    np.testing.assert_array_equal(parameters["patch"]["kernel"], source["patch"]["kernel"])
    first = parameters["segments"][0]["blocks"][0]["attention"]["query"]["kernel"]
    there = source["segments"][0]["blocks"][0]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(first if first.ndim == 2 else first[0], there[0])
    new = create_model(chosen)[1]
    if "image_position" in expected.get("interpolated", []):
        grid = np.asarray(source["image_position"]).reshape(2, 2, -1)
        bigger = np.asarray(parameters["image_position"]).reshape(4, 4, -1)
        rounding = 8 * np.finfo(np.float32).eps * abs(grid).max()  # sums of four products
        np.testing.assert_allclose(bigger[0, 0], grid[0, 0], rtol=0, atol=rounding)
        between = 0.75 * (0.25 * grid[0, 0] + 0.75 * grid[0, 1]) + 0.25 * (0.25 * grid[1, 0] + 0.75 * grid[1, 1])
        np.testing.assert_allclose(bigger[1, 2], between, rtol=0, atol=rounding)
        np.testing.assert_array_equal(parameters["text_position"][:8], source["text_position"])
        np.testing.assert_array_equal(parameters["text_position"][8:], new["text_position"][8:])
    if "token_table" in expected.get("anew", []):
        np.testing.assert_array_equal(parameters["token_table"], new["token_table"])
        assert "starting anew: token_table (another tokenizer or vocabulary)" in said


def test_an_export_gives_what_its_run_gives(tmp_path: Path, finished: Ran) -> None:
    write_export(restored_encoder(finished.folder), finished.folder, tmp_path / "export")
    parameters, record, _ = begin(tmp_path / "run", config(f"init.source={tmp_path / 'export'}"))
    jax.tree.map(np.testing.assert_array_equal, parameters, parameters_of(finished.folder))
    assert record["step"] == 12 and len(record["digest"]) == 64


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


@pytest.mark.parametrize("choices", [1, 2])
def test_upcycling_keeps_the_function(tmp_path: Path, dense: Path, choices: int) -> None:
    """Without noise the embeddings are within 5% of the dense model's; a copy that ignores the gates is far away."""
    chosen = deep(f"num_choices={choices}", f"init.source={dense}", "init.upcycle=true")
    parameters, record, said = begin(tmp_path / "run", chosen)
    expected = encode(deep("model.moe_layers=()"), parameters_of(dense))
    found = distance(encode(chosen, parameters), expected)
    training = distance(encode(chosen, parameters, RoutingContext(jax.random.key(0), 0, 0)), expected)
    print(f"relative distance of embeddings {found:.2%}, with noise and capacity of training {training:.2%}")
    assert found < 0.05
    unscaled = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * choices / 4 if path[-1].key in ("w2", "b2") else leaf, parameters
    )
    assert distance(encode(chosen, unscaled), expected) > 0.1
    assert record["parameters"]["anew"] == ["blocks.1.moe.router", "blocks.3.moe.router"]
    assert "made of dense MLPs: blocks.1.moe.b1, " in said


def test_noise_makes_experts_differ(tmp_path: Path, dense: Path) -> None:
    chosen = deep(f"init.source={dense}", "init.upcycle=true", "init.noise=0.1")
    parameters, _, _ = begin(tmp_path / "run", chosen)
    experts = np.asarray(parameters["segments"][0]["blocks"][1]["moe"]["w1"])
    mlps = np.asarray(parameters_of(dense)["segments"][0]["blocks"][0]["mlp"]["w1"]["kernel"])[[1, 3]]
    off = (experts - mlps[:, None]) / mlps.std(axis=(1, 2))[:, None, None, None]
    assert off.std(axis=(2, 3)) == pytest.approx(0.1, rel=0.1)
    assert abs(np.corrcoef(off.reshape(8, -1)) - np.eye(8)).max() < 0.1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model.width=64"], r"model\.width \(32 there, 64 here\)"),
        (["model.activation=relu", "model.num_heads=4"], r"model\.num_heads \(2 there, 4 here\), model\.activation"),
        (["model.moe_layers=()", "init.upcycle=true"], "--upcycle makes experts, but the run is dense"),
        (["init.upcycle=true"], r"in blocks \[1, 3\] from .*: it has no dense MLP in block 1; give a dense model"),
        (["model.mlp_width=32", "init.upcycle=true", "model.moe_layers=0"], "its MLPs have width 64"),
        (
            ["init.digest=00"],
            r"has other weights \(SHA-256 [0-9a-f]{64}\) than init.digest=00; put the right ones back",
        ),
    ],
)
def test_what_cannot_be_a_beginning(tmp_path: Path, sparse: Path, settings, words) -> None:
    with pytest.raises(InitError, match=words):
        begin(tmp_path / "run", deep(f"init.source={sparse}", *settings))


@pytest.mark.slow
def test_the_source_is_not_read_again_once_there_is_a_checkpoint(
    tmp_path: Path, finished: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, train = tmp_path / "source", functools.partial(ran, tmp_path / "run", f"init.source={tmp_path / 'source'}")
    shutil.copytree(finished.folder, source)
    with monkeypatch.context() as patch:
        stop_after(patch, 5, signal.SIGTERM)
        assert "beginning with the parameters of" in train().said
    shutil.rmtree(source)
    assert "continuing from the checkpoint of step 6" in train().said
    begun = summary(tmp_path / "run")["init"]
    assert (begun["source"], begun["step"]) == (str(source), 12)
    assert begun["digest"] == json.loads((tmp_path / "run" / "config.json").read_text())["init"]["digest"]
    assert metrics(tmp_path / "run")[0]["contrastive"] < metrics(finished.folder)[0]["contrastive"]
    assert summary(finished.folder)["init"] is None
