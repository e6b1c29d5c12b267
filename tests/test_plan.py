"""Plans against the reference: exact, for every pattern of load, with ties."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_cases import PATTERNS, SHAPES, gates, no_sums, plan_of

import reference
from moe_kernels import Routing, expert_capacity, make_plan

pytestmark = pytest.mark.compat


def reference_plan(shape, expert, gate, priority):
    return reference.make_plan(
        expert,
        gate,
        num_experts=shape.experts,
        num_groups=shape.groups,
        capacity=shape.capacity,
        priority="arrival" if priority is None else "random",
        priority_values=priority,
        mask=gate[:, 0] > 0,
    )


@given(st.sampled_from(SHAPES), st.integers(0, 10**6), st.sampled_from(PATTERNS), st.sampled_from([0, 1, 2]))
def test_a_plan_equals_the_reference(shape, seed, pattern, trouble):
    expert, gate = gates(shape, seed, pattern)
    rng = np.random.default_rng(seed)
    if trouble:  # padding and tokens whose logits were not finite
        gate[rng.random(shape.tokens) < 0.3] = 0
        gate[rng.random(shape.tokens) < 0.2] = np.nan
    priority = None if trouble == 2 else gate[:, 0]
    plan = plan_of(shape, expert, gate, priority)
    expected = reference_plan(shape, expert, gate, priority)

    found = np.asarray(plan.row) < plan.layout.num_rows
    np.testing.assert_array_equal(found, expected.position >= 0)
    first = np.asarray(plan.runs.first)
    np.testing.assert_array_equal((np.asarray(plan.row) - first[expert])[found], expected.position[found])
    np.testing.assert_array_equal(plan.runs.size, expected.size)
    np.testing.assert_array_equal(plan.kept, expected.kept)
    # source is the inverse of row, and every other row is unused
    source = np.asarray(plan.source)
    used = source < gate.size
    np.testing.assert_array_equal(np.asarray(plan.row).reshape(-1)[source[used]], np.flatnonzero(used))
    assert used.sum() == found.sum()


@given(st.sampled_from(SHAPES), st.integers(0, 10**6), st.sampled_from(PATTERNS))
def test_runs_ascend_without_overlap_and_inside_the_rows(shape, seed, pattern):
    expert, gate = gates(shape, seed, pattern)
    plan = plan_of(shape, expert, gate, None)
    first, size = np.asarray(plan.runs.first), np.asarray(plan.runs.size)
    assert (first[1:] >= first[:-1] + size[:-1]).all()
    assert first[-1] + size[-1] <= plan.layout.num_rows
    np.testing.assert_array_equal(size, np.asarray(plan.kept).sum((0, 1)))


@given(st.sampled_from([s for s in SHAPES if s.capacity]), st.integers(0, 10**6), st.sampled_from(PATTERNS))
def test_exactly_min_of_wanted_and_capacity_is_kept(shape, seed, pattern):
    expert, gate = gates(shape, seed, pattern)
    kept = np.asarray(plan_of(shape, expert, gate, gate[:, 0]).kept)[:, 0]
    wanted = np.stack(
        [np.bincount(group.ravel(), minlength=shape.experts) for group in expert.reshape(shape.groups, -1)]
    )
    np.testing.assert_array_equal(kept, np.minimum(wanted, shape.capacity))


def test_ties_go_to_the_lower_token_and_second_choices_wait():
    shape = SHAPES[3]  # K = 2
    expert = np.tile(np.array([[0, 1]], np.int32), (shape.tokens, 1))
    expert[::2] = [1, 0]
    gate = np.full(expert.shape, 0.5, np.float32)
    found = (
        np.asarray(plan_of(shape, expert, gate, gate[:, 0]).row) < plan_of(shape, expert, gate, None).layout.num_rows
    )
    half = shape.tokens // shape.groups
    for group in np.split(found, shape.groups):
        # capacity ceil(12 * 2 * 1.05 / 4) = 7: six first choices, and the lowest token's second choice
        assert group[:, 0].all() and group[:, 1].sum() == 2 and group[:2, 1].all()
    assert half == 12


@pytest.mark.parametrize("factor", [1.1, "1.1", 1.05, 0.3, 2])
@pytest.mark.parametrize("size", [1, 10, 100, 4096])
def test_capacity_is_exact(factor, size):
    for experts in (1, 2, 10, 32):
        expected = min(reference.expert_capacity(size, 1, experts, factor), size)
        assert expert_capacity(size, 1, experts, factor) == expected


def test_bad_arguments_fail_at_the_door():
    shape = SHAPES[2]
    expert, gate = gates(shape, 0, "uniform")
    routing = Routing(expert, gate, no_sums(shape))
    with pytest.raises(ValueError, match="num_groups=2; use a divisor of 17"):
        make_plan(routing, num_experts=3, num_groups=2)
    with pytest.raises(ValueError, match="capacity=0"):
        make_plan(routing, num_experts=3, capacity=0)
    with pytest.raises(ValueError, match=r"priority has shape \(3,\)"):
        make_plan(routing, num_experts=3, priority=jnp.zeros(3))
    with pytest.raises(ValueError, match="needs modality ids"):
        make_plan(routing, num_experts=3, num_modalities=2)
    with pytest.raises(ValueError, match="must be positive"):
        expert_capacity(8, 1, 2, 0.0)


@given(st.sampled_from(SHAPES), st.integers(0, 10**6), st.sampled_from(PATTERNS), st.booleans())
def test_a_tpu_plans_the_same(shape, seed, pattern, bpr):
    expert, gate = gates(shape, seed, pattern)
    gate[np.random.default_rng(seed).random(shape.tokens) < 0.3] = 0
    priority = gate[:, 0] if bpr else None
    expected = plan_of(shape, expert, gate, priority)
    for name, actual in tpu_plan_of(shape, expert, gate, priority)._asdict().items():
        jax.tree.map(functools.partial(np.testing.assert_array_equal, err_msg=name), actual, getattr(expected, name))


@functools.partial(jax.jit, static_argnums=0)
def tpu_plan_of(shape, expert, gate, priority):
    """What `make_plan` gives where the program is for a TPU; nothing in it needs one."""
    with mock.patch.object(jax.lax, "platform_dependent", lambda *args, tpu, default: tpu(*args)):
        return make_plan(
            Routing(expert, gate, no_sums(shape)),
            num_experts=shape.experts,
            num_groups=shape.groups,
            capacity=shape.capacity,
            priority=priority,
        )
