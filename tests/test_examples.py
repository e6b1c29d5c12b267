"""The examples do what they say: a model learns by the layer as it does by a loop over experts in plain JAX."""

import numpy as np
import pytest

from examples.language_model import FAMILIES, Sizes, by_layer, by_loop, train

SMALL = Sizes(depth=1, width=16, heads=2, experts=4, hidden=8, length=16, batch=4)
STEPS, APART = 20, 1e-4  # nats a byte, in all of the first steps


@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_model_learns_by_the_layer_as_by_a_loop(family):
    layer, loop = (list(train(family, mix, STEPS, SMALL)) for mix in (by_layer, by_loop))
    np.testing.assert_allclose(layer, loop, rtol=0, atol=APART)
    assert layer[-1] < layer[0] - 0.5


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_model_learns_for_200_steps(family):
    layer, loop = (np.array(list(train(family, mix, 200))) for mix in (by_layer, by_loop))
    np.testing.assert_allclose(layer[:STEPS], loop[:STEPS], rtol=0, atol=APART)
    assert abs(layer[-STEPS:].mean() - loop[-STEPS:].mean()) < 0.02
    assert layer[-STEPS:].mean() < 0.6 * layer[0]
