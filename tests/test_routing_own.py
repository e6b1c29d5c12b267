"""Routings and inputs of a caller's own: what is out of range, not finite, jittered or differentiated, and sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_families import arguments, assert_near

from moe_kernels import (
    GluWeights,
    MoeSpec,
    RouteInputs,
    RouterSpec,
    RouterWeights,
    Routing,
    explain,
    make_plan,
    make_routing,
    moe_mlp,
    route,
)


def test_an_expert_that_does_not_exist_takes_no_place_of_another():
    """Reproduction: an id of -1 was packed to the last expert."""
    sums = route(jnp.eye(4), jnp.zeros((4, 3))).sums
    routing = Routing(jnp.array([[-1, 2], [0, 1], [3, 0], [2, 1]]), jnp.ones((4, 2)), sums)
    plan = make_plan(routing, num_experts=3)
    assert plan.kept.tolist() == [[[2.0, 2.0, 2.0]]]
    assert (np.asarray(plan.row) == plan.layout.num_rows).tolist() == [
        [True, False],
        [False] * 2,
        [True, False],
        [False] * 2,
    ]


def test_both_choices_on_one_expert_are_refused_or_nan_but_never_half_lost():
    expert, gate = jnp.zeros((4, 2), jnp.int32), jnp.ones((4, 2))
    with pytest.raises(ValueError, match="token 0 has experts"):
        make_routing(expert, gate, num_experts=2)
    traced = jax.jit(functools.partial(make_routing, num_experts=2))(expert, gate)
    assert np.isnan(traced.gate).all() and make_plan(traced, num_experts=2).kept.sum() == 0


def test_padding_stays_0_when_its_gates_are_renormalised_to_nan():
    x, router, experts, dy = arguments()
    spec, mask = MoeSpec(num_choices=3), jnp.arange(len(x)) % 4 > 0
    inputs = RouteInputs(mask=mask)

    def own(x, kernel):
        routing = route(x, kernel, spec, inputs)
        routing = routing._replace(gate=routing.gate / routing.gate.sum(axis=1, keepdims=True))
        return moe_mlp(x, routing, experts["mlp"], spec, inputs).tokens

    def twin(x, kernel):
        by_spec = MoeSpec(num_choices=3, router=RouterSpec(renormalise=True))
        return moe_mlp(x, kernel, experts["mlp"], by_spec, inputs).tokens

    found, wanted = (jax.jit(lambda *a, f=f: (f(*a), jax.vjp(f, *a)[1](dy)))(x, router.kernel) for f in (own, twin))
    assert not np.asarray(found[0])[~np.asarray(mask)].any()
    jax.tree.map(assert_near, found, wanted)


def test_a_softmax_over_the_chosen_is_a_renormalised_softmax():
    x, router, _, _ = arguments(1)
    spec = MoeSpec(num_choices=3, router=RouterSpec(renormalise=True))
    weights, weight = RouterWeights(router.kernel, router.bias), jnp.arange(3.0)

    def over_the_chosen(weights):
        logits = jnp.dot(x, weights.kernel, precision=jax.lax.Precision.HIGHEST) + weights.bias
        return jnp.sum(jax.nn.softmax(jax.lax.top_k(logits, 3)[0]) * weight)

    found = jax.value_and_grad(lambda w: jnp.sum(route(x, w, spec).gate * weight))(weights)
    jax.tree.map(assert_near, found, jax.value_and_grad(over_the_chosen)(weights))


def test_jitter_is_a_routing_of_ones_own():
    x, router, experts, dy = arguments(2)
    spec, jitter = MoeSpec(capacity_factor=1.0), jax.random.uniform(jax.random.key(0), x.shape, minval=0.9, maxval=1.1)

    def layer(x):
        return moe_mlp(x, route(jitter * x, router.kernel, spec), experts["mlp"], spec).tokens

    def twin(x):
        found = route(x, router.kernel, spec, RouteInputs(expert=route(jitter * x, router.kernel, spec).expert))
        gate = jax.nn.softmax(jnp.dot(jitter * x, router.kernel, precision=jax.lax.Precision.HIGHEST))
        own = make_routing(found.expert, jnp.take_along_axis(gate, found.expert, axis=1), num_experts=8)
        return moe_mlp(x, own, experts["mlp"], spec).tokens

    found, wanted = (jax.jit(lambda x, f=f: (f(x), jax.vjp(f, x)[1](dy)[0]))(x) for f in (layer, twin))
    jax.tree.map(assert_near, found, wanted)


def test_a_bias_through_noise_is_refused_not_silently_without_gradient():
    x, router, _, _ = arguments()

    def through(noise_of):
        return lambda bias: route(x, router.kernel, inputs=RouteInputs(noise=noise_of(bias))).gate.sum()

    def spread(bias):
        return jnp.broadcast_to(bias, (len(x), 8))

    with pytest.raises(TypeError, match=r"noise has no gradient: .*RouterWeights\(kernel, bias\)"):
        jax.grad(through(spread))(router.bias)
    with pytest.raises(TypeError, match="noise has no gradient"):
        jax.jit(jax.grad(through(spread)))(router.bias)
    assert not jax.grad(through(lambda bias: jax.lax.stop_gradient(spread(bias))))(router.bias).any()
    noisy = jax.grad(lambda x: route(x, router.kernel, inputs=RouteInputs(noise=spread(router.bias))).gate.sum())(x)
    biased = jax.grad(lambda x: route(x, RouterWeights(router.kernel, router.bias)).gate.sum())(x)
    assert_near(noisy, biased)


def test_the_largest_gate_is_that_of_all_choices():
    x, router, _, _ = arguments(3)
    spec = MoeSpec(num_choices=2, router=RouterSpec("sigmoid"))
    routing = route(x, router._replace(choice_bias=10 * router.choice_bias), spec)
    assert (routing.gate[:, 0] < routing.gate[:, 1]).any()
    assert_near(routing.sums.largest_gate, routing.gate.max(axis=1).sum()[None, None])


def shapes(tokens: int, experts: int):
    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    return array(tokens, 4), array(4, experts), GluWeights(*(array(experts, *s) for s in ((4, 8), (4, 8), (8, 4))))


@pytest.mark.parametrize("capacity_factor", [None, 1.05])
def test_16_choices_of_512_experts_up_to_the_last_index(capacity_factor):
    spec = MoeSpec(num_choices=16, capacity_factor=capacity_factor, priority="arrival")
    most = (2**31 - 8 * 512) // 16 - 64
    if capacity_factor is not None:
        most = int(most / 1.06)
    layer = functools.partial(moe_mlp, spec=spec)
    found = jax.eval_shape(layer, *shapes(most, 512))
    assert found.tokens.shape == (most, 4) and found.kept.shape == (1, 1, 512)
    gradient = jax.eval_shape(jax.grad(lambda *a: layer(*a).tokens.sum(), argnums=2), *shapes(most, 512))
    assert gradient.gate.shape == (512, 4, 8)
    with pytest.raises(ValueError, match=r"T K \+ 8 E and the rows must be below 2\^31: give the layer fewer tokens"):
        jax.eval_shape(layer, *shapes(2**27, 512))


def test_weights_that_are_no_weights_are_refused_everywhere(as_users_run_it):
    x, router, experts, _ = arguments()
    with pytest.raises(
        TypeError, match="weights are a dict; pass MlpWeights, GluWeights, JoinedGluWeights or WithShared"
    ):
        explain(x, router, experts["glu"]._asdict())
    with pytest.raises(ValueError, match="a bias of gate or of up alone"):
        moe_mlp(x, router, experts["glu with biases"]._replace(up_bias=None))
    with pytest.raises(ValueError, match=r"weights.down_bias has shape \(8, 16\); it must be \[8, 8\]"):
        moe_mlp(x, router, experts["glu with biases"]._replace(down_bias=jnp.zeros((8, 16))))
    odd = experts["joined"]._replace(gate_up=experts["joined"].gate_up[..., :-1])
    with pytest.raises(ValueError, match=r"weights.gate_up has shape \(8, 8, 31\); it must be \[8, 8, 30\]"):
        moe_mlp(x, router, odd)
