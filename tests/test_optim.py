"""Adafactor against a NumPy loop; what is factored, capped, decayed and clipped; the schedule's corners."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from limoe.config.presets import preset
from limoe.config.schema import Config, OptimizerConfig
from limoe.parallel.parameters import (
    EXPERT_KERNEL,
    EXPERT_VECTOR,
    KERNEL,
    NORM,
    ROUTER,
    TABLE,
    VECTOR,
    kinds_of,
    parameter_path,
)
from limoe.train import optim
from limoe.train.optim import AdafactorState, FactoredMoment

EPS = float(np.finfo(np.float32).eps)


def with_optimizer(preset_name: str = "tiny", steps: int | None = None, **changes: object) -> Config:
    config = preset(preset_name)
    train = replace(config.train, steps=steps) if steps else config.train
    return replace(config, train=train, optimizer=replace(config.optimizer, **changes))


KINDS = {
    "kernel": KERNEL,
    "w1": EXPERT_KERNEL,
    "w2": EXPERT_KERNEL,
    "router": ROUTER,
    "token_table": TABLE,
    "text_position": TABLE,
    "bias": VECTOR,
    "b1": EXPERT_VECTOR,
    "b2": EXPERT_VECTOR,
    "scale": NORM,
    "log_scale": VECTOR,
}


def adafactor(**settings: object) -> optax.GradientTransformation:
    return optim.scale_by_adafactor(replace(OptimizerConfig(), **settings), KINDS)


def make_optimizer(config: Config, kinds: dict = KINDS) -> optax.GradientTransformation:
    return optim.make_optimizer(config.optimizer, config.train.steps, kinds)


def make_schedule(config: Config) -> optax.Schedule:
    return optim.make_schedule(config.optimizer, config.train.steps)


def value_of(state: AdafactorState, name: str) -> np.ndarray:
    return np.asarray(state.momentum[name])


class LoopAdafactor:
    """One parameter's Adafactor in float64, element by element, straight from the paper's section 4."""

    def __init__(self, shape: tuple[int, ...], factored: bool):
        self.shape, self.factored = shape, factored
        if factored:
            self.row, self.column = np.zeros(shape[:-1]), np.zeros((*shape[:-2], shape[-1]))
        else:
            self.moment = np.zeros(shape)

    def normalise(self, gradient: np.ndarray, t: int) -> np.ndarray:
        beta = min(1 - t**-0.8, 0.999)
        out = np.zeros(self.shape)
        if not self.factored:
            for i in np.ndindex(*self.shape):
                self.moment[i] = beta * self.moment[i] + (1 - beta) * (gradient[i] ** 2 + 1e-30)
                out[i] = gradient[i] / np.sqrt(self.moment[i])
            return out
        *_, height, width = self.shape
        for s in np.ndindex(*self.shape[:-2]):
            for i in range(height):
                mean = sum(gradient[s][i, j] ** 2 + 1e-30 for j in range(width)) / width
                self.row[s][i] = beta * self.row[s][i] + (1 - beta) * mean
            for j in range(width):
                mean = sum(gradient[s][i, j] ** 2 + 1e-30 for i in range(height)) / height
                self.column[s][j] = beta * self.column[s][j] + (1 - beta) * mean
            mean_row = sum(self.row[s]) / height
            for i in range(height):
                for j in range(width):
                    out[s][i, j] = gradient[s][i, j] / np.sqrt(self.row[s][i] * self.column[s][j] / mean_row)
        return out


@pytest.mark.parametrize(
    ("name", "shape", "factored"),
    [
        ("w1", (3, 5, 6), True),
        ("w1", (2, 3, 5, 6), True),  # layers of a scan in front of the experts
        ("kernel", (6, 5), True),
        ("kernel", (6, 3), False),  # one side is below the smallest that is factored
        ("router", (6, 5), False),
        ("b1", (5, 6), False),
        ("scale", (7,), False),
        ("log_scale", (), False),
    ],
)
def test_adafactor_is_the_numpy_loop(name, shape, factored):
    rng = np.random.default_rng(0)
    transformation = adafactor(factored_size=4)
    step = jax.jit(transformation.update)
    params = {name: jnp.zeros(shape)}
    state = transformation.init(params)
    loop = LoopAdafactor(shape, factored)
    assert isinstance(state.second_moment[name], FactoredMoment) == factored
    for t in range(1, 6):
        # Sizes from 1e-6 to 1e6 between rows, and a row of exact zeros.
        gradient = rng.normal(size=shape) * 10.0 ** rng.integers(-6, 7, size=(*shape[:-1], 1) if shape else ())
        if len(shape) >= 2:
            gradient[..., 0, :] = 0.0
        gradient = gradient.astype(np.float32)
        before = value_of(state, name).astype(np.float64)
        updates, state = step({name: jnp.asarray(gradient)}, state)
        # From the momentum that is really kept, so that a tie in bfloat16 rounding cannot blur the comparison.
        normalised = loop.normalise(gradient.astype(np.float64), t)
        expected = 0.9 * before + 0.1 * normalised
        size = 0.9 * np.abs(before) + 0.1 * np.abs(normalised)
        bound = 2 * EPS * np.sqrt(4 * 6 * t)  # means over at most 6 elements, t updates, a few roundings each
        assert (np.abs(np.asarray(updates[name], np.float64) - expected) <= bound * size).all()
        # The momentum is the update itself, rounded to bfloat16.
        assert state.momentum[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(value_of(state, name), np.asarray(updates[name].astype(jnp.bfloat16)))
    assert int(state.num_updates) == 5


@pytest.mark.parametrize(("cap", "beta"), [(0.999, 0.999), (0.9999999, 1 - 1e6**-0.8), (0.5, 0.5)])
def test_the_decay_of_the_second_moment_is_capped(cap, beta):
    transformation = adafactor(beta2_cap=cap)
    params = {"bias": jnp.ones(3)}
    state = transformation.init(params)
    state = state._replace(num_updates=jnp.asarray(10**6 - 1, jnp.int32), second_moment={"bias": jnp.ones(3)})
    _, state = transformation.update({"bias": jnp.full(3, 100.0)}, state)
    moment = beta + (1 - beta) * 100.0**2
    # 1 - beta loses beta's rounding, which the squared gradient multiplies.
    np.testing.assert_allclose(np.asarray(state.second_moment["bias"]), moment, atol=2 * EPS * 100**2, rtol=2 * EPS)


def test_experts_and_layers_are_not_factored_over():
    shapes = {
        "w1": (64, 40, 48),
        "w2": (5, 64, 48, 40),
        "b1": (64, 48),
        "b2": (5, 64, 40),
        "router": (40, 64),
        "scale": (64, 40),
        "kernel": (64, 40, 48),
        "token_table": (512, 40),
        "text_position": (16, 40),
    }
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    state = jax.eval_shape(adafactor().init, params)
    assert jax.tree.map(jnp.shape, state.second_moment) == {
        "w1": FactoredMoment(row=(64, 40), column=(64, 48)),
        "w2": FactoredMoment(row=(5, 64, 48), column=(5, 64, 40)),
        "b1": (64, 48),
        "b2": (5, 64, 40),
        "router": (40, 64),
        "scale": (64, 40),
        "kernel": FactoredMoment(row=(64, 40), column=(64, 48)),
        "token_table": FactoredMoment(row=(512,), column=(40,)),
        "text_position": (16, 40),
    }


def test_an_expert_s_update_does_not_depend_on_the_others():
    rng = np.random.default_rng(1)
    transformation = adafactor(factored_size=4)
    gradient = rng.normal(size=(64, 6, 5)).astype(np.float32)
    other = gradient.copy()
    other[1:] = rng.normal(size=(63, 6, 5)) * 1e3
    state = transformation.init({"w1": jnp.zeros((64, 6, 5))})
    update = jax.jit(transformation.update)
    first, _ = update({"w1": jnp.asarray(gradient)}, state)
    second, _ = update({"w1": jnp.asarray(other)}, state)
    np.testing.assert_array_equal(first["w1"][0], second["w1"][0])
    assert (first["w1"][1:] != second["w1"][1:]).any()


def test_an_expert_without_rows_gets_an_update_of_exactly_zero():
    transformation = adafactor(factored_size=4)
    gradient = jnp.ones((3, 6, 5)).at[1].set(0.0)
    updates, _ = jax.jit(transformation.update)({"w1": gradient}, transformation.init({"w1": gradient}))
    assert (updates["w1"][1] == 0).all() and (updates["w1"][0] != 0).all()


DECAYED = {"kernel", "w1", "w2", "router"}


@pytest.mark.parametrize("optimizer_name", ["adafactor", "adamw"])
def test_decay_is_decoupled_and_on_kernels_only(optimizer_name):
    config = with_optimizer(name=optimizer_name, weight_decay=0.125, learning_rate=0.5, warmup_steps=0)
    params = {name: jnp.full((2, 2), 3.0) for name in KINDS}
    optimizer = make_optimizer(config)
    gradient = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    rate = float(make_schedule(config)(0))
    for name, update in updates.items():
        expected = -rate / 0.5 * 0.125 * 3.0 if name in DECAYED else 0.0
        np.testing.assert_allclose(np.asarray(update), expected, rtol=4 * EPS, err_msg=name)


class Block(nnx.Module):
    def __init__(self) -> None:
        metadata = {"kernel_metadata": {"kind": KERNEL}, "bias_metadata": {"kind": VECTOR}}
        self.value = nnx.Linear(2, 2, rngs=nnx.Rngs(0), **metadata)
        # What a parameter is called says nothing.
        self.bias = nnx.Param(jnp.ones((3, 2, 2)), kind=EXPERT_KERNEL)
        self.kernel = nnx.Param(jnp.ones((3, 2)), kind=EXPERT_VECTOR)


class Tower(nnx.Module):
    def __init__(self) -> None:
        self.blocks = nnx.List([Block(), Block()])
        self.text_position = nnx.Param(jnp.ones((2, 2)), kind=TABLE)


def test_kinds_are_those_that_the_modules_say_in_dicts_and_nnx_states():
    tower = Tower()
    state, kinds = nnx.state(tower, nnx.Param), kinds_of(tower)
    block = {"bias": EXPERT_KERNEL, "kernel": EXPERT_VECTOR, "value/bias": VECTOR, "value/kernel": KERNEL}
    expected = {f"blocks/{number}/{name}": kind for number in (0, 1) for name, kind in block.items()}
    assert kinds == {**expected, "text_position": TABLE}
    for tree in (state, nnx.to_pure_dict(state)):
        assert [parameter_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)] == list(kinds)
    optimizer = make_optimizer(with_optimizer(weight_decay=0.1), kinds)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, state), optimizer.init(state), state)
    moved = {parameter_path(path) for path, leaf in jax.tree_util.tree_leaves_with_path(updates) if leaf.any()}
    assert moved == {path for path in kinds if path.endswith(("0/bias", "1/bias", "value/kernel"))}


@pytest.mark.parametrize("optimizer_name", ["adafactor", "adamw"])
def test_an_nnx_state_is_updated_like_a_dict(optimizer_name):
    config = with_optimizer(name=optimizer_name, factored_size=2)
    state = nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Param)
    gradient = jax.tree.map(jnp.cos, state)
    results = []
    for params, grads in ((state, gradient), (nnx.to_pure_dict(state), nnx.to_pure_dict(gradient))):
        optimizer = make_optimizer(config)
        updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
        results.append(optax.apply_updates(params, updates))
    in_state, in_dict = nnx.to_pure_dict(results[0]), results[1]
    jax.tree.map(np.testing.assert_array_equal, in_state, in_dict)
    assert (in_dict["kernel"] != nnx.to_pure_dict(state)["kernel"]).all()


def test_a_parameter_of_which_nobody_says_what_it_is():
    tower = Tower()
    tower.blocks[1].gamma = nnx.Param(jnp.zeros(2))
    with pytest.raises(ValueError, match=r"parameter 'blocks/1/gamma' has no kind; give its nnx.Param one"):
        kinds_of(tower)


def run(config: Config, gradients: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    params = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    optimizer = make_optimizer(config)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def random_gradients(size: float) -> list[dict[str, jax.Array]]:
    rng = np.random.default_rng(2)
    shapes = {"kernel": (3, 4), "bias": (4,)}
    return [{name: jnp.asarray(rng.normal(size=s) * size, jnp.float32) for name, s in shapes.items()} for _ in range(4)]


@pytest.mark.parametrize("optimizer_name", ["adafactor", "adamw"])
def test_gradients_are_clipped_by_their_global_norm_first(optimizer_name):
    # The first is cut to norm 1, the second is below and stays: their ratio, which normalising keeps, shows it.
    large, small = random_gradients(10.0)[0], random_gradients(0.01)[1]
    norm = np.sqrt(sum(float((value**2).sum()) for value in large.values()))
    assert norm > 1
    cut = jax.tree.map(lambda value: value / norm, large)
    clipped = run(with_optimizer(name=optimizer_name, clip_norm=1.0), [large, small])
    by_hand = run(with_optimizer(name=optimizer_name, clip_norm=0.0), [cut, small])
    unclipped = run(with_optimizer(name=optimizer_name, clip_norm=0.0), [large, small])
    for name in clipped:
        np.testing.assert_allclose(clipped[name], by_hand[name], rtol=4 * EPS)
        assert (np.abs(clipped[name] - unclipped[name]) > 1e-7).any()


def test_adamw_is_optax_s():
    config = with_optimizer(name="adamw", clip_norm=0.0, weight_decay=0.1)
    params = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    theirs = optax.adamw(
        make_schedule(config),
        b1=0.9,
        b2=config.optimizer.adam_beta2,
        weight_decay=0.1 / config.optimizer.learning_rate,
        mask={"kernel": True, "bias": False},
    )
    state = theirs.init(params)
    update = jax.jit(theirs.update)
    for gradient in random_gradients(1.0):
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    ours = run(config, random_gradients(1.0))
    for name in params:
        np.testing.assert_array_equal(ours[name], params[name])


@pytest.mark.parametrize("optimizer_name", ["adafactor", "adamw"])
def test_a_gradient_of_nan_is_not_hidden(optimizer_name):
    gradient = {"kernel": jnp.ones((3, 4)).at[1, 1].set(jnp.nan), "bias": jnp.ones(4)}
    assert jnp.isnan(run(with_optimizer(name=optimizer_name), [gradient])["kernel"]).any()


def test_schedule_at_its_corners():
    config = with_optimizer(steps=1000, learning_rate=2.0, warmup_steps=100, cooldown_steps=200, timescale=300.0)
    schedule = make_schedule(config)

    def root(steps_after_warmup: int) -> float:
        return (300 / (300 + steps_after_warmup)) ** 0.5

    corners = {
        0: 2 * 0.01,  # the first update is not wasted on a rate of zero
        49: 1.0,
        99: 2.0,  # the peak
        100: 2 * root(1),
        399: 2 * root(300),
        799: 2 * root(700),
        800: 2 * root(701),  # cool-down: 200 updates left, so still the whole
        801: 2 * root(702) * 199 / 200,
        900: 2 * root(801) * 100 / 200,
        999: 2 * root(900) / 200,  # the last update
        1000: 0.0,
        2000: 0.0,
    }
    rate_of = jax.jit(schedule)
    for step, rate in corners.items():
        np.testing.assert_allclose(float(rate_of(step)), rate, rtol=8 * EPS, err_msg=str(step))


def test_schedule_without_ramps_is_the_reverse_square_root():
    schedule = make_schedule(
        with_optimizer(steps=10, learning_rate=1.0, warmup_steps=0, cooldown_steps=0, timescale=1.0)
    )
    np.testing.assert_allclose(
        [float(schedule(step)) for step in range(4)], [(step + 2) ** -0.5 for step in range(4)], rtol=8 * EPS
    )


def test_the_paper_s_schedule_falls_as_the_root_of_the_step():
    schedule = make_schedule(preset("b16"))
    np.testing.assert_allclose(float(schedule(499_999)), 1e-3 * (10_000 / 500_000) ** 0.5, rtol=8 * EPS)
