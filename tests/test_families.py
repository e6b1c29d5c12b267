"""Routers and experts of every family, against a loop over experts that is written without the package."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sharding_cases import mesh_of

from moe_kernels import (
    ClampedSwiglu,
    GluWeights,
    JoinedGluWeights,
    MlpWeights,
    MoeSpec,
    RouteInputs,
    RouterSpec,
    RouterWeights,
    WithShared,
    balance_bias,
    expert_parallel,
    explain,
    make_plan,
    make_routing,
    moe_mlp,
    route,
)
from moe_kernels.__main__ import main

TOKENS, WIDTH, HIDDEN, EXPERTS, CHOICES = 64, 8, 16, 8, 3
HIGHEST = jax.lax.Precision.HIGHEST
dot = functools.partial(jnp.einsum, precision=HIGHEST)

ROUTERS = {
    "softmax": RouterSpec(),
    "renormalised": RouterSpec(renormalise=True),
    "scaled": RouterSpec(scale=0.5),
    "sigmoid": RouterSpec("sigmoid"),
    "DeepSeek-V3": RouterSpec("sigmoid", renormalise=True, scale=2.5, expert_groups=4, groups_chosen=2),
    "best of a group": RouterSpec(expert_groups=2, groups_chosen=1, group_best=1),
}
BIASES = {"no bias": (False, False), "bias": (True, False), "choice bias": (False, True), "both": (True, True)}


def arguments(seed: int = 0):
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)

    e, d, f = EXPERTS, WIDTH, HIDDEN
    mlp = MlpWeights(normal(e, d, f), normal(e, f), normal(e, f, d), normal(e, d))
    glu = GluWeights(normal(e, d, f), normal(e, d, f), normal(e, f, d))
    router = RouterWeights(normal(d, e), normal(e), normal(e, scale=0.1))
    x, dy = normal(TOKENS, d), normal(TOKENS, d)
    biased = glu._replace(gate_bias=normal(e, f), up_bias=normal(e, f), down_bias=normal(e, d))
    joined = JoinedGluWeights(normal(e, d, 2 * f), glu.down)
    in_turns = joined._replace(gate_up_bias=normal(e, 2 * f), down_bias=normal(e, d))
    experts = {"mlp": mlp, "glu": glu, "glu with biases": biased, "joined": joined, "interleaved": in_turns}
    return x, router, experts, dy


def router_of(router: RouterWeights, biases: str) -> RouterWeights:
    bias, choice_bias = BIASES[biases]
    return RouterWeights(router.kernel, router.bias if bias else None, router.choice_bias if choice_bias else None)


def clamped(gate, up):
    """As gpt-oss has it, with a limit that many entries reach."""
    gate, up = jnp.minimum(gate, 1.5), jnp.clip(up, -1.5, 1.5)
    return gate * jax.nn.sigmoid(1.3 * gate) * (up + 1)


CLAMPED = ClampedSwiglu(alpha=1.3, limit=1.5)


def expert_loop(x, w, e, spec: MoeSpec):
    """All tokens through expert e; e None: weights of one expert."""
    w = w if e is None else jax.tree.map(lambda a: a[e], w)
    if isinstance(w, MlpWeights):
        return dot("tf,fd->td", jax.nn.gelu(dot("td,df->tf", x, w.w1) + w.b1, approximate=True), w.w2) + w.b2
    if isinstance(w, JoinedGluWeights):
        biases = (None, None) if w.gate_up_bias is None else jnp.split(w.gate_up_bias, 2)
        parts = jnp.split(w.gate_up, 2, axis=1)
        if spec.interleaved:
            biases, parts = ([a[..., n::2] for n in range(2)] for a in (w.gate_up_bias, w.gate_up))
        w = GluWeights(*parts, w.down, *biases, w.down_bias)
    gate, up = (
        dot("td,df->tf", x, weight) + (0 if bias is None else bias)
        for weight, bias in ((w.gate, w.gate_bias), (w.up, w.up_bias))
    )
    hidden = clamped(gate, up) if spec.activation == CLAMPED else jax.nn.silu(gate) * up
    return dot("tf,fd->td", hidden, w.down) + (0 if w.down_bias is None else w.down_bias)


def scores(x, router: RouterWeights, spec: RouterSpec):
    logits = dot("td,de->te", x, router.kernel) + (0 if router.bias is None else router.bias)
    return jax.nn.sigmoid(logits) if spec.family == "sigmoid" else jax.nn.softmax(logits)


def chosen_by(x, router: RouterWeights, spec: RouterSpec, num_choices: int) -> np.ndarray:
    """The experts of each token, by sorting in NumPy."""
    ranked = np.asarray(scores(x, router, spec), np.float64)
    if router.choice_bias is not None:
        ranked = ranked + np.asarray(router.choice_bias, np.float64)
    if spec.expert_groups > 1:
        grouped = ranked.reshape(len(x), spec.expert_groups, -1)
        merit = np.sort(grouped, axis=2)[:, :, -spec.group_best :].sum(axis=2)
        best = np.argsort(-merit, axis=1, kind="stable")[:, : spec.groups_chosen]
        allowed = np.zeros(merit.shape, bool)
        np.put_along_axis(allowed, best, True, axis=1)
        ranked = np.where(allowed[:, :, None], grouped, -np.inf).reshape(ranked.shape)
    return np.argsort(-ranked, axis=1, kind="stable")[:, :num_choices]


def naive(x, router: RouterWeights, weights, spec: MoeSpec, chosen: np.ndarray):
    """The layer without a capacity, by a loop over experts."""
    shared = weights if isinstance(weights, WithShared) else None
    weights = weights.routed if shared else weights
    gate = jnp.take_along_axis(scores(x, router, spec.router), jnp.asarray(chosen), axis=1)
    if spec.router.renormalise:
        gate = gate / gate.sum(axis=1, keepdims=True)
    gate = spec.router.scale * gate
    y = jnp.zeros_like(x)
    for e in range(EXPERTS):
        hit = chosen == e
        share = jnp.sum(jnp.where(hit, gate, 0.0), axis=1, keepdims=True)
        if spec.gates_on == "input":
            y += hit.any(axis=1)[:, None] * expert_loop(share * x, weights, e, spec)
        else:
            y += share * expert_loop(x, weights, e, spec)
    if shared:
        once = expert_loop(x, shared.shared, None, spec)
        y += once if shared.gate is None else jax.nn.sigmoid(dot("td,d->t", x, shared.gate))[:, None] * once
    return y


def assert_near(mine, twin, name=""):
    twin = np.asarray(twin, np.float64)
    off = np.abs(np.asarray(mine, np.float64) - twin).max()
    assert off <= 2e-5 * max(np.abs(twin).max(), 1e-3), f"{name} is off by {off} of {np.abs(twin).max()}"


def check(x, router, weights, dy, spec: MoeSpec, mesh=None):
    chosen = chosen_by(x, router, spec.router, spec.num_choices)

    def mine(x, router, weights):
        return jnp.sum(moe_mlp(x, router, weights, spec, mesh=mesh).tokens * dy)

    def twin(x, router, weights):
        return jnp.sum(naive(x, router, weights, spec, chosen) * dy)

    found = jax.jit(jax.value_and_grad(mine, argnums=(0, 1, 2)))(x, router, weights)
    wanted_y = naive(x, router, weights, spec, chosen)
    assert_near(jax.jit(lambda *a: moe_mlp(*a, spec, mesh=mesh).tokens)(x, router, weights), wanted_y, "y")
    wanted = jax.value_and_grad(twin, argnums=(0, 1, 2))(x, router, weights)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found[1]), jax.tree.leaves(wanted[1]), strict=True):
        assert_near(a, b, jax.tree_util.keystr(path))
    if router.choice_bias is not None:
        assert not np.asarray(found[1][1].choice_bias).any()


# tests/test_layer_oracle.py holds more of them against the reference every day.
EVERYDAY = {("scaled", "choice bias"), ("DeepSeek-V3", "both"), ("best of a group", "no bias")}


@pytest.mark.parametrize(
    ("name", "biases"),
    [
        pytest.param(name, biases, marks=[] if (name, biases) in EVERYDAY else pytest.mark.full)
        for name in ROUTERS
        for biases in BIASES
    ],
)
def test_every_router(name, biases):
    x, router, experts, dy = arguments()
    check(x, router_of(router, biases), experts["mlp"], dy, MoeSpec(num_choices=CHOICES, router=ROUTERS[name]))


def one_of(experts, rng):
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape[1:]), jnp.float32), experts)


def weights_of(experts, kind: str):
    """The weights of a kind of experts, and what a spec has to say of them."""
    rng = np.random.default_rng(9)
    if kind.startswith("shared"):
        gate = jnp.asarray(rng.normal(size=WIDTH), jnp.float32) if kind == "shared with a gate" else None
        return WithShared(experts["glu"], one_of(experts["glu"], rng), gate), {}
    if kind == "gpt-oss":
        weights = experts["interleaved"]
        return WithShared(weights, one_of(weights, rng)), {"interleaved": True, "activation": CLAMPED}
    if kind == "Llama 4":
        return WithShared(experts["joined"], one_of(experts["joined"], rng)), {"gates_on": "input"}
    if kind == "clamped with biases":
        weights = experts["glu with biases"]
        return WithShared(weights, one_of(weights, rng)), {"activation": CLAMPED}
    if kind == "a bias of down":
        return experts["glu"]._replace(down_bias=experts["glu with biases"].down_bias), {}
    return experts[kind], {}


EVERYDAY_EXPERTS = {("xla", "shared with a gate"), ("xla", "clamped with biases"), ("tpu", "gpt-oss")}
IN_ONE_SPAN = ("glu", "a bias of down", "shared", "shared with a gate")
KINDS = (
    "glu",
    "a bias of down",
    "glu with biases",
    "clamped with biases",
    "joined",
    "shared",
    "shared with a gate",
    "gpt-oss",
    "Llama 4",
)


@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        pytest.param(backend, kind, marks=[] if (backend, kind) in EVERYDAY_EXPERTS else pytest.mark.full)
        for backend in ("xla", "tpu")
        for kind in KINDS
    ],
)
def test_every_kind_of_experts(kind, backend):
    x, router, experts, dy = arguments(1)
    weights, options = weights_of(experts, kind)
    spec = MoeSpec(num_choices=CHOICES, router=ROUTERS["DeepSeek-V3"], backend=backend, **options)
    check(x, router_of(router, "both"), weights, dy, spec)
    choice = explain(x, router, weights, spec).choice
    name = "expert_glu" if kind in IN_ONE_SPAN else "grouped_matmul"
    assert (choice.experts.name, choice.experts.backend) == (name, backend) and choice.layer.backend is None
    assert choice.down is None if kind in IN_ONE_SPAN else choice.down.backend == backend


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        pytest.param((1, 4), "mlp", marks=pytest.mark.full),
        pytest.param((2, 4), "mlp", marks=pytest.mark.full),
        pytest.param((1, 4), "shared with a gate", marks=pytest.mark.full),
        ((2, 4), "shared with a gate"),
        pytest.param((2, 2), "gpt-oss", marks=pytest.mark.full),
        pytest.param((1, 2), "Llama 4", marks=pytest.mark.full),
    ],
    ids=str,
)
def test_every_family_on_a_mesh(shape, kind):
    x, router, experts, dy = arguments(2)
    weights, options = weights_of(experts, kind)
    spec = MoeSpec(num_choices=CHOICES, num_groups=8, router=ROUTERS["DeepSeek-V3"], **options)
    check(x, router_of(router, "both"), weights, dy, spec, mesh=mesh_of(*shape))
    limited = dataclasses.replace(spec, capacity_factor=0.5)
    here, there = (moe_mlp(x, router, weights, limited, mesh=mesh) for mesh in (None, mesh_of(*shape)))
    np.testing.assert_array_equal(here.kept, there.kept)
    assert_near(there.tokens, here.tokens)


@pytest.mark.devices(4)
def test_a_routing_of_ones_own_is_the_same_on_a_mesh():
    x, router, experts, _ = arguments(3)
    spec = MoeSpec(num_choices=CHOICES, num_groups=4)
    found = route(x, router, spec)
    own = make_routing(found.expert, found.gate, num_experts=EXPERTS, spec=spec)
    here = moe_mlp(x, own, experts["mlp"], spec)
    assert_near(moe_mlp(x, own, experts["mlp"], spec, mesh=mesh_of(1, 4)).tokens, here.tokens)
    assert_near(moe_mlp(x, router, experts["mlp"], spec).tokens, here.tokens)
    np.testing.assert_array_equal(own.sums.wanted, found.sums.wanted)


def test_a_choice_already_made_gets_the_gates_of_its_experts():
    x, router, experts, _ = arguments(4)
    spec = MoeSpec(num_choices=CHOICES, num_groups=2, capacity_factor=1.0)
    found = route(x, router, spec)
    again = route(x, router, spec, RouteInputs(expert=found.expert))
    jax.tree.map(np.testing.assert_array_equal, again, found)
    turned = route(x, router, spec, RouteInputs(expert=found.expert[:, ::-1]))
    np.testing.assert_array_equal(turned.gate, found.gate[:, ::-1])
    assert moe_mlp(x, router, experts["mlp"], spec, RouteInputs(expert=found.expert)).kept.sum() > 0


def test_gates_of_a_routing_of_ones_own_may_be_negative_or_zero():
    expert = jnp.array([[0, 1]] * 8)
    routing = make_routing(expert, jnp.array([[0.0, 1.0]] * 4 + [[-1.0, 0.5]] * 4), num_experts=2)
    assert make_plan(routing, num_experts=2).kept.tolist() == [[[8.0, 8.0]]]
    masked = make_routing(expert, routing.gate, num_experts=2, inputs=RouteInputs(mask=jnp.arange(8) < 5))
    assert make_plan(masked, num_experts=2).kept.tolist() == [[[5.0, 5.0]]]
    assert masked.sums.tokens.tolist() == [[5.0]]


@pytest.mark.parametrize("wrong", [[-1, 0], [0, 2], [1, 1]], ids=str)
def test_experts_out_of_range_or_twice_are_refused_and_under_jit_take_no_place(wrong):
    expert, gate = jnp.array([[0, 1], wrong]), jnp.ones((2, 2))
    with pytest.raises(ValueError, match=r"token 1 has experts .* different ones from 0 to 1"):
        make_routing(expert, gate, num_experts=2)
    traced = jax.jit(functools.partial(make_routing, num_experts=2))(expert, gate)
    assert make_plan(traced, num_experts=2).kept.tolist() == [[[1.0, 1.0]]]
    assert np.isnan(traced.gate[1]).all() and traced.sums.wanted.tolist() == [[[1.0, 1.0]]]


def test_the_number_of_experts_is_that_of_the_routing():
    x, router, _, _ = arguments()
    with pytest.raises(ValueError, match="num_experts=2 must be the 8 experts of the routing"):
        make_plan(route(x, router), num_experts=2)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"router": RouterSpec("softmaxx")}, "router family 'softmaxx' is not one of softmax, sigmoid"),
        ({"router": RouterSpec(expert_groups=3)}, "expert_groups=3 with groups_chosen=1 do not fit 8 experts"),
        ({"router": RouterSpec(expert_groups=4), "num_choices": 3}, "num_choices=3 is more than the 2 experts"),
    ],
    ids=str,
)
def test_routers_that_cannot_be_are_refused(spec, message):
    x, router, experts, _ = arguments()
    with pytest.raises(ValueError, match=message):
        moe_mlp(x, router, experts["mlp"], MoeSpec(**spec))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_choices": 2}, r"moe_mlp takes num_choices in spec: .*spec=MoeSpec\(num_choices=...\)\)"),
        ({"noise": None}, r"moe_mlp takes noise in inputs: .*inputs=RouteInputs\(noise=...\)\)"),
        ({"num_chunks": 2}, r"in spec: .*spec=MoeSpec\(exchange=ExchangeSpec\(num_chunks=...\)\)"),
        ({"nonsense": 2}, r"unexpected keyword argument 'nonsense'"),
    ],
    ids=str,
)
def test_old_keywords_say_where_they_went(options, message):
    x, router, experts, _ = arguments()
    with pytest.raises(TypeError, match=message):
        moe_mlp(x, router, experts["mlp"], **options)
    with pytest.raises(TypeError, match=r"is now moe_kernels\.moe_mlp"):
        expert_parallel.moe_mlp(x, router, experts["mlp"], mesh=None)


def test_weights_of_another_kind_are_refused_in_one_line(as_users_run_it):
    x, router, experts, _ = arguments()
    with pytest.raises(
        TypeError, match="weights are a tuple; pass MlpWeights, GluWeights, JoinedGluWeights or WithShared"
    ):
        moe_mlp(x, router, tuple(experts["mlp"]))


def test_numpy_float64_is_what_jax_makes_of_it(as_users_run_it):
    x, router, experts, _ = arguments()
    numpy = jax.tree.map(lambda a: np.asarray(a, np.float64), (x, router.kernel, experts["mlp"]))
    assert_near(moe_mlp(*numpy).tokens, moe_mlp(x, router.kernel, experts["mlp"]).tokens)


def test_the_bias_for_the_choice_balances_without_a_loss():
    x, router, _, _ = arguments(5)
    spec, bias = MoeSpec(router=RouterSpec("sigmoid")), jnp.zeros(EXPERTS)
    spread = []
    for _ in range(200):
        wanted = route(x, RouterWeights(router.kernel, choice_bias=bias), spec).sums.wanted
        spread.append(float(wanted.max() - wanted.min()))
        bias = balance_bias(bias, wanted, 0.01)
    assert spread[-1] <= spread[0] / 3


def test_explain_is_a_command(capsys, as_users_run_it):
    shape = "--tokens=54272 --width=768 --expert-width=3072 --experts=32 --choices=1 --groups=8 --capacity-factor=1.05"
    main(["explain", "--chip=v5p", *shape.split(), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["route", "dispatch", "experts", "combine", "layer"]
    assert all(set(verb) == {"span", "backend", "how", "refused"} for verb in found.values())
    assert found["route"]["backend"] == "tpu" and "gpu" in found["route"]["refused"]
    assert found["layer"]["backend"] is None and "one TensorCore" in found["layer"]["refused"]["tpu"]
    main(["explain", "--chip=v6e", *shape.split(), "--gated", "--shards=4"])
    assert "layer: verb by verb" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["explain", "--chip=v5p", *shape.split(), "--shards=5"])
    assert "32 experts cannot be split over 5 shards" in capsys.readouterr().err
