"""Block sizes and schedules: arithmetic that needs no kernel."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_kernels.backends import choose, explain
from moe_kernels.backends.base import Problem
from moe_kernels.backends.tpu import TPU
from moe_kernels.backends.tpu.common.schedule import ADDS, PADDING, STARTS, make_schedule
from moe_kernels.backends.tpu.common.tiling import (
    PIECE,
    GivenTiles,
    RowCuts,
    Sizes,
    Tiles,
    computed_rows,
    covers,
    fine_pieces,
    one_item,
    pieces,
)
from moe_kernels.backends.tpu.matmul.tiles import matmul_backward_tiles, matmul_forward_tiles
from moe_kernels.backends.tpu.mlp.tiles import mlp_backward_tiles, mlp_forward_tiles
from moe_kernels.chips import MIB, TPUS
from moe_kernels.fitted import FITTED
from moe_kernels.types import Layout, Runs

CHOICES = [mlp_forward_tiles, mlp_backward_tiles, matmul_forward_tiles, matmul_backward_tiles]
LAYOUTS = [
    Layout(16384, 1, 1, 32, 32 * 544, 544),
    Layout(16384, 1, 1, 32, 16384 + 256, None),
    Layout(65536, 1, 8, 4, 4 * 17280, 17280, 8),
    Layout(1, 1, 1, 1, 8, 8),
]


@given(
    st.sampled_from([pieces, fine_pieces]), st.integers(1, 80).map(lambda n: n * PIECE), st.sampled_from([1, 128, 256])
)
def test_pieces_cover_every_number_of_rows(shapes, largest, depth):
    sizes = shapes(largest)
    assert sizes[0] == largest and all(size % PIECE == 0 for size in sizes) and len(set(sizes)) == len(sizes)
    for n, bits in enumerate(covers(sizes, depth)):
        covered = sum(size for k, size in enumerate(sizes) if bits >> k & 1)
        assert n * PIECE <= covered <= largest
        assert covered or n == 0


@pytest.mark.parametrize("chip", TPUS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("choose_tiles", CHOICES)
def test_blocks_cover_rows_and_columns_within_vmem(choose_tiles, layout, chip):
    for width in (1, 130, 512, 1280, 2880):
        for expert_width in (1, 257, 2880, 4 * width):
            tiles = choose_tiles(Sizes(layout, width, expert_width, 2, 4, TPUS[chip]))
            assert tiles is not None and tiles.vmem <= TPUS[chip].vmem
            assert tiles.num_chunks * tiles.chunk == tiles.padded >= expert_width
            assert tiles.padded <= max(1.07 * expert_width, expert_width + TPUS[chip].depth - 1)
            rows = tiles.rows
            assert rows.rows % PIECE == 0 and rows.copied % 8 == 0
            # Whatever an item's number of rows, its pieces end inside the place that it has in VMEM.
            assert rows.rows >= max(computed_rows(n, rows, TPUS[chip].depth) for n in range(1, rows.rows + 1, 5))
            assert rows.copied <= layout.num_rows and rows.copied <= rows.rows
            if layout.rows_per_expert is not None and one_item(layout, rows):
                assert rows.copied == layout.rows_per_expert


# A third of the usual examples: a program for each takes most of the time.
@settings(max_examples=settings().max_examples // 3)
@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=9),
    st.sampled_from([16, 32, 80]),
    st.sampled_from([1, 2]),
    st.booleans(),
)
def test_items_cover_every_row_once(sizes, tile_rows, num_cores, packed):
    size = np.array(sizes, np.int32)
    aligned = -(-size // 8) * 8
    first = np.cumsum(aligned) - aligned if packed else np.arange(len(size)) * 72
    num_rows = int(aligned.sum()) if packed else 72 * len(size)
    layout = Layout(num_rows, 1, 1, len(size), num_rows, None if packed else 72)
    runs = Runs(jnp.arange(len(size), dtype=jnp.int32), jnp.asarray(first, jnp.int32), jnp.asarray(size))
    # Almost every example has shapes of its own: one program each, not one for every operation.
    found = jax.jit(lambda runs: make_schedule(layout, runs, tile_rows=tile_rows, num_cores=num_cores))(runs)
    schedule = type(found)(*map(np.asarray, found))
    rows = [row for at, count in zip(schedule.first, schedule.size, strict=True) for row in range(at, at + count)]
    assert rows == [row for at, count in zip(first, size, strict=True) for row in range(at, at + count)]
    real = schedule.part != PADDING
    assert (schedule.size[~real] == 0).all() and (schedule.size <= tile_rows).all()
    # Every expert starts once, its other items follow on the same core, and experts ascend.
    assert (schedule.expert[schedule.part == STARTS] == np.arange(len(size))).all()
    core = np.arange(len(real)) // (len(real) // num_cores)
    for expert in range(len(size)):
        mine = np.flatnonzero(real & (schedule.expert == expert))
        assert (schedule.part[mine[1:]] == ADDS).all() and (np.diff(mine) == 1).all() and len({*core[mine]}) == 1
        assert (schedule.offset[mine] == np.arange(len(mine)) * tile_rows).all()
    # Weights are fetched when the expert changes among the items with rows, and at no other item.
    for items in np.split(np.arange(len(real)), num_cores):
        busy = items[schedule.size[items] > 0]
        assert (schedule.fetched[busy] == schedule.expert[busy]).all()
        changes = np.count_nonzero(np.diff(schedule.fetched[items]))
        assert changes == np.count_nonzero(np.diff(schedule.expert[busy]))
        assert (schedule.after[items] == (np.cumsum(schedule.size[items]) > 0)).all()


def useful_rows(sizes: np.ndarray, chip: str) -> float:
    """Useful rows among computed ones of the fused MLP."""
    tiles = mlp_forward_tiles(Sizes(LAYOUTS[1], 768, 3072, 2, 2, TPUS[chip]))
    assert tiles is not None
    total = 0
    for size in sizes:
        whole, tail = divmod(int(size), tiles.rows.rows)
        total += whole * computed_rows(tiles.rows.rows, tiles.rows, TPUS[chip].depth)
        total += computed_rows(tail, tiles.rows, TPUS[chip].depth)
    return sizes.sum() / total


@pytest.mark.parametrize("chip", TPUS)
def test_uneven_experts_without_a_limit_compute_few_rows_in_vain(chip):
    rng = np.random.default_rng(0)
    for share in (1 / np.arange(1, 33), np.ones(32), np.r_[31, np.ones(31)], np.r_[np.ones(8), np.zeros(24)]):
        sizes = rng.multinomial(16384, share / share.sum())
        assert useful_rows(sizes, chip) >= 0.95


def test_the_table_says_who_takes_what():
    layout = LAYOUTS[0]
    problem = Problem("expert_mlp", "cpu", "float32", (17408, 768), 32, expert_width=3072, layout=layout)
    assert explain(problem).startswith("tpu: no, platform cpu is not tpu; named, it runs interpreted\n")
    assert explain(problem).endswith("\nxla: chosen")
    on_tpu = Problem(
        "expert_mlp", "tpu", "bfloat16", (17408, 768), 32, expert_width=3072, layout=layout, chip="TPU v5", num_cores=2
    )
    assert explain(on_tpu).startswith("tpu: chosen, hidden layer kept: 1.074 ms and 107 MB; computed again: ")
    assert explain(on_tpu).endswith("\nxla: also possible")
    # Equal problems get the same span, so that nothing is traced twice.
    assert choose(on_tpu) == choose(on_tpu) and choose(problem, "tpu") == choose(problem, "tpu")
    assert choose(on_tpu).forward.args[0].num_cores == 2 and choose(problem, "tpu").forward.args[0].interpret
    for change, reason in (
        ({"chip": "TPU v3"}, "chip 'TPU v3' is none of"),
        ({"dtype": "float16"}, "dtype float16 is none of"),
        ({"shape": (17408, 200_000), "chip": "TPU v4"}, "does not fit the 16 MiB of VMEM of TPU v4"),
        ({"layout": Layout(12, 1, 1, 1, 12, 12)}, "runs of 12 rows do not start at multiples of 8"),
    ):
        assert reason in explain(Problem(**(vars(on_tpu) | change)))


def test_constants_are_fitted_for_every_chip():
    assert set(FITTED.hidden_copies) == set(FITTED.products_of_a_pair) == set(TPUS)


def test_vmem_is_a_whole_chip():
    assert {chip.vmem for chip in TPUS.values()} == {16 * MIB, 64 * MIB, 128 * MIB}


@pytest.mark.parametrize(
    ("span", "chip", "width"),
    [("expert_mlp", "v4", 3072), ("grouped_matmul", "v4", 6144), ("dispatch_mlp_combine", "7x", 1280)],
)
def test_bfloat16_weights_are_not_refused_for_float32s_vmem(span, chip, width):
    problem = Problem(
        span, "tpu", "bfloat16", (16384, width), 32, expert_width=4 * width, layout=LAYOUTS[0], chip=TPUS[chip].kind
    )
    for weight_dtype, taken in (("bfloat16", True), ("float32", False), ("", False)):
        reason = TPU.why_not(dataclasses.replace(problem, weight_dtype=weight_dtype))
        assert (reason is None) == taken and (taken or "MiB of VMEM" in reason)
    assert "weights of dtype int8 are none of" in TPU.why_not(dataclasses.replace(problem, weight_dtype="int8"))


GIVEN = Tiles(RowCuts(272, 272, (272, 144, 16)), 512, 3072)


@pytest.mark.parametrize(
    ("tiles", "reason"),
    [
        (GIVEN, None),
        (dataclasses.replace(GIVEN, rows=RowCuts(272, 272, (16, 272))), "pieces=(16, 272) do not descend"),
        (dataclasses.replace(GIVEN, rows=RowCuts(272, 272, (128, 64))), "pieces=(128, 64) go over more than rows=272"),
        (dataclasses.replace(GIVEN, rows=RowCuts(272, 544, (272,))), "copied=544 is not 272"),
        (dataclasses.replace(GIVEN, padded=2560), "padded=2560 is not at least F=3072"),
        (dataclasses.replace(GIVEN, chunk=96), "chunk=96 is neither a multiple of 128 nor all of F"),
        (dataclasses.replace(GIVEN, chunk=3072), "MiB of VMEM; v4 has 16"),
    ],
)
@pytest.mark.parametrize("span", ["expert_mlp", "grouped_matmul"])
def test_block_sizes_given_by_hand_are_taken_or_refused_with_the_reason(span, tiles, reason):
    problem = Problem(
        span, "tpu", "bfloat16", (17408, 512), 32, expert_width=3072, layout=LAYOUTS[0], chip="TPU v4",
        weight_dtype="bfloat16", tiles=GivenTiles(backward=tiles),
    )  # fmt: skip
    if reason is None:
        assert choose(problem).backward.keywords["tiles"].rows == tiles.rows
        assert choose(problem).forward.keywords == {} and choose(problem).backward.keywords["tiles"].vmem > 0
        return
    with pytest.raises(ValueError, match=re.escape(reason)):
        choose(problem, "tpu")


def test_block_sizes_of_other_kernels_are_refused():
    problem = Problem("dispatch", "tpu", "bfloat16", (16384, 768), 32, layout=LAYOUTS[0], chip="TPU v4")
    with pytest.raises(ValueError, match="tpu: block sizes can be given for expert_mlp, expert_glu, grouped_matmul"):
        choose(dataclasses.replace(problem, tiles=GivenTiles()))
    with pytest.raises(ValueError, match="xla: block sizes of class int are not those of its kernels"):
        choose(dataclasses.replace(problem, tiles=1))
