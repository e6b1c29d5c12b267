"""The layer and its operations against the reference: values and all gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_cases import PATTERNS, SHAPES, Shape, assert_close, gates, magnitudes, plan_of, weights
from spec_cases import spec_and_inputs

import reference
from moe_kernels import (
    MlpWeights,
    MoeSpec,
    RouteInputs,
    RoutingSums,
    combine,
    dispatch,
    expert_mlp,
    moe_mlp,
    random_priority,
    route,
    router_noise,
    routing_figures,
)

pytestmark = pytest.mark.compat
MODALITIES = 2


@functools.partial(jax.jit, static_argnums=(0, 1))
def experts_and_gradients(shape: Shape, activation, plan, tokens, gate, w: MlpWeights, dy):
    def chain(tokens, gate, w):
        rows = dispatch(tokens, plan)
        return combine(expert_mlp(rows, w, plan, activation=activation), gate, plan)

    y, pull = jax.vjp(chain, tokens, gate, w)
    return y, *pull(dy)


@given(
    st.sampled_from(SHAPES),
    st.integers(0, 10**6),
    st.sampled_from(PATTERNS),
    st.sampled_from(["gelu_tanh", "gelu_erf"]),
)
def test_dispatch_experts_combine(shape, seed, pattern, activation):
    rng = np.random.default_rng(seed)
    expert, gate = gates(shape, seed, pattern)
    plan = plan_of(shape, expert, gate, None)
    tokens, dy = rng.normal(size=(2, shape.tokens, shape.width)).astype(np.float32)
    w = weights(shape, rng)
    y, dtokens, dgate, dw = experts_and_gradients(shape, activation, plan, tokens, gate, w, dy)

    twin = reference.make_plan(
        expert, gate, num_experts=shape.experts, num_groups=shape.groups, capacity=shape.capacity, priority="arrival"
    )
    w64 = reference.MlpWeights(*(np.asarray(x, np.float64) for x in w))
    rows = reference.dispatch(tokens, twin)
    out = reference.expert_mlp(rows, w64, twin, activation)
    back = reference.combine_gradient(out, gate, dy.astype(np.float64), twin)
    experts = reference.expert_mlp_gradient(rows, w64, back.rows, twin, activation)

    length = max(shape.width, shape.hidden)
    # Entries may cancel (in a sum over few terms, or where the slope of GELU crosses 0), but not what they are sums of.
    behind = magnitudes(tokens, dy, expert, gate, twin.position >= 0, w)
    assert_close(y, reference.combine(out, gate, twin), length=length, name="y", scale=behind.y)
    assert_close(
        dtokens, reference.dispatch_gradient(experts.rows, twin), length=length, name="dx", scale=behind.tokens
    )
    # An entry of dgate is a dot product that may cancel: measure it against its largest possible value.
    size = np.linalg.norm(dy, axis=1) * max(np.linalg.norm(out, axis=1).max(), 1e-30)
    assert_close(dgate, back.gate, length=length, name="dgate", roundings=12, scale=size)
    for name, mine, theirs, size in zip(w._fields, dw, experts.weights, behind.weights, strict=True):
        mine, theirs, size = (np.asarray(x).reshape(shape.experts, -1) for x in (mine, theirs, size))
        assert_close(mine, theirs, length=length * shape.tokens, name=f"d{name}", scale=size)
    unused = np.asarray(plan.runs.size) == 0
    assert all((np.asarray(x)[unused] == 0).all() for x in dw)


def layer_arguments(shape: Shape, seed: int):
    rng = np.random.default_rng(seed)
    tokens, dy = rng.normal(size=(2, shape.tokens, shape.width)).astype(np.float32)
    router = rng.normal(size=(shape.width, shape.experts)).astype(np.float32)
    noise = (rng.normal(size=(shape.tokens, shape.experts)) / shape.experts).astype(np.float32)
    modality = rng.integers(0, MODALITIES, shape.tokens).astype(np.int32)
    mask = rng.random(shape.tokens) < 0.8
    dsums = RoutingSums(
        *(
            rng.normal(size=np.shape(field)).astype(np.float32)
            for field in reference.zero_sums(
                num_groups=shape.groups, num_modalities=MODALITIES, num_experts=shape.experts
            )
        )
    )
    return tokens, router, weights(shape, rng), noise, modality, mask, dy, dsums


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def layer_and_gradients(shape: Shape, priority, noisy, tokens, router, w, noise, modality, mask, dy, dsums):
    options = {"num_choices": shape.choices, "num_groups": shape.groups, "modality": modality}
    options |= {"num_modalities": MODALITIES, "mask": mask, "noise": noise if noisy else None}
    routing = route(tokens, router, *spec_and_inputs(**options))

    def layer(tokens, router, w):
        more = {"capacity_factor": shape.capacity_factor, "priority": priority, "first_modality": 1}
        more |= {"key": jax.random.key(7)}
        output = moe_mlp(tokens, router, w, *spec_and_inputs(**options, **more))
        return (output.tokens, output.sums), output

    (_y, _sums), pull, output = jax.vjp(layer, tokens, router, w, has_aux=True)
    return routing, output, pull((dy, dsums))


def logits_magnitude(twin, dy, dsums, y_magnitude, noisy) -> np.ndarray:
    """What the gradient of each token's logits [T] is the sum of, as an absolute value: one term for each field."""
    num_experts = twin.routing.clean_logits.shape[1]
    log_experts, largest = np.log(num_experts), float(np.abs(twin.routing.noisy_logits).max())
    slopes = {
        "probability": 2,
        "entropy": 2 * (log_experts + 2 * largest),
        "logsumexp_squared": 2 * (log_experts + largest),
        "load": 2 * num_experts if noisy else 0,
        "largest_gate": 2,
    }
    of_sums = sum(slope * np.abs(getattr(dsums, name)).max() for name, slope in slopes.items())
    return np.sum(np.abs(dy) * y_magnitude, axis=1) + of_sums


PRIORITIES = ["bpr", "arrival", "random", "modality"]
# Each is a program to compile: every shape twice, every priority with and without noise.
PROGRAMS = [
    program
    for i, shape in enumerate(SHAPES)
    for program in ((shape, PRIORITIES[i % 4], i % 2 == 0), (shape, PRIORITIES[(i + 2) % 4], i % 2 == 1))
]


@given(st.sampled_from(PROGRAMS), st.integers(0, 10**6))
def test_the_whole_layer(program, seed):
    shape, priority, noisy = program
    tokens, router, w, noise, modality, mask, dy, dsums = layer_arguments(shape, seed)
    routing, output, (dtokens, drouter, dw) = layer_and_gradients(
        shape, priority, noisy, tokens, router, w, noise, modality, mask, dy, dsums
    )
    # The decisions are taken in float32: given those (a near tie may differ in float64), all numbers must follow.
    values = {"bpr": routing.gate[:, 0]}.get(priority)
    if priority == "random":
        size = shape.tokens // shape.groups
        values = random_priority(jax.random.key(7), num_groups=shape.groups, group_size=size)
    twin = reference.moe_layer(
        tokens,
        router,
        w,
        num_choices=shape.choices,
        capacity_factor=shape.capacity_factor,
        num_groups=shape.groups,
        priority="random" if values is not None else priority,
        priority_values=None if values is None else np.asarray(values),
        noise=noise if noisy else None,
        mask=mask,
        modality=modality,
        num_modalities=MODALITIES,
        first_modality=1,
        expert=np.asarray(routing.expert),
    )
    length = max(shape.width, shape.hidden, shape.experts)
    behind = magnitudes(tokens, dy, twin.routing.expert, twin.routing.gate, twin.plan.position >= 0, w)
    # A softmax errs, relatively, by twice what its logits err by absolutely.
    roundings = 4 + 2 * float(np.abs(twin.routing.noisy_logits).max())
    assert_close(output.tokens, twin.tokens, length=length, name="y", scale=behind.y, roundings=roundings)
    np.testing.assert_array_equal(output.kept, twin.kept)
    for name, mine, theirs in zip(RoutingSums._fields, output.sums, twin.sums, strict=True):
        mine, theirs = np.asarray(mine), np.asarray(theirs)
        assert_close(mine.reshape(1, -1), theirs.reshape(1, -1), length=length * shape.tokens, name=name, roundings=8)
    back = reference.moe_layer_gradient(tokens, router, w, twin, dy, dsums)
    dlogits = logits_magnitude(twin, dy, dsums, behind.y, noisy)
    size = behind.tokens + dlogits[:, None] * np.abs(router).sum(axis=1)
    # The slope of the load's normal distribution errs by the logits' error over its width, 1 / E.
    roundings_of_slope = roundings * (shape.experts if noisy else 1)
    assert_close(dtokens, back.tokens, length=length, name="dx", scale=size, roundings=roundings_of_slope)
    size = np.broadcast_to((np.abs(tokens).T @ dlogits)[:, None], router.shape)
    assert_close(drouter, back.router, length=shape.tokens, name="drouter", scale=size, roundings=roundings_of_slope)
    for name, mine, theirs, size in zip(w._fields, dw, back.weights, behind.weights, strict=True):
        mine, theirs, size = (np.asarray(x).reshape(shape.experts, -1) for x in (mine, theirs, size))
        assert_close(mine, theirs, length=length * shape.tokens, name=f"d{name}", scale=size, roundings=roundings)


@given(st.sampled_from(SHAPES), st.integers(0, 10**6))
def test_experts_are_the_reference_s_where_logits_are_exact(shape, seed):
    # Small integers: every logit is exact, and ties are common.
    rng = np.random.default_rng(seed)
    tokens = rng.integers(-2, 3, (shape.tokens, shape.width)).astype(np.float32)
    router = rng.integers(-1, 2, (shape.width, shape.experts)).astype(np.float32)
    mine = route(jnp.asarray(tokens), jnp.asarray(router), MoeSpec(num_choices=shape.choices, num_groups=shape.groups))
    twin = reference.route(tokens, router, num_choices=shape.choices, num_groups=shape.groups)
    np.testing.assert_array_equal(mine.expert, twin.expert)
    assert_close(mine.gate, twin.gate, length=shape.experts, name="gate")


def test_zeros_of_both_signs_are_a_tie():
    logits = jnp.array([[-0.0, 0.0, 1.0, -1.0], [0.0, -0.0, -1.0, -0.0]])
    assert route(logits, jnp.eye(4), MoeSpec(num_choices=2)).expert.tolist() == [[2, 0], [0, 1]]
    # The product is -0.0 in the first column, +0.0 in the second.
    tokens, router = -jnp.ones((1, 3)), jnp.array([[0.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert route(tokens, router).expert.tolist() == [[0]]


def test_figures_are_what_they_say():
    shape = SHAPES[4]
    tokens, router, w, noise, modality, mask, _, _ = jax.tree.map(jnp.asarray, layer_arguments(shape, 3))
    output = moe_mlp(
        tokens,
        router,
        w,
        MoeSpec(capacity_factor=0.5, num_groups=shape.groups, num_modalities=2),
        RouteInputs(noise=noise, mask=mask, modality=modality),
    )
    twin = reference.route(
        tokens, router, num_choices=1, num_groups=1, noise=noise, modality=modality, num_modalities=2, mask=mask
    )
    figures = routing_figures(output.sums, output.kept)
    for m in range(2):
        mine = np.asarray((modality == m) & mask)
        p = np.stack([reference.softmax(row) for row in twin.clean_logits[mine]])
        assert np.isclose(figures.success_rate[m], np.asarray(output.kept)[:, m].sum() / mine.sum())
        assert np.isclose(figures.largest_gate[m], twin.gate[mine, 0].mean(), rtol=1e-5)
        assert np.isclose(figures.local_entropy[m], np.mean([reference.entropy(row) for row in p]), rtol=1e-5)
        assert np.isclose(figures.mean_entropy[m], reference.entropy(p.mean(0)), rtol=1e-5)
        assert np.isclose(figures.effective_experts[m], np.exp(reference.entropy(p.mean(0))), rtol=1e-5)
        np.testing.assert_array_equal(figures.wanted[m], np.bincount(twin.expert[mine, 0], minlength=shape.experts))


def test_noise_has_the_stated_deviation_and_depends_on_the_group_alone():
    draw = router_noise(jax.random.key(0), num_groups=8, group_size=512, num_experts=4)
    assert abs(float(draw.std()) - 0.25) < 0.005
    later = router_noise(jax.random.key(0), num_groups=3, group_size=512, num_experts=4, first_group=jnp.int32(5))
    np.testing.assert_array_equal(draw[5 * 512 :], later)


def test_outside_of_jit_each_verb_is_one_program():
    """Somebody who tries the layer in a notebook does not wait for a compilation of every small operation."""
    compiled: list[str] = []

    def listen(event: str, seconds: float, **facts):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    tokens, router = jnp.ones((26, 7)), jnp.ones((7, 3))
    w = MlpWeights(jnp.ones((3, 7, 11)), None, jnp.ones((3, 11, 7)), None)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        moe_mlp(tokens, router, w, MoeSpec(capacity_factor=1.0))
        first, compiled[:] = len(compiled), []
        moe_mlp(tokens, router, w, MoeSpec(capacity_factor=1.0))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert 0 < first < 15 and not compiled
