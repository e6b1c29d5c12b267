"""The contract of the operations, line by line: NaN, capacity, groups, bits, precision, nothing at all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_cases import assert_close
from spec_cases import spec_and_inputs

import reference
from moe_kernels import (
    MlpWeights,
    MoeSpec,
    Routing,
    RoutingSums,
    combine,
    dispatch,
    expert_capacity,
    expert_mlp,
    grouped_glu,
    grouped_matmul,
    make_plan,
    moe_mlp,
    route,
    router_noise,
)

pytestmark = pytest.mark.compat

TOKENS, GROUPS, WIDTH, HIDDEN, EXPERTS, CHOICES, MODALITIES = 64, 2, 8, 16, 8, 2, 2
# Capacity factors, one a layout: an [E, rows] block; runs one after the other, with a limit and without.
BLOCK, PACKED, DROPLESS = 1.0, 4.0, None
LAYOUTS = [BLOCK, PACKED, DROPLESS]
BAD = [np.nan, np.inf, -np.inf]
POISONS = [np.nan, np.inf]
NO_SUMS = RoutingSums(*(np.zeros((GROUPS, 1, EXPERTS), np.float32),) * 7)  # of which a plan reads the shape


class Inputs:
    """One problem for all tests here: arguments of the layer and cotangents of its results."""

    def __init__(self, seed: int = 0, dtype=jnp.float32) -> None:
        rng = np.random.default_rng(seed)
        e, d, f = EXPERTS, WIDTH, HIDDEN
        self.tokens, self.dy = jnp.asarray(rng.normal(size=(2, TOKENS, WIDTH)), dtype)
        self.router = jnp.asarray(rng.normal(size=(d, e)), jnp.float32)
        self.weights = MlpWeights(
            *(jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((e, d, f), (e, f), (e, f, d), (e, d)))
        )
        self.noise = router_noise(
            jax.random.key(seed), num_groups=GROUPS, group_size=TOKENS // GROUPS, num_experts=EXPERTS
        )
        self.modality = jnp.asarray(rng.integers(0, MODALITIES, TOKENS), jnp.int32)
        self.mask = jnp.asarray(rng.random(TOKENS) < 0.8)
        zero = reference.zero_sums(num_groups=GROUPS, num_modalities=MODALITIES, num_experts=EXPERTS)
        self.dsums = RoutingSums(*(jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in zero))


def layer_and_gradients(inputs, *, tokens, weights, mask, dy, capacity_factor, num_groups=GROUPS, priority="bpr"):
    """The whole layer with noise, mask and modalities, and its gradients through output and sums."""
    options = {"modality": inputs["modality"], "num_modalities": MODALITIES, "mask": mask, "noise": inputs["noise"]}
    options |= {"num_choices": CHOICES, "num_groups": num_groups}

    def run(tokens, router, weights):
        more = {"capacity_factor": capacity_factor, "priority": priority, "first_modality": 1}
        more |= {"key": jax.random.key(3)}
        output = moe_mlp(tokens, router, weights, *spec_and_inputs(**options, **more))
        return (output.tokens, output.sums), output

    _, pull, output = jax.vjp(run, tokens, inputs["router"], weights, has_aux=True)
    return route(tokens, inputs["router"], *spec_and_inputs(**options)), output, pull((dy, inputs["dsums"]))


STATIC = ("capacity_factor", "num_groups", "priority")
layer = jax.jit(layer_and_gradients, static_argnames=STATIC)


def run(inputs: Inputs, capacity_factor, *, function=layer, **changes):
    arguments = {name: getattr(inputs, name) for name in ("tokens", "weights", "mask", "dy")}
    shared = {name: getattr(inputs, name) for name in ("modality", "noise", "router", "dsums")}
    return function(shared, capacity_factor=capacity_factor, **(arguments | changes))


def assert_same(actual, expected, select=slice(None)) -> None:
    """The same bits in every array of two trees, or in the selected part of their first axis."""
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a)[select], np.asarray(b)[select]), actual, expected
    )


def test_the_layouts_are_what_their_names_say():
    inputs = Inputs()

    def layout(factor):
        def plan():
            routing = route(inputs.tokens, inputs.router, MoeSpec(num_choices=CHOICES, num_groups=GROUPS))
            capacity = None if factor is None else expert_capacity(TOKENS // GROUPS, CHOICES, EXPERTS, factor)
            return make_plan(routing, num_experts=EXPERTS, num_groups=GROUPS, capacity=capacity)

        return jax.eval_shape(plan).layout

    assert layout(BLOCK).rows_per_expert is not None
    assert layout(PACKED).rows_per_expert is None
    assert layout(DROPLESS).rows_per_expert is None


@pytest.mark.parametrize("factor", LAYOUTS)
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_token_touches_no_other(factor, bad):
    inputs = Inputs()
    lost = int(np.flatnonzero(inputs.mask)[5])
    others = np.arange(TOKENS) != lost
    # It takes no place, so the others are as if it were padding.
    _, without, (dx_without, _, dw_without) = run(inputs, factor, mask=inputs.mask.at[lost].set(False))
    routing, output, (dx, _, dw) = run(
        inputs,
        factor,
        tokens=inputs.tokens.at[lost, 2].set(bad),
        # Whatever reads its output sends NaN back.
        dy=inputs.dy.at[lost].set(np.nan),
    )
    assert np.isnan(output.tokens[lost]).all() and np.isnan(routing.gate[lost]).all()
    assert_same(output.tokens, without.tokens, others)
    assert_same(output.kept, without.kept)
    assert_same(dx, dx_without, others)
    assert_same(dw, dw_without)
    # The sums of its group and modality carry it to whoever checks them, those of the others do not.
    group, modality = lost // (TOKENS // GROUPS), int(inputs.modality[lost])
    for name in ("probability", "entropy", "logsumexp_squared", "load", "largest_gate"):
        finite = np.isfinite(getattr(output.sums, name)).reshape(GROUPS, MODALITIES, -1)
        expected = np.ones((GROUPS, MODALITIES), bool)
        expected[group, modality] = False
        np.testing.assert_array_equal(finite.all(axis=2), expected, err_msg=name)
    assert float(output.sums.tokens.sum()) == float(inputs.mask.sum())
    assert_same(output.sums.wanted, without.sums.wanted)


@pytest.mark.parametrize("factor", LAYOUTS)
@pytest.mark.parametrize("name", MlpWeights._fields)
@pytest.mark.parametrize("bad", POISONS)
def test_a_bad_expert_touches_only_its_tokens(factor, name, bad):
    inputs = Inputs()
    routing, clean, (dx_clean, _, dw_clean) = run(inputs, factor)
    broken = 3
    weights = inputs.weights._replace(**{name: getattr(inputs.weights, name).at[broken, 1].set(bad)})
    _, output, (dx, _, dw) = run(inputs, factor, weights=weights)
    mine = (np.asarray(routing.expert) == broken).any(axis=1)
    assert 0 < mine.sum() < TOKENS
    assert not np.isfinite(output.tokens).all()
    assert_same(output.tokens, clean.tokens, ~mine)
    assert_same(dx, dx_clean, ~mine)
    assert_same(dw, dw_clean, np.arange(EXPERTS) != broken)
    assert_same((output.sums, output.kept), (clean.sums, clean.kept))


@jax.custom_vjp
def spoil(rows, used, bad):
    """Overwrite unused rows, and on the way back their cotangents."""
    return jnp.where(used[:, None], rows, bad)


spoil.defvjp(
    lambda rows, used, bad: (spoil(rows, used, bad), (used, bad)),
    lambda saved, dy: (spoil(dy, *saved), None, None),
)


@functools.partial(jax.jit, static_argnums=0)
def chain(capacity, bad, tokens, gate, expert, weights, dy):
    """Dispatch, experts, grouped matmuls, combine, with `bad` in the unused rows between any two of them."""
    plan = make_plan(Routing(expert, gate, NO_SUMS), num_experts=EXPERTS, num_groups=GROUPS, capacity=capacity)
    used = plan.source < TOKENS * CHOICES

    def apply(tokens, gate, weights):
        rows = spoil(expert_mlp(spoil(dispatch(tokens, plan), used, bad), weights, plan), used, bad)
        hidden = weights.w1[:, :, :WIDTH], weights.w1[:, :, -WIDTH:]
        more = spoil(grouped_matmul(rows, hidden[0], plan), used, bad)
        more = more + spoil(grouped_glu(rows, *hidden, plan), used, bad)
        return combine(rows, gate, plan), combine(more, gate, plan)

    outputs, pull = jax.vjp(apply, tokens, gate, weights)
    return plan, outputs, pull((dy, dy))


def hand_made_routing(seed: int, experts: int = EXPERTS) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    expert = np.stack([rng.permutation(experts)[:CHOICES] for _ in range(TOKENS)]).astype(np.int32)
    return expert, -np.sort(-rng.random((TOKENS, CHOICES)) - 0.1, axis=1).astype(np.float32)


@pytest.mark.parametrize("capacity", [5, 30, None])
@pytest.mark.parametrize("bad", POISONS)
def test_unused_rows_are_never_read(capacity, bad):
    inputs = Inputs()
    expert, gate = hand_made_routing(0)
    arguments = (inputs.tokens, gate, expert, inputs.weights, inputs.dy)
    plan, outputs, gradients = chain(capacity, 0.0, *arguments)
    assert int(plan.runs.size.sum()) < plan.layout.num_rows
    _, spoilt_outputs, spoilt_gradients = chain(capacity, bad, *arguments)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert_same(spoilt_outputs, outputs)
    assert_same(spoilt_gradients, gradients)


@pytest.mark.parametrize("capacity", [5, 30, None])
def test_an_expert_without_rows_has_gradient_zero(capacity):
    inputs = Inputs()
    expert, gate = hand_made_routing(1, experts=EXPERTS - 3)  # nobody chooses the last three
    weights = jax.tree.map(lambda w: w.at[-1].set(np.nan), inputs.weights)
    _, outputs, (dx, dgate, dweights) = chain(capacity, 0.0, inputs.tokens, gate, expert, weights, inputs.dy)
    assert all(np.isfinite(leaf).all() for leaf in (*outputs, dx, dgate))
    for name, gradient in dweights._asdict().items():
        assert (np.asarray(gradient)[-3:] == 0).all(), name
        assert (np.asarray(gradient)[:-3] != 0).any(axis=tuple(range(1, gradient.ndim))).all(), name


@pytest.mark.parametrize("factor", LAYOUTS)
@pytest.mark.parametrize("bad", POISONS)
def test_padding_is_harmless_whatever_it_holds(factor, bad):
    inputs = Inputs()
    pad = ~np.asarray(inputs.mask)
    assert pad.any()
    clean = run(inputs, factor, tokens=jnp.where(pad[:, None], 0, inputs.tokens))
    spoilt = run(inputs, factor, tokens=jnp.where(pad[:, None], bad, inputs.tokens))
    assert_same(spoilt, clean)
    _, output, (dx, drouter, _) = spoilt
    assert (np.asarray(output.tokens)[pad] == 0).all() and (np.asarray(dx)[pad] == 0).all()
    assert np.isfinite(drouter).all()


def test_gates_that_are_not_finite_claim_nothing():
    inputs = Inputs()
    expert, gate = hand_made_routing(2)
    gate[3, 0], gate[4, 1], gate[5, 0] = np.nan, np.inf, np.inf
    routing = Routing(jnp.asarray(expert), jnp.asarray(gate), NO_SUMS)
    plan = make_plan(routing, num_experts=EXPERTS, capacity=4, priority=routing.gate[:, 0])
    found = np.asarray(plan.row) < plan.layout.num_rows
    assert not found[3:6].any()
    twin = reference.make_plan(expert, gate, num_experts=EXPERTS, capacity=4)
    np.testing.assert_array_equal(found, twin.position >= 0)
    y = combine(dispatch(inputs.tokens, plan), routing.gate, plan)
    assert np.isnan(y[3:6]).all() and np.isfinite(np.delete(y, [3, 4, 5], axis=0)).all()


@functools.partial(jax.jit, static_argnames=STATIC)
def layer_forward(inputs, **arguments):
    return layer_and_gradients(inputs, **arguments)[1]


@pytest.mark.parametrize(
    ("priority", "factor"),
    [("bpr", 0.5), ("bpr", 0.55), ("arrival", 0.5), ("random", 0.5), ("modality", 0.5), ("bpr", 4.0)],
)
def test_exactly_min_of_wanted_and_capacity_is_kept(priority, factor):
    inputs = Inputs(1)
    output = run(inputs, factor, function=layer_forward, priority=priority)
    capacity = reference.expert_capacity(TOKENS // GROUPS, CHOICES, EXPERTS, factor)
    wanted, kept = np.asarray(output.sums.wanted).sum(1), np.asarray(output.kept).sum(1)
    np.testing.assert_array_equal(kept, np.minimum(wanted, capacity))
    if factor < 4:
        assert (wanted > capacity).any(), "nothing was dropped, so nothing was tested"


@pytest.mark.parametrize("factor", LAYOUTS)
def test_groups_are_independent(factor):
    inputs = Inputs(2)
    both, size = run(inputs, factor), TOKENS // GROUPS
    parts = []
    for g in range(GROUPS):
        part = slice(g * size, (g + 1) * size)
        shared = {"modality": inputs.modality[part], "noise": inputs.noise[part], "router": inputs.router}
        shared["dsums"] = jax.tree.map(lambda x, g=g: x[g : g + 1], inputs.dsums)
        arguments = {name: getattr(inputs, name)[part] for name in ("tokens", "mask", "dy")}
        parts.append(layer(shared, weights=inputs.weights, capacity_factor=factor, num_groups=1, **arguments))
    routing, output, (dx, drouter, dw) = both

    def joined(pick):
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *(pick(part) for part in parts))

    assert_same(output.kept, joined(lambda part: part[1].kept))
    assert_same(routing.expert, joined(lambda part: part[0].expert))
    assert_close(output.tokens, joined(lambda part: part[1].tokens), length=HIDDEN, name="y")
    assert_close(dx, joined(lambda part: part[2][0]), length=HIDDEN, name="dx", roundings=16)
    for name, mine, theirs in zip(RoutingSums._fields, output.sums, joined(lambda part: part[1].sums), strict=True):
        assert_close(mine.reshape(1, -1), theirs.reshape(1, -1), length=size, name=name)
    assert_close(drouter, sum(part[2][1] for part in parts), length=TOKENS, name="drouter", roundings=16)
    for name, mine, *theirs in zip(dw._fields, dw, *(part[2][2] for part in parts), strict=True):
        mine, theirs = mine.reshape(EXPERTS, -1), sum(theirs).reshape(EXPERTS, -1)
        assert_close(mine, theirs, length=TOKENS, name=f"d{name}")


@pytest.mark.parametrize("factor", LAYOUTS)
def test_the_same_input_twice_gives_the_same_bits(factor):
    inputs = Inputs(3)
    first = jax.tree.map(np.asarray, run(inputs, factor))
    for _ in range(3):
        assert_same(run(inputs, factor), first)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("capacity", [5, None])
def test_half_precision_is_within_its_own_eps(dtype, capacity):
    inputs = Inputs(4, dtype)
    # Small enough for float16, and exact in both, so that only the computation rounds.
    weights = MlpWeights(*(w.astype(dtype).astype(jnp.float32) for w in jax.tree.map(lambda w: w / 4, inputs.weights)))
    expert, gate = hand_made_routing(3)

    @jax.jit
    def apply(tokens, gate, weights):
        plan = make_plan(Routing(jnp.asarray(expert), gate, NO_SUMS), num_experts=EXPERTS, capacity=capacity)
        y, pull = jax.vjp(
            lambda x, g, w: combine(expert_mlp(dispatch(x, plan), w, plan), g, plan), tokens, gate, weights
        )
        return y, *pull(inputs.dy)

    y, dx, dgate, dw = apply(inputs.tokens, jnp.asarray(gate), weights)
    assert y.dtype == dx.dtype == dtype and dgate.dtype == jnp.float32
    assert all(g.dtype == w.dtype for g, w in zip(dw, weights, strict=True))

    x64, dy64 = (np.asarray(a, np.float64) for a in (inputs.tokens, inputs.dy))
    w64 = reference.MlpWeights(*(np.asarray(w, np.float64) for w in weights))
    twin = reference.make_plan(expert, gate, num_experts=EXPERTS, capacity=capacity, priority="arrival")
    rows = reference.dispatch(x64, twin)
    out = reference.expert_mlp(rows, w64, twin, "gelu_tanh")
    back = reference.combine_gradient(out, gate, dy64, twin)
    gradient = reference.expert_mlp_gradient(rows, w64, back.rows, twin, "gelu_tanh")
    # Half of eps is one rounding; matmuls accumulate in float32, so only rows, hidden layer and results are rounded.
    bound = {"length": HIDDEN, "eps": float(jnp.finfo(dtype).eps) / 2, "roundings": 1}
    assert_close(y, reference.combine(out, gate, twin), name="y", **bound)
    assert_close(dx, reference.dispatch_gradient(gradient.rows, twin), name="dx", **bound)
    size = np.linalg.norm(dy64, axis=1) * np.linalg.norm(out, axis=1).max()
    assert_close(dgate, back.gate, name="dgate", scale=size, **bound)
    for name, mine, theirs in zip(dw._fields, dw, gradient.weights, strict=True):
        mine, theirs = (np.asarray(a, np.float64).reshape(EXPERTS, -1) for a in (mine, theirs))
        assert_close(mine, theirs, name=f"d{name}", **bound)


@pytest.mark.parametrize("factor", LAYOUTS)
@pytest.mark.parametrize("weight_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nothing_is_promoted_by_accident(factor, weight_dtype, dtype):
    inputs = Inputs(5, dtype)
    weights = jax.tree.map(lambda w: w.astype(weight_dtype), inputs.weights)
    abstract = functools.partial(layer_and_gradients, capacity_factor=factor)
    with jax.numpy_dtype_promotion("strict"):  # refuses while tracing, so nothing has to run
        routing, output, (dx, drouter, dw) = run(
            inputs,
            factor,
            weights=weights,
            function=lambda *args, capacity_factor, **kw: jax.eval_shape(abstract, *args, **kw),
        )
    assert output.tokens.dtype == dx.dtype == dtype
    assert routing.gate.dtype == drouter.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(dw)} == {jnp.dtype(weight_dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves((output.sums, output.kept))} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("factor", "priority"), [(BLOCK, "bpr"), (PACKED, "random"), (DROPLESS, "modality"), (DROPLESS, "arrival")]
)
def test_no_tokens_at_all(factor, priority):
    inputs = Inputs()
    none = {name: getattr(inputs, name)[:0] for name in ("tokens", "mask", "dy")}
    shared = {
        "modality": inputs.modality[:0],
        "noise": inputs.noise[:0],
        "router": inputs.router,
        "dsums": inputs.dsums,
    }
    _, output, (dx, drouter, dw) = layer(
        shared, weights=inputs.weights, capacity_factor=factor, priority=priority, **none
    )
    assert output.tokens.shape == dx.shape == (0, WIDTH)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves((output.sums, output.kept, drouter, dw)))
