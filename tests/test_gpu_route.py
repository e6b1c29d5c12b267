"""The routing kernel of the GPU back end: interpreted on a CPU with race detection, or on a GPU, against reference."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from gpu_cases import require_gpu
from nasty_cases import POISONS
from test_tpu_route import Case, by_backend, check, draw

from moe_kernels import MoeSpec, route
from moe_kernels.backends import choose, explain
from moe_kernels.backends.base import Problem, RouteStatic
from moe_kernels.backends.gpu.sm90.tiling import route_blocks, route_shared_memory
from moe_kernels.chips import find_generation

# Groups of more than a tile and less, experts that 8 does not divide, all that one product takes; padding, modalities.
CASES = {
    "one more than a tile": Case(258, 2, 128, 3, 2, 2, True, "bfloat16"),
    "short groups": Case(24, 4, 128, 16, 1, 1, False, "bfloat16"),
    "one token": Case(1, 1, 128, 1, 1, 1, True, "bfloat16"),
    "all choices": Case(63, 1, 384, 5, 5, 3, False, "bfloat16"),
    "many experts": Case(129, 1, 128, 80, 2, 2, True, "bfloat16"),
}


@pytest.fixture(autouse=True)
def _no_races(capsys):
    """The interpreter of JAX 0.10.2 prints races, later ones raise."""
    yield
    assert "RACE DETECTED" not in capsys.readouterr().out


def check_case(name, pattern="uneven", seed=0):
    """Tokens are passed on, as in a layer: their other cotangent comes back."""
    drawn = draw(CASES[name], seed, pattern)
    dpassed = jnp.asarray(np.random.default_rng(seed).normal(size=drawn[0].shape), drawn[0].dtype)
    check(CASES[name], drawn, by_backend(CASES[name], "gpu", *drawn, dpassed), dpassed)


@pytest.mark.compat
@pytest.mark.slow
def test_values_and_gradients():
    check_case("one more than a tile")


@pytest.mark.full
@pytest.mark.parametrize("pattern", ["uneven", "all equal"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_of_all(name, pattern):
    check_case(name, pattern, seed=1)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["uneven", "all equal"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_on_a_gpu(name, pattern):
    require_gpu()
    check_case(name, pattern, seed=1)


def check_poison(bad):
    """A token that is not finite wants nothing, is NaN itself, and changes no other; padding changes nothing at all."""
    case = CASES["one more than a tile"]
    tokens, router, inputs, dgate, dsums = draw(case, 1, "uneven")
    lost, mask = 128, np.array(inputs.mask)
    mask[lost], mask[[3, 127, 257]] = True, False
    inputs = inputs._replace(mask=jnp.asarray(mask))
    clean, _ = by_backend(case, "gpu", tokens.at[lost].set(0), router, inputs, dgate, dsums)
    spoilt, _ = by_backend(case, "gpu", tokens.at[lost].set(bad).at[3].set(bad), router, inputs, dgate, dsums)
    theirs, _ = by_backend(case, "xla", tokens.at[lost].set(bad).at[3].set(bad), router, inputs, dgate, dsums)
    others = np.arange(case.tokens) != lost
    assert np.isnan(spoilt.gate[lost]).all() and (np.asarray(spoilt.expert) < case.experts).all()
    np.testing.assert_array_equal(np.asarray(spoilt.gate)[others], np.asarray(clean.gate)[others])
    np.testing.assert_array_equal(np.asarray(spoilt.expert)[others], np.asarray(clean.expert)[others])
    np.testing.assert_array_equal(spoilt.sums.wanted, theirs.sums.wanted)
    np.testing.assert_array_equal(spoilt.sums.tokens, theirs.sums.tokens)
    modality = int(inputs.modality[lost])
    for field in ("probability", "entropy", "load", "largest_gate"):
        mine = np.isfinite(getattr(spoilt.sums, field)).reshape(case.groups, case.modalities, -1)
        expected = np.ones((case.groups, case.modalities), bool)
        expected[lost // (case.tokens // case.groups), modality] = False
        np.testing.assert_array_equal(mine.all(axis=2), expected, err_msg=field)


@pytest.mark.full
@pytest.mark.parametrize("bad", POISONS)
def test_what_is_not_finite_spoils_its_own_sums_only(bad):
    check_poison(bad)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", POISONS)
def test_what_is_not_finite_spoils_its_own_sums_only_on_a_gpu(bad):
    require_gpu()
    check_poison(bad)


@pytest.mark.slow
def test_near_ties_and_zeros_of_both_signs_are_decided_as_in_float32():
    # Logits that differ in the last digits of a float32 router, seen by bfloat16 tokens; then a tie of zeros.
    router = np.zeros((128, 3), np.float32)
    router[0], router[1] = [1 + 2**-20, 1 + 2**-19, 1.0], [0.0, 0.0, 2**-22]
    zeros = np.zeros((128, 3), np.float32)
    zeros[:, [0, 2]] = -0.0
    for weights, expected in ((router, [1, 0, 2]), (zeros, [0, 1, 2])):
        routing = route(jnp.ones((1, 128), jnp.bfloat16), jnp.asarray(weights), MoeSpec(num_choices=3, backend="gpu"))
        assert routing.expert.tolist() == [expected]


PROBLEM = Problem(
    "route", "gpu", "bfloat16", (16384, 768), 32, route=RouteStatic(1, 1, 2, 1 / 32), chip="NVIDIA H200", num_cores=132
)


def test_the_table_says_who_takes_what():
    assert explain(PROBLEM).splitlines()[1] == "gpu: chosen"
    assert choose(PROBLEM) is choose(dataclasses.replace(PROBLEM))
    for change, reason in (
        ({"dtype": "float16"}, "dtype float16 is not bfloat16"),
        ({"dtype": "float32"}, "dtype float32 is not bfloat16"),
        ({"shape": (0, 768)}, "there are no tokens"),
        ({"shape": (16384, 192)}, "width 192 is not a multiple of 128"),
        ({"num_experts": 81}, "81 experts are more than the 80 of one product"),
        ({"route": RouteStatic(17, 1, 2, 1 / 32)}, "more than 16 choices or modalities"),
        ({"route": None}, "what is static about the routing is not known"),
    ):
        lines = explain(dataclasses.replace(PROBLEM, **change)).splitlines()
        assert lines[1].startswith(f"gpu: no, {reason}") and lines[2] == "xla: chosen"


@pytest.mark.parametrize("experts", [8, 16, 32, 64, 80])
def test_stages_fit(experts):
    blocks = route_blocks(3 * experts, find_generation("NVIDIA H200"))
    assert blocks.stages >= 4
    assert route_shared_memory(3 * experts, blocks.stages) <= find_generation("NVIDIA H200").shared_memory
