"""The grouped matmul of the TPU back end, interpreted, against float64 and the table of nasty cases."""

import functools

import jax
import jax.numpy as jnp
import nasty_cases as nasty
import numpy as np
import pytest
from test_tpu_mlp import CASES, POISONED, TARGET, tiles_of

import reference
from moe_kernels.backends import choose
from moe_kernels.backends.base import KERNEL_ACTIVATIONS, MatmulStatic, Problem, apply
from moe_kernels.backends.tpu.common.activation import activate, activate_and_slope
from moe_kernels.backends.tpu.common.launch import Target
from moe_kernels.backends.tpu.common.tiling import GivenTiles, Sizes, covers, pieces
from moe_kernels.backends.tpu.matmul import backward, forward
from moe_kernels.backends.tpu.matmul.backward import grouped_matmul_backward, run_backward
from moe_kernels.backends.tpu.matmul.forward import grouped_matmul_forward, run_forward
from moe_kernels.backends.tpu.matmul.tiles import matmul_backward_tiles, matmul_forward_tiles

EPILOGUES = {"none": None, "pointwise": "gelu_tanh", "gated": "silu"}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def matmul(rows, tiles, target, activation, given, size):
    """Output and both gradients."""
    x, weights, dout = given
    static, runs = MatmulStatic(rows.layout, activation), rows.runs(size)
    out = run_forward(tiles, target, static, x, weights, runs)
    return out, *run_backward(tiles, target, static, x, weights, runs, dout)


def check(rows, given, size, found, activation=None) -> None:
    nasty.check_matmul(rows.runs(np.asarray(size)), given, found, activation)


def check_case(rows, tiles, dtype, weight_dtype, epilogue="none", activation=None) -> None:
    given = nasty.matmul_operands(rows, dtype=dtype, weight_dtype=weight_dtype, epilogue=epilogue)
    activation = activation or EPILOGUES[epilogue]
    for size in nasty.SIZES[rows]:
        found = matmul(rows, tiles, TARGET, activation, given, np.array(size, np.int32))
        check(rows, given, size, found, activation)


@pytest.mark.parametrize(
    ("name", "dtype", "weight_dtype", "epilogue"),
    [
        ("several pieces", "float32", "float32", "none"),
        ("several chunks, several items", "bfloat16", "float32", "none"),
        ("several runs", "bfloat16", "bfloat16", "none"),
        ("odd widths", "bfloat16", "float32", "pointwise"),
        ("several runs", "float32", "float32", "pointwise"),
        ("several chunks, several items", "float32", "float32", "gated"),
        ("several runs", "bfloat16", "bfloat16", "gated"),
    ],
)
def test_values_and_gradients(name, dtype, weight_dtype, epilogue):
    check_case(*CASES[name], dtype, weight_dtype, epilogue)


@pytest.mark.full
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(("dtype", "weight_dtype"), nasty.DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_of_all(name, dtype, weight_dtype, epilogue):
    check_case(*CASES[name], dtype, weight_dtype, epilogue)


@pytest.mark.parametrize(
    ("epilogue", "activation"),
    [
        *(("pointwise", activation) for activation in ("gelu_tanh", "gelu_erf", "silu")),
        ("gated", "silu"),
        ("gated", "relu"),
        *(pytest.param("gated", activation, marks=pytest.mark.full) for activation in ("gelu_tanh", "gelu_erf")),
    ],
)
def test_every_activation(epilogue, activation):
    rows, tiles = CASES["one piece"]
    given, size = nasty.matmul_operands(rows, epilogue=epilogue), (3, 0, 16, 1, 8, 9, 15, 2)
    check(rows, given, size, matmul(rows, tiles, TARGET, activation, given, np.array(size)), activation)


@pytest.mark.parametrize("activation", KERNEL_ACTIVATIONS)
def test_an_activation_and_its_slope(activation):
    x = np.linspace(-12, 12, 4801).astype(np.float32).astype(np.float64)
    value, slope = activate_and_slope(jnp.asarray(x, jnp.float32), activation)
    bound = 8 * 2.0**-23 * np.maximum(np.abs(x), 1)
    assert (np.abs(value - reference.activate(x, activation)) < bound).all()
    # The slope of GELU by tanh is 1 - tanh(u)², which is known to an eps, times x du/dx, where u grows like x³.
    steep = 1 + 3 * 0.044715 * x**2 if activation == "gelu_tanh" else 1.0
    assert (np.abs(slope - reference.activate_derivative(x, activation)) < bound * steep).all()
    np.testing.assert_array_equal(activate(jnp.asarray(x, jnp.float32), activation), value)


def test_what_is_left_takes_two_pieces():
    """220 rows as 144 + 80, on a chip with matmuls so short that this takes less time than 288."""
    rows = nasty.Rows(experts=2, rows_per_run=288, width=8, hidden=16)
    tiles, target = tiles_of(rows, 288, pieces(288), 16), Target("TPU v5 lite", interpret=True)
    assert covers(tiles.rows.pieces, target.facts.depth)[220 // 16 + 1] == 0b110
    given = nasty.matmul_operands(rows)
    for size in ((220, 145), (288, 1)):
        check(rows, given, size, matmul(rows, tiles, target, None, given, np.array(size)))


def test_a_bias_alone():
    rows, tiles = CASES["one piece"]
    given, size = nasty.matmul_operands(rows, epilogue="pointwise"), (3, 0, 16, 1, 8, 9, 15, 2)
    check(rows, given, size, matmul(rows, tiles, TARGET, None, given, np.array(size)))


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("name", ["one piece", "packed, one piece an item"])
def test_every_pattern_of_empty_experts(name, epilogue):
    rows, tiles = CASES[name]
    given, activation = nasty.matmul_operands(rows, epilogue=epilogue), EPILOGUES[epilogue]
    for size in nasty.empty_patterns(rows):
        for gradient in jax.tree.map(
            np.asarray, jax.tree.leaves(matmul(rows, tiles, TARGET, activation, given, size)[2])
        ):
            assert (gradient[size == 0] == 0).all() and np.isfinite(gradient).all()
    for size in nasty.empty_patterns(rows)[::37]:
        check(rows, given, size, matmul(rows, tiles, TARGET, activation, given, size), activation)


@pytest.mark.parametrize("bad", nasty.POISONS)
@pytest.mark.parametrize(("name", "size"), [(name, size) for name, size, keep in POISONED if not keep])
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_what_is_not_an_experts_own_never_reaches_it(epilogue, name, size, bad):
    rows, tiles = CASES[name]
    given, used = nasty.matmul_operands(rows, epilogue=epilogue), rows.used(np.array(size))
    x, weights, dout = given
    run = functools.partial(matmul, rows, tiles, TARGET, EPILOGUES[epilogue])
    clean = run(given, np.array(size))
    unused = ~used[:, None]
    spoilt = run((jnp.where(unused, bad, x), weights, jnp.where(unused, bad, dout)), np.array(size))
    for mine, theirs in zip(clean[:2], spoilt[:2], strict=True):
        np.testing.assert_array_equal(np.asarray(theirs)[used], np.asarray(mine)[used])
    jax.tree.map(np.testing.assert_array_equal, spoilt[2], clean[2])

    # An expert with a broken row and broken weights.
    broken, runs = 3, rows.runs(np.array(size))
    own = np.zeros(rows.num_rows, bool)
    own[int(runs.first[broken]) :][: size[broken]] = True
    row = int(runs.first[broken]) + 2
    worse = run((x.at[row].set(bad), jax.tree.map(lambda w: w.at[broken].set(bad), weights), dout), np.array(size))
    for mine, theirs in zip(clean[:2], worse[:2], strict=True):
        np.testing.assert_array_equal(np.asarray(theirs)[used & ~own], np.asarray(mine)[used & ~own])
    assert not np.isfinite(worse[0][row]).all() and not np.isfinite(worse[2].weight[broken]).all()
    others = np.arange(rows.experts) != broken
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[others], b[others]), worse[2], clean[2])


def test_without_rows():
    rows = nasty.EMPTY
    for epilogue, activation in EPILOGUES.items():
        x, weights, dout = nasty.matmul_operands(rows, epilogue=epilogue)
        static, runs = MatmulStatic(rows.layout, activation), rows.runs(np.zeros(rows.experts, np.int32))
        out, saved = grouped_matmul_forward(TARGET, static, x, weights, runs)
        drows, dweights = grouped_matmul_backward(TARGET, static, saved, dout)
        assert out.shape == (0, rows.hidden) and drows.shape == (0, rows.width)
        assert jax.tree.map(jnp.shape, dweights) == jax.tree.map(jnp.shape, weights)
        assert not any(leaf.any() for leaf in jax.tree.leaves(dweights))


def test_a_published_width():
    """2880 = 22.5 x 128 on both sides, with the block sizes that are chosen for it; two experts with few rows."""
    rows = nasty.Rows(experts=2, rows_per_run=16, width=2880, hidden=2880)
    given, size = nasty.matmul_operands(rows, dtype="bfloat16", weight_dtype="bfloat16"), (15, 3)
    sizes = (rows.layout, rows.width, rows.hidden, 2, 2, TARGET.facts)
    there, back = matmul_forward_tiles(Sizes(*sizes)), matmul_backward_tiles(Sizes(*sizes))
    assert there.chunk % 128 == 0 and there.padded > rows.hidden and there.chunk == back.chunk
    check(rows, given, size, matmul(rows, back, TARGET, None, given, np.array(size)))


def test_block_sizes_that_a_call_brings_along_give_the_same_values(monkeypatch):
    rows, size = nasty.Rows(experts=4, rows_per_run=24, width=128, hidden=256), (23, 0, 7, 24)
    (x, weights, dout), runs, static = nasty.matmul_operands(rows), rows.runs(size), MatmulStatic(rows.layout)
    tiles = GivenTiles(tiles_of(rows, 16, (16,), 128), tiles_of(rows, 32, (32, 16), 128))
    problem = Problem("grouped_matmul", "cpu", "float32", x.shape, 4, rows.hidden, rows.layout, tiles=tiles)
    for module, name in ((forward, "matmul_forward_tiles"), (backward, "matmul_backward_tiles")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("chosen, although given"))

    @jax.jit
    def both(x, weights, dout):
        run = functools.partial(apply, choose(problem, "tpu"), static)
        out, pull = jax.vjp(lambda *operands: run(operands, (runs,)), x, weights)
        return out, *pull(dout)

    assert "grid=(1, 8, 2)" in str(jax.make_jaxpr(both)(x, weights, dout))
    check(rows, (x, weights, dout), size, both(x, weights, dout))
