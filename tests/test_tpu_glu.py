"""Gated experts as one kernel of the TPU back end, interpreted, against the reference and the table of nasty cases."""

import functools

import jax
import jax.numpy as jnp
import nasty_cases as nasty
import numpy as np
import pytest
from test_tpu_mlp import CASES, POISONED, TARGET, check_containment, mlp, tiles_of

from moe_kernels import GluWeights, MoeSpec, Plan, expert_mlp, explain
from moe_kernels.backends import Problem, choice_of, tpu
from moe_kernels.backends.base import MlpStatic
from moe_kernels.backends.tpu.common.tiling import GivenTiles
from moe_kernels.backends.tpu.mlp.backward import expert_mlp_backward
from moe_kernels.backends.tpu.mlp.forward import expert_mlp_forward
from moe_kernels.backends.tpu.mlp.one_or_two import GluCost
from moe_kernels.types import Layout


def check_case(name, dtype, weight_dtype, activation="silu") -> None:
    rows, tiles = CASES[name]
    given = nasty.operands(rows, dtype=dtype, weight_dtype=weight_dtype, gated=True)
    for size in nasty.SIZES[rows]:
        found = mlp(rows, tiles, TARGET, activation, given, np.array(size, np.int32))
        nasty.check_mlp(rows, given, size, found, activation)


@pytest.mark.parametrize(
    ("name", "dtype", "weight_dtype", "activation"),
    [
        ("several pieces", "float32", "float32", "silu"),
        ("several chunks, several items", "float32", "float32", "silu"),
        ("odd widths", "bfloat16", "float32", "gelu_tanh"),
        ("several runs", "bfloat16", "bfloat16", "silu"),
        ("packed, one piece an item", "bfloat16", "bfloat16", "gelu_erf"),
    ],
)
def test_values_and_gradients(name, dtype, weight_dtype, activation):
    check_case(name, dtype, weight_dtype, activation)


@pytest.mark.full
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu_erf"])
@pytest.mark.parametrize(("dtype", "weight_dtype"), nasty.DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_of_all(name, dtype, weight_dtype, activation):
    check_case(name, dtype, weight_dtype, activation)


@pytest.mark.parametrize(("name", "bad"), [("one piece", np.inf), ("packed, one piece an item", np.nan)])
def test_what_is_not_an_experts_own_never_reaches_it(name, bad):
    size = next(size for poisoned, size, _ in POISONED if poisoned == name)
    check_containment(name, size, bad, gated=True)


def test_an_expert_without_rows_gets_exactly_0():
    rows, tiles = CASES["packed, one piece an item"]
    given = nasty.operands(rows, gated=True)
    for size in nasty.empty_patterns(rows)[::85]:
        for gradient in jax.tree.leaves(mlp(rows, tiles, TARGET, "silu", given, size)[2]):
            assert (np.asarray(gradient)[size == 0] == 0).all() and np.isfinite(gradient).all()


def test_without_rows():
    rows = nasty.EMPTY
    given, static = nasty.operands(rows, gated=True), MlpStatic(rows.layout, "silu")
    out, saved = expert_mlp_forward(TARGET, static, given.rows, given.weights, rows.runs(np.zeros(3, np.int32)))
    drows, dweights = expert_mlp_backward(TARGET, static, saved, given.dout)
    assert out.shape == drows.shape == (0, rows.width) and isinstance(dweights, GluWeights)
    assert not any(leaf.any() for leaf in jax.tree.leaves(dweights))


def glu_problem(rows: nasty.Rows, **facts) -> Problem:
    shape = (rows.num_rows, rows.width)
    return Problem("expert_glu", "cpu", "float32", shape, rows.experts, rows.hidden, rows.layout, **facts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def by_name(rows, tiles, given, size):
    """Output and gradients of the public verb."""
    plan = Plan(None, None, rows.runs(size), None, rows.layout)
    out, pull = jax.vjp(lambda x, w: expert_mlp(x, w, plan, backend="tpu", tiles=tiles), given.rows, given.weights)
    return out, *pull(given.dout)


def test_block_sizes_that_a_call_brings_along_give_the_same_values():
    rows, size = nasty.Rows(experts=4, rows_per_run=24, width=128, hidden=256), (23, 0, 7, 24)
    tiles = GivenTiles(tiles_of(rows, 16, (16,), 128), tiles_of(rows, 32, (32, 16), 128))
    given = nasty.operands(rows, gated=True)
    program = str(jax.make_jaxpr(lambda *a: by_name(rows, tiles, *a))(given, np.array(size)))
    assert "grid=(1, 8, 2)" in program and "grouped_matmul" not in program
    nasty.check_mlp(rows, given, size, by_name(rows, tiles, given, np.array(size)), "silu")


def test_a_bias_of_the_last_matmul():
    rows, size = nasty.Rows(experts=2, rows_per_run=16, width=8, hidden=16), np.array((15, 3))
    given, used = nasty.operands(rows, gated=True), rows.used(size)
    bias = np.random.default_rng(1).normal(size=(2, 8)).astype(np.float32)
    biased = given._replace(weights=given.weights._replace(down_bias=jnp.asarray(bias)))
    plain, found = (by_name(rows, None, operands, size) for operands in (given, biased))
    # The bias is added before the same sum is rounded, or after: a rounding or two of either.
    eps, sums = np.finfo(np.float32).eps, plain[0] + bias.repeat(16, axis=0)
    np.testing.assert_allclose(
        found[0][used], sums[used], rtol=0, atol=2 * eps * (abs(sums[used]).max() + abs(bias).max())
    )
    wanted = np.where(used[:, None], given.dout, 0).reshape(2, 16, 8).sum(axis=1)
    np.testing.assert_allclose(found[2].down_bias, wanted, rtol=0, atol=16 * eps * abs(given.dout[used]).max())


def test_where_it_takes_longer_gated_experts_run_as_two_kernels(monkeypatch):
    rows, size = nasty.Rows(experts=2, rows_per_run=16, width=8, hidden=16), (15, 3)
    given = nasty.operands(rows, dtype="bfloat16", weight_dtype="bfloat16", gated=True)
    assert choice_of(glu_problem(rows), "tpu").how.startswith("one kernel: 0.000 ms; grouped_glu")
    monkeypatch.setattr(tpu, "glu_cost", lambda sizes: GluCost(one=np.inf, two=1.0))
    how = choice_of(glu_problem(rows), "tpu").how
    assert how.startswith("grouped_glu, then grouped_matmul: 1000.000 ms; one kernel: does not fit VMEM")
    assert "grouped_matmul" in str(jax.make_jaxpr(lambda *a: by_name(rows, None, *a))(given, np.array(size)))
    nasty.check_mlp(rows, given, size, by_name(rows, None, given, np.array(size)), "silu", in_two=True)


@pytest.mark.parametrize(
    ("chip", "sizes", "how"),
    [
        ("v6e", (2048, 768), "one kernel: 0.313 ms; grouped_glu, then grouped_matmul: 0.354 ms"),
        ("v5p", (2880, 2880), "grouped_glu, then grouped_matmul: 3.279 ms; one kernel: 7.857 ms"),
        ("v4", (4096, 14336), "plain JAX"),
    ],
)
def test_explain_names_the_span_and_how_it_runs(chip, sizes, how, as_users_run_it):
    (width, expert_width), array = sizes, lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    weights = GluWeights(*[array(8, width, expert_width)] * 2, array(8, expert_width, width))
    found = explain(array(4096, width), array(width, 8), weights, MoeSpec(num_choices=2), chip=chip)
    experts = found.as_json()["experts"]
    assert experts["span"] == "expert_glu" and experts["how"].startswith(how)
    assert f"experts: {experts['backend']}, expert_glu (" in str(found)
    reason = "width 4096 with expert width 14336 does not fit the 16 MiB of VMEM of TPU v4"
    assert experts["refused"].get("tpu") == (reason if chip == "v4" else None)


def test_a_layout_that_is_not_known_is_refused():
    problem = Problem("expert_glu", "tpu", "float32", (16, 8), 2, 16, chip="TPU v6 lite")
    assert choice_of(problem).refused["tpu"] == "the layout of the rows is not known"
    packed = Layout(8, 1, 1, 2, 24, 12)
    refused = choice_of(Problem("expert_glu", "tpu", "float32", (24, 8), 2, 16, packed, "TPU v6 lite")).refused["tpu"]
    assert refused == "runs of 12 rows do not start at multiples of 8"
