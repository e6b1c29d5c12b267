"""The layer of every kind of router and experts against the reference: values, sums, drops and gradients."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import assert_close
from sharding_cases import mesh_of

import reference
from moe_kernels import (
    ClampedSwiglu,
    GluWeights,
    JoinedGluWeights,
    MlpWeights,
    MoeSpec,
    RouteInputs,
    RouterSpec,
    RouterWeights,
    RoutingSums,
    explain,
    moe_mlp,
)

TOKENS, GROUPS, WIDTH, HIDDEN, EXPERTS = 24, 2, 7, 10, 6
CLAMPED = ClampedSwiglu(alpha=1.3, limit=0.8, shift=0.5)


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer: its spec, whether experts are gated, joined and biased, and the biases of the router."""

    spec: MoeSpec
    gated: bool = True
    joined: bool = False
    biased: bool = False
    router_biases: bool = False


IN_GROUPS = RouterSpec("sigmoid", renormalise=True, scale=2.5, expert_groups=3, groups_chosen=2)
TOP = RouterSpec(renormalise=True)
CASES = [
    Case(MoeSpec(2, GROUPS, router=TOP), biased=True),
    Case(MoeSpec(3, GROUPS, router=IN_GROUPS, capacity_factor=1.0), router_biases=True),
    Case(
        MoeSpec(2, GROUPS, router=TOP, activation=CLAMPED, interleaved=True),
        joined=True,
        biased=True,
        router_biases=True,
    ),
    Case(MoeSpec(2, GROUPS, router=RouterSpec("sigmoid"), gates_on="input", capacity_factor=0.7), joined=True),
    Case(MoeSpec(1, GROUPS, router=RouterSpec("sigmoid", scale=0.5), activation="gelu_tanh", capacity_factor=0.5)),
    Case(MoeSpec(1, GROUPS, activation="relu_squared", gates_on="input"), gated=False),
]


def draw(case: Case, seed: int):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    e, d, f = EXPERTS, WIDTH, HIDDEN
    biases = [normal(e, f), normal(e, f), normal(e, d)] if case.biased else [None] * 3
    if not case.gated:
        weights = MlpWeights(normal(e, d, f), normal(e, f), normal(e, f, d), normal(e, d))
    else:
        weights = GluWeights(normal(e, d, f), normal(e, d, f), normal(e, f, d), *biases)
    router = RouterWeights(normal(d, e), *([normal(e), normal(e)] if case.router_biases else []))
    nothing = reference.zero_sums(num_groups=GROUPS, num_modalities=1, num_experts=e)
    dsums = RoutingSums(*(normal(*field.shape) for field in nothing))
    return normal(TOKENS, d), router, weights, normal(TOKENS, d), dsums, rng.random(TOKENS) < 0.9


def joined_of(weights: GluWeights, interleaved: bool) -> JoinedGluWeights:
    """Also of gradients, where the function is linear."""

    def join(gate, up):
        if gate is None:
            return None
        return np.stack([gate, up], axis=-1).reshape(*gate.shape[:-1], -1) if interleaved else np.append(gate, up, -1)

    gate_up, bias = join(weights.gate, weights.up), join(weights.gate_bias, weights.up_bias)
    return JoinedGluWeights(gate_up, weights.down, bias, weights.down_bias)


@functools.partial(jax.jit, static_argnums=(0, 1))
def layer(spec: MoeSpec, mesh_shape, tokens, router, weights, dy, dsums, mask):
    mesh = None if mesh_shape is None else mesh_of(*mesh_shape)

    def run(tokens, router, weights):
        output = moe_mlp(tokens, router, weights, spec, RouteInputs(mask=mask), mesh=mesh)
        return (output.tokens, output.sums), output.kept

    (tokens, sums), pull, kept = jax.vjp(run, tokens, router, weights, has_aux=True)
    return tokens, sums, kept, pull((dy, dsums))


def oracle(case: Case, tokens, router: RouterWeights, weights, dy, dsums, mask):
    spec = case.spec
    shapes = ((EXPERTS, HIDDEN), (EXPERTS, HIDDEN), (EXPERTS, WIDTH))
    if case.gated:
        biases = [np.zeros(s) if w is None else w for w, s in zip(weights[3:], shapes, strict=True)]
        weights = reference.GluWeights(*weights[:3], *biases)
    clamped = isinstance(spec.activation, ClampedSwiglu)
    activation = reference.Clamped(*dataclasses.astuple(spec.activation)) if clamped else spec.activation or "silu"
    more = {"activation": activation, "gates_on": spec.gates_on}
    output = reference.moe_layer(
        tokens,
        router.kernel,
        weights,
        settings=reference.Router(**dataclasses.asdict(spec.router)),
        bias=router.bias,
        choice_bias=router.choice_bias,
        num_choices=spec.num_choices,
        num_groups=GROUPS,
        capacity_factor=spec.capacity_factor,
        mask=mask,
        **more,
    )
    sums = reference.RoutingSums(*(np.asarray(field, np.float64) for field in dsums))
    return output, reference.moe_layer_gradient(tokens, router.kernel, weights, output, dy, sums, **more)


def check(case: Case, seed: int, backend=None, mesh_shape=None):
    tokens, router, weights, dy, dsums, mask = draw(case, seed)
    tokens[~mask] = np.nan
    passed = joined_of(weights, case.spec.interleaved) if case.joined else weights
    spec = dataclasses.replace(case.spec, backend=backend)
    y, sums, kept, (dx, drouter, dweights) = layer(spec, mesh_shape, tokens, router, passed, dy, dsums, mask)
    tokens[~mask] = 0
    output, gradient = oracle(case, tokens, router, weights, dy, dsums, mask)
    np.testing.assert_array_equal(kept, output.kept)
    wanted = gradient.weights
    if case.gated:
        wanted = GluWeights(*wanted)
        wanted = joined_of(wanted, case.spec.interleaved) if case.joined else wanted
    pairs = [("y", y, output.tokens), ("dx", dx, gradient.tokens), ("router", drouter.kernel, gradient.router)]
    pairs += [(name, *both) for name, *both in zip(sums._fields, sums, output.sums, strict=True)]
    pairs += [(name, *both) for name, *both in zip(dweights._fields, dweights, wanted, strict=True)]
    pairs += [("bias", drouter.bias, gradient.bias)]
    for name, mine, twin in pairs:
        if mine is not None:
            scale = np.full(twin.shape[:-1], np.abs(twin).max())
            assert_close(mine, twin, length=TOKENS + WIDTH + HIDDEN, name=name, scale=scale)
    if router.choice_bias is not None:
        assert not np.asarray(drouter.choice_bias).any()


@given(st.sampled_from(CASES), st.integers(0, 10**6))
def test_every_router_with_every_kind_of_experts(case, seed):
    check(case, seed)


@settings(max_examples=4)
@given(st.sampled_from([CASES[0], CASES[2]]), st.integers(0, 10**6))
def test_the_kernels_for_tpu_by_name(case, seed):
    check(case, seed, backend="tpu")


@pytest.mark.devices(2)
@pytest.mark.parametrize("case", [CASES[2], CASES[3]], ids=["gpt-oss", "Llama 4"])
def test_on_a_mesh(case):
    check(case, 0, mesh_shape=(1, 2))


@pytest.mark.parametrize(("interleaved", "capacity_factor"), [(False, None), (True, 1.0)])
def test_joined_weights_are_neither_copied_nor_turned(interleaved, capacity_factor):
    """In the compiled step, forward and backward, matmuls read `gate_up` as it is, or an expert's part of it."""
    spec = MoeSpec(2, interleaved=interleaved, capacity_factor=capacity_factor)
    tokens, router, weights, dy, *_ = draw(Case(spec, biased=True), 0)

    def step(tokens, weights):
        return jnp.sum(moe_mlp(tokens, router, weights, spec).tokens * dy)

    joined = joined_of(weights, interleaved)
    text = jax.jit(jax.value_and_grad(step, argnums=(0, 1))).lower(tokens, joined).compile().as_text()
    made = re.findall(r"= f32\[([\d,]*)\]\S* ([a-z-]+)\(", text)
    assert (f"{EXPERTS},{WIDTH},{2 * HIDDEN}", "parameter") in made
    moved = {"copy", "transpose", "slice", "concatenate", "gather", "pad", "reverse", "reshape"}
    sizes = {experts * WIDTH * columns for experts in (1, EXPERTS) for columns in (HIDDEN, 2 * HIDDEN)}
    found = {(shape, how) for shape, how in made if how in moved and math.prod(map(int, shape.split(","))) in sizes}
    assert not found


def test_what_runs_gated_experts_is_explained():
    tokens, router, weights, *_ = jax.tree.map(jnp.asarray, draw(CASES[2], 0))
    found = explain(tokens, router, joined_of(weights, True), CASES[2].spec).as_json()
    assert found["layer"]["refused"]["tpu"] == "its kernel has no gated experts"
    assert found["experts"]["span"] == "grouped_matmul" and found["experts"]["how"].endswith("down by xla")
    tokens, router, weights, *_ = jax.tree.map(jnp.asarray, draw(CASES[5], 0))
    plain = explain(tokens, router, weights, CASES[5].spec).as_json()
    assert plain["layer"]["refused"]["tpu"] == "gates are on the input of the experts"
