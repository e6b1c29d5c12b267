"""The reference routing and plan: the paper's example, exact capacity, order of claims, and what is kept."""

from typing import Any

import numpy as np
import pytest

import reference
from reference.plan import Priority

PAPER_EXPERT = np.array([[0], [0], [1], [1]])
PAPER_GATE = np.array([[0.40], [0.90], [0.35], [0.80]])


def kept_tokens(plan: reference.Plan) -> list[int]:
    return [t for t in range(len(plan.position)) if (plan.position[t] >= 0).any()]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"priority": "arrival"}, [0, 2]),
        ({"priority": "bpr"}, [1, 3]),
        ({"priority": "modality", "modality": np.array([0, 1, 1, 0]), "num_modalities": 2}, [0, 3]),
        (
            {"priority": "modality", "modality": np.array([0, 1, 1, 0]), "num_modalities": 2, "first_modality": 1},
            [1, 2],
        ),
        ({"priority": "random", "priority_values": np.array([4.0, 1.0, 2.0, 3.0])}, [0, 3]),
        ({"priority": "bpr", "mask": np.array([True, False, True, True])}, [0, 3]),
    ],
    ids=lambda value: str(value),
)
def test_who_is_kept_in_the_papers_example(settings: dict[str, Any], expected: list[int]) -> None:
    plan = reference.make_plan(PAPER_EXPERT, PAPER_GATE, num_experts=2, capacity=1, **settings)
    assert kept_tokens(plan) == expected


def test_ties_go_to_the_lower_index() -> None:
    routing = reference.route(np.zeros((3, 2)), np.zeros((2, 4)), num_choices=2)
    assert routing.expert.tolist() == [[0, 1]] * 3
    plan = reference.make_plan(routing.expert, routing.gate, num_experts=4, capacity=2)
    assert plan.position.tolist() == [[0, 0], [1, 1], [-1, -1]]
    values = np.array([1.0, 1.0, 2.0])
    plan = reference.make_plan(
        routing.expert, routing.gate, num_experts=4, capacity=2, priority="random", priority_values=values
    )
    assert plan.position.tolist() == [[1, 1], [-1, -1], [0, 0]]


@pytest.mark.parametrize(("priority", "expected"), [("random", [1, 5]), ("modality", [2, 4])])
def test_every_group_reads_the_priorities_of_its_own_tokens(priority: Priority, expected: list[int]) -> None:
    plan = reference.make_plan(
        np.zeros((6, 1), int),
        np.full((6, 1), 0.5),
        num_experts=1,
        num_groups=2,
        capacity=1,
        priority=priority,
        priority_values=np.array([9.0, 3.0, 2.0, 1.0, 2.0, 3.0]),
        modality=np.array([1, 0, 1, 0, 1, 0]),
        num_modalities=2,
        first_modality=1,
        mask=np.arange(6) > 0,
    )
    assert kept_tokens(plan) == expected


def test_all_first_choices_come_before_all_second_ones() -> None:
    expert = np.array([[0, 1], [1, 0], [1, 0]])
    gate = np.array([[0.9, 0.8], [0.5, 0.4], [0.6, 0.3]])
    plan = reference.make_plan(expert, gate, num_experts=2, capacity=2)
    # Token 0 has the largest gates of all, and yet its second choice finds expert 1 full.
    assert plan.position.tolist() == [[0, -1], [1, -1], [0, 1]]
    assert plan.row.tolist() == [[0, 4], [3, 4], [2, 1]]
    assert plan.source.tolist() == [0, 5, 4, 2]


def test_rows_follow_group_after_group_without_gaps() -> None:
    expert = np.array([[1], [0], [0], [1], [0], [0]])
    gate = np.array([[0.5], [0.6], [0.7], [0.5], [0.6], [0.7]])
    plan = reference.make_plan(expert, gate, num_experts=2, num_groups=2, capacity=2, row_multiple=8)
    assert plan.position[:, 0].tolist() == [0, 1, 0, 1, 3, 2]
    assert plan.first.tolist() == [0, 8] and plan.size.tolist() == [4, 2]
    assert plan.source.tolist() == [2, 1, 5, 4, 6, 6, 6, 6, 0, 3, 6, 6, 6, 6, 6, 6]
    dropless = reference.make_plan(expert, gate, num_experts=2, num_groups=2)
    assert dropless.first.tolist() == [0, 4] and dropless.source.tolist() == [2, 1, 5, 4, 0, 3]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((100, 1, 1, 1.1), 110),  # 100 * 1.1 is 110.00000000000001 in floats
        ((1000, 1, 100, 1.1), 11),
        ((1700, 2, 34, 1.1), 110),
        ((101, 1, 1, 1.1), 112),  # 111.1
        ((4096, 1, 32, 1.05), 135),  # 134.4
        ((212, 1, 32, "1.05"), 7),  # 6.956
        ((8, 1, 8, 1), 1),
        ((1, 1, 32, 0.5), 1),
    ],
)
def test_capacity_is_an_exact_ceiling(arguments: tuple[int, int, int, float], expected: int) -> None:
    assert reference.expert_capacity(*arguments) == expected


@pytest.mark.parametrize("priority", ["bpr", "arrival", "random", "modality"])
@pytest.mark.parametrize("num_choices", [1, 2, 3])
@pytest.mark.parametrize("capacity", [0, 1, 3, None])
def test_exactly_as_many_are_kept_as_fit(priority: Priority, num_choices: int, capacity: int | None) -> None:
    random = np.random.default_rng(7)
    num_tokens, num_groups, num_experts, num_modalities = 30, 3, 5, 3
    modality = random.integers(0, num_modalities, size=num_tokens)
    mask = random.random(num_tokens) < 0.8
    tokens = random.normal(size=(num_tokens, 4))
    tokens[11] = np.nan
    routing = reference.route(
        tokens,
        random.normal(size=(4, num_experts)),
        num_choices=num_choices,
        num_groups=num_groups,
        modality=modality,
        num_modalities=num_modalities,
        mask=mask,
    )
    plan = reference.make_plan(
        routing.expert,
        routing.gate,
        num_experts=num_experts,
        num_groups=num_groups,
        capacity=capacity,
        priority=priority,
        priority_values=random.random(num_tokens),
        modality=modality,
        num_modalities=num_modalities,
        mask=mask,
    )
    active = mask & (np.arange(num_tokens) != 11)
    wanted = routing.sums.wanted.sum(axis=1)
    np.testing.assert_array_equal(plan.wanted, routing.sums.wanted)
    assert wanted.sum() == num_choices * active.sum()
    np.testing.assert_array_equal(plan.kept.sum(axis=1), wanted if capacity is None else np.minimum(wanted, capacity))
    np.testing.assert_array_equal(plan.size, plan.kept.sum(axis=(0, 1)))
    assert (plan.position[~active] == -1).all()
    assert plan.active_tokens.sum() == active.sum()
    assert plan.placed_tokens.sum() == len(kept_tokens(plan))
    # Rows and choices point at each other, and no row is used twice.
    used = plan.source[plan.source < plan.row.size]
    assert len(set(used)) == len(used) == plan.kept.sum() == (plan.position >= 0).sum()
    for r, source in enumerate(plan.source):
        if source < plan.row.size:
            assert plan.row.flat[source] == r
    # Nobody of a lower priority sits where somebody of a higher one was turned away.
    if priority == "bpr":
        for g in range(num_groups):
            block = slice(g * 10, (g + 1) * 10)
            for e in range(num_experts):
                here = active[block] & (plan.expert[block, 0] == e)
                gate = routing.gate[block, 0][here]
                placed = plan.position[block, 0][here] >= 0
                assert not placed.any() or placed.all() or gate[placed].min() > gate[~placed].max()


def test_routing_sums_are_per_group_and_modality() -> None:
    random = np.random.default_rng(8)
    tokens, router, noise = random.normal(size=(12, 4)), random.normal(size=(4, 3)), random.normal(size=(12, 3)) / 3
    modality, mask = np.arange(12) % 2, np.arange(12) != 6
    routing = reference.route(
        tokens, router, num_choices=2, num_groups=3, noise=noise, modality=modality, num_modalities=2, mask=mask
    )
    logits = tokens @ router
    for g in range(3):
        for m in range(2):
            chosen = (np.arange(12) // 4 == g) & (modality == m) & mask
            clean = np.exp(logits[chosen])
            clean /= clean.sum(axis=1, keepdims=True)
            noisy = np.exp(logits[chosen] + noise[chosen])
            noisy /= noisy.sum(axis=1, keepdims=True)
            sums = reference.RoutingSums(*(field[g, m] for field in routing.sums))
            assert sums.tokens == chosen.sum() and sums.wanted.sum() == 2 * chosen.sum()
            np.testing.assert_allclose(sums.probability, clean.sum(axis=0), rtol=1e-13)
            np.testing.assert_allclose(sums.entropy, -(clean * np.log(clean)).sum(), rtol=1e-13)
            np.testing.assert_allclose(
                sums.logsumexp_squared, (np.log(np.exp(logits[chosen]).sum(axis=1)) ** 2).sum(), rtol=1e-13
            )
            np.testing.assert_allclose(sums.largest_gate, noisy.max(axis=1).sum(), rtol=1e-13)
    np.testing.assert_allclose(routing.gate[0], np.sort(reference.softmax(logits[0] + noise[0]))[:0:-1], rtol=1e-13)
    assert (routing.gate[6] == 0).all() and (routing.expert[6] == 3).all()


def test_load_is_the_chance_of_being_chosen_again() -> None:
    random = np.random.default_rng(9)
    tokens, noise = random.normal(size=(1, 3)), random.normal(size=(1, 3)) / 3
    routing = reference.route(tokens, np.eye(3), num_choices=1, noise=noise)
    threshold = (tokens + noise).max()
    draws = random.normal(size=(200_000, 3)) / 3
    # Two hundred thousand draws: a standard error below 0.0012.
    np.testing.assert_allclose(routing.sums.load[0, 0], (tokens + draws > threshold).mean(axis=0), atol=0.005)
    assert (reference.route(tokens, np.eye(3), num_choices=1).sums.load == 0).all()


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="10 tokens cannot be cut into 3"):
        reference.route(np.zeros((10, 2)), np.zeros((2, 2)), num_choices=1, num_groups=3)
    with pytest.raises(ValueError, match="'bqr' is not one of"):
        reference.make_plan(PAPER_EXPERT, PAPER_GATE, num_experts=2, priority="bqr")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="priority_values"):
        reference.make_plan(PAPER_EXPERT, PAPER_GATE, num_experts=2, priority="random")
    with pytest.raises(ValueError, match="modality"):
        reference.make_plan(PAPER_EXPERT, PAPER_GATE, num_experts=2, priority="modality")
