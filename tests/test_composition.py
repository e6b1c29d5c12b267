"""The layer inside other people's code: in their `shard_map`, on their meshes, under their settings of JAX."""

import dataclasses
import functools
import re

import equinox
import jax
import jax.export
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import linen, nnx
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_leaves_with_path
from sharding_cases import arguments, assert_same_layer, close_in_rows, mesh_of, run, sharded, unsharded, weights_of

from moe_kernels import (
    GluWeights,
    MlpWeights,
    MoeOutput,
    MoeSpec,
    RouteInputs,
    RouterSpec,
    RouterWeights,
    bpr_priority,
    combine,
    dispatch,
    expert_capacity,
    expert_mlp,
    grouped_glu,
    grouped_matmul,
    make_plan,
    moe_mlp,
    moe_mlp_on_shard,
    route,
)

pytestmark = [pytest.mark.compat, pytest.mark.devices(4)]

TOKENS, GROUPS, EXPERTS, SHARDS = 64, 4, 8, 4
OPTIONS = {"num_choices": 2, "num_groups": GROUPS, "capacity_factor": 1.0}
SPLIT, WHOLE = PartitionSpec(("data", "expert")), PartitionSpec()


@pytest.fixture
def as_users_run_it():
    """The suite's import hook checks every annotation first; users do not have it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def problem(kind: str = "mlp"):
    a = arguments(1, tokens=TOKENS, groups=GROUPS, experts=EXPERTS)
    return a._replace(weights=weights_of(kind, a.weights))


def auto_mesh():
    return jax.make_mesh((2, 2), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)


def in_own_shard_map(name, tokens, router, weights, spec, inputs):
    """A layer of each device's tokens in a `shard_map` as JAX makes it, which checks what varies."""
    groups, layer = spec.num_groups // SHARDS, LAYERS[name]
    weights_split = PartitionSpec("expert") if name == "on shard" else WHOLE
    spec = dataclasses.replace(spec, num_groups=groups)

    def on_shard(tokens, router, weights, inputs):
        first = inputs.first_group + groups * jax.lax.axis_index(("data", "expert"))
        return layer(tokens, router, weights, spec, inputs._replace(first_group=first))

    by_token = RouteInputs(noise=SPLIT, modality=SPLIT, mask=SPLIT, key=WHOLE, first_group=WHOLE)
    return jax.shard_map(on_shard, mesh=auto_mesh(), in_specs=(SPLIT, WHOLE, weights_split, by_token), out_specs=SPLIT)(
        tokens, router, weights, inputs._replace(first_group=jnp.int32(inputs.first_group))
    )


def by_verbs(tokens, router, weights, spec, inputs):
    """The layer out of its verbs, written by hand."""
    routing = route(tokens, router, spec, inputs)
    capacity = expert_capacity(len(tokens) // spec.num_groups, spec.num_choices, EXPERTS, spec.capacity_factor)
    plan = make_plan(
        routing,
        num_experts=EXPERTS,
        num_groups=spec.num_groups,
        capacity=capacity,
        priority=bpr_priority(routing),
        modality=inputs.modality,
        num_modalities=spec.num_modalities,
    )
    rows = dispatch(tokens, plan)
    if isinstance(weights, GluWeights):
        rows = grouped_matmul(grouped_glu(rows, weights.gate, weights.up, plan), weights.down, plan)
    else:
        rows = expert_mlp(rows, weights, plan)
    return MoeOutput(combine(rows, routing.gate, plan), routing.sums, plan.kept, routing.expert, None)


LAYERS = {"moe_mlp": moe_mlp, "by verbs": by_verbs, "on shard": moe_mlp_on_shard}


@functools.cache
def traces_erf() -> bool:
    """Whether JAX differentiates erf in a shard_map that checks what varies; JAX 0.12.0 does not."""
    mesh, split = mesh_of(1, 4), PartitionSpec("expert")
    slope = jax.shard_map(jax.grad(lambda x: jax.lax.erf(x).sum()), mesh=mesh, in_specs=split, out_specs=split)
    try:
        jax.eval_shape(slope, jax.ShapeDtypeStruct((4,), jnp.float32))
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "kind", "changes"),
    [
        ("moe_mlp", "mlp", {}),
        ("moe_mlp", "shared", {"capacity_factor": None, "priority": "random"}),
        ("by verbs", "mlp", {}),
        ("by verbs", "glu", {"capacity_factor": 2.0}),
        ("on shard", "mlp", {"num_chunks": 2, "capacity_factor": 2.0}),
        ("on shard", "glu", {"capacity_factor": None}),
    ],
    ids=str,
)
def test_in_a_shard_map_of_ones_own(name, kind, changes):
    layer = functools.partial(in_own_shard_map, name)
    options, a = OPTIONS | changes, problem(kind)
    if not traces_erf():  # the load of a noisy router needs it
        a = a._replace(noise=None)
    mine = jax.jit(functools.partial(run, layer, **options))(a)
    options.pop("num_chunks", None)
    assert_same_layer(mine, jax.jit(unsharded(**options))(a))


def test_gradients_taken_inside_a_shard_map_of_ones_own_are_those_of_all_tokens():
    a, spec = problem(), MoeSpec(num_choices=2, num_groups=GROUPS // SHARDS, capacity_factor=1.0)

    def loss(tokens, router, weights, dtokens, spec=spec):
        return jnp.sum(moe_mlp(tokens, router, weights, spec).tokens * dtokens)

    def on_shard(*arguments):
        return jax.grad(lambda *some: jax.lax.psum(loss(*some), ("data", "expert")), argnums=(0, 1, 2))(*arguments)

    places = (SPLIT, WHOLE, WHOLE)
    inside = jax.shard_map(on_shard, mesh=auto_mesh(), in_specs=(*places, SPLIT), out_specs=places)
    arguments = a.tokens, a.router, a.weights, a.dtokens
    whole = functools.partial(loss, spec=dataclasses.replace(spec, num_groups=GROUPS))
    mine, twin = jax.jit(inside)(*arguments), jax.jit(jax.grad(whole, argnums=(0, 1, 2)))(*arguments)
    for (path, x), y in zip(tree_leaves_with_path(mine), jax.tree.leaves(twin), strict=True):
        close_in_rows(*(np.reshape(z, (len(z), -1)) for z in (x, y)), length=TOKENS, name=keystr(path))


def test_interpreted_kernels_say_how_to_run_them_in_a_shard_map():
    a = problem()

    def layer(tokens):
        return moe_mlp(tokens, a.router, a.weights, MoeSpec(backend="tpu")).tokens

    mapped = jax.shard_map(layer, mesh=auto_mesh(), in_specs=SPLIT, out_specs=SPLIT)
    with pytest.raises(ValueError, match=r"interpreted kernels do not run in .* check_vma=False to jax\.shard_map"):
        jax.eval_shape(mapped, a.tokens)


def test_kernels_of_gpus_say_how_to_run_them_in_a_shard_map():
    h200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "expert"), axis_types=(AxisType.Auto,) * 2, abstract_device=h200)
    a = arguments(1, tokens=TOKENS, groups=GROUPS, experts=EXPERTS, width=128, hidden=128)
    tokens = a.tokens.astype("bfloat16")

    def traced(spec, **options):
        def layer(tokens):
            return moe_mlp(tokens, a.router, a.weights, spec).tokens

        mapped = jax.shard_map(layer, mesh=mesh, in_specs=SPLIT, out_specs=SPLIT, **options)
        return set(re.findall(r"\bname=(moe_\w+)", str(jax.make_jaxpr(mapped)(tokens))))

    with pytest.raises(ValueError, match=r"GPU kernels do not run in .* check_vma=False .* or use backend='xla'"):
        traced(MoeSpec())
    kernels = {"moe_gather", "moe_rows_activate_alone", "moe_rows_store", "moe_gather_weighed"}
    assert kernels <= traced(MoeSpec(), check_vma=False)
    assert not kernels & traced(MoeSpec(backend="xla"))


def explicit_mesh(*types):
    return jax.make_mesh((2, 2), ("data", "expert"), axis_types=types or (AxisType.Explicit,) * 2)


@pytest.mark.parametrize("types", [(), (AxisType.Explicit, AxisType.Auto)], ids=["explicit", "mixed"])
@pytest.mark.parametrize("placed", [False, True], ids=["unplaced", "placed"])
def test_explicit_meshes(placed, types):
    a, mesh = problem("shared"), explicit_mesh(*types)
    twin = jax.jit(unsharded(**OPTIONS))(a)
    if placed:
        split = NamedSharding(mesh, PartitionSpec("data"))
        a = a._replace(
            tokens=jax.device_put(a.tokens, split), weights=jax.device_put(a.weights, NamedSharding(mesh, WHOLE))
        )
    mine = jax.jit(sharded(mesh, **OPTIONS))(a)
    assert_same_layer(jax.tree.map(np.asarray, mine), twin)


def test_arrays_on_explicit_meshes_say_what_to_do_without_the_mesh():
    a, mesh, spec = problem(), explicit_mesh(), MoeSpec(num_choices=2)
    split, whole = (jax.device_put(a.tokens, NamedSharding(mesh, PartitionSpec(axis))) for axis in ("data", None))
    routing = route(a.tokens, a.router, spec)
    plan = make_plan(routing, num_experts=EXPERTS)
    elsewhere = routing._replace(gate=jax.device_put(routing.gate, NamedSharding(mesh, PartitionSpec("data"))))
    for verb in (
        lambda: moe_mlp(split, a.router, a.weights, spec),
        lambda: jax.jit(moe_mlp)(split, a.router, a.weights),
        lambda: route(split, a.router),
        lambda: make_plan(elsewhere, num_experts=EXPERTS),
        lambda: dispatch(split, plan),
    ):
        with pytest.raises(ValueError, match=r"split over the Explicit mesh axes \['data'\]; .*mesh=mesh.*auto_axes"):
            verb()
    with pytest.raises(ValueError, match=r"on a mesh with Explicit axes; enter it with jax\.set_mesh\(mesh\)"):
        moe_mlp(whole, a.router, a.weights, spec)
    with jax.set_mesh(mesh):
        alone = jax.sharding.auto_axes(
            lambda tokens: moe_mlp(tokens, a.router, a.weights, spec).tokens, out_sharding=PartitionSpec("data")
        )
        for found in (jax.jit(alone)(split), jax.jit(lambda x: moe_mlp(x, a.router, a.weights, spec).tokens)(whole)):
            close_in_rows(np.asarray(found), moe_mlp(*a[:3], spec).tokens, length=20, name="y")


def loss_of(a, spec, inputs=RouteInputs()):  # noqa: B008 (a tuple)
    """A function of tokens, router and weights of a problem with all inputs, and these three."""

    def loss(tokens, router, weights):
        output = moe_mlp(tokens, router, weights, spec, inputs)
        return jnp.sum(jnp.sin(output.tokens)) + jnp.sum(output.sums.load)

    return loss, (a.tokens, a.router, a.weights)


def gradient_of(loss):
    return jax.grad(loss, argnums=(0, 1, 2))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mlp", {"capacity_factor": 1.0}),
        ("biased", {"router": RouterSpec("sigmoid", True, 2.5, 2, 1)}),
        ("shared", {"priority": "random"}),
        ("mlp", {"num_choices": 1, "backend": "tpu"}),
        ("glu", {"capacity_factor": 1.0, "backend": "tpu"}),
    ],
    ids=str,
)
def test_ranks_and_dtypes_need_no_promotion(kind, changes):
    a = problem(kind)
    spec = MoeSpec(**{"num_choices": 2, "num_groups": GROUPS, "num_modalities": 2} | changes)
    inputs = RouteInputs(noise=a.noise, modality=a.modality, mask=a.mask, key=jax.random.key(0))
    loss, arguments = loss_of(a, spec, inputs)
    bias = jnp.ones(EXPERTS)
    biased = arguments[0], RouterWeights(arguments[1], bias, bias), arguments[2]
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(gradient_of(loss), *(arguments if spec.backend == "tpu" else biased))


@pytest.mark.parametrize("factor", [None, 1.0])
def test_ranks_need_no_promotion_on_a_mesh(factor):
    a, spec = problem(), MoeSpec(num_choices=2, num_groups=GROUPS, capacity_factor=factor)

    def loss(tokens, router, weights):
        return jnp.sum(moe_mlp(tokens, router, weights, spec, mesh=auto_mesh()).tokens)

    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(gradient_of(loss), a.tokens, a.router, a.weights)


def test_numpy_float64_is_converted_as_jax_does(as_users_run_it):
    a = problem()
    routing = route(a.tokens, a.router)
    plan = make_plan(routing, num_experts=EXPERTS)
    rows = dispatch(a.tokens, plan)
    for verb, given in (
        (route, (a.tokens, a.router)),
        (lambda tokens: dispatch(tokens, plan), (a.tokens,)),
        (lambda rows, weights: expert_mlp(rows, weights, plan), (rows, a.weights)),
        (lambda rows, weight: grouped_matmul(rows, weight, plan), (rows, a.weights.w1)),
        (lambda rows, gate: combine(rows, gate, plan), (rows, routing.gate)),
        (moe_mlp, (a.tokens, a.router, a.weights)),
    ):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), given)
        jax.tree.map(np.testing.assert_array_equal, verb(*wide), verb(*given))


def test_float64_is_refused_with_the_reason_first():
    a = problem()
    loss, arguments = loss_of(a, MoeSpec(num_choices=2, num_groups=GROUPS, capacity_factor=1.0))
    twin = gradient_of(loss)(*arguments)
    with jax.enable_x64(True):
        for x, y in zip(jax.tree.leaves(gradient_of(loss)(*arguments)), jax.tree.leaves(twin), strict=True):
            assert x.dtype == jnp.float32
            close_in_rows(*(np.reshape(z, (len(z), -1)) for z in (x, y)), length=TOKENS, name="gradient")
        wide = a.tokens.astype(jnp.float64)
        for verb in (route, functools.partial(moe_mlp, weights=a.weights)):
            with pytest.raises(
                ValueError, match=r"^xla: dtype float64 is none of \('float32', 'bfloat16', 'float16'\)"
            ):
                verb(wide, router=a.router)


def test_export_and_back_with_gradients_but_without_symbolic_sizes():
    a = problem()
    layer = jax.jit(lambda tokens: moe_mlp(tokens, a.router, a.weights, MoeSpec(num_choices=2)).tokens)
    exported = jax.export.export(layer)(a.tokens)
    np.testing.assert_array_equal(exported.call(a.tokens), layer(a.tokens))
    _, pull = jax.vjp(layer, a.tokens)
    # The exported program computes the layer again, the other one kept what it needs: they may round apart.
    found, wanted = exported.vjp().call(a.tokens, a.dtokens)[0], pull(a.dtokens)[0]
    scale = np.abs(wanted).max(axis=1, keepdims=True)
    np.testing.assert_allclose(found / scale, wanted / scale, rtol=0, atol=16 * np.finfo(np.float32).eps)
    (size,) = jax.export.symbolic_shape("t")
    with pytest.raises(ValueError, match=r"tokens: an array has the symbolic size t; .* with fixed shapes"):
        jax.export.export(layer)(jax.ShapeDtypeStruct((size, a.tokens.shape[1]), jnp.float32))


@pytest.mark.parametrize("factor", [None, 0.5])
def test_checks_of_indices_and_nans_raise_no_false_alarm(factor):
    a = problem()
    spec = MoeSpec(num_choices=2, num_groups=GROUPS, capacity_factor=factor)
    loss, arguments = loss_of(a, spec, RouteInputs(mask=a.mask))
    error, _ = jax.jit(checkify.checkify(gradient_of(loss), errors=checkify.index_checks))(*arguments)
    error.throw()
    with jax.debug_nans(True):
        jax.jit(gradient_of(loss))(*arguments)


def test_layers_of_flax():
    a = problem()
    twin = moe_mlp(a.tokens, a.router, a.weights).tokens

    class Linen(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            parameters = [self.param(f"p{n}", lambda key, x=x: x) for n, x in enumerate((a.router, *a.weights))]
            return moe_mlp(tokens, parameters[0], MlpWeights(*parameters[1:])).tokens

    class Nnx(nnx.Module):
        def __init__(self):
            self.router, self.weights = nnx.Param(a.router), nnx.data([nnx.Param(x) for x in a.weights])

        def __call__(self, tokens):
            weights = MlpWeights(*(weight[...] for weight in self.weights))
            return moe_mlp(tokens, self.router[...], weights).tokens

    model = Linen()
    parameters = model.init(jax.random.key(0), a.tokens)
    np.testing.assert_array_equal(model.apply(parameters, a.tokens), twin)
    found = jax.grad(lambda p: jnp.sum(model.apply(p, a.tokens)))(parameters)["params"]["p0"]
    module = Nnx()
    np.testing.assert_array_equal(module(a.tokens), twin)
    other = nnx.grad(lambda module: jnp.sum(module(a.tokens)))(module)["router"]
    np.testing.assert_array_equal(found, other[...])


def test_layers_of_equinox():
    a = problem()

    class Layer(equinox.Module):
        router: jax.Array
        weights: MlpWeights

        def __call__(self, tokens):
            return moe_mlp(tokens, self.router, self.weights).tokens

    layer = Layer(a.router, a.weights)
    found = equinox.filter_jit(equinox.filter_grad(lambda layer: jnp.sum(layer(a.tokens))))(layer)
    close_in_rows(
        found.router,
        jax.grad(lambda r: jnp.sum(moe_mlp(a.tokens, r, a.weights).tokens))(a.router),
        length=TOKENS,
        name="dr",
    )
