"""The contrastive losses over a mesh: those of one device, and no [B, B] anywhere."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from moe_cases import assert_close
from sharding_cases import collectives, mesh_of

from limoe.train.losses import sigmoid_contrastive, softmax_contrastive

pytestmark = pytest.mark.devices(8)

BATCH, WIDTH = 64, 12
LOSSES = {"softmax": (softmax_contrastive, (10.0,)), "sigmoid": (sigmoid_contrastive, (10.0, -3.0))}
MESHES = [((8,), ("data",)), ((2, 4), ("data", "expert")), ((2, 1, 2), ("slice", "data", "expert"))]


def embeddings(seed: int):
    x = np.random.default_rng(seed).normal(size=(2, BATCH, WIDTH))
    x[1] += x[0]  # pairs are alike
    return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.float32)


def with_gradient(loss, mesh, num_scalars: int):
    argnums = tuple(range(2 + num_scalars))
    return jax.value_and_grad(functools.partial(loss, mesh=mesh), argnums=argnums)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("shape", "names"), MESHES, ids=str)
def test_loss_and_gradients_are_those_of_one_device(name, shape, names):
    loss, scalars = LOSSES[name]
    arguments = (*embeddings(0), *map(jnp.float32, scalars))
    value, grads = jax.jit(with_gradient(loss, mesh_of(*shape, names=names), len(scalars)))(*arguments)
    expected, twins = with_gradient(loss, None, len(scalars))(*arguments)
    # Logits go to 10: exp of them is known to 10 eps, and B of them are added up.
    assert_close(value, expected, length=BATCH, name="loss", roundings=10)
    for mine, twin in zip(grads, twins, strict=True):
        assert_close(np.ravel(mine)[None], np.ravel(twin)[None], length=BATCH, name="gradient", roundings=20)


@pytest.mark.parametrize(("name", "gathers"), [("softmax", 2), ("sigmoid", 1)])
def test_no_device_holds_all_pairs(name, gathers):
    loss, scalars = LOSSES[name]
    mesh = mesh_of(2, 4)
    rows, whole = NamedSharding(mesh, PartitionSpec(("data", "expert"))), NamedSharding(mesh, PartitionSpec())
    step = jax.jit(
        with_gradient(loss, mesh, len(scalars)),
        in_shardings=(rows, rows, *[whole] * len(scalars)),
        out_shardings=(whole, (rows, rows, *[whole] * len(scalars))),
    )
    text = step.lower(*embeddings(0), *map(jnp.float32, scalars)).compile().as_text()
    sizes = {int(np.prod([int(n) for n in shape.split(",")])) for shape in re.findall(r"\[([\d,]+)\]", text)}
    assert BATCH * BATCH // 8 in sizes  # rows of one device against all others: the reading finds what there is
    assert max(sizes) < BATCH * BATCH
    found = [one.kind for one in collectives(text)]
    assert found.count("all-gather") == gathers and found.count("reduce-scatter") == gathers
    assert set(found) <= {"all-gather", "reduce-scatter", "all-reduce"}
    # What is reduced everywhere are scalars.
    assert all(one.elements <= 4 for one in collectives(text) if one.kind == "all-reduce")
