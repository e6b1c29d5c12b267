"""Periodic segments: they reproduce the tower, and none cut has fewer distinct blocks."""

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limoe.config.presets import PRESETS
from limoe.model.segments import Segment, cut

pytestmark = pytest.mark.compat


@st.composite
def towers(draw, max_depth=32):
    depth = draw(st.integers(1, max_depth))
    if draw(st.booleans()):  # a repeated pattern with a flaw is where a cut is interesting
        period = draw(st.lists(st.booleans(), min_size=1, max_size=4))
        blocks = (period * depth)[:depth]
        flaw = draw(st.integers(0, depth - 1))
        blocks[flaw] = not blocks[flaw]
    else:
        blocks = draw(st.lists(st.booleans(), min_size=depth, max_size=depth))
    return depth, tuple(layer for layer, experts in enumerate(blocks) if experts)


def tower(segments: tuple[Segment, ...]) -> list[bool]:
    return [experts for segment in segments for experts in segment.pattern * segment.repeats]


@given(towers())
def test_segments_reproduce_the_tower(case):
    depth, moe_layers = case
    segments = cut(depth, moe_layers)
    assert tower(segments) == [layer in moe_layers for layer in range(depth)]
    first = 0
    for segment in segments:
        assert segment.first_block == first and segment.pattern and segment.repeats >= 1
        first += segment.num_blocks
    assert first == depth


def cheapest(blocks: tuple[bool, ...]) -> tuple[int, int]:
    """Fewest distinct blocks, then fewest segments, by trying every first segment."""

    @functools.cache
    def cost(start: int) -> tuple[int, int]:
        if start == len(blocks):
            return 0, 0
        found = []
        for period in range(1, len(blocks) - start + 1):
            end = start
            while blocks[end : end + period] == blocks[start : start + period]:
                end += period
                distinct, segments = cost(end)
                found.append((distinct + period, segments + 1))
        return min(found)

    return cost(0)


@given(towers(max_depth=12))
def test_no_cut_is_cheaper(case):
    depth, moe_layers = case
    segments = cut(depth, moe_layers)
    assert (sum(len(s.pattern) for s in segments), len(segments)) == cheapest(
        tuple(layer in moe_layers for layer in range(depth))
    )


PAPER = {
    "s32": ["dM x4"],
    "b32": ["dM x6"],
    "b16": ["dM x6"],
    "l16": ["d x12", "dM x6"],
    "h14": ["dddM x4", "dM x8"],
    "h14-dense": ["d x32"],
}


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_towers_are_few_short_patterns(name):
    model = PRESETS[name].model
    found = [
        f"{''.join('M' if experts else 'd' for experts in s.pattern)} x{s.repeats}"
        for s in cut(model.depth, model.moe_layers)
    ]
    assert found == PAPER[name]


def test_a_tower_without_a_pattern_is_written_out():
    assert cut(1, ()) == (Segment((False,), 1, 0),)
    assert cut(3, (0, 2)) == (Segment((True, False, True), 1, 0),)
