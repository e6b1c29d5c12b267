"""What a step does beyond its update: leave it out if it is not finite, keep the scale below its limit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import limoe.train.step
from limoe.config.presets import preset
from limoe.config.settings import override
from limoe.parallel.parameters import KERNEL, VECTOR
from limoe.train.gradient import Gradient
from limoe.train.losses import AUXILIARY_LOSSES, LossTerms
from limoe.train.optim import make_optimizer
from limoe.train.step import TrainState, make_step


@pytest.fixture
def step_of(monkeypatch):
    """A step whose gradient is in the place of its images, and whose loss is the first of its text."""

    def gradient(graph, parameters, images, text, *others):
        zero = jnp.zeros(())
        terms = LossTerms(text[0], zero, zero, dict.fromkeys(AUXILIARY_LOSSES, zero))
        return Gradient({"w": images, "log_scale": -images.sum()}, terms, None)

    monkeypatch.setattr(limoe.train.step, "gradient", gradient)

    def make(*settings):
        config = override(preset("tiny-dense"), settings)
        optimizer = make_optimizer(config.optimizer, config.train.steps, {"w": KERNEL, "log_scale": VECTOR})
        parameters = {"w": jnp.ones((2, 2)), "log_scale": jnp.log(jnp.float32(10))}
        state = TrainState(jnp.int32(0), parameters, optimizer.init(parameters))
        return state, jax.jit(make_step(None, optimizer, config))  # pyright: ignore[reportArgumentType]

    return make


GRADIENT, LOSS, COUNTS = jnp.arange(1.0, 5.0).reshape(2, 2), jnp.array([3.0]), jnp.zeros((1, 3), jnp.int32)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_a_step_that_is_not_finite_leaves_its_update_out(step_of, name):
    state, step = step_of("train.non_finite=skip", f"optimizer.name={name}")
    _, plain = step_of(f"optimizer.name={name}")
    first, _ = step(state, GRADIENT, LOSS, COUNTS)
    jax.tree.map(np.testing.assert_array_equal, first, plain(state, GRADIENT, LOSS, COUNTS)[0])
    assert (np.asarray(first.parameters["w"]) < 1).all()
    for gradient, loss in ((GRADIENT.at[0, 0].set(jnp.nan), LOSS), (GRADIENT, LOSS * jnp.inf)):
        second, report = step(first, gradient, loss, COUNTS)
        assert not np.isfinite([report.gradient_norm, report.loss.total]).all()
        jax.tree.map(np.testing.assert_array_equal, second.parameters, first.parameters)
        jax.tree.map(np.testing.assert_array_equal, second.optimizer[:-1], first.optimizer[:-1])
        # The learning rate goes on by steps, as the log says.
        assert (int(second.step), int(second.optimizer[-1].count)) == (2, 2)


@pytest.mark.usefixtures("as_users_run_it")
def test_the_scale_stays_below_its_limit(step_of):
    settings = ("optimizer.learning_rate=1", "optimizer.warmup_steps=0")
    scales = []
    for more in ((), ("loss.max_logit_scale=12",)):
        state, step = step_of(*settings, *more)
        scales.append(float(jnp.exp(step(state, GRADIENT, LOSS, COUNTS)[0].parameters["log_scale"])))
    assert scales[0] > 20 and scales[1] == pytest.approx(12, rel=1e-6)
