"""Routing figures against loops over tokens, and the bound against the figures of the paper notes and a simulation."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limoe.report import analysis
from limoe.report.analysis import TopPatches, success_rate_bound


@pytest.mark.parametrize(
    ("num_experts", "tokens", "percent"), [(32, 8 * 212, 96.9), (32, 4096, 98.6), (32, 42 * 272, 99.5), (8, 1696, 99.2)]
)
def test_bound_has_the_known_values(num_experts, tokens, percent):
    assert round(100 * success_rate_bound(num_experts, tokens, 1, 1.05), 1) == percent


@settings(max_examples=60, deadline=None)
@given(
    num_experts=st.integers(1, 9),
    tokens=st.integers(1, 60),
    num_choices=st.integers(1, 9),
    factor=st.sampled_from([0.1, 0.5, 1.0, 1.05, 1.1, 2.0, 9.5]),
)
def test_bound_is_the_sum_over_all_counts(num_experts, tokens, num_choices, factor):
    num_choices = min(num_choices, num_experts)
    p = Fraction(num_choices, num_experts)
    capacity = math.ceil(Fraction(str(factor)) * tokens * p)
    kept = sum(math.comb(tokens, n) * p**n * (1 - p) ** (tokens - n) * min(n, capacity) for n in range(tokens + 1))
    expected = kept / (tokens * p)
    assert success_rate_bound(num_experts, tokens, num_choices, factor) == pytest.approx(float(expected), rel=1e-11)


def test_bound_is_what_a_simulation_keeps():
    rng = np.random.default_rng(0)
    capacity = math.ceil(212 * 1.05 / 8)
    kept = [np.minimum(np.bincount(rng.integers(0, 8, 212), minlength=8), capacity).sum() / 212 for _ in range(4000)]
    bound = success_rate_bound(8, 212, 1, 1.05)
    assert abs(np.mean(kept) - bound) < 5 * np.std(kept) / math.sqrt(len(kept))


def test_bound_of_huge_groups_is_one_and_never_above():
    bounds = [success_rate_bound(32, tokens, 2, 1.05) for tokens in (10**3, 10**5, 10**7)]
    assert bounds == sorted(bounds)
    assert 1 - 1e-12 < bounds[-1] <= 1


@pytest.mark.parametrize("sizes", [(0, 1, 1, 1.0), (4, 0, 1, 1.0), (4, 1, 5, 1.0), (4, 1, 1, 0.0), (4, 1, 1, math.nan)])
def test_bound_refuses_nonsense(sizes):
    with pytest.raises(ValueError, match=r"must be|is not a finite number"):
        success_rate_bound(*sizes)


def test_shares_are_fractions_of_all_tokens_of_the_layer():
    rng = np.random.default_rng(1)
    wanted = rng.integers(0, 50, (3, 2, 5))
    kept = rng.integers(0, wanted + 1)
    shares = analysis.expert_shares(wanted, kept)
    for layer in range(3):
        total = sum(int(n) for n in wanted[layer].ravel())
        for m in range(2):
            for e in range(5):
                assert shares.wanted[layer, m, e] == wanted[layer, m, e] / total
                assert shares.kept[layer, m, e] == kept[layer, m, e] / total


def test_preference_does_not_depend_on_how_many_tokens_a_modality_has():
    wanted = np.array([[[30.0, 10.0, 0.0, 0.0], [1.0, 1.0, 2.0, 0.0]]])
    expected = [0.25 / (0.75 + 0.25), 0.25 / (0.25 + 0.25), 1.0, np.nan]
    np.testing.assert_allclose(analysis.text_preference(wanted)[0], expected, rtol=1e-15)
    np.testing.assert_array_equal(
        analysis.text_preference(wanted * [[[16.0], [1.0]]]), analysis.text_preference(wanted)
    )
    # A step without text leaves image experts, not NaN.
    np.testing.assert_array_equal(analysis.text_preference(wanted * [[[1.0], [0.0]]])[0], [0, 0, np.nan, np.nan])


def test_names_of_experts():
    # Shares of image: 60, 35, 4, 1, 0; of text: 2, 35, 60, 1, 2 per cent. An even share is 20, so below 2 is unused.
    wanted = np.array([[[600, 350, 39, 1, 10], [2, 34, 61, 1, 2]]])
    assert analysis.expert_modality(wanted) == (("image", "shared", "text", "unused", "unused"),)
    # Preferences of 0.89, 0.91, 0.106 and 0.048.
    near = np.array([[[55, 45, 800, 100], [445, 455, 95, 5]]])
    assert analysis.expert_modality(near) == (("shared", "text", "shared", "image"),)


def top_patches_ref(gate, expert, num_experts, patches, count, per_image):
    """Takes the tokens of all choices from the best down; greedy, one at a time."""
    entries = [(-gate[t, k], t, expert[t, k]) for t in range(len(gate)) for k in range(gate.shape[1]) if gate[t, k] > 0]
    lists = [[] for _ in range(num_experts)]
    for negative, t, e in sorted(entries):
        if len(lists[e]) < count and sum(u // patches == t // patches for u, _ in lists[e]) < per_image:
            lists[e].append((t, -negative))
    return lists


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    images=st.integers(0, 6),
    patches=st.integers(1, 5),
    num_choices=st.integers(1, 2),
    count=st.integers(1, 5),
    per_image=st.integers(1, 3),
)
def test_top_patches_is_the_loop(seed, images, patches, num_choices, count, per_image):
    rng = np.random.default_rng(seed)
    gate = rng.choice([0.0, np.nan, 0.25, 0.5, 0.75, 0.875], (images * patches, num_choices))
    expert = np.argsort(rng.random((images * patches, 4)), axis=1)[:, :num_choices]
    top = analysis.top_patches(gate, expert, num_experts=4, patches_per_image=patches, count=count, per_image=per_image)
    for e, entries in enumerate(top_patches_ref(gate, expert, 4, patches, count, per_image)):
        rest = [-1] * (count - len(entries))
        assert top.example[e].tolist() == [t // patches for t, _ in entries] + rest
        assert top.patch[e].tolist() == [t % patches for t, _ in entries] + rest
        assert top.gate[e].tolist() == [g for _, g in entries] + [0] * len(rest)


def test_top_tokens_is_the_loop():
    rng = np.random.default_rng(4)
    gate = rng.choice([0.0, 0.25, 0.5], (200, 2))
    expert = np.argsort(rng.random((200, 5)), axis=1)[:, :2]
    expert[expert == 3] = 0
    token_id = rng.integers(0, 9, 200)
    result = analysis.top_tokens(gate, expert, token_id, num_experts=5, count=12)
    for e in range(5):
        total = {}
        for t in range(200):
            for k in range(2):
                if expert[t, k] == e and gate[t, k] > 0:
                    total[int(token_id[t])] = total.get(int(token_id[t]), 0) + gate[t, k]
        best = sorted(total, key=lambda token: (-total[token], token))
        assert result[e].tolist() == best + [-1] * (12 - len(best))
    assert result[3].tolist() == [-1] * 12


def test_cuts_hold_the_patch_in_the_middle_and_white_outside():
    images = np.random.default_rng(5).integers(0, 255, (2, 6, 9, 3), dtype=np.uint8)
    example = np.array([[0, 1, -1], [1, 1, 0]])
    patch = np.array([[0, 5, -1], [2, 4, 3]])
    cuts = analysis.cut_patches(images, example, patch, patch_size=3)
    assert cuts.shape == (2, 3, 9, 9, 3)
    padded = np.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)), constant_values=255)
    for i in range(2):
        for j in range(3):
            if example[i, j] < 0:
                assert np.all(cuts[i, j] == 255)
                continue
            row, column = patch[i, j] // 3, patch[i, j] % 3
            window = padded[example[i, j], 3 * row : 3 * row + 9, 3 * column : 3 * column + 9]
            np.testing.assert_array_equal(cuts[i, j], window)
            inner = images[example[i, j], 3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
            np.testing.assert_array_equal(cuts[i, j, 3:6, 3:6], inner)
    # Context wider than the image.
    assert analysis.cut_patches(images, np.array([0]), np.array([1]), patch_size=3, context=4).shape == (1, 27, 27, 3)


def test_top_patches_can_be_cut_out():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    top = analysis.top_patches(np.ones(8), np.zeros(8, int), num_experts=3, patches_per_image=4, count=3)
    assert isinstance(top, TopPatches)
    assert analysis.cut_patches(images, top.example, top.patch, patch_size=2, context=0).max(
        axis=(2, 3, 4)
    ).tolist() == [
        [0, 0, 0],
        [255, 255, 255],
        [255, 255, 255],
    ]


COUNTS = np.ones((1, 2, 3))
IMAGES = np.zeros((2, 4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: analysis.expert_shares(COUNTS, np.ones((1, 2, 4))), "must be equal"),
        (lambda: analysis.expert_shares(COUNTS, 2 * COUNTS), "layer 0, modality 0, expert 0: more tokens kept"),
        (lambda: analysis.expert_shares(0 * COUNTS, 0 * COUNTS), "layer 0 routed no tokens"),
        (lambda: analysis.expert_shares(-COUNTS, COUNTS), "wanted must be finite and at least 0"),
        (lambda: analysis.expert_shares(COUNTS[0], COUNTS[0]), r"must be counts \[layers, modalities, experts\]"),
        (lambda: analysis.text_preference(np.ones((1, 3, 3))), "3 modalities"),
        (lambda: analysis.top_patches(np.ones(4), np.arange(4), num_experts=3, patches_per_image=2), "0 to 2"),
        (lambda: analysis.top_patches(np.ones(4), np.arange(3), num_experts=4, patches_per_image=2), "must both be"),
        (lambda: analysis.top_patches(np.ones(4), np.arange(4), num_experts=4, patches_per_image=3), "whole images"),
        (lambda: analysis.top_tokens(np.ones(4), np.arange(4), np.arange(3), num_experts=4), "must be 4 integers"),
        (lambda: analysis.top_tokens(np.ones(4), np.arange(4), np.arange(4) - 1, num_experts=4), "goes down to -1"),
        (lambda: analysis.cut_patches(IMAGES / 255, np.array([0]), np.array([0]), patch_size=2), "uint8"),
        (lambda: analysis.cut_patches(IMAGES, np.array([0]), np.array([0]), patch_size=3), "4 x 4 cannot be cut"),
        (lambda: analysis.cut_patches(IMAGES, np.array([0]), np.array([4]), patch_size=2), "2 images of 4 patches"),
        (lambda: analysis.cut_patches(IMAGES, np.array([2]), np.array([0]), patch_size=2), "2 images of 4 patches"),
        (lambda: analysis.cut_patches(IMAGES, np.array([0]), np.array([-1]), patch_size=2), "2 images of 4 patches"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
