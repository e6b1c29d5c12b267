"""Grouped matmuls with what follows them (bias, activation, gate) against the reference, on every back end."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import nasty_cases as nasty
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_cases import PATTERNS, SHAPES, Shape, assert_close, gates, plan_of

import reference
from moe_kernels import GluWeights, MlpWeights, Problem, expert_mlp, grouped_glu, grouped_matmul
from moe_kernels.backends import explain
from moe_kernels.backends.base import MatmulWeights
from moe_kernels.types import Layout

FOLLOWS = [
    ("none", None),
    ("bias", None),
    ("bias", "gelu_tanh"),
    ("none", "gelu_erf"),
    ("gate", "silu"),
    ("gate", "gelu_tanh"),
]
SMALL = Shape(24, 2, 5, 33, 4, 2, 1.05)


def operands(shape: Shape, follows: str, rng: np.random.Generator, num_rows: int):
    """Rows, weights and gradient of the output, of size one after the matmul."""
    e, d, f = shape.experts, shape.width, shape.hidden
    weight, up = (rng.normal(size=(2, e, d, f)) / np.sqrt(d)).astype(np.float32)
    bias = rng.normal(size=(e, f)).astype(np.float32)
    weights = MatmulWeights(weight, bias if follows == "bias" else None, up if follows == "gate" else None)
    rows, dy = rng.normal(size=(num_rows, d)), rng.normal(size=(num_rows, f))
    return rows.astype(np.float32), weights, dy.astype(np.float32)


def matmul(rows, weights: MatmulWeights, plan, activation, backend=None):
    if weights.up is not None:
        return grouped_glu(rows, weights.weight, weights.up, plan, activation=activation, backend=backend)
    return grouped_matmul(rows, weights.weight, plan, bias=weights.bias, activation=activation, backend=backend)


@functools.partial(jax.jit, static_argnums=(0, 1))
def with_gradients(activation, backend, plan, rows, weights, dy):
    y, pull = jax.vjp(lambda rows, weights: matmul(rows, weights, plan, activation, backend), rows, weights)
    return y, *pull(dy)


@given(st.sampled_from(SHAPES), st.integers(0, 10**6), st.sampled_from(PATTERNS), st.sampled_from(FOLLOWS))
def test_values_and_gradients_with_nan_in_unused_rows(shape, seed, pattern, follows):
    rng = np.random.default_rng(seed)
    plan = plan_of(shape, *gates(shape, seed, pattern), None)
    rows, weights, dy = operands(shape, follows[0], rng, plan.layout.num_rows)
    used = np.asarray(plan.source) < shape.tokens * shape.choices
    rows[~used], dy[~used] = np.nan, np.inf
    found = with_gradients(follows[1], None, plan, rows, weights, dy)
    nasty.check_matmul(plan.runs, (rows, weights, dy), found, follows[1])
    for gradient in jax.tree.leaves(found[2]):
        assert (np.asarray(gradient)[np.asarray(plan.runs.size) == 0] == 0).all()


@functools.partial(jax.jit, static_argnums=(0, 1))
def gated_with_gradients(activation, in_two, plan, rows, weights, dy):
    def run(rows, weights):
        if not in_two:
            return expert_mlp(rows, weights, plan, activation=activation)
        hidden = grouped_glu(rows, weights.gate, weights.up, plan, activation=activation)
        return grouped_matmul(hidden, weights.down, plan, bias=weights.down_bias)

    y, pull = jax.vjp(run, rows, weights)
    return y, *pull(dy)


@pytest.mark.parametrize(
    ("shape", "activation", "bias"), [(SHAPES[2], "silu", False), (SHAPES[4], "relu", True), (SHAPES[7], "silu", True)]
)
def test_gated_experts_are_two_of_them_with_nan_in_unused_rows(shape, activation, bias):
    """In one pass over the rows; `relu` is an activation that kernels do not know."""
    plan = plan_of(shape, *gates(shape, 0, "few experts"), None)
    rows, first, _ = operands(shape, "gate", np.random.default_rng(0), plan.layout.num_rows)
    turned = dataclasses.replace(shape, width=shape.hidden, hidden=shape.width)
    _, second, dy = operands(turned, "bias", np.random.default_rng(1), plan.layout.num_rows)
    weights = GluWeights(first.weight, first.up, second.weight, down_bias=second.bias if bias else None)
    used = np.asarray(plan.source) < shape.tokens * shape.choices
    spoilt = np.where(used[:, None], rows, np.nan), weights, np.where(used[:, None], dy, np.inf)
    found = gated_with_gradients(activation, False, plan, *jax.tree.map(jnp.asarray, spoilt))
    wanted = gated_with_gradients(activation, True, plan, *jax.tree.map(jnp.asarray, (rows, weights, dy)))
    length = shape.width + shape.hidden + shape.tokens
    for name, mine, theirs in zip(("out", "drows"), found, wanted, strict=False):
        assert_close(np.asarray(mine)[used], np.asarray(theirs)[used], length=length, name=name, roundings=16)
    empty = np.bincount(plan.runs.expert, plan.runs.size, minlength=shape.experts) == 0
    for mine, theirs in zip(jax.tree.leaves(found[2]), jax.tree.leaves(wanted[2]), strict=True):
        mine, theirs = (np.asarray(value).reshape(shape.experts, -1) for value in (mine, theirs))
        assert_close(mine, theirs, length=length, name="dweights", roundings=16)
        assert (mine[empty] == 0).all()


@pytest.mark.parametrize(("follows", "activation"), FOLLOWS)
def test_the_kernels_for_tpu_by_name(follows, activation):
    plan = plan_of(SMALL, *gates(SMALL, 0, "zipf"), None)
    given = operands(SMALL, follows, np.random.default_rng(0), plan.layout.num_rows)
    nasty.check_matmul(plan.runs, given, with_gradients(activation, "tpu", plan, *given), activation)


@pytest.mark.parametrize("capacity_factor", [1.05, None])
def test_in_bfloat16_with_float32_weights(capacity_factor):
    shape = Shape(24, 2, 5, 33, 4, 2, capacity_factor)
    plan = plan_of(shape, *gates(shape, 0, "zipf"), None)
    for follows, activation in FOLLOWS:
        rows, weights, dy = operands(shape, follows, np.random.default_rng(1), plan.layout.num_rows)
        rounded = jnp.asarray(rows, jnp.bfloat16), weights, jnp.asarray(dy, jnp.bfloat16)
        found = with_gradients(activation, None, plan, *rounded)
        nasty.check_matmul(plan.runs, rounded, found, activation)


def test_two_of_them_are_the_expert_mlp():
    plan = plan_of(SMALL, *gates(SMALL, 0, "uniform"), None)
    rows, first, _ = operands(SMALL, "bias", np.random.default_rng(2), plan.layout.num_rows)
    turned = Shape(24, 2, SMALL.hidden, SMALL.width, 4, 2, 1.05)
    _, second, _ = operands(turned, "bias", np.random.default_rng(3), 0)
    rows, first, second = jax.tree.map(jnp.asarray, (rows, first, second))
    hidden = grouped_matmul(rows, first.weight, plan, bias=first.bias, activation="gelu_erf")
    out = grouped_matmul(hidden, second.weight, plan, bias=second.bias)
    whole = expert_mlp(rows, MlpWeights(*first[:2], *second[:2]), plan, activation="gelu_erf")
    used = np.asarray(plan.source) < plan.row.size
    assert_close(np.asarray(out)[used], np.asarray(whole)[used], length=SMALL.hidden, name="out")


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu_erf", "silu", None])
def test_the_reference_gradient_against_central_differences(activation):
    plan = plan_of(SMALL, *gates(SMALL, 4, "zipf"), None)
    given = operands(SMALL, "bias", np.random.default_rng(4), plan.layout.num_rows)
    rows, (weight, bias, _), dy = jax.tree.map(lambda a: np.asarray(a, np.float64), given)
    up = np.random.default_rng(5).normal(size=weight.shape)
    arguments = {"rows": rows, "weight": weight, "bias": bias, "up": up}

    def loss(arguments):
        return np.sum(dy * reference.grouped_matmul(**arguments, plan=plan.runs, activation=activation))

    gradient = reference.grouped_matmul_gradient(**arguments, d_output=dy, plan=plan.runs, activation=activation)
    for name, value in arguments.items():
        direction, step = np.random.default_rng(6).normal(size=value.shape), 1e-6
        ahead, behind = (loss({**arguments, name: value + sign * step * direction}) for sign in (1, -1))
        slope = np.sum(getattr(gradient, name) * direction)
        assert abs((ahead - behind) / (2 * step) - slope) < 1e-6 * max(1.0, abs(slope)), name


@pytest.mark.parametrize("epilogue", ["none", "pointwise", "gated"])
def test_gpus_work_what_follows_in_the_same_kernel(epilogue):
    layout = Layout(128, 1, 1, 2, 256, 128)
    problem = Problem(
        "grouped_matmul",
        "gpu",
        "bfloat16",
        (256, 128),
        2,
        expert_width=128,
        layout=layout,
        chip="NVIDIA H200",
        num_cores=132,
        epilogue=epilogue,
    )
    assert "gpu: chosen" in explain(problem).splitlines()
