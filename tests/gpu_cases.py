"""What the tests of the GPU back end share: the nasty cases at widths that it takes, and the comparison."""

import dataclasses
import functools

import gpu_simulator
import jax
import nasty_cases as nasty
import numpy as np
import pytest

from moe_kernels import GluWeights
from moe_kernels.backends import choose, problem_of
from moe_kernels.backends.base import MatmulStatic, MlpStatic, apply
from moe_kernels.backends.gpu import install_simulator
from moe_kernels.types import Epilogue, MatmulActivation

# For every test that imports this: without it, a CPU runs no GPU kernels.
install_simulator(gpu_simulator.simulate)


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
def mlp_value(rows: nasty.Rows, activation: str, x, weights, size):
    """Output alone, which is not that of `jax.vjp`."""
    name = "expert_glu" if isinstance(weights, GluWeights) else "expert_mlp"
    span, static = span_of(name, rows, x), MlpStatic(rows.layout, activation)
    return apply(span, static, (x, weights), (rows.runs(size),))


@functools.partial(jax.jit, static_argnums=(0, 1))
def mlp(rows: nasty.Rows, activation: str, given: nasty.Operands, size):
    """Output, dX and the gradients of the weights."""
    run = lambda x, weights: mlp_value(rows, activation, x, weights, size)  # noqa: E731
    out, pullback = jax.vjp(run, given.rows, given.weights)
    return out, *pullback(given.dout)


def check_matmul(
    name: str,
    dtype: str,
    weight_dtype: str,
    epilogue: Epilogue = "none",
    activation: MatmulActivation | None = None,
    sizes=None,
) -> None:
    rows, all_sizes = CASES[name]
    x, weights, dout = nasty.matmul_operands(rows, dtype=dtype, weight_dtype=weight_dtype, epilogue=epilogue)
    for size in all_sizes if sizes is None else sizes:
        found = matmul(rows, activation, x, weights, dout, np.array(size, np.int32))
        nasty.check_matmul(rows.runs(np.array(size)), (x, weights, dout), found, activation)


def check_mlp(
    name: str,
    dtype: str,
    weight_dtype: str,
    activation: str = "gelu_tanh",
    sizes=None,
    bias: bool = True,
    gated: bool = False,
) -> None:
    rows, all_sizes = CASES[name]
    given = nasty.operands(rows, dtype=dtype, weight_dtype=weight_dtype, gated=gated)
    if not bias:
        given = given._replace(weights=given.weights._replace(b1=None, b2=None))
    for size in all_sizes if sizes is None else sizes:
        found = mlp(rows, activation, given, np.array(size, np.int32))
        nasty.check_mlp(rows, given, size, found, activation, in_two=gated)
