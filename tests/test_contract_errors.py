"""Bad arguments fail at the door, each with its name, its value and what to do; back ends say why not."""

import re

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from spec_cases import spec_and_inputs

from moe_kernels import (
    GluWeights,
    MlpWeights,
    Problem,
    combine,
    dispatch,
    expert_capacity,
    expert_mlp,
    grouped_glu,
    grouped_matmul,
    make_plan,
    moe_mlp,
    route,
)
from moe_kernels.backends import choose, explain

pytestmark = pytest.mark.compat

TOKENS, WIDTH, HIDDEN, EXPERTS = 6, 4, 8, 3
X, ROUTER = jnp.ones((TOKENS, WIDTH)), jnp.ones((WIDTH, EXPERTS))
WEIGHTS = MlpWeights(
    jnp.ones((EXPERTS, WIDTH, HIDDEN)),
    jnp.ones((EXPERTS, HIDDEN)),
    jnp.ones((EXPERTS, HIDDEN, WIDTH)),
    jnp.ones((EXPERTS, WIDTH)),
)


@pytest.fixture(autouse=True)
def _as_users_run_it():
    """The suite's import hook checks every annotation first; users do not have it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def layer(tokens=X, router=ROUTER, weights=WEIGHTS, **options):
    return moe_mlp(tokens, router, weights, *spec_and_inputs(**options))


LAYER_MISTAKES = [
    ({"tokens": X[0]}, "tokens and router must be [T, D] and [D, E], not (4,) and (4, 3); reshape"),
    ({"router": jnp.ones((5, 3))}, "router of shape (5, 3) does not take tokens of width 4; make it [D, E]"),
    ({"router": jnp.ones((4, 0))}, "router of shape (4, 0) has no expert"),
    ({"num_choices": 0}, "num_choices=0 must be at least 1"),
    ({"num_choices": 4}, "num_choices=4 is more than the 3 experts; choose at most 3"),
    ({"num_groups": 4}, "6 tokens cannot be split into num_groups=4; use a divisor of 6"),
    ({"num_groups": 0}, "num_groups=0 must be at least 1"),
    ({"num_modalities": 0}, "num_modalities=0 must be at least 1"),
    ({"num_modalities": 2}, "num_modalities=2 needs modality ids; pass modality=[T] integers"),
    ({"noise": jnp.ones((6, 2))}, "noise has shape (6, 2); it must be [T, E] = (6, 3)"),
    ({"mask": jnp.ones(5, bool)}, "mask has shape (5,); it must be [T] = (6,)"),
    ({"mask": jnp.ones(6)}, "mask has dtype float32; pass booleans"),
    ({"modality": jnp.zeros(5, int)}, "modality has shape (5,); it must be [T] = (6,)"),
    ({"modality": jnp.zeros(6)}, "modality has dtype float32; pass integer ids from 0 to 0"),
    ({"priority": "bprr"}, "priority='bprr' is not one of bpr, arrival, random, modality"),
    ({"priority": "random"}, "priority='random' needs a key; pass RouteInputs(key=jax.random.key(...))"),
    ({"priority": "modality"}, "priority='modality' needs modality ids; pass RouteInputs(modality=[T] integers)"),
    (
        {"priority": "modality", "modality": jnp.zeros(6, int), "num_modalities": 2, "first_modality": 2},
        "first_modality=2 is not one of num_modalities=2; choose from 0 to 1",
    ),
    ({"capacity_factor": 0}, "capacity_factor=0 must be positive; use None for no limit"),
    ({"capacity_factor": float("nan")}, "capacity_factor=nan is not a finite number; use one like 1.05"),
    ({"capacity_factor": "a lot"}, "capacity_factor='a lot' is not a finite number"),
    ({"activation": "rleu"}, "activation='rleu' is not one of gelu_tanh, gelu_erf, silu, relu, relu_squared"),
    ({"weights": WEIGHTS._replace(w1=WEIGHTS.w2)}, "weights.w1 has shape (3, 8, 4); it must be [3, 4, 4]"),
    ({"weights": WEIGHTS._replace(w2=WEIGHTS.w1)}, "weights.w2 has shape (3, 4, 8); it must be [3, 8, 4]"),
    ({"weights": WEIGHTS._replace(b1=WEIGHTS.b2)}, "weights.b1 has shape (3, 4); it must be [3, 8]"),
    ({"weights": WEIGHTS._replace(b2=WEIGHTS.b1)}, "weights.b2 has shape (3, 8); it must be [3, 4]"),
    ({"tokens": X.astype(int)}, "xla: dtype int32 is none of ('float32', 'bfloat16', 'float16')"),
    ({"backend": "XLAA"}, "backend 'XLAA' does not exist; did you mean 'xla'? (back ends: tpu, gpu, xla)"),
    ({"backend": "zzz"}, "backend 'zzz' does not exist (back ends: tpu, gpu, xla)"),
]


@pytest.mark.parametrize(("change", "message"), LAYER_MISTAKES, ids=[message[:40] for _, message in LAYER_MISTAKES])
def test_the_layer_refuses(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(lambda: layer(**change))


def plan():
    return make_plan(route(X, ROUTER), num_experts=EXPERTS, capacity=2)


ROWS = jnp.ones((3 * 8, WIDTH))
OPERATION_MISTAKES = [
    (lambda: dispatch(X[:5], plan()), "tokens has shape (5, 4); the plan is for [6, D]"),
    (lambda: dispatch(X[0], plan()), "tokens has shape (4,); the plan is for [6, D]"),
    (lambda: combine(ROWS[1:], jnp.ones((6, 1)), plan()), "rows has shape (23, 4); the plan is for [24, D]"),
    (lambda: combine(ROWS, jnp.ones((6, 2)), plan()), "gate has shape (6, 2); the plan is for [T, K] = (6, 1)"),
    (lambda: expert_mlp(ROWS[1:], WEIGHTS, plan()), "rows has shape (23, 4); the plan is for [24, D]"),
    (
        lambda: expert_mlp(ROWS, GluWeights(WEIGHTS.w1, WEIGHTS.w1, WEIGHTS.w2, WEIGHTS.b1, WEIGHTS.b1), plan()),
        "expert_mlp has no biases of gate and up, no clamp and no array of both; use moe_mlp, or grouped_matmul",
    ),
    (lambda: grouped_matmul(ROWS[1:], WEIGHTS.w1, plan()), "rows has shape (23, 4); the plan is for [24, D]"),
    (lambda: grouped_matmul(ROWS, WEIGHTS.w2, plan()), "weight has shape (3, 8, 4); it must be [3, 4, any]"),
    (lambda: grouped_matmul(ROWS, WEIGHTS.w1[0], plan()), "weight has shape (4, 8); it must be [3, 4, any]"),
    (
        lambda: grouped_matmul(ROWS, WEIGHTS.w1, plan(), bias=WEIGHTS.b2),
        "bias has shape (3, 4); it must be [3, 8]",
    ),
    (
        lambda: grouped_matmul(ROWS, WEIGHTS.w1, plan(), activation="rleu"),
        "activation='rleu' is not one of gelu_tanh, gelu_erf, silu",
    ),
    (
        lambda: grouped_glu(ROWS, WEIGHTS.w1, WEIGHTS.w1, plan(), activation=None),
        "activation=None is not one of gelu_tanh, gelu_erf, silu",
    ),
    (
        lambda: grouped_glu(ROWS, WEIGHTS.w2, WEIGHTS.w2, plan()),
        "gate_weight has shape (3, 8, 4); it must be [3, 4, any]",
    ),
    (
        lambda: grouped_glu(ROWS, WEIGHTS.w1, WEIGHTS.w2, plan()),
        "up_weight has shape (3, 8, 4); it must be [3, 4, 8]",
    ),
    (
        lambda: grouped_glu(ROWS, WEIGHTS.w1, WEIGHTS.w1.astype(jnp.bfloat16), plan()),
        "up_weight has dtype bfloat16; give it that of gate_weight, float32",
    ),
    (lambda: make_plan(route(X, ROUTER), num_experts=3, num_groups=4), "num_groups=4; use a divisor of 6"),
    (lambda: make_plan(route(X, ROUTER), num_experts=3, capacity=0), "capacity=0 must be at least 1; use None"),
    (lambda: expert_capacity(8, 1, 2, -1.0), "capacity_factor=-1.0 must be positive"),
]


@pytest.mark.parametrize(
    ("call", "message"), OPERATION_MISTAKES, ids=[message[:40] for _, message in OPERATION_MISTAKES]
)
def test_the_operations_refuse(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(call)


def test_a_back_end_explains_itself():
    good = Problem("expert_mlp", "cpu", "bfloat16", (48, 4), 3)
    *others, chosen = explain(good).splitlines()
    assert chosen == "xla: chosen"
    assert [line.split(" is not ")[0] for line in others] == ["tpu: no, platform cpu", "gpu: no, platform cpu"]
    bad = Problem("expert_mlp", "cpu", "int8", (48, 4), 3)
    assert explain(bad).endswith("xla: no, dtype int8 is none of ('float32', 'bfloat16', 'float16')")


def test_a_named_back_end_is_used():
    output = jax.eval_shape(lambda: layer(backend="xla"))
    assert output.tokens.shape == X.shape


def test_what_a_named_back_end_does_not_have_goes_to_another():
    problem = Problem("route", "cpu", "float32", (48, 4), 3)
    assert choose(problem, "gpu") == choose(problem)
