"""What the tests of the GPU back end share: the nasty cases at widths that it takes, and the comparison."""

import dataclasses
import functools

import jax
import nasty_cases as nasty
import numpy as np
import pytest
from moe_cases import assert_close

from moe_kernels.backends import choose, problem_of
from moe_kernels.backends.base import MatmulStatic, MlpStatic, apply
from moe_kernels.types import MatmulActivation


def widened(rows: nasty.Rows, width: int = 128, hidden: int = 256) -> nasty.Rows:
    """The same rows at widths that tiles of 128 divide; sizes of runs stay as they are."""
    return dataclasses.replace(rows, width=width, hidden=hidden)


# Two tiles of columns as well as one; a tile, two and one and a half of rows; several runs; many small experts.
CASES = {
    "block": (widened(nasty.TILES_BLOCK), nasty.SIZES[nasty.TILES_BLOCK]),
    "packed": (widened(nasty.TILES_PACKED), nasty.SIZES[nasty.TILES_PACKED]),
    "several runs": (widened(nasty.SEVERAL_RUNS, 256, 384), nasty.SIZES[nasty.SEVERAL_RUNS]),
    "half full": (widened(nasty.HALF_BLOCK, 384, 128), nasty.SIZES[nasty.HALF_BLOCK]),
    "odd block": (widened(nasty.ODD_BLOCK), nasty.SIZES[nasty.ODD_BLOCK]),
    "odd packed": (widened(nasty.ODD_PACKED), nasty.SIZES[nasty.ODD_PACKED]),
    "one row": (widened(nasty.TINY), nasty.SIZES[nasty.TINY]),
}
DTYPES = [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float16", "float16"), ("float16", "float32")]


def require_gpu() -> None:
    if jax.default_backend() != "gpu":
        pytest.skip(f"JAX runs on {jax.default_backend()}; set JAX_PLATFORMS=cuda on a machine with a GPU")


def span_of(name: str, rows: nasty.Rows, x: jax.Array):
    problem = problem_of(name, x, rows.experts, expert_width=rows.hidden, layout=rows.layout)
    return choose(problem, "gpu")


@functools.partial(jax.jit, static_argnums=(0, 1))
def matmul_value(rows: nasty.Rows, activation: MatmulActivation | None, x, weights, size):
    """Output alone, which is not that of `jax.vjp`."""
    span, static = span_of("grouped_matmul", rows, x), MatmulStatic(rows.layout, activation)
    return apply(span, static, (x, weights), (rows.runs(size),))


@functools.partial(jax.jit, static_argnums=(0, 1))
def matmul(rows: nasty.Rows, activation: MatmulActivation | None, x, weights, dout, size):
    """Output, dX and the gradients of the weights."""
    run = lambda x, weights: matmul_value(rows, activation, x, weights, size)  # noqa: E731
    out, pullback = jax.vjp(run, x, weights)
    return out, *pullback(dout)


@functools.partial(jax.jit, static_argnums=(0, 1))
def mlp(rows: nasty.Rows, activation: str, given: nasty.Operands, size):
    """Output, dX and the gradients of the weights."""
    span, static = span_of("expert_mlp", rows, given.rows), MlpStatic(rows.layout, activation)
    run = lambda x, weights: apply(span, static, (x, weights), (rows.runs(size),))  # noqa: E731
    out, pullback = jax.vjp(run, given.rows, given.weights)
    return out, *pullback(given.dout)


def close(actual, expected, **bound) -> None:
    """Row by row, where an entry is a sum of numbers of size one: a row of small ones may be off as the others are."""
    expected = np.asarray(expected, np.float64)
    scale = np.maximum(np.abs(expected).max(axis=1, initial=0), 1)
    assert_close(np.asarray(actual, np.float64), expected, scale=scale, **bound)


def check_matmul(name: str, dtype: str, weight_dtype: str, sizes=None) -> None:
    rows, all_sizes = CASES[name]
    x, weights, dout = nasty.matmul_operands(rows, dtype=dtype, weight_dtype=weight_dtype)
    for size in all_sizes if sizes is None else sizes:
        out, dx, dweights = matmul(rows, None, x, weights, dout, np.array(size, np.int32))
        assert [a.dtype for a in (out, dx, dweights.weight)] == [x.dtype, x.dtype, weights.weight.dtype]
        out, dx, dw = (np.asarray(a, np.float64) for a in (out, dx, dweights.weight))
        want = nasty.expected_matmul(rows.runs(np.array(size)), x, nasty.as_multiplied(weights, dtype), dout)
        used, one = rows.used(np.array(size)), {"length": 1, "roundings": 0.5}
        # Sums are float32 and as good as exact; what is left is one rounding of the result.
        assert_close(out[used], want.out[used], name=f"out {size}", eps=nasty.ROUNDING[dtype], **one)
        assert_close(dx[used], want.drows[used], name=f"dx {size}", eps=nasty.ROUNDING[dtype], **one)
        eps = {"float32": 2.0**-19}.get(weight_dtype, nasty.ROUNDING.get(weight_dtype, 0))
        flat = (rows.experts * rows.width, rows.hidden)
        close(dw.reshape(flat), want.dweights.weight.reshape(flat), name=f"dw {size}", eps=eps, **one)


def check_epilogue(
    name: str, dtype: str, weight_dtype: str, epilogue: str, activation: MatmulActivation | None, sizes=None
) -> None:
    """A grouped matmul with a bias or a gate, against what each entry is a sum of."""
    rows, all_sizes = CASES[name]
    x, weights, dout = nasty.matmul_operands(rows, dtype=dtype, weight_dtype=weight_dtype, epilogue=epilogue)
    for size in all_sizes if sizes is None else sizes:
        found = matmul(rows, activation, x, weights, dout, np.array(size, np.int32))
        nasty.check_matmul(rows.runs(np.array(size)), (x, weights, dout), found, activation)


def check_mlp(name: str, dtype: str, weight_dtype: str, activation: str = "gelu_tanh", sizes=None, bias=True) -> None:
    rows, all_sizes = CASES[name]
    given = nasty.operands(rows, dtype=dtype, weight_dtype=weight_dtype)
    if not bias:
        given = given._replace(weights=given.weights._replace(b1=None, b2=None))
    for size in all_sizes if sizes is None else sizes:
        nasty.check_mlp(rows, given, size, mlp(rows, activation, given, np.array(size, np.int32)), activation)
