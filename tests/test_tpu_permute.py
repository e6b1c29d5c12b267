"""Dispatch and combine as TPU kernels, interpreted, against the gathers of XLA: values, gradients, nasty operands."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_cases import Shape, assert_close, gates, plan_of
from nasty_cases import POISONS
from test_tpu_races import simulate

from moe_kernels import combine, dispatch
from moe_kernels.backends import choose, explain, problem_of
from moe_kernels.backends.base import Problem
from moe_kernels.backends.tpu.permute import backward, forward, gather
from moe_kernels.backends.tpu.permute.tiles import GatherTiles, gather_tiles
from moe_kernels.chips import TPUS
from moe_kernels.types import Layout

# One row, dropped choices in several groups, two choices, packed runs, more than a block of 512 rows.
CASES = {
    "one row": Shape(1, 1, 256, 1, 1, 1, None),
    "groups": Shape(48, 4, 256, 1, 8, 1, 0.5),
    "two choices": Shape(34, 2, 512, 1, 4, 2, 1.05),
    "dropless": Shape(30, 3, 256, 1, 5, 2, None),
    "blocks": Shape(1032, 1, 256, 1, 2, 1, 1.0),
}


@functools.partial(jax.jit, static_argnums=0)
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


def compare(given, actual, expected, dtype, exact=False):
    eps = 2.0**-23 if dtype == "float32" else 2.0**-8
    names = ("rows", "dtokens", "tokens", "drows", "dgate")
    for name, found, wanted in zip(names, actual, expected, strict=True):
        assert found.dtype == wanted.dtype, name
        np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted), err_msg=name)
        found, wanted = (np.nan_to_num(np.asarray(a, np.float64)) for a in (found, wanted))
        if name == "dgate":
            # One float32 sum over the width, whatever the rows are, which may cancel.
            plan, _, rows, _, dy, _ = (jax.tree.map(np.asarray, leaf) for leaf in given)
            behind = np.append(np.abs(rows.astype(np.float64)), np.zeros((1, rows.shape[1])), axis=0)[plan.row]
            scale = np.einsum("tkd,td->tk", behind, np.abs(dy.astype(np.float64)))
            assert_close(found, wanted, length=rows.shape[1], name=name, roundings=1, scale=scale)
        elif exact:
            np.testing.assert_array_equal(found, wanted, err_msg=name)
        else:
            assert_close(found, wanted, length=found.shape[-1], name=name, eps=eps)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_gathers_what_xla_gathers(name, dtype):
    given = operands(CASES[name], dtype)
    compare(given, both("tpu", *given), both("xla", *given), dtype)


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


def spans(target, plan, tokens, rows, gate, dy, drows):
    """The same five arrays from the back end's own functions, for a device of any number of cores."""
    out, _ = forward.dispatch_forward(target, None, tokens, plan)
    (dtokens,) = backward.dispatch_backward(target, None, plan, drows)
    y, saved = forward.combine_forward(target, None, rows, gate, plan)
    return out, dtokens, y, *backward.combine_backward(target, None, saved, dy)


def small_tiles(blocks, length, count, width, itemsize, terms, chip):
    """Three tiles of 34 tokens, so that one of two cores that share them has one less than the other."""
    planes = -(-width * itemsize // 512 // blocks)
    return GatherTiles(16, -(-length // 16), 16, -(-count // 16), planes, blocks, 16, vmem=0)


@pytest.mark.parametrize(
    ("num_cores", "mode", "width", "blocks"),
    [
        pytest.param(1, "eager", 512, 1, marks=pytest.mark.full),
        # Cores share columns; three blocks of them they cannot, and the last one is half padding.
        (2, "eager", 512, 2),
        (2, "on_wait", 640, 3),
    ],
)
def test_with_simulated_memories_results_are_the_same_and_no_core_disturbs_the_other(
    monkeypatch, num_cores, mode, width, blocks
):
    given = operands(dataclasses.replace(CASES["two choices"], width=width), "bfloat16")
    expected = both("tpu", *given)
    monkeypatch.setattr(gather, "gather_tiles", functools.partial(small_tiles, blocks))

    def run(target, given, size):
        return spans(target, *given)

    found, races = simulate(run, given, (), num_cores=num_cores, mode=mode)
    assert all(jnp.isfinite(array).all() for array in found), "memory that nothing was written to is NaN here"
    # Tiles of another size: XLA adds up the products of a row in another order, and copies and weighs as before.
    compare(given, found, expected, "bfloat16", exact=True)
    assert not races


@pytest.mark.parametrize("width", [768, 1280, 1536, 4096])
def test_every_block_has_columns(width):
    for length in (1024, 16384, 54272, 65536):
        tiles = gather_tiles(length, length, width, 2, 1, TPUS["v5p"])
        assert tiles is not None
        assert (tiles.blocks - 1) * tiles.planes * 512 < 2 * width <= tiles.blocks * tiles.planes * 512


def problem(width=768, dtype="bfloat16", tokens=16384, **facts):
    layout = Layout(tokens, 1, 1, 32, tokens * 17 // 16, tokens // 512 * 17)
    defaults = {"platform": "tpu", "chip": "TPU v6 lite", "layout": layout}
    return Problem("dispatch", dtype=dtype, shape=(tokens, width), num_experts=32, **(defaults | facts))


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"width": 640 - 8}, "no multiple of 128"),
        ({"chip": "TPU v4", "tokens": 32768}, "do not fit 16 MiB of VMEM"),
        ({"layout": None}, "layout of the rows is not known"),
        ({"dtype": "float16"}, "dtype float16"),
    ],
)
def test_what_is_refused_goes_to_xla_and_says_why(facts, reason):
    lines = explain(problem(**facts)).splitlines()
    assert reason in lines[0] and lines[-1] == "xla: chosen"


@pytest.mark.parametrize(
    ("tokens", "choices", "width", "chip", "how"),
    [
        (8192, 2, 4096, "TPU v6 lite", "2 for 16896 rows"),
        (8192, 2, 4096, "TPU v5", "2 for 8192 rows, 4 for 16896 rows"),
        (8192, 8, 2048, "TPU v6 lite", "3 for 67584 rows"),
        (54272, 1, 768, "TPU v5", "2 for 54272 rows, 2 for 55968 rows"),
    ],
)
def test_wide_or_many_rows_are_gathered_in_blocks_of_columns(tokens, choices, width, chip, how):
    layout = Layout(tokens, choices, 1, 32, tokens * choices * 33 // 32, None)
    assert how in explain(problem(width=width, tokens=tokens, chip=chip, layout=layout)).splitlines()[0]


def test_a_named_back_end_leaves_odd_widths_to_others():
    assert "tpu: chosen" in explain(problem())
    tokens = jnp.ones((8, 12))
    layout = operands(CASES["one row"], "float32")[0].layout
    span = choose(problem_of("dispatch", tokens, 1, layout=layout), "tpu")
    assert span.forward.__module__ == "moe_kernels.backends.xla.permute"
