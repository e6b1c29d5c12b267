"""The model of a step's time over schedules written by hand: what covers what, and what each instruction costs."""

import dataclasses

import numpy as np
import pytest
from jax.sharding import Mesh
from pod_cases import paper_pod

from limoe.config.schema import MeshConfig
from limoe.parallel.mesh import AXES, Placement
from limoe.plan import pods, prices
from limoe.plan.hlo import HloError, Program
from limoe.plan.hlo_work import Collective, collectives
from limoe.plan.overlap import Cost, Times, schedule
from limoe.plan.planner import _cost, _exchanges
from moe_kernels.chips import TPUS

# Of instructions by name: work of one second in the matrix unit, and with memory half of that time, or all of it.
COSTS = {
    "work": Cost(compute=1.0),
    "half": Cost(compute=1.0, hbm=0.5),
    "full": Cost(compute=0.5, hbm=1.0),
    "send": Cost(exchange=1.0),
    "other": Cost(exchange=1.0),
    "long": Cost(exchange=5.0),
    "in": Cost(hbm=1.0),
    "out": Cost(hbm=1.0),
    "both": Cost(compute=1.0, exchange=0.75),
    "more": Cost(compute=1.0, exchange=4.0),
}
WORK, HALF, FULL = (f"%{name} = f32[8]{{0}} negate(%x)" for name in ("work", "half", "full"))
SEND, OTHER, LONG = (f"%{name} = (f32[8]{{0}}, f32[8]{{0}}) all-gather-start(%x)" for name in ("send", "other", "long"))
SENT, OTHER_SENT, LONG_SENT = (f"%{n}d = f32[8]{{0}} all-gather-done(%{n})" for n in ("send", "other", "long"))
IN, OUT = (f"%{name} = (f32[8]{{0:S(1)}}, f32[8]{{0}}, u32[]) copy-start(%x)" for name in ("in", "out"))
IN_DONE, OUT_DONE = (f"%{name}d = f32[8]{{0:S(1)}} copy-done(%{name})" for name in ("in", "out"))
BOTH, MORE = (f"%{name} = f32[8]{{0}} fusion(%x), kind=kLoop, calls=%f" for name in ("both", "more"))
SYNCHRONOUS = "%send = f32[8]{0} all-gather(%x)"
LOOP = "%t = (s32[], f32[8]{0}) tuple(%zero, %x)\n  %w = (s32[], f32[8]{0}) while(%t), condition=%condition, body=%body"

REST = """
%condition (c: (s32[], f32[8])) -> pred[] {
  %c = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %limit = s32[] constant(3)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {
  %b = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[8]{0} get-tuple-element(%b), index=1
  %one = s32[] constant(1)
  %j = s32[] add(%i, %one)
  BODY
  ROOT %r = (s32[], f32[8]{0}) tuple(%j, %x)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
"""


def times(lines: list[str], body: tuple[str, ...] = ()) -> Times:
    """Of a program of these instructions, and of the body of its loop of three trips."""
    program = Program("\n  ".join([REST.replace("BODY", "\n  ".join(body)).rstrip(), *lines]) + "\n}")
    return schedule((run, COSTS.get(run.instruction.name, Cost())) for run in program.runs())


# What runs, one after the other; the time in which a device is busy, that of exchanges, and how much of it is covered.
SCHEDULES = {
    "nothing to cover": ([WORK, FULL], 2, 0, 0),
    "the longer of both": ([HALF, FULL], 2, 0, 0),
    "synchronous": ([SYNCHRONOUS, WORK], 1, 1, 0),
    "nothing in between": ([WORK, SEND, SENT, WORK], 2, 1, 0),
    "before and after do not count": ([WORK, SEND, WORK, SENT, WORK], 3, 1, 1),
    "memory covers an exchange too": ([SEND, FULL, SENT], 1, 1, 1),
    "more work than exchange": ([SEND, WORK, FULL, SENT], 2, 1, 1),
    "less work than exchange": ([LONG, WORK, FULL, LONG_SENT], 2, 5, 2),
    "two share one second": ([SEND, OTHER, WORK, SENT, OTHER_SENT], 1, 2, 1),
    "two have a second each": ([SEND, OTHER, WORK, SENT, FULL, OTHER_SENT], 2, 2, 2),
    "the first takes what it needs": ([LONG, WORK, OTHER, WORK, OTHER_SENT, LONG_SENT], 2, 6, 2),
    "a copy by itself": ([IN, IN_DONE], 1, 0, 0),
    "a copy under work that leaves memory alone": ([IN, WORK, IN_DONE], 1, 0, 0),
    "a copy under work that uses it half the time": ([IN, HALF, IN_DONE], 1.5, 0, 0),
    "a copy under work that uses it all the time": ([IN, FULL, IN_DONE], 2, 0, 0),
    "two copies share one second": ([IN, OUT, WORK, IN_DONE, OUT_DONE], 2, 0, 0),
    "a copy and an exchange have the same second": ([IN, SEND, WORK, IN_DONE, SENT], 1, 1, 1),
    "a copy does not cover an exchange": ([SEND, IN, IN_DONE, SENT], 1, 1, 0),
    "an exchange in a fusion": ([BOTH], 1, 0.75, 0.75),
    "a long exchange in a fusion": ([MORE], 1, 4, 1),
    "a fusion covers another with the rest": ([SEND, BOTH, SENT], 1, 1.75, 1),
    "a fusion with nothing left": ([SEND, MORE, SENT], 1, 5, 1),
    "a fusion covers a copy too": ([IN, MORE, IN_DONE], 1, 4, 1),
    "through an update": (
        [SEND, WORK, "%u = f32[8]{0} async-update(%send)", "%d = f32[8]{0} async-done(%u)"],
        *(1, 1, 1),
    ),
    "what starts and is no exchange": (
        ["%work = f32[8]{0} async-start(%x)", "%d = f32[8]{0} async-done(%work)"],
        1,
        0,
        0,
    ),
    "to another slice": (
        [
            "%s = token[] send(%x)",
            "%send = token[] recv(%x)",
            WORK,
            "%d = token[] send-done(%s)",
            "%e = token[] recv-done(%send)",
        ],
        *(1, 1, 1),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_covers_what(name):
    lines, busy, exchange, hidden = SCHEDULES[name]
    found = times(lines)
    assert (found.busy, found.exchange, found.hidden) == (busy, exchange, hidden)
    assert found.step == busy + exchange - hidden
    # The parts count all that runs, covered or not.
    names = [line.partition(" = ")[0].removeprefix("%") for line in lines]
    assert found.compute == sum(COSTS[name].compute for name in names if name in COSTS)
    assert found.hbm == sum(COSTS[name].hbm for name in names if name in COSTS)


# The same with a loop of three trips: what runs outside, what inside.
LOOPS = {
    "inside": ([LOOP], (SEND, WORK, SENT), 3, 3, 3),
    "every trip for itself": ([LOOP], (LONG, WORK, LONG_SENT), 3, 15, 3),
    "a copy of every trip": ([LOOP], (IN, HALF, IN_DONE), 4.5, 0, 0),
    "three trips under one exchange": ([LONG, LOOP, LONG_SENT], (WORK,), 3, 5, 3),
    "one exchange needs one trip": ([SEND, LOOP, SENT], (WORK,), 3, 1, 1),
    "trips leave the rest to others": ([LONG, OTHER, LOOP, WORK, WORK, WORK, OTHER_SENT, LONG_SENT], (WORK,), 6, 6, 6),
    "a fusion in a loop": ([LOOP], (SEND, BOTH, SENT), 3, 5.25, 3),
}


@pytest.mark.parametrize("name", LOOPS)
def test_what_covers_what_in_loops(name):
    lines, body, *expected = LOOPS[name]
    found = times(lines, body)
    assert [found.busy, found.exchange, found.hidden] == expected


def test_a_start_needs_its_done_and_a_done_its_start():
    with pytest.raises(HloError, match="send, in started, but nothing waits for the end"):
        times([SEND, WORK, IN])
    with pytest.raises(HloError, match="sendd ends send, which has not started in main"):
        times([SYNCHRONOUS, SENT])
    with pytest.raises(HloError, match="sendd ends send, which has not started in main"):
        times([SEND, SENT, SENT])


CHIP = TPUS["v5p"]
POD = paper_pod("v5p", 2, 2, 1)


def placement(num_slices: int = 1) -> tuple[pods.Pod, Placement]:
    """Four chips along `expert`, or two times four."""
    devices = tuple(dataclasses.replace(one, slice_index=n) for n in range(num_slices) for one in POD.devices)
    config = MeshConfig(slice=num_slices, expert=4)
    mesh = Mesh(np.array(devices).reshape(num_slices, 1, 4), AXES)
    return POD._replace(devices=devices), Placement(mesh, config)


def cost_of(line: str, *, num_slices: int = 1, before: str = "", ahead: tuple[str, ...] = ()) -> Cost:
    """Of the last instruction of a program."""
    parameters = ("%x = f32[256,256]{1,0} parameter(0)", "%y = bf16[256,256]{1,0} parameter(1)")
    program = Program(
        "\n  ".join([f"{before}\nENTRY %main () -> x {{", *parameters, *ahead, f"ROOT %z = {line}"]) + "\n}"
    )
    *_, last = program.runs()
    return _cost(program, last, *placement(num_slices))


PRODUCT = "f32[256,256]{1,0} dot(%LEFT, %RIGHT), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
FLOPS, SIZE = 2 * 256**3, 256 * 256 * 4


@pytest.mark.parametrize(
    ("left", "precision", "passes"), [("x", "default", 1), ("x", "high", 3), ("x", "highest", 6), ("y", "highest", 1)]
)
def test_the_time_of_a_matmul_and_its_memory(left, precision, passes):
    line = PRODUCT.replace("LEFT", left).replace("RIGHT", left)
    found = cost_of(f"{line}, operand_precision={{{precision},{precision}}}")
    assert found.compute == pytest.approx(passes * FLOPS / CHIP.flops) and found.flops == FLOPS
    read = 2 * SIZE if left == "x" else SIZE
    assert found.hbm == pytest.approx((read + SIZE) / CHIP.hbm_bandwidth) and found.exchange == 0


def test_the_time_of_a_float32_kernel():
    kernel = (
        'f32[256,256]{1,0} custom-call(%LEFT), custom_call_target="tpu_custom_call", "cost_estimate":{"flops":"12"}'
    )
    assert cost_of(kernel.replace("LEFT", "x")).compute == pytest.approx(6 * 12 / CHIP.flops)
    assert cost_of(kernel.replace("LEFT", "y")).compute == pytest.approx(12 / CHIP.flops)
    assert cost_of(kernel.replace("LEFT", "x")).flops == 12


GATHER = "f32[1024,256]{1,0} all-gather(%x), replica_groups={{0,1,2,3}}, dimensions={0}"
# Two chips along each of two dimensions, one link each way.
GATHER_SECONDS = prices.LATENCY + 3 / 4 * 4 * SIZE / (2 * CHIP.link_bandwidth)


def test_an_exchange_alone_takes_no_memory_time_and_one_in_a_fusion_does():
    found = cost_of(GATHER)
    assert found == Cost(0.0, 0.0, pytest.approx(GATHER_SECONDS), 0)
    fused = "\n  ".join(
        [
            "%f (x: x) -> y {",
            "%x = f32[256,256]{1,0} parameter(0)",
            f"%g = {GATHER}",
            "ROOT %n = f32[8]{0} slice(%g)\n}\n",
        ]
    )
    found = cost_of("f32[8]{0} fusion(%x), kind=kLoop, calls=%f", before=fused)
    assert found.exchange == pytest.approx(GATHER_SECONDS)
    assert found.hbm == pytest.approx((SIZE + 32) / CHIP.hbm_bandwidth)


MEETING = '_xla_host_transfer_rendezvous="sum_0",_xla_megascale_transfer_type="KIND"'
ACROSS = (
    "%token = token[] after-all()",
    f"%s = (f32[256,256]{{1,0}}, u32[], token[]) send(%x, %token), frontend_attributes={{{MEETING}}}",
)
RECEIVED = f"(f32[256,256]{{1,0}}, u32[], token[]) recv(%token), frontend_attributes={{{MEETING}}}"


@pytest.mark.parametrize(
    ("kind", "sent", "received", "passes"),
    [("ALL_REDUCE", 256, 256, 2), ("ALL_GATHER", 128, 256, 1), ("REDUCE_SCATTER", 256, 128, 1)],
)
def test_what_crosses_slices_goes_over_the_network_between_them(kind, sent, received, passes):
    token, send = (line.replace("KIND", kind).replace("[256,256]", f"[{sent},256]") for line in ACROSS)
    receive = RECEIVED.replace("KIND", kind).replace("[256,256]", f"[{received},256]")
    found = cost_of(receive, num_slices=2, ahead=(token, send))
    # Half of the whole is another slice's.
    assert found.exchange == pytest.approx(prices.LATENCY + passes * SIZE / 2 / prices.DATACENTRE_BANDWIDTH)
    assert found.hbm == found.compute == 0


def across(old: str = "", new: str = "") -> Program:
    """A sum over slices, with a change to what receives it."""
    received = RECEIVED.replace("KIND", "ALL_REDUCE")
    assert old in received
    lines = ["%x = f32[256,256]{1,0} parameter(0)", *ACROSS, f"ROOT %z = {received.replace(old, new)}"]
    return Program("\n  ".join(["ENTRY %main () -> x {", *lines]) + "\n}")


def test_what_crosses_slices_is_counted_on_their_axis():
    program, (_, placed) = across(), placement(2)
    assert _exchanges(program, placed) == ({"all-reduce": {"slice": SIZE}}, {"all-reduce": {"slice": 1}})
    assert collectives(program, program.entry.root, program.entry) == [Collective("all-reduce", (), SIZE)]


def test_work_covers_what_crosses_slices():
    pod, placed = placement(2)
    work = PRODUCT.replace("LEFT", "x").replace("RIGHT", "x")
    lines = ["%x = f32[256,256]{1,0} parameter(0)", *ACROSS, f"%z = {RECEIVED}", f"%w = {work}"]
    lines += ["%sd = token[] send-done(%s)", "ROOT %zd = (f32[256,256]{1,0}, token[]) recv-done(%z)"]
    program = Program("\n  ".join(["ENTRY %main () -> x {", *lines]).replace("KIND", "ALL_REDUCE") + "\n}")
    found = schedule((run, _cost(program, run, pod, placed)) for run in program.runs())
    assert 0 < found.busy < found.exchange
    assert found.hidden == pytest.approx(found.busy) and found.step == pytest.approx(found.exchange)


@pytest.mark.parametrize(("old", "new"), [("sum_0", "sum_1"), ("ALL_REDUCE", "OTHER"), ("transfer_type", "x")])
def test_what_a_host_sends_otherwise_is_refused(old, new):
    program = across(old, new)
    with pytest.raises(HloError, match="z receives something from a host that is no exchange between slices"):
        collectives(program, program.entry.root, program.entry)
