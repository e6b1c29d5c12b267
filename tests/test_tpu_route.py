"""The routing kernels of the TPU back end, interpreted, against the reference and the XLA back end."""

import dataclasses
import functools
import importlib
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from moe_cases import SAME_BITS, assert_close
from spec_cases import spec_and_inputs
from test_layer import logits_magnitude

import reference
from moe_kernels import MoeSpec, RouterWeights, RoutingSums, route
from moe_kernels.backends import choose, explain, problem_of
from moe_kernels.backends.base import Problem, RouteInputs, RouteStatic
from moe_kernels.backends.tpu.common.launch import Target
from moe_kernels.backends.tpu.route.backward import run_backward
from moe_kernels.backends.tpu.route.forward import RouteSaved, run_forward
from moe_kernels.backends.tpu.route.tiles import RouteTiles, backward_tiles, forward_tiles
from moe_kernels.chips import TPUS
from moe_kernels.routing import Routed, route_static, routed

EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8}


@dataclasses.dataclass(frozen=True)
class Case:
    """A static problem; the noisy ones have a mask too if they have modalities."""

    tokens: int
    groups: int
    width: int
    experts: int
    choices: int
    modalities: int
    noisy: bool
    dtype: str

    @property
    def masked(self) -> bool:
        return self.modalities > 1

    @property
    def static(self) -> RouteStatic:
        return RouteStatic(self.choices, self.groups, self.modalities, 1 / self.experts)


CASES = {
    "one token": Case(1, 1, 1, 1, 1, 1, True, "float32"),
    "one more than a tile": Case(258, 2, 5, 3, 2, 2, True, "float32"),
    "one less than a tile": Case(127, 1, 130, 8, 1, 1, False, "bfloat16"),
    "exact tiles": Case(512, 2, 16, 32, 1, 1, True, "bfloat16"),
    "more experts than lanes": Case(300, 1, 8, 130, 2, 3, True, "float32"),
    "short groups, all experts": Case(24, 4, 7, 5, 5, 2, False, "bfloat16"),
}


def draw(case: Case, seed: int, pattern: str):
    """Tokens, router and inputs of few digits, so that logits are exact and often equal; and cotangents."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(-3, 4, (case.tokens, case.width)) / 2
    router = rng.integers(-4, 5, (case.width, case.experts)) / 8
    noise = rng.integers(-8, 9, (case.tokens, case.experts)) / 64
    if pattern == "all equal":
        tokens, noise = np.zeros_like(tokens), np.zeros_like(noise)
    # The last modality has no token.
    modality = rng.integers(0, max(1, case.modalities - 1), case.tokens).astype(np.int32)
    mask = rng.random(case.tokens) < 0.8
    if case.masked:
        tokens[~mask] = np.nan
    inputs = RouteInputs(
        jnp.asarray(noise, jnp.float32) if case.noisy else None,
        jnp.asarray(modality) if case.modalities > 1 else None,
        jnp.asarray(mask) if case.masked else None,
    )
    shapes = reference.zero_sums(num_groups=case.groups, num_modalities=case.modalities, num_experts=case.experts)
    dsums = RoutingSums(*(rng.normal(size=np.shape(field)).astype(np.float32) for field in shapes))
    dgate = rng.normal(size=(case.tokens, case.choices)).astype(np.float32)
    return jnp.asarray(tokens, case.dtype), jnp.asarray(router, jnp.float32), inputs, dgate, dsums


def tiles_of(case: Case, target: Target) -> tuple[RouteTiles, RouteTiles]:
    arguments = (case.tokens, case.width, case.experts, jnp.dtype(case.dtype).itemsize, target.facts, target.num_cores)
    return forward_tiles(case.static, *arguments), backward_tiles(case.static, *arguments)


TARGET = Target("TPU v6 lite", interpret=True)


@functools.partial(jax.jit, static_argnums=(0, 1))
def kernels(case: Case, target: Target, tokens, router, inputs, dgate, dsums):
    """Routing and gradients."""
    forward, backward = tiles_of(case, target)
    routing = run_forward(forward, target, case.static, tokens, router, inputs)
    saved = RouteSaved(tokens, router, routing.expert, inputs)
    return routing, run_backward(backward, target, case.static, saved, dgate, dsums)


def route_and_pass(tokens, router, **options) -> Routed:
    spec, inputs = spec_and_inputs(**options)
    weights = RouterWeights(router)
    static = route_static(spec, router.shape[1], inputs, biased=False)
    span = choose(problem_of("route", tokens, router.shape[1], route=static), spec.backend)
    return routed(span, static, tokens, weights, inputs)


@functools.partial(jax.jit, static_argnums=(0, 1))
def by_backend(case: Case, backend: str, tokens, router, inputs, dgate, dsums, dpassed=None):
    """The same through the public operation; or with tokens passed on, whose cotangent comes back."""

    def run(tokens, router):
        options = dict(
            num_choices=case.choices, num_groups=case.groups, num_modalities=case.modalities,
            noise=inputs.noise, modality=inputs.modality, mask=inputs.mask, backend=backend,
        )  # fmt: skip
        if dpassed is None:
            routing, passed = route(tokens, router, *spec_and_inputs(**options)), None
        else:
            routing, passed = route_and_pass(tokens, router, **options)
        return (routing.gate, routing.sums, passed), routing

    _, pull, routing = jax.vjp(run, tokens, router, has_aux=True)
    return routing, pull((dgate, dsums, dpassed))


def check(case: Case, drawn, found, dpassed=0.0) -> tuple[np.ndarray, np.ndarray]:
    """The exact gradient of the tokens, and how large the terms of the router's part are."""
    tokens, router, inputs, dgate, dsums = drawn
    routing, (dtokens, drouter) = found
    given = {name: getattr(inputs, name) for name in ("noise", "modality", "mask")}
    optional = {name: None if value is None else np.asarray(value) for name, value in given.items()}
    x = np.asarray(tokens, np.float64)
    twin = reference.route(
        np.nan_to_num(x), np.asarray(router), num_choices=case.choices, num_groups=case.groups,
        num_modalities=case.modalities, **optional,
    )  # fmt: skip
    # Logits are exact here, ties and all, so the choice is that of float64.
    np.testing.assert_array_equal(np.asarray(routing.expert)[twin.active], twin.expert[twin.active])
    assert (np.asarray(routing.expert) < case.experts).all() and (np.asarray(routing.expert) >= 0).all()
    assert_close(routing.gate, twin.gate, length=case.experts, name="gate", roundings=2)
    for name, mine, theirs in zip(RoutingSums._fields, routing.sums, twin.sums, strict=True):
        # A load is 1 for an expert that is always chosen: that is what it is rounded to.
        scale = np.asarray(twin.sums.tokens)[..., None] if name == "load" else None
        scale = None if scale is None else scale.reshape(-1, 1) + 0 * np.asarray(theirs).reshape(-1, case.experts)
        mine, theirs = (np.asarray(a).reshape(case.groups * case.modalities, -1) for a in (mine, theirs))
        assert_close(mine, theirs, length=case.experts, name=name, scale=scale, roundings=4)

    dlogits = reference.route_gradient(twin, dgate.astype(np.float64), jax.tree.map(np.float64, dsums))
    size = logits_magnitude(SimpleNamespace(routing=twin), dgate, dsums, np.ones_like(dgate), case.noisy) * twin.active
    eps, w64 = EPS[case.dtype], np.asarray(router, np.float64)
    behind = size[:, None] * np.abs(w64).sum(axis=1) + 1e-30
    assert dtokens.dtype == tokens.dtype and drouter.dtype == router.dtype
    exact, product = dlogits @ w64.T + np.asarray(dpassed, np.float64), behind
    behind = behind + np.abs(np.asarray(dpassed, np.float64))
    assert_close(dtokens, exact, length=case.experts, name="dx", scale=behind, eps=eps)
    x = np.nan_to_num(x)
    behind = np.abs(x).T @ np.broadcast_to(size[:, None], dlogits.shape) + 1e-30
    assert_close(drouter, x.T @ dlogits, length=case.experts, name="dw", scale=behind)
    return exact, product


@given(st.sampled_from(sorted(CASES)), st.integers(0, 10**6), st.sampled_from(["uneven", "all equal"]))
@settings(max_examples=25)
def test_values_and_gradients(name, seed, pattern):
    drawn = draw(CASES[name], seed, pattern)
    check(CASES[name], drawn, kernels(CASES[name], TARGET, *drawn))


@pytest.mark.parametrize("name", ["one more than a tile", "exact tiles"])
def test_the_public_operation_is_that_of_the_xla_back_end(name):
    case = CASES[name]
    drawn = draw(case, 0, "uneven")
    (mine, dmine), (theirs, dtheirs) = (by_backend(case, backend, *drawn) for backend in ("tpu", "xla"))
    # Both lie within the rounding of what is added up.
    check(case, drawn, (mine, dmine))
    check(case, drawn, (theirs, dtheirs))
    keep = np.ones(case.tokens, bool) if drawn[2].mask is None else np.asarray(drawn[2].mask)
    np.testing.assert_array_equal(np.asarray(mine.expert)[keep], np.asarray(theirs.expert)[keep])
    again = by_backend(case, "tpu", *drawn)
    jax.tree.map(np.testing.assert_array_equal, again, (mine, dmine))


@pytest.mark.parametrize("backend", ["tpu", "xla"])
@pytest.mark.parametrize("name", ["one more than a tile", "exact tiles", "short groups, all experts"])
def test_the_cotangent_of_tokens_passed_on_is_added_before_rounding(name, backend):
    case = CASES[name]
    drawn = draw(case, 3, "uneven")
    alone, (dalone, _) = by_backend(case, backend, *drawn)
    drawn_at_random = jnp.asarray(np.random.default_rng(4).normal(size=drawn[0].shape), drawn[0].dtype)
    # Of the router's part, less that part rounded, stays what rounding lost.
    for dpassed in (drawn_at_random, -dalone):
        routing, (dtokens, drouter) = by_backend(case, backend, *drawn, dpassed)
        jax.tree.map(np.testing.assert_array_equal, routing, alone)
        exact, product = check(case, drawn, (routing, (dtokens, drouter)), dpassed)
        once = EPS[case.dtype] / 2 * np.abs(exact) * 1.01 + 2.0**-14 * product
        assert (np.abs(np.asarray(dtokens, np.float64) - exact) <= once).all()
        # Where the router's part is 0 (padding, say) what was passed on comes back as it was.
        unmoved = ~np.any(np.asarray(dalone, np.float32), axis=1)
        assert unmoved.any() == case.masked
        np.testing.assert_array_equal(np.asarray(dtokens)[unmoved], np.asarray(dpassed)[unmoved])
    assert case.dtype == "float32" or np.asarray(dtokens, np.float32).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["one more than a tile", "exact tiles"])
def test_a_token_that_is_not_finite_spoils_its_own_sums_only(name, bad):
    case = CASES[name]
    drawn = draw(case, 1, "uneven")
    tokens, router, inputs, dgate, dsums = drawn
    lost = case.tokens // case.groups - 1
    mask = np.ones(case.tokens, bool) if inputs.mask is None else np.array(inputs.mask)
    others = np.arange(case.tokens) != lost
    if case.masked:
        mask[lost] = True
        drawn = (tokens, router, inputs._replace(mask=jnp.asarray(mask)), dgate, dsums)
    clean, (dclean, _) = kernels(case, TARGET, drawn[0].at[lost].set(0), *drawn[1:])
    spoilt, (dspoilt, drouter) = kernels(case, TARGET, drawn[0].at[lost].set(bad), *drawn[1:])
    theirs, _ = by_backend(case, "xla", drawn[0].at[lost].set(bad), *drawn[1:])
    assert np.isnan(spoilt.gate[lost]).all() and not np.isfinite(drouter).all()
    assert (np.asarray(spoilt.expert[lost]) < case.experts).all()
    for mine, before in ((spoilt.expert, clean.expert), (spoilt.gate, clean.gate), (dspoilt, dclean)):
        np.testing.assert_array_equal(np.asarray(mine)[others], np.asarray(before)[others])
    np.testing.assert_array_equal(spoilt.sums.wanted, theirs.sums.wanted)
    np.testing.assert_array_equal(spoilt.sums.tokens, theirs.sums.tokens)
    modality = 0 if inputs.modality is None else int(inputs.modality[lost])
    for field, mine, xla in zip(RoutingSums._fields, spoilt.sums, theirs.sums, strict=True):
        if field in ("tokens", "wanted"):
            continue
        # No sum is finite that is not in XLA; where an infinity meets no product in pieces, they are the same.
        mine, xla = np.isfinite(mine), np.isfinite(xla)
        assert not (mine & ~xla).any(), field
        if np.isnan(bad) or case.dtype == "float32":
            np.testing.assert_array_equal(mine, xla, err_msg=field)
        own = mine.reshape(case.groups, case.modalities, -1).all(axis=2)
        expected = np.ones((case.groups, case.modalities), bool)
        expected[0, modality] = False
        np.testing.assert_array_equal(own, expected, err_msg=field)


def test_zeros_of_both_signs_are_a_tie():
    for zeros in ([-0.0, 0.0, -0.0], [0.0, -0.0, 0.0]):
        routing = route(jnp.ones((1, 1)), jnp.array([zeros]), MoeSpec(num_choices=3, backend="tpu"))
        assert routing.expert.tolist() == [[0, 1, 2]]


def test_near_ties_are_decided_as_in_float32():
    # Logits that differ in the last digits of a float32 router, seen by bfloat16 tokens.
    router = np.array([[1 + 2**-20, 1 + 2**-19, 1.0], [0.0, 0.0, 2**-22]], np.float32)
    routing = route(jnp.ones((1, 2), jnp.bfloat16), jnp.asarray(router), MoeSpec(num_choices=3, backend="tpu"))
    assert routing.expert.tolist() == [[1, 0, 2]]


def test_remat_that_saves_the_decision_never_runs_the_forward_kernel_again():
    tokens, router, *_ = draw(CASES["exact tiles"], 0, "uneven")

    def loss(tokens, router):
        routing, passed = route_and_pass(jnp.sin(tokens), router, backend="tpu")
        return jnp.sum(routing.gate) + jnp.sum(routing.sums.entropy) + jnp.sum(jnp.square(passed))

    def runs_again(function) -> bool:
        lowered = jax.jit(jax.value_and_grad(function, argnums=(0, 1))).lower(tokens, router)
        compiled = lowered.compile()
        names = re.findall(r'op_name="([^"]*)"', compiled.as_text())
        assert any("route_forward" in name for name in names) and any("route_backward" in name for name in names)
        return any("rematted_computation" in name and "route_forward" in name for name in names)

    saving = jax.checkpoint_policies.save_only_these_names("moe_routing")
    assert not runs_again(jax.checkpoint(loss, policy=saving))
    # Without the name it decides again: the answer can be another.
    assert runs_again(jax.checkpoint(loss))


def test_vmap_is_one_after_the_other():
    case = CASES["one more than a tile"]
    drawn = [draw(case, seed, "uneven") for seed in (0, 1)]
    alone = functools.partial(kernels.__wrapped__, case, TARGET)
    run = jax.jit(alone, compiler_options=SAME_BITS)
    one_by_one = [run(*arguments) for arguments in drawn]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn)
    together = jax.jit(jax.vmap(alone), compiler_options=SAME_BITS)(*stacked)
    for n, one in enumerate(one_by_one):
        jax.tree.map(lambda a, b, n=n: np.testing.assert_array_equal(b[n], a), one, together)


@pytest.mark.parametrize("name", ["one more than a tile", "more experts than lanes"])
def test_no_races_and_no_uninitialised_memory(name):
    case = dataclasses.replace(CASES[name], groups=1)
    drawn, target = draw(case, 2, "uneven"), Target("TPU v5", num_cores=2, interpret=True)
    parameters = pltpu.InterpretParams(
        detect_races=True, num_cores_or_threads=2, uninitialized_memory="nan", out_of_bounds_reads="uninitialized"
    )
    with pltpu.force_tpu_interpret_mode(parameters):
        simulated = jax.jit(kernels.__wrapped__, static_argnums=(0, 1))
        found = jax.block_until_ready(simulated(case, target, *drawn))
    check(case, drawn, found)
    assert not importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call").races.races_found


def test_the_table_says_who_takes_what():
    static = RouteStatic(1, 1, 2, 1 / 32)
    on_tpu = Problem("route", "tpu", "bfloat16", (16384, 768), 32, route=static, chip="TPU v5 lite")
    assert explain(on_tpu).startswith("tpu: chosen\n") and explain(on_tpu).endswith("\nxla: also possible")
    assert choose(on_tpu) == choose(dataclasses.replace(on_tpu))
    for change, reason in (
        ({"platform": "cpu"}, "platform cpu is not tpu; named, it runs interpreted"),
        ({"dtype": "float16"}, "dtype float16 is none of"),
        ({"shape": (0, 768)}, "tokens of shape (0, 768) are empty"),
        ({"route": RouteStatic(17, 1, 2, 1 / 32)}, "17 choices and 2 modalities are more than 16 and 16"),
        ({"route": None}, "what is static about the routing is not known"),
        ({"shape": (16384, 100_000), "chip": "TPU v4"}, "width 100000 with 32 experts does not fit the 16 MiB of VMEM"),
    ):
        assert f"tpu: no, {reason}" in explain(dataclasses.replace(on_tpu, **change))


@pytest.mark.parametrize("chip", TPUS)
@pytest.mark.parametrize("size", [1, 127, 128, 129, 1696, 2048, 16384])
def test_tiles_cover_a_group(chip, size):
    for tiles in (
        f(RouteStatic(2, 3, 2, 0.1), 3 * size, 768, 32, 2, TPUS[chip], 2) for f in (forward_tiles, backward_tiles)
    ):
        assert tiles.tokens % 128 == 0 and tiles.tokens <= max(size, 128)
        blocks = {tiles.at(part, tile) for part in range(3 * tiles.parts) for tile in range(tiles.steps)}
        assert blocks == {(g, b) for g in range(3) for b in range(-(-size // tiles.tokens))}
