"""What a program adds from outside the packages: each is one class or function and a line that registers it."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import small_batch, small_config, small_model
from PIL import Image

import moe_kernels
from limoe.config import schema
from limoe.config.schema import ConfigError
from limoe.config.settings import override
from limoe.data import inputs, source
from limoe.data.batches import Batches
from limoe.data.files import DataError
from limoe.data.source import Bad, Decoded, Source
from limoe.evaluate.data import read_evaluation_data
from limoe.model.moe import LayerRouting, RoutingSums, register_activation
from limoe.train import losses
from limoe.train.gradient import gradient


class LinesSource(Source):
    """Pairs listed in a file with the columns image and caption."""

    def __init__(self, path, *, preprocess, metadata, cache_dir):
        with open(path, newline="") as file:
            self.rows = list(csv.DictReader(file))
        self.folder, self.size = path.rpartition("/")[0], preprocess.size

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        row = self.rows[number]
        if not row["caption"]:
            return Bad(row["image"], "the caption is empty")
        image = Image.open(f"{self.folder}/{row['image']}").convert("RGB").resize((self.size, self.size))
        return Decoded(np.asarray(image), row["caption"], row["image"], None)


def test_a_data_source(tmp_path, monkeypatch):
    for number in range(6):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / f"{number}.png")
    lines = [f"{number}.png,{'' if number == 4 else f'picture {number}'}" for number in range(6)]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,caption", *lines]))
    place = f"lines:{tmp_path / 'pairs.csv'}"
    config = override(small_config(), [f"data.shards={place}", f"data.eval_shards={place}"])
    folders = inputs.data_folders(config)
    with pytest.raises(DataError, match=r"there is no data source 'lines' for lines:.*; there are: shards"):
        inputs.training_source(config, folders)

    monkeypatch.setitem(source.SOURCES, "lines", LinesSource)
    found = inputs.training_source(config, folders)
    assert found.damages == [] and list(found.captions(limit=3)) == ["picture 0", "picture 2"]

    def lengths(captions):
        return np.array([[len(caption)] for caption in captions], np.int32)

    batch = Batches(found, lengths, batch_size=config.train.batch_size, seed=0).at(0)
    assert len(batch.keys) == config.train.batch_size
    np.testing.assert_array_equal(batch.images[:, 0, 0, 0], [int(key.removesuffix(".png")) for key in batch.keys])
    evaluation = read_evaluation_data(config, folders)
    assert (
        evaluation.retrieval is not None and len(evaluation.retrieval.pairs.captions) == 5 and evaluation.num_bad == 1
    )


def gate_loss(sums, loss, model):
    """One minus the mean of the largest gates, by layer and group."""
    return 1 - jnp.sum(sums.largest_gate, axis=2) / jnp.sum(sums.tokens, axis=2)


def test_an_auxiliary_loss(monkeypatch):
    monkeypatch.setattr(losses, "EXTRA_LOSSES", [])
    monkeypatch.setattr(schema, "EXTRA_LOSSES", losses.EXTRA_LOSSES)
    monkeypatch.setattr(losses, "AUXILIARY_LOSSES", dict(losses.AUXILIARY_LOSSES))
    with pytest.raises(ConfigError, match=r"'gates' is no registered auxiliary loss; there are: none"):
        small_config("extra=gates=2")

    losses.register("gates", gate_loss)
    one, even = jnp.ones((1, 1, 2)), jnp.ones((1, 1, 2, 4))
    sums = RoutingSums(4 * one, even, even, one, one, even, one)  # largest gates of 1/4
    pairs, scale = jnp.eye(3), jnp.float32(10)

    def terms(*settings):
        config = small_config(*settings)
        return losses.total_loss(pairs, pairs, LayerRouting(sums, even), scale, None, config.loss, config.model)

    # With the six of the paper that are on, a mean of seven.
    off, on, more = terms("aux_weight=0.07"), terms("aux_weight=0.07", "extra=gates=2"), terms("extra=gates=4")
    assert float(off.auxiliary["gates"]) == float(on.auxiliary["gates"]) == 0.75
    assert float(on.auxiliary_total) == pytest.approx(float(off.auxiliary_total) * 6 / 7 + 0.01 * 2 * 0.75)
    assert float(on.total) == pytest.approx(float(on.contrastive + on.auxiliary_total))
    assert losses.by_name(more)["gates"] == 0.75
    for wrong, words in (("gates=0", "needs a positive number"), ("gates", "needs a positive number")):
        with pytest.raises(ConfigError, match=words):
            small_config(f"extra={wrong}")
    with pytest.raises(ValueError, match="there is an auxiliary loss 'z' already"):
        losses.register("z", gate_loss)


@pytest.fixture
def names_of_activations():
    """After the test they are what they were."""
    before = list(schema.ACTIVATIONS)
    yield before
    schema.ACTIVATIONS[:] = before


def test_an_activation(monkeypatch, names_of_activations):
    assert list(moe_kernels.ACTIVATIONS) == names_of_activations
    monkeypatch.delitem(moe_kernels.ACTIVATIONS, "line", raising=False)
    with pytest.raises(
        ConfigError, match=r"model\.activation=line is not of the right type; .*use gelu_tanh \| gelu_erf"
    ):
        small_config("activation=line")
    with pytest.raises(ValueError, match="activation='line' is not one of gelu_tanh"):
        moe_kernels.moe_mlp(*layer_arguments(), moe_kernels.MoeSpec(activation="line"))

    monkeypatch.setitem(moe_kernels.ACTIVATIONS, "line", None)  # taken out again after the test
    register_activation("line", lambda x: 2 * x)
    with pytest.raises(ValueError, match="there is an activation 'line' already"):
        register_activation("line", jnp.abs)
    tokens, router, weights = layer_arguments()
    output = moe_kernels.moe_mlp(tokens, router, weights, moe_kernels.MoeSpec(activation="line"))
    gate = jax.nn.softmax(tokens @ router).max(axis=1)
    chosen = (tokens @ router).argmax(axis=1)
    by_hand = jnp.einsum("td,tdf,tfo->to", tokens, weights.w1[chosen], weights.w2[chosen])
    np.testing.assert_allclose(output.tokens, 2 * gate[:, None] * by_hand, rtol=1e-5, atol=1e-6)

    # In a model of both kinds of MLPs it reaches every parameter's gradient.
    config = small_config("activation=line")
    graph, parameters = small_model(config)
    arguments = *map(jnp.asarray, small_batch(config)), jnp.int32(0)
    compiled = jax.jit(gradient, static_argnums=(0, 5))
    found = compiled(graph, parameters, *arguments, config)
    other = small_config("activation=relu")
    others = compiled(graph_of(other), parameters, *arguments, other)
    assert abs(float(found.loss.contrastive - others.loss.contrastive)) > 1e-4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.parameters))


def graph_of(config):
    return small_model(config)[0]


def layer_arguments():
    keys = jax.random.split(jax.random.key(0), 4)
    weights = moe_kernels.MlpWeights(
        jax.random.normal(keys[0], (2, 4, 8)), None, jax.random.normal(keys[1], (2, 8, 4)), None
    )
    return jax.random.normal(keys[2], (6, 4)), jax.random.normal(keys[3], (4, 2)), weights
