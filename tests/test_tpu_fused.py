"""Dispatch, experts and combine as one TPU kernel, interpreted, against the reference and the nasty cases."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_cases import PATTERNS, Shape, assert_close, gates, magnitudes, plan_of, weights
from nasty_cases import POISONS
from test_tpu_races import simulate

import reference
from moe_kernels import MlpWeights, combine, dispatch, expert_mlp
from moe_kernels.backends import explain
from moe_kernels.backends.base import MlpStatic, Problem
from moe_kernels.backends.tpu.common.launch import Target
from moe_kernels.backends.tpu.common.tiling import RowCuts, Sizes, Tiles
from moe_kernels.backends.tpu.fused import span as in_layer
from moe_kernels.backends.tpu.fused.forward import run_fused
from moe_kernels.backends.tpu.fused.in_place import LayerOperands
from moe_kernels.backends.tpu.fused.span import LayerSaved, layer_backward, layer_forward, layer_value, run_backward
from moe_kernels.backends.tpu.fused.tiles import FusedTiles, fused_backward_tiles, fused_tiles
from moe_kernels.chips import TPUS
from moe_kernels.types import Layout

TARGET = Target("TPU v6 lite", interpret=True)


def tiles_of(
    rows: int, pieces: tuple[int, ...], chunk: int, hidden: int, load: int, tokens: int, planes: int
) -> FusedTiles:
    steps = rows // pieces[0] * (hidden // chunk)
    mlp = Tiles(RowCuts(rows, rows, pieces), chunk, hidden, vmem=0)
    return FusedTiles(mlp, load, -(-tokens // load), planes, -(-rows // steps // 16) * 16)


# One row; dropped tokens in several groups; an expert of three pieces and two chunks, tokens one off a block of 32;
# one chunk and two pieces; eight experts, of which any may be empty. float32 words are twice as many.
CASES = {
    "one row": (Shape(1, 1, 256, 8, 1, 1, 1.0), (16, 16, 8, 16)),
    "groups": (Shape(48, 4, 256, 32, 8, 1, 0.5), (16, 16, 32, 48)),
    "pieces and chunks": (Shape(97, 1, 512, 256, 3, 1, 1.05), (48, 16, 128, 32)),
    "pieces": (Shape(63, 1, 256, 16, 2, 1, 1.0), (32, 16, 16, 32)),
    "chunks": (Shape(40, 2, 256, 384, 8, 1, 1.05), (16, 16, 128, 16)),
    # More rows than fill an MXU of 128.
    "long pieces": (Shape(576, 1, 256, 16, 2, 1, 1.0), (288, 144, 2, 192)),
}
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8}


def tiles_for(name: str, dtype: str) -> tuple[FusedTiles, FusedTiles]:
    """Those of the forward and of the backward pass, which takes what is left of a piece in shorter ones."""
    shape, (rows, piece, chunk, load) = CASES[name]
    planes = shape.width // (256 if dtype == "bfloat16" else 128)
    back = {(48, 16): (32, 16)}.get((rows, piece), (piece,))
    return tuple(tiles_of(rows, p, chunk, shape.hidden, load, shape.tokens, planes) for p in ((piece,), back))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def layer(tiles, target, activation, plan, tokens, gate, w, dy):
    """Output, output before gates, and all gradients; backward in its parts where no blocks are given for it."""
    static, (forward, backward) = MlpStatic(plan.layout, activation), tiles
    kept = {"keep": True, "keep_rows": backward is None}
    given = LayerOperands(tokens, gate, w, plan)
    out, ungated, rows = run_fused(forward, target, static, given, **kept)
    return out, ungated, *run_backward(backward, target, static, LayerSaved(given, ungated, rows), dy)


def operands(name, dtype, weight_dtype="float32", pattern="uniform", seed=0):
    shape = CASES[name][0]
    rng = np.random.default_rng(seed)
    expert, gate = gates(shape, seed, pattern)
    tokens, dy = (jnp.asarray(values, dtype) for values in rng.normal(size=(2, shape.tokens, shape.width)))
    w = MlpWeights(*(jnp.asarray(array, weight_dtype) for array in weights(shape, rng)))
    return expert, tokens, jnp.asarray(gate), w, dy


def run(name, dtype, expert, tokens, gate, w, dy, activation="gelu_tanh", target=TARGET, function=layer):
    plan = plan_of(CASES[name][0], expert, gate, None)
    return plan, function(tiles_for(name, dtype), target, activation, plan, tokens, gate, w, dy)


def check(name, dtype, given, found, activation="gelu_tanh"):
    shape = CASES[name][0]
    expert, tokens, gate, w, dy = given
    out, ungated, dtokens, dgate, dw = found
    twin = reference.make_plan(
        expert, gate, num_experts=shape.experts, num_groups=shape.groups, capacity=shape.capacity, priority="arrival"
    )
    tokens, dy, gate = (np.asarray(array, np.float64) for array in (tokens, dy, gate))
    w64 = reference.MlpWeights(*(np.asarray(x, np.float64) for x in w))
    rows = reference.dispatch(tokens, twin)
    results = reference.expert_mlp(rows, w64, twin, activation)
    back = reference.combine_gradient(results, gate, dy, twin)
    experts = reference.expert_mlp_gradient(rows, w64, back.rows, twin, activation)
    behind = magnitudes(tokens, dy, expert, gate, twin.position >= 0, w)
    # In bfloat16 the hidden layer, results and gradients are rounded on their way, sums are not.
    length = shape.width + shape.hidden + shape.tokens if dtype == "float32" else 1
    close = functools.partial(assert_close, eps=EPS[dtype], length=length, roundings=2)
    close(out, reference.combine(results, gate, twin), name="out", scale=behind.y)
    ones = np.ones_like(gate)
    alone = magnitudes(tokens, dy, expert, ones, twin.position >= 0, w)
    close(ungated, reference.combine(results, ones, twin), name="ungated", scale=alone.y)
    close(dtokens, reference.dispatch_gradient(experts.rows, twin), name="dtokens", scale=behind.tokens)
    size = np.sum(np.abs(dy) * alone.y, axis=1)
    close(dgate, back.gate, name="dgate", scale=size)
    for field, mine, theirs, size in zip(w._fields, dw, experts.weights, behind.weights, strict=True):
        mine, theirs, size = (np.asarray(x, np.float64).reshape(shape.experts, -1) for x in (mine, theirs, size))
        close(mine, theirs, name=f"d{field}", scale=size)


@pytest.mark.parametrize(
    ("name", "dtype", "weight_dtype"),
    [
        ("one row", "bfloat16", "bfloat16"),
        ("groups", "bfloat16", "float32"),
        ("pieces and chunks", "float32", "float32"),
    ],
)
def test_values_and_gradients(name, dtype, weight_dtype):
    for pattern in PATTERNS:
        given = operands(name, dtype, weight_dtype, pattern)
        check(name, dtype, given, run(name, dtype, *given)[1])


def test_shorter_pieces_that_fill_the_mxu_hold_all_rows():
    """The other expert has more tokens than places."""
    name, target = "long pieces", Target("TPU v5 lite", interpret=True)
    expert, tokens, gate, w, dy = operands(name, "bfloat16")
    for count in (256, 257):
        given = (np.arange(len(expert)) >= count)[:, None].astype(np.int32), tokens, gate, w, dy
        plan, found = run(name, "bfloat16", *given, target=target)
        assert int(plan.runs.size[0]) == count < int(plan.runs.size[1])
        check(name, "bfloat16", given, found)


def test_every_pattern_of_empty_experts():
    """The experts of a pattern share the tokens: neighbours without rows, full ones, all tokens to one."""
    expert, tokens, gate, w, dy = operands("groups", "bfloat16")
    experts = w.w1.shape[0]
    for pattern in range(1, 2**experts):
        used = np.flatnonzero([pattern >> n & 1 for n in range(experts)])
        given = used[np.arange(len(expert)) % len(used)][:, None].astype(np.int32), tokens, gate, w, dy
        plan, found = run("groups", "bfloat16", *given)
        empty = np.asarray(plan.runs.size) == 0
        assert empty.sum() == experts - len(used)
        for gradient in found[4]:
            assert (np.asarray(gradient)[empty] == 0).all() and np.isfinite(gradient).all()
        lost = np.asarray(plan.row[:, 0]) == plan.layout.num_rows
        assert not np.asarray(found[0])[lost].any()
        if pattern % 37 == 0:
            check("groups", "bfloat16", given, found)


def test_nobody_has_a_row():
    expert, tokens, gate, w, dy = operands("groups", "bfloat16")
    plan, (out, ungated, *gradients) = run("groups", "bfloat16", expert, tokens, 0 * gate, w, dy)
    assert not np.asarray(plan.runs.size).any() and not np.asarray(out).any() and not np.asarray(ungated).any()
    assert not any(np.asarray(gradient).any() for gradient in jax.tree.leaves(gradients))


@pytest.mark.parametrize("poison", POISONS)
def test_what_is_not_finite_stays_where_it_belongs(poison):
    expert, tokens, gate, w, dy = operands("groups", "bfloat16", pattern="zipf")
    plan, clean = run("groups", "bfloat16", expert, tokens, gate, w, dy)
    row = np.asarray(plan.row[:, 0])
    lost = np.flatnonzero(row == plan.layout.num_rows)
    kept = np.flatnonzero(row < plan.layout.num_rows)
    broken = kept[1]
    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)

    # In a token without a row and in its gradient: nothing changes.
    spoilt = run("groups", "bfloat16", expert, tokens.at[lost].set(poison), gate, w, dy.at[lost].set(poison))[1]
    same(spoilt, clean)

    # In a token with a row: its own output and gradient, and the gradients of its expert's weights.
    spoilt = run("groups", "bfloat16", expert, tokens.at[broken].set(poison), gate, w, dy.at[broken].set(poison))[1]
    others, other_experts = (np.arange(n) != own for n, own in ((48, broken), (8, expert[broken, 0])))
    assert not np.isfinite(np.asarray(spoilt[0], np.float32)[broken]).any()
    for mine, theirs in zip(clean[:4], spoilt[:4], strict=True):
        np.testing.assert_array_equal(np.asarray(theirs)[others], np.asarray(mine)[others])
    assert not np.isfinite(spoilt[4].w1[~other_experts]).all()
    same([a[other_experts] for a in spoilt[4]], [a[other_experts] for a in clean[4]])

    # In the weights of an expert: the tokens that it has.
    others = (expert[:, 0] != expert[broken, 0]) | (row == plan.layout.num_rows)
    for field in w._fields:
        worse = w._replace(**{field: getattr(w, field).at[expert[broken, 0]].set(poison)})
        spoilt = run("groups", "bfloat16", expert, tokens, gate, worse, dy)[1]
        for mine, theirs in zip(clean[:4], spoilt[:4], strict=True):
            np.testing.assert_array_equal(np.asarray(theirs)[others], np.asarray(mine)[others])
        same([a[other_experts] for a in spoilt[4]], [a[other_experts] for a in clean[4]])

    # A gate that is not finite, put in behind the plan's back: its own token, with a row or without.
    for token in (lost[0], broken):
        own = layer(
            tiles_for("groups", "bfloat16"), TARGET, "gelu_tanh", plan, tokens, gate.at[token].set(poison), w, dy
        )
        assert np.isnan(np.asarray(own[0], np.float32)[token]).all()
        np.testing.assert_array_equal(np.delete(own[0], token, axis=0), np.delete(clean[0], token, axis=0))
        np.testing.assert_array_equal(own[3], clean[3])


def test_what_separate_kernels_give_bit_for_bit():
    """The same roundings in the same places; the value alone is that of the forward pass."""
    expert, tokens, gate, w, _dy = operands("one row", "bfloat16")
    plan = plan_of(CASES["one row"][0], expert, gate, None)
    static = MlpStatic(plan.layout, "gelu_tanh")

    def all_three(tokens, gate, w, plan):
        out, saved = layer_forward(TARGET, static, tokens, gate, w, plan)
        rows = dispatch(tokens, plan, backend="tpu")
        rows = expert_mlp(rows, w, plan, backend="tpu")
        return (
            out,
            saved.ungated,
            layer_value(TARGET, static, tokens, gate, w, plan),
            combine(rows, gate, plan, backend="tpu"),
        )

    out, ungated, value, separate = jax.jit(all_three)(tokens, gate, w, plan)
    np.testing.assert_array_equal(value, out)
    np.testing.assert_array_equal(value, separate)
    assert ungated.any()


def check_races(name, mode, seed):
    expert, tokens, gate, w, dy = operands(name, "bfloat16", pattern="zipf", seed=seed)
    plan = plan_of(CASES[name][0], expert, gate, None)
    (tiles, back), static = tiles_for(name, "bfloat16"), MlpStatic(plan.layout, "gelu_tanh")
    right = run(name, "bfloat16", expert, tokens, gate, w, dy)[1]

    def forward(target, given, size):
        return run_fused(tiles, target, static, LayerOperands(*given), keep=True)[:2]

    used = np.asarray(plan.source) < plan.layout.num_tokens
    rows = tokens[plan.source[used]]

    def with_rows(target, given, size):
        out, ungated, rows = run_fused(tiles, target, static, LayerOperands(*given), keep=True, keep_rows=True)
        return out, ungated, rows[used]

    def backward(target, given, size):
        *operands, ungated, dy = given
        return tuple(run_backward(back, target, static, LayerSaved(LayerOperands(*operands), ungated), dy))

    for kernel, given, expected in (
        (forward, (tokens, gate, w, plan), right[:2]),
        (with_rows, (tokens, gate, w, plan), (*right[:2], rows)),
        (backward, (tokens, gate, w, plan, right[1], dy), right[2:]),
    ):
        found, races = simulate(kernel, given, (), mode=mode, seed=seed)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert not races


def test_no_races_and_no_uninitialised_memory():
    """The kernels copy nothing by hand, so one order of copies stands for all of them here."""
    check_races("groups", "on_wait", 0)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", ["eager", "on_wait"])
@pytest.mark.parametrize("name", ["groups", "pieces and chunks", "chunks"])
def test_no_races_whatever_the_order(name, mode, seed):
    check_races(name, mode, seed)


def problem(chip="TPU v6 lite", width=768, **facts):
    block = {"num_tokens": 16384, "num_choices": 1, "num_rows": 32 * 544, "rows_per_expert": 544, "runs_per_expert": 1}
    layout = Layout(num_groups=1, num_experts=32, **(block | facts))
    shape = (layout.num_tokens, width)
    return Problem(
        "dispatch_mlp_combine", "tpu", "bfloat16", shape, 32, expert_width=4 * width, layout=layout, chip=chip
    )


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (problem(), "chosen"),
        (problem("TPU7x"), "chosen"),
        (problem(num_tokens=0), "there are no tokens"),
        (problem(num_choices=2), "2 choices of a token are added up"),
        (problem(rows_per_expert=None), "rows are packed"),
        (problem(num_rows=32 * 576, rows_per_expert=576, runs_per_expert=8), "8 runs from other shards"),
        (problem(num_rows=32 * 2312, rows_per_expert=2312), "at most 2304 are held at once"),
        (problem(width=640 - 8), "no multiple of 512"),
        (problem("TPU v4"), "does not fit the 16 MiB of VMEM"),
        (problem("TPU7x", 1280), "does not fit the 64 MiB"),
        (dataclasses.replace(problem(), num_cores=2), "one TensorCore, the device has 2"),
    ],
)
def test_what_is_taken_and_why_not(given, reason):
    assert reason in explain(given).splitlines()[0]


@pytest.mark.parametrize("name", [pytest.param("one row", marks=pytest.mark.full), "groups"])
def test_the_backward_pass_in_its_parts_gives_the_same_bits(name):
    """The same roundings in the same places, where experts are one piece; only gates' gradients are summed elsewise."""
    expert, tokens, gate, w, dy = operands(name, "bfloat16", pattern="zipf")
    plan, (out, ungated, dtokens, dgate, dw) = run(name, "bfloat16", expert, tokens, gate, w, dy)
    tiles = tiles_for(name, "bfloat16")[0], None
    parts = layer(tiles, TARGET, "gelu_tanh", plan, tokens, gate, w, dy)
    np.testing.assert_array_equal(parts[0], out)
    np.testing.assert_array_equal(parts[2], dtokens)
    jax.tree.map(np.testing.assert_array_equal, parts[4], dw)
    terms = np.asarray(ungated, np.float64) * np.asarray(dy, np.float64)
    scale = np.abs(terms).sum(axis=1, keepdims=True)
    assert_close(parts[3], dgate, name="dgate", length=terms.shape[1], scale=scale, eps=EPS["float32"])


@pytest.mark.parametrize("fits", [True, False])
def test_a_backward_pass_in_parts_gets_the_rows_if_they_fit(fits, monkeypatch):
    expert, tokens, gate, w, dy = operands("groups", "bfloat16", pattern="zipf")
    plan, (out, _, *gradients) = run("groups", "bfloat16", expert, tokens, gate, w, dy)
    monkeypatch.setattr(in_layer, "fused_backward_tiles", lambda *sizes: None)
    monkeypatch.setattr(in_layer, "keeps_rows", lambda *sizes: fits)
    static = MlpStatic(plan.layout, "gelu_tanh")
    found, saved = jax.jit(functools.partial(layer_forward, TARGET, static))(tokens, gate, w, plan)
    assert (saved.rows is not None) == fits
    np.testing.assert_array_equal(found, out)
    dtokens, _, dw = jax.jit(functools.partial(layer_backward, TARGET, static))(saved, dy)
    jax.tree.map(np.testing.assert_array_equal, (dtokens, dw), (gradients[0], gradients[2]))


@pytest.mark.parametrize(
    ("chip", "width", "said"),
    [
        ("TPU v6 lite", 1280, "one kernel forward and one backward"),
        ("TPU v5 lite", 768, "one kernel forward and one backward"),
        (
            "TPU7x",
            768,
            "backward in its parts, since tokens, cotangents and a chunk of weights do not fit the 64 MiB of VMEM",
        ),
    ],
)
def test_what_explain_says_of_both_passes(chip, width, said):
    assert said in explain(problem(chip, width))


@pytest.mark.parametrize("choose", [fused_tiles, fused_backward_tiles])
@pytest.mark.parametrize("rows", [8, 544, 2152])
@pytest.mark.parametrize("width", [256, 768, 1280])
def test_blocks_cover_tokens_rows_and_columns_within_vmem(width, rows, choose):
    for chip, weight_itemsize in itertools.product(TPUS.values(), (2, 4)):
        for expert_width in (128, 257, 2880, 4 * width):
            layout = Layout(4001, 1, 1, 4, 4 * rows, rows)
            tiles = choose(Sizes(layout, width, expert_width, 2, weight_itemsize, chip))
            if tiles is None:
                continue
            assert tiles.mlp.vmem <= chip.vmem and tiles.inputs * tiles.load >= 4001
            assert tiles.moved >= tiles.mlp.rows.rows >= rows and tiles.part % 16 == 0
            assert tiles.mlp.num_chunks * tiles.mlp.chunk == tiles.mlp.padded >= expert_width
            assert tiles.stride % 16 == tiles.held_stride % 16 == 8


@pytest.mark.full
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu_erf"])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_of_all(name, dtypes, activation):
    for seed, pattern in enumerate(PATTERNS):
        given = operands(name, *dtypes, pattern, seed)
        check(name, dtypes[0], given, run(name, dtypes[0], *given, activation)[1], activation)
