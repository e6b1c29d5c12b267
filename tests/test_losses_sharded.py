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
from reference import losses

pytestmark = pytest.mark.devices(8)

BATCH, WIDTH = 64, 12
LOSSES = {"softmax": (softmax_contrastive, (10.0,)), "sigmoid": (sigmoid_contrastive, (10.0, -3.0))}
MESHES = [((8,), ("data",)), ((2, 4), ("data", "expert")), ((2, 1, 2), ("slice", "data", "expert"))]


def embeddings(seed: int):
    x = np.random.default_rng(seed).normal(size=(2, BATCH, WIDTH))
    x[1] += x[0]  # pairs are alike
    return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.float32)


def with_gradient(loss, mesh, num_scalars: int, captions=None):
    argnums = tuple(range(2 + num_scalars))
    return jax.value_and_grad(functools.partial(loss, mesh=mesh, captions=captions), argnums=argnums)


@pytest.mark.parametrize(
    ("name", "shape", "names", "num_captions"),
    [
        *((name, *mesh, 0) for name in LOSSES for mesh in MESHES),
        *((name, *MESHES[2], 9) for name in LOSSES),
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_one_device(name, shape, names, num_captions):
    loss, scalars = LOSSES[name]
    captions = jnp.arange(BATCH)[:, None] % num_captions if num_captions else None
    arguments = (*embeddings(0), *map(jnp.float32, scalars))
    value, grads = jax.jit(with_gradient(loss, mesh_of(*shape, names=names), len(scalars), captions))(*arguments)
    expected, twins = with_gradient(loss, None, len(scalars), captions)(*arguments)
    assert captions is None or expected < with_gradient(loss, None, len(scalars))(*arguments)[0], "something is masked"
    # Logits go to 10: exp of them is known to 10 eps, and B of them are added up.
    assert_close(value, expected, length=BATCH, name="loss", roundings=10)
    for mine, twin in zip(grads, twins, strict=True):
        assert_close(np.ravel(mine)[None], np.ravel(twin)[None], length=BATCH, name="gradient", roundings=20)


@pytest.mark.parametrize("mesh", [None, ((4,), ("data",))], ids=["one device", "four"])
def test_a_tiny_loss_keeps_its_digits_and_its_sign(mesh):
    scale = 100.0
    image, noise = np.random.default_rng(0).normal(size=(2, BATCH, WIDTH))
    arrays = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, image + 0.1 * noise)]
    image, text = (jnp.asarray(x, jnp.float32) for x in arrays)
    placed = mesh and mesh_of(*mesh[0], names=mesh[1])
    value, grads = jax.jit(with_gradient(softmax_contrastive, placed, 1))(image, text, jnp.float32(scale))

    exact = [np.asarray(x, np.float64) for x in (image, text)]
    logits = losses.contrastive_logits(*exact, np.log(scale))
    expected, slope = losses.softmax_contrastive_loss(logits), losses.softmax_contrastive_gradient(logits)
    # exp of a gap is known to the gap's own error, that of two products of length WIDTH times the scale.
    bound = 2 * scale * 2.0**-23 * WIDTH**0.5
    assert 0 < expected < 1e-6
    assert abs(value - expected) <= bound * expected
    gradients = scale * slope @ exact[1], scale * slope.T @ exact[0], np.sum(slope * logits) / scale
    for mine, gradient in zip(grads, gradients, strict=True):
        assert np.linalg.norm(mine - gradient) <= 4 * bound * np.linalg.norm(gradient)


def test_a_loss_of_far_too_large_gaps_is_finite():
    image = jnp.eye(2)
    value, grads = with_gradient(softmax_contrastive, None, 1)(image, image[::-1], jnp.float32(1e4))
    assert value == 1e4 and grads[2] == 1
    alone, slopes = with_gradient(softmax_contrastive, None, 1)(image[:1], image[1:], jnp.float32(1e4))
    assert alone == 0 and all((slope == 0).all() for slope in slopes)


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
