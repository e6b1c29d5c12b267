"""Experts over a mesh: the same function as the layer on one device, for every mesh, load and option."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from moe_cases import assert_close
from sharding_cases import (
    MESHES,
    arguments,
    assert_same_layer,
    close_in_rows,
    gate_roundings,
    mesh_of,
    same_sums,
    sharded,
    unsharded,
    weights_of,
)
from spec_cases import spec_and_inputs

from moe_kernels import ClampedSwiglu, RouterSpec, RouterWeights, moe_mlp
from moe_kernels.parallel import ragged as ragged_exchange
from moe_kernels.parallel.ragged import received_rows

pytestmark = pytest.mark.devices(8)

TOKENS, GROUPS, EXPERTS = 128, 8, 8
OPTIONS = {"num_choices": 2, "num_groups": GROUPS, "capacity_factor": 1.0}
# Which experts nearly all choices fall on: all of them; one; two on one shard of 4 or fewer, so that both choices of a
# token meet there; those of the upper half, so that the lower shards get nothing or next to nothing.
LOADS = [None, (5,), (2, 3), (4, 5, 6, 7)]


@functools.cache
def compiled(mesh_shape: tuple[int, int] | None, options: tuple):
    layer = unsharded(**dict(options)) if mesh_shape is None else sharded(mesh_of(*mesh_shape), **dict(options))
    return jax.jit(layer)


def check(mesh_shape, seed: int, wanted, **changes) -> None:
    options = OPTIONS | changes
    chunks = options.pop("num_chunks", 1)
    a = arguments(seed, tokens=TOKENS, groups=options["num_groups"], experts=EXPERTS, wanted=wanted)
    mine = compiled(mesh_shape, tuple((options | {"num_chunks": chunks}).items()))(a)
    assert_same_layer(mine, compiled(None, tuple(options.items()))(a), wanted)


def with_every_load(test):
    for wanted in LOADS:
        test = example(seed=1, wanted=wanted)(test)
    return test


# One device; tokens over eight, experts over eight, and both over two or four.
EVERYDAY = [(1, 1), (8, 1), (1, 8), (2, 4), (4, 2)]


@pytest.mark.parametrize(
    "mesh_shape",
    [shape if shape in EVERYDAY else pytest.param(shape, marks=pytest.mark.full) for shape in MESHES],
    ids=str,
)
@with_every_load
@settings(max_examples=4)
@given(seed=st.integers(0, 10**6), wanted=st.sampled_from(LOADS))
def test_every_mesh_gives_what_one_device_gives(mesh_shape, seed, wanted):
    check(mesh_shape, seed, wanted)


@pytest.mark.parametrize("wanted", LOADS, ids=str)
@pytest.mark.parametrize("changes", [{"num_chunks": 3, "capacity_factor": 2.0}, {"priority": "random"}], ids=str)
def test_chunks_and_random_order_change_nothing(changes, wanted):
    check((2, 4), 1, wanted, **changes)


@pytest.mark.parametrize("wanted", LOADS, ids=str)
@pytest.mark.parametrize("mesh_shape", [(2, 4), (1, 8)], ids=str)
def test_without_a_limit_everything_is_kept_wherever_it_goes(mesh_shape, wanted):
    check(mesh_shape, 3, wanted, capacity_factor=None)


def ragged_all_to_all_ref(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What JAX documents of `ragged_all_to_all`, which CPUs do not have: each slice lands where its sender says."""
    here, shards = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)
    sent = jax.lax.all_gather(operand, axis_name)
    # [quantity, sender, receiver, slice]
    slices = jax.lax.all_gather(jnp.stack([input_offsets, send_sizes, output_offsets, recv_sizes]), axis_name)
    first, size, there, expected = slices.reshape(shards, 4, shards, -1).swapaxes(0, 1)
    row = jnp.arange(operand.shape[0])
    for sender in range(shards):
        for n in range(first.shape[-1]):
            place = row - first[sender, here, n]
            inside = (place >= 0) & (place < size[sender, here, n])
            target = jnp.where(inside, place + there[sender, here, n], output.shape[0])
            output = output.at[target].set(sent[sender], mode="drop")
    # Undefined unless what is sent is what its receiver expects.
    return jnp.where(jnp.all(size == expected.swapaxes(0, 1)), output, jnp.nan)


@pytest.mark.parametrize("mesh_shape", [(2, 4), (1, 8)], ids=str)
def test_ragged_exchanges_of_accelerators_give_what_one_device_gives(monkeypatch, mesh_shape):
    """And with a small buffer what the exchange gives that stands in for them here."""
    options = OPTIONS | {"capacity_factor": None}
    small = tuple((options | {"buffer_factor": 1}).items())
    loads = [arguments(3, tokens=TOKENS, groups=GROUPS, experts=EXPERTS, wanted=wanted) for wanted in LOADS]
    stand_in = [compiled(mesh_shape, small)(a) for a in loads]
    shipped = []

    def ship(*given, axis_name):
        shipped.append(given)
        return ragged_all_to_all_ref(*given, axis_name=axis_name)

    monkeypatch.setattr(ragged_exchange, "PLATFORMS_WITH_RAGGED", ("cpu",))
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ship)
    whole, cut = (jax.jit(sharded(mesh_of(*mesh_shape), **o)) for o in (options, dict(small)))
    for a, wanted, twin in zip(loads, LOADS, stand_in, strict=True):
        assert_same_layer(whole(a), compiled(None, tuple(options.items()))(a), wanted)
        assert_same_layer(cut(a), twin, wanted)
        assert wanted != (2, 3) or np.sum(twin.output.kept) < np.sum(twin.output.sums.wanted)
    # There and back, forwards and backwards. With the small buffer there and back have one shape, traced once.
    assert len(shipped) == 4 + 2


@pytest.mark.devices(32)
@pytest.mark.parametrize("mesh_shape", [(4, 8), (8, 4)], ids=str)
def test_thirty_two_devices(mesh_shape):
    check(mesh_shape, 4, (2, 3), num_groups=32, num_chunks=2)


@pytest.mark.parametrize("options", [{}, {"capacity_factor": None}], ids=str)
def test_no_tokens_at_all(options):
    a = arguments(0, tokens=0, groups=GROUPS, experts=EXPERTS)
    mine = compiled((2, 4), tuple((OPTIONS | options).items()))(a)
    assert mine.output.tokens.shape == (0, 12) and not np.any(mine.output.kept)
    assert not any(np.any(gradient) for gradient in (mine.drouter, *mine.dweights))


@pytest.mark.parametrize(
    "changes", [{}, {"num_chunks": 2}, {"capacity_factor": None}], ids=["one piece", "chunks", "no limit"]
)
def test_what_is_not_a_number_stays_where_it_stays_on_one_device(changes):
    a = arguments(6, tokens=TOKENS, groups=GROUPS, experts=EXPERTS)
    sick = a._replace(tokens=a.tokens.at[17].set(np.nan), weights=a.weights._replace(w1=a.weights.w1.at[5].set(np.nan)))
    options = OPTIONS | changes
    chunks = {"num_chunks": options.pop("num_chunks", 1)}
    mine = compiled((2, 4), tuple((options | chunks).items()))(sick)
    twin = compiled(None, tuple(options.items()))(sick)
    same = lambda x, y: np.testing.assert_array_equal(np.isnan(x), np.isnan(y))  # noqa: E731
    jax.tree.map(same, (mine.output, mine.dtokens, mine.dweights), (twin.output, twin.dtokens, twin.dweights))
    sound = ~np.isnan(twin.output.tokens).any(axis=1)
    assert 0 < sound.sum() < TOKENS
    close_in_rows(mine.output.tokens[sound], np.asarray(twin.output.tokens)[sound], length=20, name="y")


def test_bfloat16_rows_experts_without_biases_and_an_axis_that_tokens_do_not_use():
    a = arguments(7, tokens=TOKENS, groups=GROUPS, experts=EXPERTS)
    half = a._replace(
        tokens=a.tokens.astype("bfloat16"),
        dtokens=a.dtokens.astype("bfloat16"),
        weights=a.weights._replace(b1=None, b2=None),
    )
    # Every device of "copies" works out the same.
    mesh = mesh_of(2, 4, names=("copies", "expert"))
    mine = jax.jit(sharded(mesh, token_axes=("expert",), **OPTIONS))(half)
    twin = compiled(None, tuple(OPTIONS.items()))(half)
    np.testing.assert_array_equal(mine.output.kept, twin.output.kept)
    assert mine.output.tokens.dtype == "bfloat16" and mine.dweights.b1 is None
    bound = {"length": 1, "roundings": 2, "eps": 2.0**-8}
    as_rows = lambda x: np.asarray(x, np.float32).reshape(len(x), -1)  # noqa: E731
    for name, x, y in (
        ("y", mine.output.tokens, twin.output.tokens),
        ("dx", mine.dtokens, twin.dtokens),
        *((f"d{field}", getattr(mine.dweights, field), getattr(twin.dweights, field)) for field in ("w1", "w2")),
    ):
        x, y = as_rows(x), as_rows(y)
        assert_close(x, y, name=name, scale=np.full(len(y), np.abs(y).max()), **bound)


def test_an_overflow_is_shared_by_the_longest_runs():
    options = OPTIONS | {"capacity_factor": None, "num_choices": 1}
    a = arguments(5, tokens=512, groups=GROUPS, experts=EXPERTS, wanted=(2, 3))
    mine = compiled((2, 4), tuple((options | {"buffer_factor": 1}).items()))(a)
    wanted, kept = (
        np.asarray(x).sum(axis=1).reshape(2, 4, EXPERTS) for x in (mine.output.sums.wanted, mine.output.kept)
    )
    assert (kept <= wanted).all() and (kept < wanted).any()
    # Experts 2 and 3 are those of the second shard, and 8 runs of it share 64 rows and 56 for rounding up.
    for row in range(2):
        runs, room = wanted[row, :, 2:4], received_rows(64, 1, 4, 2, 1)
        level = max(n for n in range(0, 65, 8) if np.minimum(-(-runs // 8) * 8, n).sum() <= room)
        np.testing.assert_array_equal(kept[row, :, 2:4], np.minimum(runs, level))
    others = [0, 1, 4, 5, 6, 7]
    np.testing.assert_array_equal(kept[..., others], wanted[..., others])


@pytest.mark.parametrize("wanted", [None, (5,)], ids=str)
def test_what_overflows_a_buffer_is_dropped_and_counted(wanted):
    options = OPTIONS | {"capacity_factor": None, "num_choices": 1}
    a = arguments(5, tokens=512, groups=GROUPS, experts=EXPERTS, wanted=wanted)
    mine = compiled((2, 4), tuple((options | {"buffer_factor": 1}).items()))(a)
    twin = compiled(None, tuple(options.items()))(a)
    there = np.any(mine.output.tokens != 0, axis=1)
    claims = np.asarray(a.mask)
    # Two rows of four shards, 64 tokens each: a shard has room for 64 rows and 56 for rounding its 8 runs up.
    lost = claims.sum() - there.sum()
    assert lost == np.asarray(mine.output.sums.wanted).sum() - np.asarray(mine.output.kept).sum()
    assert (lost > 0) == (wanted is not None)
    kept = np.asarray(mine.output.kept).sum(axis=1).reshape(2, 4, EXPERTS).sum(axis=1)
    assert (kept.reshape(2, 4, 2).sum(axis=2) <= received_rows(64, 1, 4, 2, 1)).all()
    # Who is there is untouched, who is not is 0 and has no gradient through the experts; statistics are the router's.
    close_in_rows(mine.output.tokens[there], np.asarray(twin.output.tokens)[there], length=20, name="y")
    same_sums(mine.output.sums, twin.output.sums, TOKENS)
    off = np.abs(np.asarray(mine.dtokens) - twin.dtokens).max(axis=1)
    same = off <= gate_roundings(wanted) * 2 * 2.0**-23 * np.sqrt(20) * np.abs(twin.dtokens).max()
    np.testing.assert_array_equal(same, there | ~claims)


def test_slices_are_one_more_axis_of_tokens_and_the_order_of_axes_is_free():
    a = arguments(2, tokens=TOKENS, groups=GROUPS, experts=EXPERTS)
    mesh = mesh_of(2, 2, 2, names=("slice", "data", "expert"))
    layer = sharded(mesh, token_axes=("expert", "slice", "data"), **OPTIONS)
    mine = jax.jit(layer)(a)
    assert_same_layer(mine, compiled(None, tuple(OPTIONS.items()))(a), None)


DEEPSEEK = RouterSpec("sigmoid", renormalise=True, scale=2.5, expert_groups=4, groups_chosen=2)
# Experts and options of the families of layers, and the mesh of everyday tests: together every number of devices.
FAMILIES = {
    "Mixtral": ("glu", {"router": RouterSpec(renormalise=True)}, (1, 1)),
    "gpt-oss": ("biased", {"router": RouterSpec(renormalise=True), "activation": ClampedSwiglu()}, (1, 2)),
    "Llama 4": ("shared", {"router": RouterSpec("sigmoid"), "gates_on": "input", "num_choices": 1}, (4, 1)),
    "DeepSeek-V3": ("shared", {"router": DEEPSEEK, "capacity_factor": None}, (2, 4)),
    "one array": ("joined", {"activation": "gelu_tanh", "priority": "modality"}, (1, 4)),
}


@pytest.mark.parametrize(
    ("name", "mesh_shape"),
    [
        pytest.param(name, shape, marks=[] if shape == everyday else pytest.mark.full)
        for name, (*_, everyday) in FAMILIES.items()
        for shape in MESHES
    ],
    ids=str,
)
def test_every_family_gives_what_one_device_gives(name, mesh_shape):
    kind, changes, _ = FAMILIES[name]
    a = arguments(8, tokens=TOKENS, groups=GROUPS, experts=EXPERTS)
    bias = jnp.linspace(-1, 1, EXPERTS)
    a = a._replace(weights=weights_of(kind, a.weights), router=RouterWeights(a.router, bias, bias[::-1]))
    options = OPTIONS | changes
    mine = jax.jit(sharded(mesh_of(*mesh_shape), **options))(a)
    assert_same_layer(mine, jax.jit(unsharded(**options))(a))


@pytest.mark.parametrize(
    ("names", "kind", "changes"),
    [
        (("expert", "width"), "mlp", {}),
        (("data", "expert", "width"), "mlp", {"capacity_factor": None}),
        (("data", "expert", "width"), "biased", {"num_chunks": 2, "capacity_factor": 2.0}),
        (("width", "expert"), "interleaved", {"capacity_factor": None}),
        (("data", "width", "expert"), "shared", {}),
    ],
    ids=str,
)
def test_experts_are_split_over_two_axes(names, kind, changes):
    a = arguments(4, tokens=TOKENS, groups=GROUPS, experts=EXPERTS)
    a, options = a._replace(weights=weights_of(kind, a.weights)), OPTIONS | changes
    if kind == "interleaved":
        options["interleaved"] = True
    mesh = mesh_of(*(2,) * len(names), names=names)
    mine = jax.jit(sharded(mesh, width_axis="width", **options))(a)
    options.pop("num_chunks", None)
    assert_same_layer(mine, jax.jit(unsharded(**options))(a))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width_axis": "model"}, r"width_axis='model' must be an axis of the mesh \('expert', 'width'\)"),
        ({"width_axis": "expert"}, r"width_axis='expert' must be an axis of the mesh .* not 'expert'"),
        ({"token_axes": ("expert", "width")}, r"token_axes=.* must be axes of the mesh \('expert',\)"),
        ({}, r"experts of width F=20 cannot be split over 3 devices of mesh axis 'width'; use a divisor of 20"),
        (
            {"kind": "joined"},
            r"all columns of gate first cannot be split .* pass GluWeights, or let the columns altern",
        ),
    ],
    ids=str,
)
def test_widths_that_do_not_fit_the_mesh_are_refused(changes, message):
    options = OPTIONS | {"width_axis": "width"} | changes
    a = arguments(0, tokens=TOKENS, groups=GROUPS, experts=EXPERTS)
    kind = options.pop("kind", "mlp")
    mesh = mesh_of(2, 2 if kind == "joined" else 3, names=("expert", "width"))
    with pytest.raises(ValueError, match=message):
        moe_mlp(a.tokens, a.router, weights_of(kind, a.weights), *spec_and_inputs(**options), mesh=mesh)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router": 6}, r"6 experts cannot be split over 4 shards of mesh axis 'expert'; .* one of \[1, 2, 3, 6\]"),
        ({"num_groups": 4}, r"num_groups=4 cannot be split over the 8 shards of mesh axes \('data', 'expert'\); use a"),
        ({"num_chunks": 2, "capacity_factor": None}, r"num_chunks=2 needs a capacity limit; .* use num_chunks=1"),
        ({"buffer_factor": "inf", "capacity_factor": None}, r"buffer_factor='inf' is not a finite number; use one"),
        ({"num_chunks": 0}, r"num_chunks=0 must be at least 1"),
        ({"expert_axis": "experts"}, r"expert_axis='experts' is not an axis of the mesh; choose one of \('data', 'exp"),
        ({"token_axes": ("data",)}, r"token_axes=\('data',\) must be axes of the mesh .* and 'expert' one of them"),
        ({"token_axes": ("data", "expert", "model")}, r"token_axes=.* must be axes of the mesh \('data', 'expert'\)"),
        (
            {"buffer_factor": 2},
            r"buffer_factor=2 is for a layer without a capacity limit; leave it out, or",
        ),
        ({"buffer_factor": 0, "capacity_factor": None}, r"buffer_factor=0 must be positive; use None for no limit"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_mesh_is_refused(changes, message):
    changes = dict(changes)
    experts = changes.pop("router", EXPERTS)
    a = arguments(0, tokens=TOKENS, groups=GROUPS, experts=experts)
    mesh = mesh_of(2, 4)
    with pytest.raises(ValueError, match=message):
        moe_mlp(a.tokens, a.router, a.weights, *spec_and_inputs(**OPTIONS | changes), mesh=mesh)


@pytest.mark.full
@pytest.mark.devices(32)
@pytest.mark.parametrize("mesh_shape", [(1, 32), (4, 8)], ids=str)
def test_32_devices(mesh_shape):
    for seed, wanted in enumerate([None, (5,), (2, 3)]):
        # Lifted gates crowd below 1, and half of them round otherwise in batches of 32 tokens than in one of 1,024: who
        # comes first is not for them to say.
        priority = "bpr" if wanted is None else "arrival"
        options = {"num_choices": 2, "num_groups": 64, "capacity_factor": 1.05, "priority": priority}
        a = arguments(seed, tokens=1024, groups=64, experts=32, wanted=wanted)
        assert_same_layer(
            jax.jit(sharded(mesh_of(*mesh_shape), **options))(a), jax.jit(unsharded(**options))(a), wanted
        )


@pytest.mark.full
@pytest.mark.parametrize("mesh_shape", MESHES, ids=str)
@pytest.mark.parametrize(
    ("num_chunks", "num_choices", "priority"), [(1, 1, "arrival"), (2, 2, "modality"), (4, 8, "random"), (3, 1, "bpr")]
)
def test_every_option_on_every_mesh(mesh_shape, num_chunks, num_choices, priority):
    for seed, wanted in enumerate(LOADS):
        check(mesh_shape, seed, wanted, num_chunks=num_chunks, num_choices=num_choices, priority=priority)


@pytest.mark.full
@pytest.mark.parametrize("mesh_shape", MESHES, ids=str)
@pytest.mark.parametrize("num_choices", [1, 2, 8])
def test_no_limit_on_every_mesh(mesh_shape, num_choices):
    for seed, wanted in enumerate(LOADS):
        check(mesh_shape, seed, wanted, num_choices=num_choices, capacity_factor=None)
