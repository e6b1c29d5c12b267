"""The TPU kernels in the interpreter that simulates memories, copies and cores: races, uninitialised memory, bits."""

import functools
import importlib

import jax
import nasty_cases as nasty
import numpy as np
import pytest
import test_tpu_matmul
import test_tpu_mlp
from jax.experimental.pallas import tpu as pltpu

from moe_kernels.backends.tpu.common.launch import Target

BLOCK = nasty.Rows(experts=4, rows_per_run=24, width=8, hidden=256)
PACKED = nasty.Rows(experts=4, rows_per_run=None, width=8, hidden=384, packed_rows=96)
CASES = {
    # Sizes; tiles: two chunks of F and an item of two pieces; three chunks, so that gradients of the same chunk are not
    # in the same slot again, and items of one piece each (one expert has several).
    "block": (BLOCK, (23, 0, 7, 24), test_tpu_mlp.tiles_of(BLOCK, 32, (16,), 128)),
    "packed": (PACKED, (33, 0, 9, 16), test_tpu_mlp.tiles_of(PACKED, 16, (16,), 128)),
    # One chunk of F: what is read back was written in the very step before.
    "packed, one chunk": (PACKED, (33, 0, 9, 16), test_tpu_mlp.tiles_of(PACKED, 16, (16,), 384)),
}


def simulate(run, given, size, *, num_cores=1, mode="on_wait", seed=0):
    """What `run(target, given, size)` gives, and whether a race was seen."""
    parameters = pltpu.InterpretParams(
        detect_races=True,
        dma_execution_mode=mode,
        random_seed=seed,
        num_cores_or_threads=num_cores,
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
    )
    target = Target("TPU v6 lite", num_cores=num_cores, interpret=True)
    compiled = jax.jit(functools.partial(run, target))
    with pltpu.force_tpu_interpret_mode(parameters):
        found = jax.block_until_ready(compiled(given, np.array(size, np.int32)))
    return found, race_detector().races.races_found


def race_detector():
    """The module that holds the verdict; JAX has no public name for it."""
    return importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")


def check_mlp(name, num_cores, mode, *, keep=False, gated=False):
    rows, size, tiles = CASES[name]
    given = nasty.operands(rows, gated=gated)

    def run(target, given, size):
        return test_tpu_mlp.mlp.__wrapped__(rows, tiles, target, "gelu_tanh", given, size, keep)

    found, races = simulate(run, given, size, num_cores=num_cores, mode=mode, seed=num_cores)
    nasty.check_mlp(rows, given, size, found)
    assert not races


@pytest.mark.parametrize("mode", ["eager", "on_wait"])
@pytest.mark.parametrize("num_cores", [1, 2])
@pytest.mark.parametrize("name", ["block", "packed"])
def test_no_races_and_no_uninitialised_memory(name, num_cores, mode):
    check_mlp(name, num_cores, mode)


@pytest.mark.parametrize(("name", "num_cores", "mode"), [("block", 1, "on_wait"), ("packed", 2, "eager")])
def test_no_races_with_a_kept_hidden_layer(name, num_cores, mode):
    check_mlp(name, num_cores, mode, keep=True)


@pytest.mark.parametrize(
    ("name", "num_cores", "mode"),
    [
        ("block", 1, "on_wait"),
        ("packed", 2, "eager"),
        pytest.param("packed", 1, "on_wait", marks=pytest.mark.full),
        pytest.param("packed, one chunk", 1, "on_wait", marks=pytest.mark.full),
    ],
)
def test_no_races_with_gated_experts(name, num_cores, mode):
    check_mlp(name, num_cores, mode, gated=True)


def check_matmul(name, num_cores, mode, seed, epilogue):
    rows, size, tiles = CASES[name]
    given = nasty.matmul_operands(rows, epilogue=epilogue, seed=seed)
    activation = test_tpu_matmul.EPILOGUES[epilogue]

    def run(target, given, size):
        return test_tpu_matmul.matmul.__wrapped__(rows, tiles, target, activation, given, size)

    found, races = simulate(run, given, size, num_cores=num_cores, mode=mode, seed=seed)
    test_tpu_matmul.check(rows, given, size, found, activation)
    assert not races


@pytest.mark.parametrize(
    ("name", "num_cores", "mode", "seed", "epilogue"),
    [
        ("block", 1, "on_wait", 0, "none"),
        ("block", 2, "eager", 1, "pointwise"),
        ("packed", 1, "eager", 2, "gated"),
        ("packed", 2, "on_wait", 3, "none"),
        ("packed, one chunk", 1, "on_wait", 4, "none"),
    ],
)
def test_a_grouped_matmul_has_no_races(name, num_cores, mode, seed, epilogue):
    check_matmul(name, num_cores, mode, seed, epilogue)


@pytest.mark.full
@pytest.mark.parametrize("epilogue", test_tpu_matmul.EPILOGUES)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mode", ["eager", "on_wait"])
@pytest.mark.parametrize("num_cores", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_a_grouped_matmul_has_no_races_whatever_the_order(name, num_cores, mode, seed, epilogue):
    check_matmul(name, num_cores, mode, seed, epilogue)
