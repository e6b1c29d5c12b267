"""Compiled programs are read right: trips of loops, matmuls in every form, traffic, exchanges and their groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import small_batch, small_config
from moe_cases import FAST

from limoe.hlo import HloError, Program
from limoe.hlo_work import Matmul, axes_of, collectives, groups_of, kernel_flops, matmuls
from limoe.step import compile_step, prepare

F32 = 4


def total(program: Program, count) -> int:
    return sum(count(run) * run.trips for run in program.runs())


def flops(program: Program) -> int:
    return total(program, lambda run: sum(m.flops for m in matmuls(program, run.instruction, run.computation)))


def compiled(function, *args) -> Program:
    return Program(jax.jit(function).lower(*args).compile().as_text())


def test_a_loop_counts_as_often_as_it_runs():
    x, w = jnp.ones((8, 16)), jnp.ones((16, 16))

    def inner(x, trips):
        return jax.lax.fori_loop(0, trips, lambda _, y: jnp.tanh(y @ w), x)

    def nested(x):
        return jax.lax.fori_loop(0, 3, lambda _, y: inner(y, 5), x)

    once = 2 * 8 * 16 * 16
    assert flops(compiled(lambda x: inner(x, 7), x)) == 7 * once
    assert flops(compiled(nested, x)) == 15 * once


@functools.cache
def step_program(*settings: str) -> Program:
    config = small_config("depth=4", "moe_layers=1,3", "batch_size=8", *settings)
    training = prepare(config)
    step = compile_step(training, config)
    return Program(step.lower(training.abstract, *small_batch(config)).compile(compiler_options=FAST).as_text())


def test_a_scan_of_blocks_has_the_flops_of_its_unrolled_twin():
    """Two repeats of (dense, experts), against the same four blocks written out."""
    rolled, written_out = step_program("scan_unroll=1"), step_program("scan_unroll=2")
    counts = [
        sum(bool(matmuls(program, run.instruction, run.computation)) for run in program.runs())
        for program in (rolled, written_out)
    ]
    assert 0 < counts[0] < counts[1]
    assert flops(rolled) == flops(written_out)


LOOP = """
%next (i: s32[], by: s32[]) -> s32[] {
  %i = s32[] parameter(0)
  %by = s32[] parameter(1)
  ROOT %sum = s32[] add(%by, %i)
}

%less (limit: s32[], i: s32[]) -> pred[] {
  %limit = s32[] parameter(0)
  %i = s32[] parameter(1)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (p: (f32[8], s32[])) -> (f32[8], s32[]) {
  %p = (f32[8]{0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=1
  %copied = s32[] copy(%i)
  %one = s32[] constant(1)
  %j = s32[] add(%copied, %one)
  %x = f32[8]{0} get-tuple-element(%p), index=0
  %y = f32[8]{0} negate(%x)
  ROOT %t = (f32[8]{0}, s32[]) tuple(%y, %j)
}

%condition (p: (f32[8], s32[])) -> pred[] {
  %p = (f32[8]{0}, s32[]) parameter(0)
  %limit = s32[] constant(9)
  %i = s32[] get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x: f32[8], n: s32[]) -> (f32[8], s32[]) {
  %x = f32[8]{0} parameter(0)
  %n = s32[] parameter(1)
  %start = s32[] constant(2)
  %copy = s32[] copy(%start)
  %t = (f32[8]{0}, s32[]) tuple(%x, %copy)
  ROOT %loop = (f32[8]{0}, s32[]) while(%t), condition=%condition, body=%body
}
"""


def edited(old: str, new: str) -> Program:
    assert old in LOOP
    return Program(LOOP.replace(old, new))


SAME_LOOPS = {
    "as it is": ("", ""),
    "sum the other way round": ("add(%copied, %one)", "add(%one, %copied)"),
    "sum in a fusion": ("add(%copied, %one)", "fusion(%copied, %one), kind=kLoop, calls=%next"),
    "condition in a fusion": (
        "compare(%i, %limit), direction=LT\n}\n\nE",
        "fusion(%limit, %i), calls=%less\n}\n\nE",
    ),
    "XLA says it": ("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'),
}


@pytest.mark.parametrize("name", SAME_LOOPS)
def test_trips_from_a_counter(name):
    program = edited(*SAME_LOOPS[name])
    assert {run.instruction.name: run.trips for run in program.runs()}["y"] == 7


END = "compare(%i, %limit), direction=LT\n}\n\nE"
UNEVEN = "counter of the loop loop does not go up by 1"
OTHER_LOOPS = [
    ("direction=LT", "direction=NE", r"runs while compare\(i, limit\), which is not counter < constant"),
    (END, "negate(%p)\n}\n\nE", r"runs while negate\(p\), which is not counter < constant"),
    (END, END.replace("%i, %limit", "%limit, %i"), r"compares constant\(9\) with get-tuple-element\(%p\), not its"),
    ("constant(9)", "negate(%p)", r"compares get-tuple-element\(%p\) with negate\(%p\), not its counter with"),
    ("copy(%start)", "copy(%n)", "counter of the loop loop starts at no constant"),
    ("%one = s32[] constant(1)", "%one = s32[] constant(2)", UNEVEN),
    ("%p), index=1\n  %copied", "%p), index=0\n  %copied", UNEVEN),
    ("add(%copied, %one)", "multiply(%copied, %one)", UNEVEN),
]


@pytest.mark.parametrize(("old", "new", "message"), OTHER_LOOPS)
def test_a_loop_of_another_form_is_refused(old, new, message):
    with pytest.raises(HloError, match=message + r".*, so its trips are not known"):
        list(edited(old, new).runs())


def test_a_text_that_is_no_program():
    with pytest.raises(HloError, match="no ENTRY computation"):
        Program("HloModule nothing")


# What the TPU compiler makes of x @ w, of a batched product, and of a product that sums over examples.
CONVOLUTIONS = {
    "bf16[4,53,768]{2,1,0} convolution(%a, %b), window={size=1}, dim_labels=b0f_io0->b0f": (
        "bf16[4,53,512]{2,1,0}",
        "bf16[512,768,1]{2,1,0}",
        Matmul(1, 4 * 53, 768, 512, "bf16"),
    ),
    "f32[4,3,16,20]{3,2,1,0} convolution(%a, %b), window={size=4x3 stride=3x2 lhs_dilate=4x3}, "
    "dim_labels=0b1f_0o1i->01bf": (
        "bf16[4,16,3,8]{3,2,1,0}",
        "bf16[4,20,3,8]{3,2,1,0}",
        Matmul(12, 16, 20, 8, "bf16"),
    ),
}


@pytest.mark.parametrize("text", CONVOLUTIONS)
def test_convolutions_of_a_tpu_are_matmuls(text):
    left, right, expected = CONVOLUTIONS[text]
    lines = [f"%a = {left} parameter(0)", f"%b = {right} parameter(1)", f"ROOT %c = {text}"]
    program = Program("\n  ".join(["ENTRY %main (a: x, b: y) -> z {", *lines]) + "\n}")
    assert matmuls(program, program.entry.root, program.entry) == [expected]


def test_a_real_convolution():
    text = (
        "ENTRY %main (a: x, b: y) -> z {\n  %a = f32[2,9,9,3]{3,2,1,0} parameter(0)\n"
        "  %b = f32[3,3,3,5]{3,2,1,0} parameter(1)\n  ROOT %c = f32[2,4,4,5]{3,2,1,0} convolution(%a, %b), "
        "window={size=3x3 stride=2x2}, dim_labels=b01f_01io->b01f\n}"
    )
    program = Program(text)
    assert flops(program) == 2 * 2 * 4 * 4 * 5 * 3 * 9


def test_a_kernel_counts_by_its_own_estimate_or_not_at_all():
    text = (
        "ENTRY %main (a: x) -> y {\n  %a = f32[8]{0} parameter(0)\n  ROOT %k = f32[8]{0} custom-call(%a), "
        'custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{ESTIMATE"body":""}}\n}'
    )
    estimate = '"cost_estimate":{"flops":"12","transcendentals":"0"},'
    root = Program(text.replace("ESTIMATE", estimate)).entry.root
    assert kernel_flops(root) == 12
    with pytest.raises(HloError, match="the kernel k has no cost estimate"):
        kernel_flops(Program(text.replace("ESTIMATE", "")).entry.root)


def test_padding_to_the_matrix_unit():
    full = Matmul(1, 1024, 512, 256, "bf16")
    assert full.on_array(128) == full.on_array(256) == full.flops
    # A depth of 64 fills half of an array; of rows and columns only one has to be whole.
    assert Matmul(3, 100, 1024, 64, "bf16").on_array(128) == 2 * 3 * 100 * 1024 * 128


def test_traffic_counts_slices_and_updates_in_place_as_such():
    stack, row = jnp.ones((64, 128)), jnp.ones((1, 128))
    program = compiled(lambda stack, i: jax.lax.dynamic_slice(stack, (i, 0), (1, 128)) * 2, stack, jnp.int32(3))
    read = max(program.traffic(run) for run in program.runs())
    assert 2 * 128 * F32 <= read <= 2 * 128 * F32 + 64
    update = jax.jit(lambda stack, row, i: jax.lax.dynamic_update_slice(stack, row * 2, (i, 0)), donate_argnums=0)
    program = Program(update.lower(stack, row, jnp.int32(3)).compile().as_text())
    assert max(program.traffic(run) for run in program.runs()) <= 4 * 128 * F32 + 64


def test_tiles_pad_and_scratch_memory_is_free():
    text = """
ENTRY %main (x: bf16[4,100]) -> bf16[4,100] {
  %x = bf16[4,100]{1,0:T(8,128)(2,1)} parameter(0)
  %y = bf16[4,100]{1,0:T(8,128)(2,1)S(1)} negate(%x)
  ROOT %z = bf16[4,100]{1,0:T(8,128)(2,1)} negate(%y)
}
"""
    program = Program(text)
    assert {run.instruction.name: program.traffic(run) for run in program.runs()} == {"x": 0, "y": 2048, "z": 2048}


GROUPS = {
    "replica_groups={{0,1},{2,3}}, use": ((0, 1), (2, 3)),
    "replica_groups=[2,2]<=[4], use": ((0, 1), (2, 3)),
    "replica_groups=[2,2]<=[2,2]T(1,0), use": ((0, 2), (1, 3)),
    "replica_groups=mesh['a'=2,'b'=2] {'b'}, use": ((0, 1), (2, 3)),
    "replica_groups=mesh['a'=1,'b'=2,'c'=2], device_ids=([2,2]T(1,0)) {'c'}, use": ((0, 2), (1, 3)),
    "source_target_pairs={{0,1},{1,0}}, x": ((0, 1), (1, 0)),
}


@pytest.mark.parametrize("text", GROUPS)
def test_groups_of_devices_in_every_form(text):
    assert groups_of(text) == GROUPS[text]


def test_axes_of_groups():
    shape = {"slice": 1, "data": 2, "expert": 4}
    grid = np.arange(8).reshape(2, 4)
    assert axes_of(tuple(map(tuple, grid.tolist())), shape) == "expert"
    assert axes_of(tuple(map(tuple, grid.T.tolist())), shape) == "data"
    assert axes_of((tuple(range(8)),), shape) == "data+expert"
    assert axes_of(((0,), (1,)), shape) == "none"


@pytest.mark.devices(8)
def test_exchanges_are_found_with_their_axes_and_bytes():
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec(("data", "expert"))

    def exchanged(x):
        x = jax.lax.all_to_all(x, "expert", 0, 0, tiled=True)
        return jax.lax.psum(x, "data")

    sharded = jax.shard_map(exchanged, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    program = compiled(sharded, jnp.ones((8 * 4, 16)))
    found = {
        (one.kind, axes_of(one.groups, dict(mesh.shape)), one.bytes)
        for run in program.runs()
        for one in collectives(program, run.instruction, run.computation)
    }
    assert found == {("all-to-all", "expert", 4 * 16 * F32), ("all-reduce", "data", 4 * 16 * F32)}
