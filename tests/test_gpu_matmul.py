"""Grouped matmul of the GPU back end: interpreted on a CPU with race detection, or on a GPU, against NumPy."""

import gpu_cases as gpu
import jax.numpy as jnp
import nasty_cases as nasty
import numpy as np
import pytest

EVERYDAY = [("block", "bfloat16", "float32"), ("several runs", "float16", "float16")]
ALL = [(name, *dtypes) for name in gpu.CASES for dtypes in gpu.DTYPES]


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


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype", "weight_dtype"), ALL)
def test_values_and_gradients_on_a_gpu(name, dtype, weight_dtype):
    gpu.require_gpu()
    gpu.check_matmul(name, dtype, weight_dtype)


def check_poison(poison):
    """What stands in unused rows, in another expert's rows or in its weights reaches nobody else."""
    rows, _ = gpu.CASES["block"]
    size = np.array((127, 0, 129, 17), np.int32)
    x, weight, dout = gpu.matmul_operands(rows, "bfloat16", "float32")
    clean = [np.asarray(a) for a in gpu.matmul(rows, x, weight, dout, size)]
    used = rows.used(size)
    unused = jnp.asarray(~used)[:, None]
    dirty = gpu.matmul(rows, jnp.where(unused, poison, x), weight, jnp.where(unused, poison, dout), size)
    for a, b in zip(dirty[:2], clean[:2], strict=True):
        np.testing.assert_array_equal(np.asarray(a)[used], b[used])
    np.testing.assert_array_equal(np.asarray(dirty[2]), clean[2])

    sick = 2
    own = np.zeros(rows.num_rows, bool)
    own[sick * rows.rows_per_run :][: rows.rows_per_run] = True
    mine = jnp.asarray(own)[:, None]
    found = gpu.matmul(
        rows, jnp.where(mine, poison, x), weight.at[sick].set(poison), jnp.where(mine, poison, dout), size
    )
    for a, b in zip(found[:2], clean[:2], strict=True):
        np.testing.assert_array_equal(np.asarray(a)[used & ~own], b[used & ~own])
    others = np.arange(rows.experts) != sick
    np.testing.assert_array_equal(np.asarray(found[2])[others], clean[2][others])
    assert (clean[2][1] == 0).all()


def test_nan_stays_where_it_is():
    check_poison(np.nan)


@pytest.mark.full
@pytest.mark.parametrize("poison", nasty.POISONS)
def test_what_is_not_finite_stays_where_it_is(poison):
    check_poison(poison)


@pytest.mark.gpu
@pytest.mark.parametrize("poison", nasty.POISONS)
def test_what_is_not_finite_stays_where_it_is_on_a_gpu(poison):
    gpu.require_gpu()
    check_poison(poison)
