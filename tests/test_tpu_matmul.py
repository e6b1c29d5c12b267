"""The grouped matmul of the TPU back end, interpreted, against float64 and the table of nasty cases."""

import functools

import jax
import jax.numpy as jnp
import nasty_cases as nasty
import numpy as np
import pytest
from moe_cases import FAST, assert_close
from test_tpu_mlp import CASES, EPS, TARGET

from moe_kernels.backends.tpu.matmul import run_backward, run_forward


@functools.partial(jax.jit, static_argnums=(0, 1, 2), compiler_options=FAST)
def matmul(rows, tiles, target, x, weight, dout, size):
    """Output and both gradients."""
    runs = rows.runs(size)
    out = run_forward(tiles, target, rows.layout, x, weight, runs)
    return out, *run_backward(tiles, target, rows.layout, x, weight, runs, dout)


def operands(rows, dtype, weight_dtype, seed=0):
    given = nasty.operands(rows, dtype=dtype, weight_dtype=weight_dtype, seed=seed)
    rng = np.random.default_rng(seed)
    return given.rows, given.weights.w1, jnp.asarray(rng.normal(size=(rows.num_rows, rows.hidden)), dtype)


def check(rows, given, size, found) -> None:
    x, weight, _ = given
    out, dx, dweight = found
    wanted, used = nasty.expected_matmul(rows, *given, size), rows.used(np.asarray(size))
    assert out.dtype == dx.dtype == x.dtype and dweight.dtype == weight.dtype
    dtype = str(x.dtype)
    # In bfloat16 operands are exact and results are rounded once; sums are in float32.
    longest = max(rows.width, rows.hidden, *size, 1)
    bound = {"eps": EPS[dtype], "roundings": 1, "length": longest if dtype == "float32" else 1}
    scale = nasty.expected_matmul(rows, *map(jnp.abs, given), size)
    for name, mine, theirs, behind in zip(("out", "dx"), (out, dx), wanted, scale, strict=False):
        assert_close(np.asarray(mine, np.float64)[used], theirs[used], name=name, scale=behind[used], **bound)
    mine, theirs, behind = (np.asarray(a, np.float64).reshape(rows.experts, -1) for a in (dweight, wanted[2], scale[2]))
    assert_close(mine, theirs, name="dweight", scale=behind, **bound)


def check_case(rows, tiles, dtype, weight_dtype) -> None:
    given = operands(rows, dtype, weight_dtype)
    for size in nasty.SIZES.get(rows, ()):
        check(rows, given, size, matmul(rows, tiles, TARGET, *given, np.array(size, np.int32)))


@pytest.mark.parametrize(
    ("name", "dtype", "weight_dtype"),
    [
        ("several pieces", "float32", "float32"),
        ("several chunks, several items", "bfloat16", "float32"),
        ("several runs", "bfloat16", "bfloat16"),
    ],
)
def test_values_and_gradients(name, dtype, weight_dtype):
    check_case(*CASES[name], dtype, weight_dtype)


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "weight_dtype"), nasty.DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_of_all(name, dtype, weight_dtype):
    check_case(*CASES[name], dtype, weight_dtype)


@pytest.mark.parametrize("name", ["one piece", "packed, one piece an item"])
def test_every_pattern_of_empty_experts(name):
    rows, tiles = CASES[name]
    given = operands(rows, "float32", "float32")
    for size in nasty.empty_patterns(rows):
        gradient = np.asarray(matmul(rows, tiles, TARGET, *given, size)[2])
        assert (gradient[size == 0] == 0).all() and np.isfinite(gradient).all()
    for size in nasty.empty_patterns(rows)[::37]:
        check(rows, given, size, matmul(rows, tiles, TARGET, *given, size))
