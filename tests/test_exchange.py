"""What the compiled program of a sharded layer exchanges: how often, with whom, in which dtype, how many bytes."""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from sharding_cases import Arguments, arguments, collectives, mesh_of
from spec_cases import spec_and_inputs

from limoe.config.presets import preset
from moe_kernels import (
    EXCHANGE_NAMES,
    SAVED_NAMES,
    MoeOutput,
    MoeSpec,
    expert_capacity,
    make_plan,
    moe_mlp,
    route,
    router_noise,
)
from moe_kernels.parallel.exchange import block_rows, in_chunks

pytestmark = pytest.mark.devices(8)

GROUPS, TOKENS, EXPERTS, WIDTH, HIDDEN = 8, 1024, 8, 12, 20
OPTIONS = {"num_groups": GROUPS, "capacity_factor": 1.05}


def program(function, a: Arguments, mesh, **options) -> str:
    """Compiled text of a function of (tokens, router, weights), with its arguments where a trainer has them."""
    by_token, by_expert, whole = (
        NamedSharding(mesh, PartitionSpec(*axes)) for axes in ([mesh.axis_names], ["expert"], [])
    )
    jitted = jax.jit(function, in_shardings=(by_token, whole, by_expert))
    return jitted.lower(a.tokens, a.router, a.weights).compile().as_text()


def layer_of(mesh, **options):
    """The layer as the trainer calls it, noise drawn inside."""

    def layer(tokens, router, weights):
        noise = router_noise(
            jax.random.key(0), num_groups=GROUPS, group_size=tokens.shape[0] // GROUPS, num_experts=EXPERTS
        )
        return moe_mlp(tokens, router, weights, *spec_and_inputs(noise=noise, **OPTIONS | options), mesh=mesh)

    return layer


def loss_and_gradient(layer, a: Arguments):
    def loss(tokens, router, weights):
        output = layer(tokens, router, weights)
        aux = sum(jnp.sum(jnp.sin(jnp.sum(field, axis=0))) for field in output.sums)
        return jnp.sum(output.tokens.astype(jnp.float32) * a.dtokens) + aux

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


def kinds(text: str) -> dict[str, int]:
    """How many collectives of each kind; exchanges of rows and of counts apart."""
    counted: dict[str, int] = {}
    for one in collectives(text):
        name = "counts" if one.kind == "all-to-all" and one.dtypes == {"s32"} else one.kind
        counted[name] = counted.get(name, 0) + 1
    return counted


def problem(tokens: int = TOKENS) -> Arguments:
    return arguments(0, tokens=tokens, groups=GROUPS, experts=EXPERTS, width=WIDTH, hidden=HIDDEN)


@pytest.mark.parametrize(("mesh_shape", "num_chunks"), [((1, 8), 1), ((2, 4), 2)])
def test_rows_are_exchanged_twice_forward_and_nothing_else_is(mesh_shape, num_chunks):
    mesh = mesh_of(*mesh_shape)
    found = kinds(program(layer_of(mesh, num_chunks=num_chunks), problem(), mesh))
    # Plain XLA multiplies whole blocks, and so does not ask for the counts before the backward pass.
    assert found.pop("counts", 0) <= 1
    assert found == {"all-to-all": 2 * num_chunks}


@pytest.mark.parametrize(
    ("saved", "exchanges"),
    [
        (None, 4),  # no remat
        (SAVED_NAMES, 6),
        ((*SAVED_NAMES, *EXCHANGE_NAMES), 4),
    ],
    ids=["no remat", "rematerialised", "saved"],
)
def test_the_gradient_exchanges_twice_more_and_again_twice_where_rows_are_rematerialised(saved, exchanges):
    mesh, a = mesh_of(2, 4), problem()
    layer = layer_of(mesh)
    if saved is not None:
        layer = jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(*saved))

    def tower(tokens, router, weights):
        # Two layers in a scan, as in a model; of a single one XLA merges what is rematerialised with what was there.
        def step(x, _):
            output = layer(x, router, weights)
            return x + output.tokens, output.sums

        x, sums = jax.lax.scan(step, tokens, length=2)
        sums, kept = jax.tree.map(lambda field: field.sum(axis=0), sums), jnp.zeros((GROUPS, 1, EXPERTS))
        return MoeOutput(x, sums, kept, expert=jnp.zeros((len(x), 1), jnp.int32), priority=None)

    text = program(loss_and_gradient(tower, a), a, mesh)
    found = kinds(text)
    assert found.pop("all-reduce") >= 1
    assert found == {"all-to-all": exchanges, "counts": 1}
    # What is summed over devices are gradients of parameters and sums of the statistics: no rows, no tokens.
    local = EXPERTS // 4
    parameters = {(local, WIDTH, HIDDEN), (local, HIDDEN), (local, HIDDEN, WIDTH), (local, WIDTH), (WIDTH, EXPERTS)}
    statistics = {(1,), (1, EXPERTS), ()}
    summed = {shape for one in collectives(text) if one.kind == "all-reduce" for _, shape in one.shapes}
    assert parameters <= summed <= parameters | statistics


def test_an_exchange_stays_in_its_slice_and_its_row_of_the_mesh():
    mesh, a = mesh_of(2, 2, 2, names=("slice", "data", "expert")), problem()
    exchanged = [one for one in collectives(program(layer_of(mesh), a, mesh)) if one.kind == "all-to-all"]
    assert {one.groups for one in exchanged} == {((0, 1), (2, 3), (4, 5), (6, 7))}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_an_exchange_ships_little_more_than_the_rows_in_the_compute_dtype(dtype):
    mesh, a = mesh_of(1, 8), problem(16 * TOKENS)
    a = a._replace(tokens=a.tokens.astype(dtype))
    # The lowered program: the CPU's compiler widens bfloat16 whatever is asked for.
    text = jax.jit(loss_and_gradient(layer_of(mesh), a)).lower(a.tokens, a.router, a.weights).as_text()
    name = {"bfloat16": "bf16", "float32": "f32"}[jnp.dtype(dtype).name]
    operands = [line.rsplit(":", 1)[1] for line in text.splitlines() if '"stablehlo.all_to_all"' in line]
    rows = [line for line in operands if f"x{name}>" in line]
    counts = [line for line in operands if "xi32>" in line]
    assert len(rows) == 4 and len(counts) == 1 and len(operands) == 5
    shapes = {tuple(int(n) for n in line.split("tensor<")[1].split(f"x{name}>")[0].split("x")) for line in rows}
    assert len(shapes) == 1
    shipped = np.prod(shapes.pop())
    assert shipped <= Fraction("1.05") * Fraction("1.05") * (16 * TOKENS // 8) * WIDTH


@pytest.mark.parametrize(("name", "chips"), [("b16", 64), ("l16", 128), ("h14", 512)], ids=lambda value: str(value))
@pytest.mark.parametrize("num_chunks", [1, 2])
def test_blocks_at_the_paper_s_sizes_hold_little_more_than_the_rows(name, chips, num_chunks):
    config = preset(name)
    model = config.model
    per_example = model.num_image_tokens + model.text_length
    examples = config.train.batch_size // chips
    groups = examples // (model.group_examples or examples)
    capacity = expert_capacity(
        examples * per_example // groups, model.num_choices, model.num_experts, model.capacity_factor
    )
    rows = model.num_experts * block_rows(groups * capacity, num_chunks)
    wanted = Fraction(str(model.capacity_factor)) * model.num_choices * examples * per_example
    assert rows <= Fraction("1.05") * wanted


def test_chunks_deal_rows_out_in_turn():
    a = problem()
    routing = jax.jit(functools.partial(route, spec=MoeSpec(num_choices=2, num_groups=2)))(a.tokens, a.router)
    plan = make_plan(routing, num_experts=EXPERTS, num_groups=2, capacity=100, rows_per_expert=240)
    cut = in_chunks(plan, 3)
    row, source = np.asarray(cut.row).ravel(), np.asarray(cut.source)
    kept = np.asarray(plan.row).ravel() < plan.layout.num_rows
    # Who has a place keeps one, the place knows who has it, and nobody else's does.
    np.testing.assert_array_equal(row < cut.layout.num_rows, kept)
    np.testing.assert_array_equal(source[row[kept]], np.flatnonzero(kept))
    assert (np.sort(source)[: kept.sum()] == np.flatnonzero(kept)).all()
    # Every chunk holds a third of the rows of every expert, at the front of its run.
    size = np.asarray(cut.runs.size).reshape(3, EXPERTS)
    np.testing.assert_array_equal(size.sum(axis=0), plan.runs.size)
    assert (size.max(axis=0) - size.min(axis=0) <= 1).all()
    used = (source < plan.layout.num_tokens * 2).reshape(3, EXPERTS, 80)
    np.testing.assert_array_equal(used, np.arange(80) < size[..., None])
