"""The reference MoE layer: hand-derived gradients against central differences, and what drops, masks and NaN do."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import reference
from reference.activations import Activation

T, D, F, E, G, M = 8, 3, 4, 3, 2, 2
MASK = np.array([True, True, False, True, True, True, True, False])
MODALITY = np.array([0, 0, 0, 1, 0, 1, 1, 0])


def draw(seed: int) -> tuple[np.random.Generator, np.ndarray, np.ndarray, reference.MlpWeights]:
    random = np.random.default_rng(seed)
    weights = reference.MlpWeights(
        random.normal(size=(E, D, F)),
        random.normal(size=(E, F)),
        random.normal(size=(E, F, D)),
        random.normal(size=(E, D)),
    )
    return random, random.normal(size=(T, D)), random.normal(size=(D, E)), weights


def central_difference(function: Callable[[], float], array: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Gradient of a function of no arguments that reads `array`, which is changed in place and put back."""
    gradient = np.zeros(array.shape)
    for index in np.ndindex(array.shape):
        value = array[index]
        array[index] = value + step
        above = function()
        array[index] = value - step
        below = function()
        array[index] = value
        gradient[index] = (above - below) / (2 * step)
    return gradient


CASES: list[dict[str, Any]] = [
    {},
    {"num_choices": 2},
    {"num_choices": 3, "noise": True},
    {"capacity_factor": 0.7, "noise": True, "masked": True},
    {"num_choices": 2, "capacity_factor": 0.6, "noise": True, "masked": True},
    {"num_choices": 2, "capacity_factor": 0.6, "priority": "modality", "first_modality": 1, "activation": "gelu_erf"},
    {"num_choices": 2, "settings": reference.Router("sigmoid", True, 2.5, 3, 2, 1), "biased": True, "noise": True},
    {"num_choices": 2, "settings": reference.Router(renormalise=True), "gated": reference.Clamped(1.7, 0.8, 1.0)},
    {"settings": reference.Router("sigmoid"), "gates_on": "input", "gated": "gelu_erf", "capacity_factor": 0.6},
    {"settings": reference.Router(scale=0.5), "gated": "relu", "masked": True, "noise": True},
    {"activation": "relu_squared"},
]


def gated_weights(random: np.random.Generator) -> reference.GluWeights:
    shapes = [(E, D, F), (E, D, F), (E, F, D), (E, F), (E, F), (E, D)]
    return reference.GluWeights(*(random.normal(size=shape) for shape in shapes))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_central_differences(case: dict[str, Any]) -> None:
    random, tokens, router, weights = draw(seed=1)
    case = dict(case)
    noise = random.normal(size=(T, E)) / E if case.pop("noise", False) else None
    mask = MASK if case.pop("masked", False) else None
    bias, choice_bias = random.normal(size=(2, E)) if case.pop("biased", False) else (np.zeros(E), None)
    if "gated" in case:
        weights, case["activation"] = gated_weights(random), case.pop("gated")
    settings = dict(case, noise=noise, mask=mask, num_groups=G, modality=MODALITY, num_modalities=M)
    settings |= {"bias": bias, "choice_bias": choice_bias}
    d_tokens = random.normal(size=(T, D))
    nothing = reference.zero_sums(num_groups=G, num_modalities=M, num_experts=E)
    d_sums = reference.RoutingSums(*(random.normal(size=field.shape) for field in nothing))

    def loss() -> float:
        output = reference.moe_layer(tokens, router, weights, **settings)
        # Counts have no derivative, but they would add a constant and cost digits.
        smooth = zip(output.sums[2:], d_sums[2:], strict=True)
        return float((d_tokens * output.tokens).sum() + sum((value * weight).sum() for value, weight in smooth))

    output = reference.moe_layer(tokens, router, weights, **settings)
    if "capacity_factor" in case:
        assert output.kept.sum() < output.sums.wanted.sum()
    passed = {name: case[name] for name in ("activation", "gates_on") if name in case}
    found = reference.moe_layer_gradient(tokens, router, weights, output, d_tokens, d_sums, **passed)
    for name, argument, gradient in [
        ("tokens", tokens, found.tokens),
        ("router", router, found.router),
        ("bias", bias, found.bias),
        *zip(weights._fields, weights, found.weights, strict=True),
    ]:
        expected = central_difference(loss, argument)
        # Rounding eps * |loss| / step and truncation step^2 * f''' / 6 are both about 1e-9 here.
        np.testing.assert_allclose(gradient, expected, rtol=1e-7, atol=1e-7, err_msg=name)


def test_gradients_of_gates_and_rows_equal_central_differences() -> None:
    random, tokens, router, weights = draw(seed=2)
    output = reference.moe_layer(tokens, router, weights, num_choices=2, capacity_factor=0.8)
    d_tokens = random.normal(size=(T, D))
    gate, rows = output.routing.gate.copy(), output.rows.copy()

    def loss() -> float:
        return float(
            (reference.combine(reference.expert_mlp(rows, weights, output.plan), gate, output.plan) * d_tokens).sum()
        )

    found = reference.moe_layer_gradient(tokens, router, weights, output, d_tokens)
    np.testing.assert_allclose(found.gate, central_difference(loss, gate), rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(found.rows, central_difference(loss, rows), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu_erf"])
def test_gelu_derivative(activation: Activation) -> None:
    x = np.linspace(-4.0, 4.0, 33)
    expected = (reference.gelu(x + 1e-5, activation) - reference.gelu(x - 1e-5, activation)) / 2e-5
    np.testing.assert_allclose(reference.gelu_derivative(x, activation), expected, rtol=1e-8, atol=1e-9)


def test_layer_equals_a_dense_sum_over_experts_when_nothing_is_dropped() -> None:
    _, tokens, router, weights = draw(seed=3)
    output = reference.moe_layer(tokens, router, weights, num_choices=E, num_groups=G)
    gate = reference.softmax(tokens @ router)
    hidden = reference.gelu(np.einsum("td,edf->tef", tokens, weights.w1) + weights.b1)
    expected = np.einsum("te,ted->td", gate, np.einsum("tef,efd->ted", hidden, weights.w2) + weights.b2)
    np.testing.assert_allclose(output.tokens, expected, rtol=1e-12)


def test_dropped_and_masked_tokens_give_zero_and_take_no_gradient() -> None:
    random, tokens, router, weights = draw(seed=4)
    router[:] = 0.0  # every token wants expert 0
    output = reference.moe_layer(tokens, router, weights, capacity_factor="0.75", mask=MASK)
    assert output.plan.position[:, 0].tolist() == [0, 1, -1, -1, -1, -1, -1, -1]
    assert (output.tokens[2:] == 0).all() and (output.tokens[:2] != 0).all()
    found = reference.moe_layer_gradient(tokens, router, weights, output, random.normal(size=(T, D)))
    assert (found.tokens[2:] == 0).all() and (found.gate[2:] == 0).all()
    assert (found.weights.b2[1:] == 0).all() and (found.weights.b2[0] != 0).all()


def test_a_bad_token_is_nan_alone() -> None:
    random, tokens, router, weights = draw(seed=5)
    settings: dict[str, Any] = {"num_choices": 2, "capacity_factor": 1, "num_groups": G, "modality": MODALITY}
    settings["num_modalities"] = M
    d_tokens = random.normal(size=(T, D))
    bad = tokens.copy()
    bad[5, 1] = np.inf
    output = reference.moe_layer(bad, router, weights, **settings)
    # The same tokens, with the bad one masked away, take the same places.
    without = np.arange(T) != 5
    expected = reference.moe_layer(tokens, router, weights, mask=without, **settings)
    assert np.isnan(output.tokens[5]).all() and np.isnan(output.routing.gate[5]).all()
    np.testing.assert_array_equal(output.tokens[without], expected.tokens[without])
    np.testing.assert_array_equal(output.plan.row, expected.plan.row)
    np.testing.assert_array_equal(output.sums.wanted, expected.sums.wanted)
    assert output.sums.tokens[1, 1] == expected.sums.tokens[1, 1] + 1
    assert np.isnan(output.sums.entropy).tolist() == [[False, False], [False, True]]
    found = reference.moe_layer_gradient(bad, router, weights, output, d_tokens)
    clean = reference.moe_layer_gradient(tokens, router, weights, expected, d_tokens)
    np.testing.assert_array_equal(found.tokens[without], clean.tokens[without])
    np.testing.assert_array_equal(found.weights.w1, clean.weights.w1)


def test_nan_in_masked_tokens_changes_nothing() -> None:
    random, tokens, router, weights = draw(seed=7)
    d_tokens = random.normal(size=(T, D))
    nothing = reference.zero_sums(num_groups=1, num_modalities=1, num_experts=E)
    d_sums = reference.RoutingSums(*(np.ones(field.shape) for field in nothing))
    outputs, gradients = [], []
    for value in (1.0, np.nan):
        tokens[~MASK], d_tokens[~MASK] = value, value
        outputs.append(reference.moe_layer(tokens, router, weights, num_choices=2, capacity_factor=0.9, mask=MASK))
        gradients.append(reference.moe_layer_gradient(tokens, router, weights, outputs[-1], d_tokens, d_sums))
    assert (outputs[1].tokens[~MASK] == 0).all() and (gradients[1].tokens[~MASK] == 0).all()
    np.testing.assert_array_equal(outputs[1].tokens, outputs[0].tokens)
    for name in ("tokens", "router", "gate", "rows"):
        np.testing.assert_array_equal(getattr(gradients[1], name), getattr(gradients[0], name))


def test_a_bad_expert_spoils_only_its_tokens() -> None:
    random, tokens, router, weights = draw(seed=6)
    output = reference.moe_layer(tokens, router, weights)
    weights.w1[1, 0, 0] = np.nan
    spoilt = reference.moe_layer(tokens, router, weights)
    found = reference.moe_layer_gradient(tokens, router, weights, spoilt, random.normal(size=(T, D)))
    users = output.routing.expert[:, 0] == 1
    assert users.any() and not users.all()
    np.testing.assert_array_equal(np.isnan(spoilt.tokens).all(axis=1), users)
    np.testing.assert_array_equal(np.isnan(found.tokens).any(axis=1), users)
    assert np.isnan(found.weights.w1).any(axis=(1, 2)).tolist() == [False, True, False]
