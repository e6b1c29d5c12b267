"""Grouped matmul of the GPU back end: interpreted on a CPU with race detection, or on a GPU, against NumPy."""

import functools

import gpu_cases as gpu
import gpu_simulator
import jax
import jax.numpy as jnp
import nasty_cases as nasty
import numpy as np
import pytest

EVERYDAY = [("block", "bfloat16", "float32"), ("several runs", "float16", "float16")]
ALL = [(name, *dtypes) for name in gpu.CASES for dtypes in gpu.DTYPES]
# What follows the matmul, and the activation in it.
EPILOGUES = [
    ("pointwise", None),
    ("pointwise", "gelu_erf"),
    ("gated", "silu"),
    ("gated", "gelu_tanh"),
    ("gated", "gelu_erf"),
]
POISONED = [("none", None), ("pointwise", "gelu_tanh"), ("gated", "silu")]
# Every case with every one, and dtypes in turns.
ALL_EPILOGUES = [
    (name, *gpu.DTYPES[(i + j) % 4], *epilogue)
    for i, name in enumerate(gpu.CASES)
    for j, epilogue in enumerate(EPILOGUES)
]


@pytest.fixture(autouse=True)
def _no_races(capsys):
    """The interpreter of JAX 0.10.2 prints races, later ones raise."""
    yield
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.parametrize(("name", "dtype", "weight_dtype"), EVERYDAY)
def test_values_and_gradients(name, dtype, weight_dtype):
    gpu.check_matmul(name, dtype, weight_dtype)


@pytest.mark.full
@pytest.mark.parametrize(("name", "dtype", "weight_dtype"), ALL)
def test_values_and_gradients_of_all(name, dtype, weight_dtype):
    gpu.check_matmul(name, dtype, weight_dtype)


def test_the_interpreter_keeps_the_last_programs(monkeypatch):
    """And compiles again what it let go."""
    monkeypatch.setattr(gpu_simulator, "KEPT", 2)
    gpu.check_matmul("one row", "bfloat16", "bfloat16")
    before = dict(gpu_simulator._compiled)
    gpu.check_matmul("one row", "float16", "float16")
    after = gpu_simulator._compiled
    assert len(after) == len(before) == 2 and not before.keys() & after.keys()
    gpu.check_matmul("one row", "bfloat16", "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype", "weight_dtype"), ALL)
def test_values_and_gradients_on_a_gpu(name, dtype, weight_dtype):
    gpu.require_gpu()
    gpu.check_matmul(name, dtype, weight_dtype)


@pytest.mark.parametrize(("epilogue", "activation"), [("pointwise", "silu"), ("gated", "silu"), ("gated", "gelu_erf")])
def test_what_follows_the_matmul(epilogue, activation):
    gpu.check_matmul("odd packed", "bfloat16", "float32", epilogue, activation)


@pytest.mark.parametrize(("epilogue", "activation"), [("pointwise", "gelu_tanh"), ("gated", "gelu_erf")])
def test_the_value_alone_is_that_of_the_forward_pass(epilogue, activation):
    rows, _ = gpu.CASES["odd block"]
    x, weights, dout = nasty.matmul_operands(rows, dtype="bfloat16", epilogue=epilogue)
    size = np.array((23, 24, 1), np.int32)
    alone = gpu.matmul_value(rows, activation, x, weights, size)
    both = gpu.matmul(rows, activation, x, weights, dout, size)[0]
    used = rows.used(size)
    np.testing.assert_array_equal(np.asarray(alone)[used], np.asarray(both)[used])


@pytest.mark.full
@pytest.mark.parametrize(("name", "dtype", "weight_dtype", "epilogue", "activation"), ALL_EPILOGUES)
def test_what_follows_the_matmul_in_all(name, dtype, weight_dtype, epilogue, activation):
    gpu.check_matmul(name, dtype, weight_dtype, epilogue, activation)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype", "weight_dtype", "epilogue", "activation"), ALL_EPILOGUES)
def test_what_follows_the_matmul_on_a_gpu(name, dtype, weight_dtype, epilogue, activation):
    gpu.require_gpu()
    gpu.check_matmul(name, dtype, weight_dtype, epilogue, activation)


def check_poison(poison, epilogue="none", activation=None):
    """What stands in unused rows, in another expert's rows or in its weights reaches nobody else."""
    rows, _ = gpu.CASES["block"]
    size = np.array((127, 0, 129, 17), np.int32)
    x, weights, dout = nasty.matmul_operands(rows, dtype="bfloat16", epilogue=epilogue)
    run = functools.partial(gpu.matmul, rows, activation)
    clean = run(x, weights, dout, size)
    used = rows.used(size)
    unused = jnp.asarray(~used)[:, None]
    dirty = run(jnp.where(unused, poison, x), weights, jnp.where(unused, poison, dout), size)
    for a, b in zip(dirty[:2], clean[:2], strict=True):
        np.testing.assert_array_equal(np.asarray(a)[used], np.asarray(b)[used])
    jax.tree.map(np.testing.assert_array_equal, dirty[2], clean[2])

    sick = 2
    own = np.zeros(rows.num_rows, bool)
    own[sick * rows.rows_per_run :][: rows.rows_per_run] = True
    mine = jnp.asarray(own)[:, None]
    broken = jax.tree.map(lambda w: w.at[sick].set(poison), weights)
    found = run(jnp.where(mine, poison, x), broken, jnp.where(mine, poison, dout), size)
    for a, b in zip(found[:2], clean[:2], strict=True):
        np.testing.assert_array_equal(np.asarray(a)[used & ~own], np.asarray(b)[used & ~own])
    others = np.arange(rows.experts) != sick
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[others], b[others]), found[2], clean[2])
    assert all((np.asarray(gradient)[1] == 0).all() for gradient in jax.tree.leaves(clean[2]))


@pytest.mark.parametrize(("poison", "epilogue", "activation"), [(np.nan, "none", None), (np.inf, "gated", "silu")])
def test_what_is_not_finite_stays_where_it_is(poison, epilogue, activation):
    check_poison(poison, epilogue, activation)


@pytest.mark.full
@pytest.mark.parametrize(("epilogue", "activation"), POISONED)
@pytest.mark.parametrize("poison", nasty.POISONS)
def test_all_that_is_not_finite_stays_where_it_is(poison, epilogue, activation):
    check_poison(poison, epilogue, activation)


@pytest.mark.gpu
@pytest.mark.parametrize(("epilogue", "activation"), POISONED)
@pytest.mark.parametrize("poison", nasty.POISONS)
def test_all_that_is_not_finite_stays_where_it_is_on_a_gpu(poison, epilogue, activation):
    gpu.require_gpu()
    check_poison(poison, epilogue, activation)
