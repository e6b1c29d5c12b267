"""Dispatch and combine as TPU kernels, interpreted, against the gathers of XLA: values, gradients, nasty operands."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from moe_cases import FAST, Shape, assert_close, gates, plan_of
from nasty_cases import POISONS

from moe_kernels import combine, dispatch
from moe_kernels.backends import choose, explain, problem_of
from moe_kernels.backends.base import Problem
from moe_kernels.types import Layout

# One row, dropped choices in several groups, two choices, packed runs, more than a block of 512 rows.
CASES = {
    "one row": Shape(1, 1, 256, 1, 1, 1, None),
    "groups": Shape(48, 4, 256, 1, 8, 1, 0.5),
    "two choices": Shape(34, 2, 512, 1, 4, 2, 1.05),
    "dropless": Shape(30, 3, 256, 1, 5, 2, None),
    "blocks": Shape(1032, 1, 256, 1, 2, 1, 1.0),
}


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
def both(backend, plan, tokens, rows, gate, dy, drows):
    out, back = jax.vjp(lambda tokens: dispatch(tokens, plan, backend=backend), tokens)
    y, weigh_back = jax.vjp(lambda rows, gate: combine(rows, gate, plan, backend=backend), rows, gate)
    return out, back(drows)[0], y, *weigh_back(dy)


def operands(shape, dtype, pattern="uniform"):
    expert, gate = gates(shape, 0, pattern)
    plan = plan_of(shape, expert, gate, gate[:, 0])
    rng = np.random.default_rng(0)
    draw = [rng.normal(size=(n, shape.width)) for n in (shape.tokens, plan.layout.num_rows) * 2]
    tokens, rows, dy, drows = (jnp.asarray(values, dtype) for values in draw)
    return plan, tokens, rows, jnp.asarray(gate), dy, drows


def compare(actual, expected, dtype):
    eps = 2.0**-23 if dtype == "float32" else 2.0**-8
    names = ("rows", "dtokens", "tokens", "drows", "dgate")
    for name, found, wanted in zip(names, actual, expected, strict=True):
        assert found.dtype == wanted.dtype, name
        np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted), err_msg=name)
        found, wanted = (np.nan_to_num(np.asarray(a, np.float64)) for a in (found, wanted))
        assert_close(found, wanted, length=found.shape[-1], name=name, eps=eps)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_gathers_what_xla_gathers(name, dtype):
    given = operands(CASES[name], dtype)
    compare(both("tpu", *given), both("xla", *given), dtype)


@pytest.mark.parametrize("poison", POISONS)
def test_what_is_not_finite_stays_where_it_belongs(poison):
    plan, tokens, rows, gate, dy, drows = operands(CASES["groups"], "bfloat16", "zipf")
    unused = np.asarray(plan.source) == plan.row.size
    dropped = np.asarray(plan.row[:, 0]) == plan.layout.num_rows
    assert unused.any() and dropped.any() and not dropped.all()
    clean = both("tpu", plan, tokens, rows, gate, dy, drows)
    rows, drows = (jnp.where(unused[:, None], poison, array).astype(array.dtype) for array in (rows, drows))
    hidden = both("tpu", plan, jnp.where(dropped[:, None], poison, tokens).astype(tokens.dtype), rows, gate, dy, drows)
    for found, wanted in zip(hidden, clean, strict=True):
        np.testing.assert_array_equal(found, wanted)
    # A gate that is not finite makes its own token NaN, also where it found no room, and no other.
    lost = np.flatnonzero(dropped)[0]
    y = both("tpu", plan, tokens, rows, gate.at[lost].set(poison), dy, drows)[2]
    assert np.isnan(np.asarray(y, np.float32)[lost]).all()
    np.testing.assert_array_equal(np.delete(y, lost, axis=0), np.delete(clean[2], lost, axis=0))


def test_with_simulated_memories_bits_are_the_same():
    given = operands(CASES["two choices"], "bfloat16")
    expected = both("tpu", *given)
    parameters = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise", detect_races=True)
    with pltpu.force_tpu_interpret_mode(parameters):
        found = jax.jit(both.__wrapped__, static_argnums=0)("tpu", *given)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def problem(width=768, dtype="bfloat16", tokens=16384, **facts):
    layout = Layout(tokens, 1, 1, 32, tokens * 17 // 16, tokens // 512 * 17)
    defaults = {"platform": "tpu", "chip": "TPU v6 lite", "layout": layout}
    return Problem("dispatch", dtype=dtype, shape=(tokens, width), num_experts=32, **(defaults | facts))


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"width": 640 - 8}, "no multiple of 512"),
        ({"chip": "TPU v4"}, "do not fit 16 MiB of VMEM"),
        ({"tokens": 131072}, "of scalar memory"),
        ({"num_cores": 2}, "one TensorCore, the device has 2"),
        ({"layout": None}, "layout of the rows is not known"),
        ({"dtype": "float16"}, "dtype float16"),
    ],
)
def test_what_is_refused_goes_to_xla_and_says_why(facts, reason):
    lines = explain(problem(**facts)).splitlines()
    assert reason in lines[0] and lines[-1] == "xla: chosen"


def test_a_named_back_end_leaves_odd_widths_to_others():
    assert "tpu: chosen" in explain(problem())
    tokens = jnp.ones((8, 12))
    layout = operands(CASES["one row"], "float32")[0].layout
    span = choose(problem_of("dispatch", tokens, 1, layout=layout), "tpu")
    assert span.forward.__module__ == "moe_kernels.backends.xla.permute"
