"""The reference losses: the oracle values of the paper's section 3, and gradients against central differences."""

from collections.abc import Callable

import numpy as np
import pytest

import reference
from reference import losses, metrics

# Six tokens and four experts: four image tokens, then two text tokens.
TABLE = np.array(
    [
        [2.0, 0.5, -1.0, 0.0],
        [1.5, 1.0, 0.0, -0.5],
        [-0.5, 2.5, 0.5, 0.0],
        [0.0, 0.2, 1.8, -1.0],
        [0.9, 1.0, 0.8, 0.7],
        [0.3, 0.1, 0.2, 0.6],
    ]
)
MODALITY = np.array([0, 0, 0, 0, 1, 1])
IMAGE, TEXT = TABLE[:4], TABLE[4:]


def central_difference(function: Callable[[np.ndarray], float], array: np.ndarray, step: float = 1e-5) -> np.ndarray:
    gradient = np.zeros(array.shape)
    for index in np.ndindex(array.shape):
        above, below = array.copy(), array.copy()
        above[index] += step
        below[index] -= step
        gradient[index] = (function(above) - function(below)) / (2 * step)
    return gradient


def test_uniform_gates() -> None:
    logits = np.zeros((64, 32))
    modality = np.arange(64) % 2
    found = losses.auxiliary_losses(logits, logits, modality, threshold_experts_text=9.0, threshold_experts_image=20.0)
    expected = losses.AuxiliaryLosses(0.0, 0.0, 12.0113, 3.4657, 3.4657, 0.0, 0.0)
    np.testing.assert_allclose(found, expected, atol=5e-5)
    assert losses.global_entropy_loss(logits) == pytest.approx(-3.4657, abs=5e-5)


def test_all_mass_on_one_expert() -> None:
    logits = np.zeros((64, 32))
    logits[:, 3] = 100.0
    found = losses.auxiliary_losses(
        logits, None, np.arange(64) % 2, threshold_experts_text=9.0, threshold_experts_image=20.0
    )
    expected = losses.AuxiliaryLosses(31.0, 0.0, 100.0**2, 0.0, 0.0, 2.1972, 2.9957)
    np.testing.assert_allclose(found, expected, atol=5e-5)


def test_the_table_of_six_tokens_and_four_experts() -> None:
    probability = reference.softmax(TABLE)
    np.testing.assert_allclose(probability.sum(axis=0), [1.8807, 1.8873, 1.4144, 0.8176], atol=5e-5)
    assert losses.importance_loss(TABLE) == pytest.approx(0.085332, abs=5e-7)
    # A zero noise draw: the threshold is the largest clean logit.
    routing = reference.route(TABLE, np.eye(4), num_choices=1, noise=np.zeros((6, 4)))
    np.testing.assert_allclose(routing.sums.load[0, 0] / 6, [0.2433, 0.1743, 0.1278, 0.1025], atol=5e-5)
    assert losses.load_loss(TABLE, TABLE) == pytest.approx(0.109286, abs=5e-7)
    assert losses.z_loss(TABLE) == pytest.approx(5.048882, abs=5e-7)
    assert losses.local_entropy_loss(IMAGE) == pytest.approx(0.914121, abs=5e-7)
    assert losses.local_entropy_loss(TEXT) == pytest.approx(1.373776, abs=5e-7)
    assert -losses.global_entropy_loss(IMAGE) == pytest.approx(1.259481, abs=5e-7)
    assert -losses.global_entropy_loss(TEXT) == pytest.approx(1.384338, abs=5e-7)
    assert metrics.effective_experts(probability[:4]) == pytest.approx(np.exp(1.259481), rel=1e-6)


def test_every_auxiliary_loss_is_about_its_own_tokens() -> None:
    found = losses.auxiliary_losses(TABLE, TABLE, MODALITY, threshold_experts_text=4.0, threshold_experts_image=3.8)
    expected = losses.AuxiliaryLosses(
        importance=0.085332,
        load=0.109286,
        z=5.048882,
        local_text=1.373776,
        local_image=0.914121,
        global_text=np.log(4.0) - 1.384338,
        global_image=np.log(3.8) - 1.259481,
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_sums_of_routing_hold_the_same_losses() -> None:
    routing = reference.route(
        TABLE, np.eye(4), num_choices=1, noise=np.zeros((6, 4)), modality=MODALITY, num_modalities=2
    )
    sums = routing.sums
    assert sums.tokens.tolist() == [[4, 2]]
    assert sums.wanted.tolist() == [[[2, 1, 1, 0], [0, 1, 0, 1]]]
    np.testing.assert_allclose(sums.entropy / sums.tokens, [[0.914121, 1.373776]], atol=5e-7)
    np.testing.assert_allclose(sums.logsumexp_squared.sum() / 6, 5.048882, atol=5e-7)
    mean = sums.probability / sums.tokens[..., None]
    np.testing.assert_allclose(reference.entropy(mean), [[1.259481, 1.384338]], atol=5e-7)
    assert losses.squared_variation(sums.load.sum(axis=(0, 1))) == pytest.approx(0.109286, abs=5e-7)


def test_the_threshold_cuts_the_loss_and_its_gradient() -> None:
    for logits in (IMAGE, TEXT):
        spread = float(np.exp(-losses.global_entropy_loss(logits)))
        assert losses.thresholded_global_entropy_loss(logits, spread * 0.99) == 0.0
        assert (losses.thresholded_global_entropy_loss_gradient(logits, spread * 0.99) == 0).all()
        above = losses.thresholded_global_entropy_loss(logits, spread * 1.01)
        assert above == pytest.approx(np.log(1.01), rel=1e-9)


NOISE = np.random.default_rng(3).normal(size=TABLE.shape) / 4
GRADIENTS: dict[str, tuple[Callable[[np.ndarray], float], Callable[[np.ndarray], np.ndarray]]] = {
    "importance": (losses.importance_loss, losses.importance_loss_gradient),
    "load, K=1": (lambda a: losses.load_loss(a, a + NOISE), lambda a: losses.load_loss_gradient(a, a + NOISE)),
    "load, K=2": (
        lambda a: losses.load_loss(a, a + NOISE, 2, sigma=0.4),
        lambda a: losses.load_loss_gradient(a, a + NOISE, 2, sigma=0.4),
    ),
    "z": (losses.z_loss, losses.z_loss_gradient),
    "local": (losses.local_entropy_loss, losses.local_entropy_loss_gradient),
    "global": (losses.global_entropy_loss, losses.global_entropy_loss_gradient),
    "thresholded": (
        lambda a: losses.thresholded_global_entropy_loss(a, 3.9),
        lambda a: losses.thresholded_global_entropy_loss_gradient(a, 3.9),
    ),
    "softmax": (
        lambda a: losses.softmax_contrastive_loss(a[:4]),
        lambda a: np.concatenate([losses.softmax_contrastive_gradient(a[:4]), np.zeros((2, 4))]),
    ),
    "sigmoid": (
        lambda a: losses.sigmoid_contrastive_loss(a[:4]),
        lambda a: np.concatenate([losses.sigmoid_contrastive_gradient(a[:4]), np.zeros((2, 4))]),
    ),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_equal_central_differences(name: str) -> None:
    loss, gradient = GRADIENTS[name]
    found = gradient(TABLE)
    assert np.abs(found).max() > 1e-3
    np.testing.assert_allclose(found, central_difference(loss, TABLE), rtol=1e-7, atol=1e-8)


def test_softmax_contrastive_loss_by_hand() -> None:
    # exp(t) = 2; the second text lies at 60 degrees to its own image and along the first one.
    image, text = np.array([[1.0, 0.0], [0.5, np.sqrt(0.75)]]), np.array([[1.0, 0.0], [1.0, 0.0]])
    logits = losses.contrastive_logits(image, text, float(np.log(2.0)))
    np.testing.assert_allclose(logits, [[2.0, 2.0], [1.0, 1.0]], rtol=1e-15)
    first = np.log(2.0) / 2 + np.log(1 + np.exp(-1.0)) / 2
    second = np.log(2.0) / 2 + np.log(1 + np.exp(1.0)) / 2
    assert losses.softmax_contrastive_loss(logits) == pytest.approx((first + second) / 2, rel=1e-14)
    assert losses.softmax_contrastive_loss(100.0 * np.eye(3)) == pytest.approx(0.0, abs=1e-15)


def test_sigmoid_contrastive_loss_by_hand() -> None:
    logits = losses.contrastive_logits(np.eye(2), np.eye(2), float(np.log(10.0)), bias=-10.0)
    np.testing.assert_allclose(logits, [[0.0, -10.0], [-10.0, 0.0]], atol=1e-14)
    expected = np.log(2.0) + np.log(1 + np.exp(-10.0))
    assert losses.sigmoid_contrastive_loss(logits) == pytest.approx(expected, rel=1e-14)


def test_the_total_is_the_mean_of_the_active_losses_summed_over_layers() -> None:
    layers = [losses.AuxiliaryLosses(*range(1, 8)), losses.AuxiliaryLosses(*range(11, 18))]
    found = losses.total_auxiliary_loss(layers, {"importance": 1.0, "local_text": 0.5, "global_image": 2.0})
    assert found == pytest.approx(0.04 * ((1 + 0.5 * 4 + 2 * 7) / 3 + (11 + 0.5 * 14 + 2 * 17) / 3))
    with pytest.raises(AttributeError, match="locl_text"):
        losses.total_auxiliary_loss(layers, {"locl_text": 1.0})


def test_no_tokens_no_loss() -> None:
    found = losses.auxiliary_losses(
        TABLE[:0], TABLE[:0], MODALITY[:0], threshold_experts_text=2.0, threshold_experts_image=2.0
    )
    assert found == losses.AuxiliaryLosses(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("tokens", "experts", "percent"), [(8 * 212, 32, 96.9), (4096, 32, 98.6), (42 * 272, 32, 99.5), (1696, 8, 99.2)]
)
def test_what_a_perfect_router_keeps(tokens: int, experts: int, percent: float) -> None:
    capacity = reference.expert_capacity(tokens, 1, experts, 1.05)
    assert 100 * metrics.success_rate_bound(tokens, experts, capacity) == pytest.approx(percent, abs=0.05)


def test_the_bound_equals_an_average_over_all_assignments() -> None:
    kept = [sum(min(np.sum(np.array(e) == i), 2) for i in range(3)) for e in np.ndindex(3, 3, 3, 3, 3)]
    assert metrics.success_rate_bound(5, 3, 2) == pytest.approx(np.mean(kept) / 5, rel=1e-12)
    assert metrics.success_rate_bound(8, 1, 6) == 0.75


def test_success_rate_counts_tokens_not_choices() -> None:
    expert = np.array([[0, 1], [0, 1], [0, 2], [2, 0]])
    gate = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    plan = reference.make_plan(
        expert, gate, num_experts=3, capacity=1, modality=np.array([0, 0, 1, 1]), num_modalities=3
    )
    # Token 1 loses both of its experts to token 0, token 2 loses both to tokens 0 and 3.
    assert [metrics.success_rate(plan, m) for m in (0, 1)] == [0.5, 0.5]
    assert np.isnan(metrics.success_rate(plan, 2))


def test_recall() -> None:
    similarity = np.array([[0.9, 0.9, 0.1], [0.2, 0.3, 0.1], [0.1, 0.2, 0.3]])
    hit = np.array([[False, True, False], [True, False, True], [True, False, False]])
    assert [metrics.recall_at(similarity, hit, k) for k in (1, 2, 3)] == [0.0, 2 / 3, 1.0]
