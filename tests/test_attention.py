"""The attention kernel: against float64, in both interpreters, in the model, and what it does not take."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from model_cases import small_config

from limoe.config.presets import preset
from limoe.config.schema import ConfigError
from limoe.model import attention_kernel
from limoe.model.attention import TracedChip, attend, why_not_kernel
from limoe.model.attention_kernel import Geometry
from limoe.parallel.mesh import place

# Spans that start and end inside tiles, several heads to a tile of lanes; whole tiles of rows, heads across tiles of
# lanes; three spans, one of a single token, and a head of two tiles.
GEOMETRIES = {
    "two heads a tile": Geometry(((0, 20), (20, 24)), 256, 4),
    "heads across tiles": Geometry(((0, 32), (32, 48)), 640, 8),
    "a head of two tiles": Geometry(((0, 7), (7, 8), (8, 24)), 256, 1),
}
EXAMPLES = 8
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8}


def operands(geometry: Geometry, dtype: str, seed: int = 0) -> list[np.ndarray]:
    """Queries, keys, values and the result's cotangent; large enough scores that weights differ."""
    size = (EXAMPLES * geometry.length, geometry.width)
    drawn = np.random.default_rng(seed).normal(size=(4, *size)) * np.array([2, 2, 1, 1]).reshape(4, 1, 1)
    return [np.asarray(jnp.asarray(array, dtype)) for array in drawn]


@functools.partial(jax.jit, static_argnums=0)
def run(geometry: Geometry, query, key, value, dout):
    return [
        attention_kernel.forward(geometry, "TPU v5", True, query, key, value),
        *attention_kernel.backward(geometry, "TPU v5", True, query, key, value, dout),
    ]


def check(geometry: Geometry, given: list[np.ndarray], found: list, examples=range(EXAMPLES)) -> None:
    """Result and gradients, each entry within the roundings of what was added up in it."""
    eps, scale = EPS[str(given[0].dtype)], geometry.head_width**-0.5
    given, found = ([np.asarray(array, np.float64) for array in arrays] for arrays in (given, found))
    for example in examples:
        for start, end in geometry.spans:
            rows = slice(example * geometry.length + start, example * geometry.length + end)
            for head in range(geometry.num_heads):
                own = rows, slice(head * geometry.head_width, (head + 1) * geometry.head_width)
                q, k, v, dy = (array[own] for array in given)
                scores = scale * q @ k.T
                weight = np.exp(scores - scores.max(axis=1, keepdims=True))
                weight /= weight.sum(axis=1, keepdims=True)
                dweight = dy @ v.T
                dscores = scale * weight * (dweight - (weight * dweight).sum(axis=1, keepdims=True))
                # The same over absolute values.
                size = np.abs(dy) @ np.abs(v).T
                size = scale * weight * (size + (weight * size).sum(axis=1, keepdims=True))
                # An error of a score is a share of its weight; sums are as long as a span or a head.
                largest = 1 + 2 * (scale * np.abs(q) @ np.abs(k).T).max()
                share = eps + 2.0**-23 * np.sqrt(max(len(q), geometry.head_width)) * largest
                expected = [
                    (weight @ v, weight @ np.abs(v), 4),
                    (dscores @ k, size @ np.abs(k), 8),
                    (dscores.T @ q, size.T @ np.abs(q), 8),
                    (weight.T @ dy, weight.T @ np.abs(dy), 4),
                ]
                for name, mine, (right, added, roundings) in zip("yqkv", found, expected, strict=True):
                    error, bound = np.abs(mine[own] - right), roundings * share * added + 2.0**-100
                    assert (error <= bound).all(), (name, example, start, head, (error / bound).max())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("two heads a tile", "bfloat16"),
        ("heads across tiles", "float32"),
        pytest.param("two heads a tile", "float32", marks=pytest.mark.full),
        pytest.param("heads across tiles", "bfloat16", marks=pytest.mark.full),
        *(("a head of two tiles", dtype) for dtype in EPS),
    ],
)
def test_values_and_gradients(name, dtype):
    geometry = GEOMETRIES[name]
    assert attention_kernel.misfit(geometry, EXAMPLES * geometry.length, dtype) is None
    given = operands(geometry, dtype)
    check(geometry, given, run(geometry, *given))


def test_what_is_not_finite_stays_in_its_example_and_modality():
    geometry = GEOMETRIES["two heads a tile"]
    given = operands(geometry, "bfloat16")
    clean = run(geometry, *given)
    # The words of one example, which share tiles with its image and with the next example.
    spoilt = slice(3 * geometry.length + 20, 4 * geometry.length)
    spoiled = [array.copy() for array in given]
    for array, bad in zip(spoiled, (np.nan, np.inf, np.nan, -np.inf), strict=True):
        array[spoilt] = bad
    for before, after in zip(clean, run(geometry, *spoiled), strict=True):
        before, after = (np.asarray(array, np.float32) for array in (before, after))
        assert np.isnan(after[spoilt]).all()
        np.testing.assert_array_equal(np.delete(after, spoilt, axis=0), np.delete(before, spoilt, axis=0))


@pytest.mark.parametrize("num_cores", [pytest.param(1, marks=pytest.mark.full), 2])
def test_no_races_and_no_uninitialised_memory(num_cores):
    geometry = GEOMETRIES["two heads a tile"]
    given = operands(geometry, "bfloat16")
    parameters = pltpu.InterpretParams(
        detect_races=True,
        num_cores_or_threads=num_cores,
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
    )
    with pltpu.force_tpu_interpret_mode(parameters):
        found = jax.block_until_ready(jax.jit(run.__wrapped__, static_argnums=0)(geometry, *given))
    check(geometry, given, found, examples=(0, EXAMPLES - 1))
    assert not importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call").races.races_found


# Of 36 + 4 tokens, two heads of 64: on two devices each has two periods of two examples.
SMALL = ("image_size=24", "text_length=4", "width=128", "mlp_width=128", "batch_size=8", "text_padding=keep")


@pytest.mark.devices(2)
def test_on_a_mesh_the_kernel_gives_what_xla_gives_on_one_device():
    geometry = Geometry(((0, 36), (36, 40)), 128, 2)
    query, key, value, dout = operands(geometry, "float32")

    def found(*settings: str):
        config = small_config(*SMALL, *settings)
        run = lambda *given: attend(*given, None, config.model, place(config.mesh))  # noqa: E731
        both = jax.jit(lambda *given: (lambda y, pull: (y, *pull(dout)))(*jax.vjp(run, *given)))
        return both(query, key, value)

    mine = found("attention=kernel", "mesh.expert=2")
    check(geometry, [query, key, value, dout], mine)
    check(geometry, [query, key, value, dout], found("attention=xla", "remat=attention"))


def test_what_the_kernel_does_not_take_goes_to_xla_or_is_an_error():
    chip, model = TracedChip("tpu", "TPU v5", 64), preset("b16").model
    assert why_not_kernel(model, 16384 * 212, "bfloat16", False, chip) is None
    assert why_not_kernel(preset("l16").model, 16384 * 212, "bfloat16", False, chip) is None
    assert why_not_kernel(preset("h14").model, 21504 * 272, "bfloat16", False, TracedChip("tpu", "TPU v5", 512)) is None
    reasons = {
        "platform cpu": why_not_kernel(model, 16384 * 212, "bfloat16", False, TracedChip("cpu", "cpu")),
        "not support masks": why_not_kernel(model, 16384 * 212, "bfloat16", True, chip),
        "whole examples": why_not_kernel(model, 100 * 212, "bfloat16", False, chip),
        "not a multiple of 848": why_not_kernel(model, 64 * 2 * 212, "bfloat16", False, chip),
        "neither": why_not_kernel(model, 16384 * 212, "float16", False, chip),
        "16 examples of 65": why_not_kernel(preset("b32").model, 16384 * 65, "bfloat16", False, chip),
        "do not fill whole lanes": attention_kernel.misfit(Geometry(((0, 16),), 96, 3), 160, "bfloat16"),
        "do not fit": attention_kernel.misfit(Geometry(((0, 4096),), 128, 1), 4096, "bfloat16"),
    }
    for words, reason in reasons.items():
        assert words in (reason or ""), (words, reason)
    config = small_config(*SMALL, "attention=kernel", "text_padding=mask")
    x = jnp.zeros((8 * 40, 128))
    with pytest.raises(ConfigError, match=r"model\.attention=kernel cannot be used: it does not support masks"):
        attend(x, x, x, jnp.ones((8, 40), bool), config.model, None)
