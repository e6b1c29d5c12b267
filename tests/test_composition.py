"""The layer inside other people's code: in their `shard_map`, on their meshes, under their settings of JAX."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_leaves_with_path
from sharding_cases import arguments, assert_same_layer, close_in_rows, run, sharded, unsharded, weights_of

from moe_kernels import (
    GluWeights,
    MoeOutput,
    MoeSpec,
    RouteInputs,
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
