"""The train step: accumulation, noise, the dense twin, and gradients that reach every parameter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_cases import small_batch, small_config, small_model

from limoe.config.settings import override
from limoe.model import moe
from limoe.model.build import parameter_kinds
from limoe.model.moe import MoeLayer, RoutingContext, moe_mlp
from limoe.train.gradient import gradient, step_key
from limoe.train.losses import AUXILIARY_LOSSES
from limoe.train.optim import make_optimizer
from limoe.train.step import TrainState, make_step

# Two repeats of (dense, experts) in one scan; four groups of two pairs.
BASE = ("depth=4", "moe_layers=1,3", "batch_size=8", "num_choices=2", "local_image=true", "aux_weight=1")
STEP = 3


@functools.cache
def gradient_function(*settings: str):
    """A configuration and its compiled gradient; the parameters are those of one seed for all."""
    config = small_config(*BASE, *settings)
    graph, parameters = small_model(config)
    function = lambda parameters, images, text, step: gradient(graph, parameters, images, text, step, config)  # noqa: E731
    return config, parameters, jax.jit(function)


@functools.cache
def gradient_of(*settings: str):
    config, parameters, function = gradient_function(*settings)
    return function(parameters, *small_batch(config), jnp.int32(STEP))


def norm(tree) -> float:
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(tree))))


def assert_same_gradient(actual, expected, *, terms: int) -> None:
    """Every entry within 2 eps sqrt(terms) of the whole gradient, a few such sums in a row."""
    bound = 8 * 2 * 2.0**-23 * np.sqrt(terms) * norm(expected)
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: np.testing.assert_allclose(a, b, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path)),
        actual,
        expected,
    )


ACCUMULATION = [("softmax", 4), ("sigmoid", 4), pytest.param("softmax", 2, marks=pytest.mark.full)]


@pytest.mark.parametrize(("contrastive", "chunks"), ACCUMULATION)
def test_accumulation_is_the_gradient_of_the_whole_batch(contrastive, chunks):
    grads, terms, routing = gradient_of(f"contrastive={contrastive}")
    other_grads, other_terms, other_routing = gradient_of(f"contrastive={contrastive}", f"accumulation={chunks}")
    # The same tokens find no room, and there are some.
    np.testing.assert_array_equal(other_routing.kept, routing.kept)
    np.testing.assert_array_equal(other_routing.sums.wanted, routing.sums.wanted)
    assert (routing.kept < routing.sums.wanted).any()
    assert routing.kept.shape[:2] == (2, 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), other_terms, terms)
    assert_same_gradient(other_grads, grads, terms=routing.sums.tokens.sum())


def test_accumulation_of_the_dense_twin():
    grads, terms, routing = gradient_of("moe_layers=()")
    other_grads, other_terms, other_routing = gradient_of("moe_layers=()", "accumulation=2")
    assert routing is None and other_routing is None
    assert float(terms.auxiliary_total) == 0 and not any(terms.auxiliary.values())
    np.testing.assert_allclose(other_terms.total, terms.total, rtol=1e-6)
    assert_same_gradient(other_grads, grads, terms=100)


def test_routing_of_a_chunk_is_decided_once(monkeypatch):
    """By the first pass over it, so that no near tie falls the other way in the second."""
    seen = {"first": {}, "second": {}}

    def watched(tokens, router, weights, spec, inputs, *, mesh):
        result = moe_mlp(tokens, router, weights, spec, inputs, mesh=mesh)
        when = "first" if inputs.expert is None else "second"

        def note(noise, *decided):
            # The noise says which layer and which groups these are.
            seen[when][float(noise)] = [np.asarray(part) for part in decided]

        jax.debug.callback(note, inputs.noise[0, 0], result.expert, result.priority, result.kept)
        return result

    monkeypatch.setattr(moe, "moe_mlp", watched)
    config = small_config(*BASE, "compute_dtype=bfloat16", "accumulation=2", "capacity_factor=0.75")
    _, parameters = small_model(config)
    images, text = map(jnp.asarray, small_batch(config))
    run = lambda config: gradient(graph_of(config), parameters, images, text, jnp.int32(STEP), config)  # noqa: E731
    found = jax.jit(lambda: run(config))()
    jax.effects_barrier()
    assert len(seen["first"]) == 4 and seen["first"].keys() == seen["second"].keys()  # two layers, two chunks
    for noise, decided in seen["first"].items():
        jax.tree.map(np.testing.assert_array_equal, seen["second"][noise], decided)
        assert decided[0].shape == (4 * config.model.tokens_per_example, 2)
    assert (found.routing.kept < found.routing.sums.wanted).any()

    expected = jax.jit(lambda: run(override(config, ["accumulation=1"])))()
    np.testing.assert_array_equal(found.routing.kept, expected.routing.kept)
    off = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, found.parameters, expected.parameters)
    assert norm(off) < 0.02 * norm(expected.parameters)


def graph_of(config):
    return small_model(config)[0]


def test_a_choice_that_was_made_is_followed():
    config = small_config(*BASE, "num_choices=1", "text_padding=keep").model
    layer = MoeLayer(config, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    tokens = jnp.asarray(np.random.default_rng(0).normal(size=(8 * config.tokens_per_example, config.width)), "float32")

    @jax.jit
    def run(state, choice):
        context = RoutingContext(jax.random.key(0), 0, group_stride=0, choice=choice)
        return nnx.merge(graph, state)(tokens, None, context, jnp.int32(1), config.lengths)

    first, report = run(state, None)
    again = jax.tree.map(lambda leaf: jnp.stack([jnp.zeros_like(leaf), leaf]), report.choice)  # of layer 1
    second, other = run(state, again)
    np.testing.assert_allclose(second, first, rtol=1e-6, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, other.choice, report.choice)
    # The next expert of each, and the last come first.
    turned = again._replace(expert=(again.expert + 1) % config.num_experts, priority=-again.priority)
    third, other = run(state, turned)
    np.testing.assert_array_equal(other.choice.expert, turned.expert[1])
    np.testing.assert_allclose(other.routing.sums.wanted, np.roll(report.routing.sums.wanted, 1, axis=-1))
    assert (np.asarray(third) != np.asarray(first)).any(axis=1).mean() > 0.5


def slices(path, leaf) -> np.ndarray:
    """A parameter as [copies, ...]: one for each repeat of a scan, and for experts one for each of them."""
    names = [str(getattr(key, "key", key)) for key in path]
    leaf = np.asarray(leaf)
    leading = int("segments" in names) + int(names[-1] in ("w1", "b1", "w2", "b2"))
    return leaf.reshape(int(np.prod(leaf.shape[:leading])), -1)


@pytest.mark.parametrize("settings", [(), ("contrastive=sigmoid", "accumulation=4")])
def test_every_parameter_has_a_gradient(settings):
    grads, _, _ = gradient_of(*(settings or ("contrastive=softmax",)))
    largest = norm(grads)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        sizes = np.abs(slices(path, leaf)).max(axis=1)
        if name.endswith("['key']['bias']"):
            # A softmax over keys does not see what is added to all of them.
            assert (sizes < 1e-5 * largest).all(), name
        else:
            assert (sizes > 1e-7 * largest).all(), name
    assert ("logit_bias" in grads) == ("contrastive=sigmoid" in settings)


def test_each_auxiliary_weight_counts_for_its_term_and_no_other():
    weights = dict(zip(AUXILIARY_LOSSES, (2, 3, 5, 7, 11, 13, 17), strict=True))
    config = small_config(
        *BASE,
        *(f"{name}_weight={weight}" for name, weight in weights.items()),
        # Above the entropies of a new router, else these two terms are 0.
        *("threshold_experts_text=4", "threshold_experts_image=4"),
    )
    graph, parameters = small_model(config)
    batch = small_batch(config)
    terms = jax.jit(lambda *given: gradient(graph, *given, config)[1])(parameters, *batch, jnp.int32(STEP))
    # aux_weight is 1, so the mean of the seven.
    shares = {name: weight / 7 * float(terms.auxiliary[name]) for name, weight in weights.items()}
    expected = float(terms.contrastive) + sum(shares.values())
    # Nine numbers in eight sums, each of which rounds once.
    error = 8 * 2.0**-24 * expected
    assert float(terms.total) == pytest.approx(expected, rel=0, abs=error)
    # Any weight that was off by one would show.
    assert min(share / weights[name] for name, share in shares.items()) > 100 * error, shares


def test_the_auxiliary_loss_reaches_the_routers():
    def routers(grads):
        return np.asarray(grads["segments"][0]["blocks"][1]["moe"]["router"])

    with_losses, _, _ = gradient_of("contrastive=softmax")
    without, terms, _ = gradient_of("aux_weight=0")
    assert float(terms.auxiliary_total) == 0 and float(terms.auxiliary["importance"]) > 0
    for layer in range(2):
        assert np.abs(routers(with_losses)[layer] - routers(without)[layer]).max() > 1e-3


def test_a_small_step_downhill_lowers_the_loss_by_what_the_gradient_says():
    config, parameters, function = gradient_function("contrastive=softmax")
    batch = small_batch(config)
    grads, before, routing = function(parameters, *batch, jnp.int32(STEP))
    length = 1e-3
    moved = jax.tree.map(lambda p, g: p - length / norm(grads) * g, parameters, grads)
    _, after, other_routing = function(moved, *batch, jnp.int32(STEP))
    np.testing.assert_array_equal(other_routing.kept, routing.kept)  # else the loss would have jumped
    expected = -length * norm(grads)
    assert float(after.total - before.total) == pytest.approx(expected, rel=0.05)


def test_noise_is_a_function_of_seed_and_step():
    config, parameters, function = gradient_function("contrastive=softmax")
    batch = small_batch(config)
    grads, _, routing = function(parameters, *batch, jnp.int32(STEP))
    again, _, _ = function(parameters, *batch, jnp.int32(STEP))
    jax.tree.map(np.testing.assert_array_equal, again, grads)
    _, _, later = function(parameters, *batch, jnp.int32(STEP + 1))
    assert (np.asarray(later.sums.largest_gate) != routing.sums.largest_gate).all()
    np.testing.assert_array_equal(later.sums.tokens, routing.sums.tokens)

    def key(settings, step):
        return tuple(jax.random.key_data(step_key(override(config, settings).train.seed, jnp.int32(step))).tolist())

    assert key([], 1) == key(["learning_rate=0.1"], 1)
    assert len({key([], 0), key([], 1), key(["train.seed=1"], 0), key(["train.seed=1"], 1)}) == 4


def test_noise_and_random_order_are_functions_of_layer_and_group():
    config = small_config(*BASE, "num_choices=1", "priority=random", "text_padding=keep").model
    layer = MoeLayer(config, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    length = config.tokens_per_example
    tokens = jnp.asarray(np.random.default_rng(0).normal(size=(8 * length, config.width)), jnp.float32)

    @jax.jit
    def run(state, tokens, seed, number, first_group):
        context = RoutingContext(jax.random.key(seed), first_group, group_stride=0)
        return nnx.merge(graph, state)(tokens, None, context, number, config.lengths)

    whole, (routing, _) = run(state, tokens, 0, 0, 0)
    # Groups 2 and 3 alone, told that they are groups 2 and 3.
    part, (part_routing, _) = run(state, tokens[4 * length :], 0, 0, 2)
    np.testing.assert_array_equal(part_routing.kept, routing.kept[2:])
    np.testing.assert_allclose(part_routing.sums.largest_gate, routing.sums.largest_gate[2:], rtol=1e-6)
    dropped = (np.asarray(whole) == 0).all(axis=1)
    assert dropped.any()
    np.testing.assert_array_equal((np.asarray(part) == 0).all(axis=1), dropped[4 * length :])
    # Every group draws its own, and so does every layer and every key.
    same = jnp.tile(tokens[: 2 * length], (4, 1))
    base = run(state, same, 0, 0, 0)[1].routing.sums.largest_gate.sum(1)
    assert len(set(base.tolist())) == 4
    for seed, number in ((0, 1), (1, 0)):
        assert (run(state, same, seed, number, 0)[1].routing.sums.largest_gate.sum(1) != base).all()


def test_training_steps_lower_the_loss_and_report_what_they_did():
    settings = ["aux_weight=0.04", "learning_rate=0.01", "warmup_steps=0", "cooldown_steps=0"]
    config = override(small_config(*BASE), settings)
    graph, parameters = small_model(config)
    optimizer = make_optimizer(config.optimizer, config.train.steps, parameter_kinds(graph, parameters))
    step = jax.jit(make_step(graph, optimizer, config), donate_argnums=0)
    state = TrainState(jnp.int32(0), parameters, optimizer.init(parameters))
    batch = small_batch(config)
    seen = []
    for number in range(20):
        old = jax.tree.leaves(state.parameters)
        state, report = step(state, *batch, np.array([[1, number]], np.int32))
        assert int(state.step) == number + 1
        assert all(leaf.is_deleted() for leaf in old)
        seen.append(float(report.loss.total))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(report))
        assert float(report.gradient_norm) > 0
        assert report.counts.tolist() == [1, number]
    assert seen[-1] < 0.8 * seen[0]
    assert report.routing.wanted.shape == (2, 2, config.model.num_experts)
    assert (np.asarray(report.routing.success_rate) <= 1).all()
    assert float(report.scale) == pytest.approx(np.exp(float(state.parameters["log_scale"])), rel=0.05)
