"""The fused expert MLP of the TPU back end, interpreted, against the reference and the table of nasty cases."""

import functools

import jax
import jax.numpy as jnp
import nasty_cases as nasty
import numpy as np
import pytest
from moe_cases import SAME_BITS

from moe_kernels.backends import choose
from moe_kernels.backends.base import MlpStatic, Problem, apply
from moe_kernels.backends.tpu.common.launch import Target
from moe_kernels.backends.tpu.common.tiling import GivenTiles, RowCuts, Sizes, Tiles
from moe_kernels.backends.tpu.mlp import backward, forward
from moe_kernels.backends.tpu.mlp.backward import expert_mlp_backward, run_backward
from moe_kernels.backends.tpu.mlp.forward import expert_mlp_forward, run_forward
from moe_kernels.backends.tpu.mlp.tiles import mlp_backward_tiles

TARGET = Target("TPU v6 lite", interpret=True)
# Small enough that every case has several pieces, and most of them several items and chunks.


def tiles_of(rows: nasty.Rows, held: int, pieces: tuple[int, ...], chunk: int, padded: int = 0) -> Tiles:
    copied = min(held, rows.layout.rows_per_expert or rows.num_rows)
    return Tiles(RowCuts(held, copied, pieces), chunk, padded or rows.hidden, vmem=0)


# A whole expert as one item of one piece, and of several; several items with one chunk of F, and with several.
CASES = {
    "one row": (nasty.TINY, tiles_of(nasty.TINY, 16, (16,), 1)),
    "one piece": (nasty.PATTERNS_BLOCK, tiles_of(nasty.PATTERNS_BLOCK, 16, (16,), 16)),
    "several pieces": (nasty.TILES_BLOCK, tiles_of(nasty.TILES_BLOCK, 144, (48, 32, 16), 16)),
    "packed, one chunk": (nasty.TILES_PACKED, tiles_of(nasty.TILES_PACKED, 128, (64, 32, 16), 16)),
    "packed, one piece an item": (nasty.PATTERNS_PACKED, tiles_of(nasty.PATTERNS_PACKED, 16, (16,), 16)),
    "odd widths": (nasty.ODD_BLOCK, tiles_of(nasty.ODD_BLOCK, 32, (32, 16), 128, 384)),
    "several chunks, several items": (nasty.ODD_PACKED, tiles_of(nasty.ODD_PACKED, 32, (16,), 128, 384)),
    "half a lane's width": (nasty.HALF_BLOCK, tiles_of(nasty.HALF_BLOCK, 16, (16,), 320)),
    "several runs": (nasty.SEVERAL_RUNS, tiles_of(nasty.SEVERAL_RUNS, 32, (32, 16), 32)),
}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), static_argnames="keep")
def mlp(rows, tiles, target, activation, given, size, keep=False):
    """Output and gradients, with the hidden layer computed again or kept."""
    static, runs = MlpStatic(rows.layout, activation), rows.runs(size)
    out, hidden = run_forward(tiles, target, static, given.rows, given.weights, runs, keep=keep)
    assert (hidden is not None) == keep
    return out, *run_backward(tiles, target, static, given.rows, given.weights, runs, given.dout, hidden)


def cases(names=None, dtypes=nasty.DTYPES):
    for name, (rows, tiles) in CASES.items():
        if names is None or name in names:
            yield from (pytest.param(rows, tiles, *dtype, id=f"{name}, {'/'.join(dtype)}") for dtype in dtypes)


def check_case(rows, tiles, dtype, weight_dtype, activation="gelu_tanh", target=TARGET, keep=False) -> None:
    given = nasty.operands(rows, dtype=dtype, weight_dtype=weight_dtype)
    for size in nasty.SIZES[rows]:
        found = mlp(rows, tiles, target, activation, given, np.array(size, np.int32), keep=keep)
        nasty.check_mlp(rows, given, size, found, activation)


@pytest.mark.parametrize(
    ("rows", "tiles", "dtype", "weight_dtype"),
    [
        *cases(["several pieces", "several chunks, several items"], [("float32", "float32")]),
        *cases(["packed, one chunk", "odd widths"], [("bfloat16", "float32")]),
        *cases(["one row", "half a lane's width", "several runs"], [("bfloat16", "bfloat16")]),
    ],
)
def test_values_and_gradients(rows, tiles, dtype, weight_dtype):
    check_case(rows, tiles, dtype, weight_dtype)


@pytest.mark.parametrize(
    ("rows", "tiles", "dtype", "weight_dtype"),
    [
        *cases(["several chunks, several items"], [("float32", "float32")]),
        *cases(["several pieces"], [("bfloat16", "float32")]),
        *cases(["several runs"], [("bfloat16", "bfloat16")]),
    ],
)
def test_a_kept_hidden_layer(rows, tiles, dtype, weight_dtype):
    check_case(rows, tiles, dtype, weight_dtype, keep=True)


@pytest.mark.full
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu_erf"])
@pytest.mark.parametrize(("rows", "tiles", "dtype", "weight_dtype"), [*cases()])
def test_values_and_gradients_of_all(rows, tiles, dtype, weight_dtype, activation, keep):
    check_case(rows, tiles, dtype, weight_dtype, activation, keep=keep)


@pytest.mark.parametrize("name", ["one piece", "packed, one piece an item"])
def test_every_pattern_of_empty_experts(name):
    rows, tiles = CASES[name]
    given = nasty.operands(rows)
    for size in nasty.empty_patterns(rows):
        found = mlp(rows, tiles, TARGET, "gelu_tanh", given, size)
        for gradient in found[2]:
            empty = np.asarray(gradient)[size == 0]
            assert (empty == 0).all() and np.isfinite(gradient).all()
    for size in nasty.empty_patterns(rows)[::37]:
        nasty.check_mlp(rows, given, size, mlp(rows, tiles, TARGET, "gelu_tanh", given, size))


def test_a_published_width():
    """F 2880 = 22.5 x 128, with the block sizes that are chosen for it; two experts with few rows."""
    rows = nasty.Rows(experts=2, rows_per_run=16, width=320, hidden=2880)
    given, size = nasty.operands(rows, dtype="bfloat16", weight_dtype="bfloat16"), (15, 3)
    tiles = mlp_backward_tiles(Sizes(rows.layout, rows.width, rows.hidden, 2, 2, TARGET.facts))
    assert tiles.num_chunks > 1 and tiles.padded > rows.hidden
    nasty.check_mlp(rows, given, size, mlp(rows, tiles, TARGET, "gelu_tanh", given, np.array(size)))


def test_the_exact_gelu():
    check_case(*CASES["one piece"], "float32", "float32", "gelu_erf")
    rows, tiles = CASES["one piece"]
    given, size = nasty.operands(rows), (3, 0, 16, 1, 8, 9, 15, 2)
    exact = mlp(rows, tiles, TARGET, "gelu_erf", given, np.array(size))
    nasty.check_mlp(rows, given, size, exact, "gelu_erf")
    assert not np.array_equal(exact[0], mlp(rows, tiles, TARGET, "gelu_tanh", given, np.array(size))[0])


def spoil(given, used, bad):
    """The operands with `bad` in every row that belongs to no run."""
    unused = jnp.asarray(~used)[:, None]
    return given._replace(rows=jnp.where(unused, bad, given.rows), dout=jnp.where(unused, bad, given.dout))


POISONED = [
    ("one piece", (3, 0, 15, 16, 1, 7, 8, 9), False),
    ("packed, one piece an item", (3, 0, 15, 17, 1, 7, 8, 9), False),
    ("packed, one piece an item", (3, 0, 15, 17, 1, 7, 8, 9), True),
]


@pytest.mark.parametrize("bad", nasty.POISONS)
@pytest.mark.parametrize(("name", "size", "keep"), POISONED)
def test_what_is_not_an_experts_own_never_reaches_it(name, size, keep, bad):
    check_containment(name, size, bad, keep=keep)


def check_containment(name, size, bad, *, keep=False, gated=False) -> None:
    rows, tiles = CASES[name]
    given, used = nasty.operands(rows, gated=gated), rows.used(np.array(size))
    run = functools.partial(mlp, rows, tiles, TARGET, "gelu_tanh", keep=keep)
    clean, spoilt = (run(g, np.array(size)) for g in (given, spoil(given, used, bad)))
    for mine, theirs in zip(clean[:2], spoilt[:2], strict=True):
        np.testing.assert_array_equal(np.asarray(theirs)[used], np.asarray(mine)[used])
    jax.tree.map(np.testing.assert_array_equal, spoilt[2], clean[2])

    # A broken row, and an expert with broken weights.
    runs = rows.runs(np.array(size))
    broken, row = 3, int(runs.first[3]) + 2
    other_rows = used & (np.arange(rows.num_rows) != row)
    others = np.arange(rows.experts) != broken
    worse = run(given._replace(rows=given.rows.at[row].set(bad), dout=given.dout.at[row].set(bad)), np.array(size))
    for mine, theirs in zip(clean[:2], worse[:2], strict=True):
        np.testing.assert_array_equal(np.asarray(theirs)[other_rows], np.asarray(mine)[other_rows])
    assert not np.isfinite(worse[2][0][broken]).all()
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[others], b[others]), worse[2], clean[2])
    own = np.zeros(rows.num_rows, bool)
    own[int(runs.first[broken]) :][: size[broken]] = True
    for field in [name for name, weight in given.weights._asdict().items() if weight is not None]:
        weights = given.weights._replace(**{field: getattr(given.weights, field).at[broken].set(bad)})
        worse = run(given._replace(weights=weights), np.array(size))
        np.testing.assert_array_equal(np.asarray(worse[0])[used & ~own], np.asarray(clean[0])[used & ~own])
        np.testing.assert_array_equal(np.asarray(worse[1])[used & ~own], np.asarray(clean[1])[used & ~own])
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[others], b[others]), worse[2], clean[2])


def test_the_same_input_twice_gives_the_same_bits_and_vmap_is_one_after_the_other():
    rows, tiles = CASES["packed, one piece an item"]
    sizes = nasty.empty_patterns(rows)[[255, 77]]
    given = [nasty.operands(rows, seed=seed) for seed in (0, 1)]
    alone = functools.partial(mlp.__wrapped__, rows, tiles, TARGET, "gelu_tanh")
    run = jax.jit(alone, compiler_options=SAME_BITS)
    one_by_one = [run(*arguments) for arguments in zip(given, sizes, strict=True)]
    jax.tree.map(np.testing.assert_array_equal, run(given[0], sizes[0]), one_by_one[0])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *given)
    together = jax.jit(jax.vmap(alone), compiler_options=SAME_BITS)(stacked, sizes)
    for n, one in enumerate(one_by_one):
        used = rows.used(sizes[n])
        for mine, theirs in zip(one[:2], together[:2], strict=True):
            np.testing.assert_array_equal(np.asarray(theirs)[n][used], np.asarray(mine)[used])
        jax.tree.map(lambda a, b, n=n: np.testing.assert_array_equal(b[n], a), one[2], together[2])


def test_the_shortest_piece_that_fills_the_mxu_holds_all_rows():
    """144 rows cost the matmuls over rows 256 of a depth of 128; an expert with at most 128 of them leaves out 16."""
    rows = nasty.Rows(experts=3, rows_per_run=144, width=8, hidden=16)
    tiles, target = tiles_of(rows, 144, (144, 16), 16), Target("TPU v5 lite", interpret=True)
    given = nasty.operands(rows)
    for size in [(129, 128, 0), (144, 1, 127)]:
        nasty.check_mlp(rows, given, size, mlp(rows, tiles, target, "gelu_tanh", given, np.array(size, np.int32)))


def test_as_many_shorter_pieces_hold_all_rows():
    """Two pieces of 144 rows, or of 128 where those are enough: forward, nothing is contracted over rows."""
    rows = nasty.Rows(experts=4, rows_per_run=288, width=8, hidden=16)
    tiles, target = tiles_of(rows, 288, (144, 80, 48, 32, 16), 8), Target("TPU v5 lite", interpret=True)
    given = nasty.operands(rows)
    for size in [(256, 257, 224, 225), (288, 145, 0, 1)]:
        nasty.check_mlp(rows, given, size, mlp(rows, tiles, target, "gelu_tanh", given, np.array(size, np.int32)))


@pytest.mark.parametrize(("chip", "kept"), [("TPU v5 lite", True), ("TPU v6 lite", False)])
def test_the_roofline_decides_what_a_chip_keeps(chip, kept):
    """And nothing is kept where no gradient is wanted; passes may have other chunks of F."""
    rows = nasty.Rows(experts=2, rows_per_run=520, width=512, hidden=512)
    given, size = nasty.operands(rows, dtype="bfloat16", weight_dtype="bfloat16"), np.array((519, 8), np.int32)
    target, static = Target(chip, interpret=True), MlpStatic(rows.layout, "gelu_tanh")

    @jax.jit
    def both(given, size):
        out, saved = expert_mlp_forward(target, static, given.rows, given.weights, rows.runs(size))
        return out, *expert_mlp_backward(target, static, saved, given.dout)

    saved = jax.eval_shape(
        lambda given: expert_mlp_forward(target, static, given.rows, given.weights, rows.runs(size))[1], given
    )
    assert (saved.hidden is not None) == kept
    nasty.check_mlp(rows, given, size, both(given, size))


def test_without_rows_and_without_biases():
    rows = nasty.EMPTY
    given = nasty.operands(rows)
    weights = given.weights._replace(b1=None, b2=None)
    static = MlpStatic(rows.layout, "gelu_tanh")
    runs = rows.runs(np.zeros(rows.experts, np.int32))
    out, saved = expert_mlp_forward(TARGET, static, given.rows, weights, runs)
    drows, dweights = expert_mlp_backward(TARGET, static, saved, given.dout)
    assert out.shape == drows.shape == (0, rows.width)
    assert dweights.b1 is None and dweights.b2 is None and not dweights.w1.any() and not dweights.w2.any()


def test_block_sizes_that_a_call_brings_along_give_the_same_values(monkeypatch):
    rows, size = nasty.Rows(experts=4, rows_per_run=24, width=128, hidden=256), (23, 0, 7, 24)
    given, runs, static = nasty.operands(rows), rows.runs(size), MlpStatic(rows.layout, "gelu_tanh")
    tiles = GivenTiles(tiles_of(rows, 16, (16,), 128), tiles_of(rows, 32, (32, 16), 128))
    problem = Problem("expert_mlp", "cpu", "float32", given.rows.shape, 4, rows.hidden, rows.layout, tiles=tiles)
    for module, name in ((forward, "mlp_forward_tiles"), (backward, "mlp_backward_tiles")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("chosen, although given"))

    @jax.jit
    def both(given):
        run = functools.partial(apply, choose(problem, "tpu"), static)
        out, pull = jax.vjp(lambda *operands: run(operands, (runs,)), given.rows, given.weights)
        return out, *pull(given.dout)

    assert "grid=(1, 8, 2)" in str(jax.make_jaxpr(both)(given))
    nasty.check_mlp(rows, given, size, both(given))
