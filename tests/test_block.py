"""Rows of a block through their experts: all at once, as accelerators do, and one after the other, as CPUs do."""

import functools

import jax
import numpy as np
import pytest
from moe_cases import assert_close

from moe_kernels import GluWeights, MlpWeights, backends
from moe_kernels.backends.base import MatmulStatic, MatmulWeights, MlpStatic, apply
from moe_kernels.types import Layout, Runs

EXPERTS, WIDTH, HIDDEN = 4, 5, 6


def layout(rows: int, runs_per_expert: int) -> Layout:
    num_rows = EXPERTS * rows
    return Layout(num_rows, 1, 1, EXPERTS, num_rows, rows_per_expert=rows, runs_per_expert=runs_per_expert)


def block_of(rows: int, runs_per_expert: int, seed: int, gated: bool = False):
    """Rows, cotangents and weights; experts that are empty, half full, one row over half, and full."""
    rng = np.random.default_rng(seed)
    per_run = rows // runs_per_expert
    size = np.array([[0], [(rows + 1) // 2], [(rows + 1) // 2 + 1], [rows]]) - per_run * np.arange(runs_per_expert)
    expert = np.repeat(np.arange(EXPERTS), runs_per_expert)
    runs = Runs(
        *(np.asarray(x, np.int32) for x in (expert, per_run * np.arange(len(expert)), size.clip(0, per_run).ravel()))
    )
    first, second = (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
    sizes = (first, first, second) if gated else (first, (EXPERTS, HIDDEN), second, (EXPERTS, WIDTH))
    weights = (GluWeights if gated else MlpWeights)(*(rng.normal(size=size).astype(np.float32) for size in sizes))
    x, dy = rng.normal(size=(2, EXPERTS * rows, WIDTH)).astype(np.float32)
    used = (np.arange(per_run) < runs.size[:, None]).ravel()
    x[~used], dy[~used] = np.nan, np.inf
    return x, dy, weights, runs, used


def span_for(platform: str, span: str, rows, layout: Layout):
    problem = backends.Problem(span, platform, "float32", rows.shape, EXPERTS, expert_width=HIDDEN, layout=layout)
    return backends.choose(problem, "xla")


@functools.partial(jax.jit, static_argnums=(0, 1))
def mlp_and_gradients(platform, layout, x, dy, weights, runs):
    static = MlpStatic(layout, "gelu_tanh")
    span = span_for(platform, "expert_glu" if isinstance(weights, GluWeights) else "expert_mlp", x, layout)
    y, pull = jax.vjp(lambda x, w: apply(span, static, (x, w), (runs,)), x, weights)
    return y, *pull(dy)


@functools.partial(jax.jit, static_argnums=(0, 1))
def matmul_and_gradients(platform, layout, x, dh, weight, runs):
    span = span_for(platform, "grouped_matmul", x, layout)
    run = lambda x, w: apply(span, MatmulStatic(layout), (x, MatmulWeights(w)), (runs,))  # noqa: E731
    y, pull = jax.vjp(run, x, weight)
    return y, *pull(dh)


@pytest.mark.parametrize(
    ("rows", "runs_per_expert", "gated"), [(8, 1, False), (9, 1, True), (1, 1, False), (12, 3, False), (12, 3, True)]
)
def test_both_ways_agree(rows, runs_per_expert, gated):
    x, dy, weights, runs, used = block_of(rows, runs_per_expert, rows, gated)
    static = layout(rows, runs_per_expert)
    loop, batch = (mlp_and_gradients(platform, static, x, dy, weights, runs) for platform in ("cpu", "gpu"))
    for name, mine, theirs in zip(("y", "dx"), loop, batch, strict=False):
        assert_close(np.asarray(mine)[used], np.asarray(theirs)[used], length=HIDDEN, name=name, roundings=16)
    for name, mine, theirs in zip(weights._fields, loop[2], batch[2], strict=True):
        if mine is None:  # a bias that is not there
            assert theirs is None
            continue
        mine, theirs = (np.asarray(value).reshape(EXPERTS, -1) for value in (mine, theirs))
        assert_close(mine, theirs, length=rows, name=f"d{name}", roundings=16)
        assert (mine[0] == 0).all()

    if gated:
        return
    dh = np.random.default_rng(0).normal(size=(len(x), HIDDEN)).astype(np.float32)
    dh[~used] = np.nan
    loop, batch = (matmul_and_gradients(platform, static, x, dh, weights.w1, runs) for platform in ("cpu", "gpu"))
    for name, mine, theirs in zip(("y", "dx"), loop, batch, strict=False):
        assert_close(np.asarray(mine)[used], np.asarray(theirs)[used], length=HIDDEN, name=name, roundings=16)
    assert_close(*(np.asarray(value[2]).reshape(EXPERTS, -1) for value in (loop, batch)), length=rows, name="dw")
