"""Compiled programs are read right: trips of loops, and what real programs amount to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import small_batch, small_config

from limoe.plan.hlo import HloError, Program
from limoe.plan.hlo_work import axes_of, collectives, matmuls
from limoe.train.step import compile_step, prepare

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
    return Program(step.lower(training.abstract, *small_batch(config), np.zeros((1, 3), np.int32)).compile().as_text())


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
