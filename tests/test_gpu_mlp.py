"""The expert MLP of the GPU back end: interpreted on a CPU with race detection, or on a GPU, against the reference."""

import gpu_cases as gpu
import jax
import jax.numpy as jnp
import nasty_cases as nasty
import numpy as np
import pytest

import reference.matmul as oracle
from moe_kernels.backends.gpu.common.activation import activate, activate_and_slope

ALL = [
    (name, *dtypes, activation)
    for name in gpu.CASES
    for dtypes in gpu.DTYPES
    for activation in ("gelu_tanh", "gelu_erf")
]


@pytest.fixture(autouse=True)
def _no_races(capsys):
    """The interpreter of JAX 0.10.2 prints races, later ones raise."""
    yield
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.compat
def test_values_and_gradients():
    gpu.check_mlp("packed", "bfloat16", "float32", sizes=[(127, 128, 129, 0), (15, 16, 17, 1), (544, 0, 0, 0)])


def test_the_exact_gelu_without_biases():
    gpu.check_mlp("odd block", "float16", "float16", "gelu_erf", sizes=[(23, 24, 1)], bias=False)


def test_gated_experts_by_two_of_the_matmuls():
    gpu.check_mlp("odd block", "bfloat16", "float32", "silu", sizes=[(23, 0, 1)], gated=True)


def test_the_value_alone_is_that_of_the_forward_pass():
    rows, _ = gpu.CASES["odd block"]
    given, size = nasty.operands(rows, dtype="bfloat16"), np.array((23, 24, 1), np.int32)
    alone = gpu.mlp_value(rows, "gelu_tanh", given.rows, given.weights, size)
    both, *_ = gpu.mlp(rows, "gelu_tanh", given, size)
    used = rows.used(size)
    np.testing.assert_array_equal(np.asarray(alone)[used], np.asarray(both)[used])


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu_erf", "silu", "relu", "relu_squared"])
def test_the_epilogue_computes_the_activation_and_its_slope(activation):
    x = np.linspace(-12, 12, 4801).astype(np.float32).astype(np.float64)
    value, slope = activate_and_slope(jnp.asarray(x, jnp.float32), activation)
    bound = 8 * 2.0**-23 * np.maximum(np.abs(x), 1)
    assert (np.abs(value - oracle.activate(x, activation)) < bound).all()
    assert (np.abs(slope - oracle.activate_derivative(x, activation)) < bound).all()
    np.testing.assert_array_equal(activate(jnp.asarray(x, jnp.float32), activation), value)


def test_the_kernel_computes_the_activation_that_is_asked_for():
    rows, _ = gpu.CASES["odd block"]
    size = (23, 24, 1)
    given, used = nasty.operands(rows, dtype="float16"), rows.used(np.array(size))
    # Pre-activations where the two are small and differ by a hundredth of themselves.
    b1 = np.broadcast_to(np.linspace(-3, -1.5, rows.hidden, dtype=np.float32), (rows.experts, rows.hidden))
    weights = given.weights._replace(w1=given.weights.w1 / 64, b1=jnp.asarray(b1), b2=None)
    given = given._replace(weights=weights)
    wanted = {name: nasty.expected_mlp(rows, given, size, name) for name in ("gelu_tanh", "gelu_erf")}
    for name, other in (("gelu_tanh", "gelu_erf"), ("gelu_erf", "gelu_tanh")):
        out, drows, _ = gpu.mlp(rows, name, given, np.array(size, np.int32))
        for found, mine, theirs in (
            (out, wanted[name].out, wanted[other].out),
            (drows, wanted[name].drows, wanted[other].drows),
        ):
            off, off_other = (np.linalg.norm(np.asarray(found, np.float64)[used] - w[used]) for w in (mine, theirs))
            assert off < off_other / 2, (name, off, off_other)


@pytest.mark.full
@pytest.mark.parametrize(("name", "dtype", "weight_dtype", "activation"), ALL)
def test_values_and_gradients_of_all(name, dtype, weight_dtype, activation):
    gpu.check_mlp(name, dtype, weight_dtype, activation)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype", "weight_dtype", "activation"), ALL)
def test_values_and_gradients_on_a_gpu(name, dtype, weight_dtype, activation):
    gpu.require_gpu()
    gpu.check_mlp(name, dtype, weight_dtype, activation)


def check_poison(poison):
    rows, _ = gpu.CASES["packed"]
    size = np.array((127, 17, 129, 0), np.int32)
    given = nasty.operands(rows, dtype="bfloat16")
    clean = gpu.mlp(rows, "gelu_tanh", given, size)
    used = rows.used(size)
    unused = jnp.asarray(~used)[:, None]
    dirty = given._replace(rows=jnp.where(unused, poison, given.rows), dout=jnp.where(unused, poison, given.dout))
    found = gpu.mlp(rows, "gelu_tanh", dirty, size)
    for a, b in zip(found[:2], clean[:2], strict=True):
        np.testing.assert_array_equal(np.asarray(a)[used], np.asarray(b)[used])
    jax.tree.map(np.testing.assert_array_equal, found[2], clean[2])
    assert all((np.asarray(gradient)[3] == 0).all() for gradient in clean[2])


@pytest.mark.parametrize("poison", [np.nan, *(pytest.param(bad, marks=pytest.mark.full) for bad in (np.inf, -np.inf))])
def test_what_is_not_finite_in_unused_rows_reaches_nothing(poison):
    check_poison(poison)


@pytest.mark.gpu
@pytest.mark.parametrize("poison", nasty.POISONS)
def test_what_is_not_finite_in_unused_rows_reaches_nothing_on_a_gpu(poison):
    gpu.require_gpu()
    check_poison(poison)
