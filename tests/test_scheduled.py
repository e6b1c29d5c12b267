"""A train step is priced by the final bundles of its instructions, beside the roofline; one is compiled for real."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from typing import Any

import pytest
from model_cases import small_config
from plan_cases import made_up
from test_overlap import CHIP, POD, placement

from limoe.plan import compiler, planner
from limoe.plan.hlo import Program
from limoe.plan.overlap import Times, schedule
from limoe.plan.prices import in_bundles, on_matrix_units
from limoe.plan.scheduled import ScheduledStep, schedule_step
from limoe.plan.text import as_text


def straight(size: int) -> str:
    """The final bundles of an instruction that runs this many, one after the other."""
    return "\n".join(f"{n:#x}   :  {{}}" if n else "  0   :  {}" for n in range(size))


# A loop of 6 bundles around a matmul, with 4 bundles outside. It ends when a register has a value that is not known.
MATMULS = """
     0   :  { CORE }
   0x1 LB: > { %v9_v0 = vmatmul.bf16.gmra.mxu0 %v1_v1 } /* Start region 5 */
   0x2   : > {}
   0x3   : > {}
   0x4   : > {}
   0x5   : > {}
   0x6   :  { %9 = sbr.rel (!%p3_p0) target = $region5 }
   0x7   :  {}
   0x8   :  {}
   0x9   :  {}
"""
INSIDE, OUTSIDE = 6, 4
# Multiply-adds of one run of the loop: 16 rows of bfloat16 against one array of weights.
MACS = 16 * CHIP.depth**2
ENDLESS = """
     0   :  { %s1_s0 = smov 0  ;;  %p2_p0 = scmp.eq.s32.totalorder %s1_s0, %s1_s0 }
   0x1   :  { %p3_p0 = scmp.eq.s32.totalorder %s1_s0, 0 }
   0x2 LB: > {} /* Start region 5 */
   0x3   :  { %9 = sbr.rel (%p3_p0) target = $region5 }
"""

# A step with what steps have: a copy, an exchange over a matmul, a kernel, a loop of three trips, a sum that waits.
FLOPS = 1000 * MACS
MATRIX, ALL = "f32[256,256]{1,0}", "replica_groups={{0,1,2,3}}"
KERNEL = f'custom_call_target="tpu_custom_call", "cost_estimate":{{"flops":"{FLOPS}"}}'
STEP = f"""
%negated (a: f32[256,256]) -> f32[256,256] {{
  %a = {MATRIX} parameter(0)
  ROOT %n = {MATRIX} negate(%a)
}}

%condition (c: (s32[], f32[256,256])) -> pred[] {{
  %c = (s32[], {MATRIX}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %limit = s32[] constant(3)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}}

%body (b: (s32[], f32[256,256])) -> (s32[], f32[256,256]) {{
  %b = (s32[], {MATRIX}) parameter(0)
  %j = s32[] get-tuple-element(%b), index=0
  %y = {MATRIX} get-tuple-element(%b), index=1
  %one = s32[] constant(1)
  %k = s32[] add(%j, %one)
  %layer = {MATRIX} fusion(%y), kind=kLoop, calls=%negated
  ROOT %r = (s32[], {MATRIX}) tuple(%k, %layer)
}}

ENTRY %main (x: f32[256,256], rows: bf16[256,256]) -> f32[256,256] {{
  %x = {MATRIX} parameter(0)
  %rows = bf16[256,256]{{1,0}} parameter(1)
  %in = (f32[256,256]{{1,0:S(1)}}, {MATRIX}, u32[]) copy-start(%x)
  %ind = f32[256,256]{{1,0:S(1)}} copy-done(%in)
  %send = ({MATRIX}, f32[1024,256]{{1,0}}) all-gather-start(%x), {ALL}, dimensions={{0}}
  %product = {MATRIX} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %sent = f32[1024,256]{{1,0}} all-gather-done(%send)
  %kernel.1 = bf16[8,128]{{1,0}} custom-call(%rows), {KERNEL}
  %zero = s32[] constant(0)
  %t = (s32[], {MATRIX}) tuple(%zero, %x)
  %w = (s32[], {MATRIX}) while(%t), condition=%condition, body=%body
  %sum = {MATRIX} all-reduce(%x), {ALL}, to_apply=%negated
  ROOT %last = {MATRIX} negate(%x)
}}
"""
TEXTS = {
    "product": straight(3000),
    "layer": straight(900),
    "kernel.1": MATMULS,
    "sum": straight(5000),  # bundles that wait for other devices
    "TLP": straight(5000),  # no instruction
}


def roofline_costs() -> list[Any]:
    """The instructions of the step, each with its cost by the roofline, on four chips."""
    program, (pod, placed) = Program(STEP), placement()
    return [(run, planner._cost(program, run, pod, placed)) for run in program.runs()]


def by_both(texts: dict[str, str]) -> tuple[Times, Times, str]:
    """The step's times by the roofline and by these bundles, and the note."""
    costs = roofline_costs()
    found = schedule_step(texts, costs, CHIP)
    assert found.times is not None
    return schedule(costs), found.times, found.note


def cost(name: str) -> float:
    """One run of an instruction by the roofline."""
    (found,) = (cost for run, cost in roofline_costs() if run.instruction.name == name)
    return max(found.compute, found.hbm)


def test_a_plan_shows_a_step_by_both_yardsticks():
    costs = roofline_costs()
    times = schedule(costs)
    asked = made_up(small_config(), times.step, 2**30)
    mfu = asked.model_flops_per_step / (4 * CHIP.flops) / times.step
    roofline = dataclasses.replace(asked, times=times, modelled_mfu=mfu)
    found = dataclasses.replace(roofline, scheduled=schedule_step(TEXTS, costs, CHIP))
    before, after = roofline.as_json(), found.as_json()
    assert before["scheduled_mfu"] is before["scheduled_times"] is before["scheduled_step_seconds"] is None
    # The roofline's figures stay as they are.
    assert {name for name in after if before[name] != after[name]} == {
        *("scheduled_mfu", "scheduled_times", "scheduled_step_seconds", "scheduled_note")
    }
    # One step, the same FLOPs: the utilisations are as the times. The long instructions of this step have more bundles
    # than the roofline has cycles for them, so it takes longer by the schedule.
    assert after["scheduled_mfu"] * after["scheduled_step_seconds"] == pytest.approx(mfu * times.step)
    assert 0 < after["scheduled_mfu"] < mfu
    assert after["scheduled_times"]["step"] == after["scheduled_step_seconds"] > times.step
    lines = [line for line in as_text(found).splitlines() if re.match("  (step|model FLOPs) ", line + " ")]
    assert lines[0].split()[1::2] == [f"{1e3 * times.step:.3f}", f"{1e3 * after['scheduled_step_seconds']:.3f}"]


def test_each_run_takes_its_bundles_and_exchanges_take_what_they_took():
    roofline, found, note = by_both({name: TEXTS[name] for name in ("product", "layer", "sum", "TLP")})
    more = in_bundles(3000, CHIP) - cost("product") + 3 * (in_bundles(900, CHIP) - cost("layer"))
    assert more > 0
    assert found.busy == pytest.approx(roofline.busy + more)
    assert found.exchange == roofline.exchange and found.hbm == pytest.approx(roofline.hbm)
    # The matmul runs between start and done of an exchange, so more of that is covered.
    assert found.hidden == pytest.approx(in_bundles(3000, CHIP)) and roofline.hidden == pytest.approx(cost("product"))
    left = cost("kernel.1") + cost("last") + 3 * cost("k")  # the loop's counter has no bundles either
    assert note == (
        "2 instructions by their bundles (0 with branches that hang on data), "
        f"3 without bundles by the roofline ({1e6 * left:.3g} us)"
    )


def test_no_instruction_takes_less_than_by_the_roofline():
    roofline, found, note = by_both({name: straight(1) for name in ("product", "layer", "kernel.1", "last")})
    assert found._replace(compute=roofline.compute) == roofline and found.compute > roofline.compute
    assert note.startswith("4 instructions by") and "1 without bundles" in note


@pytest.mark.parametrize(("core", "cores"), [("", CHIP.num_cores), ("%s1_s0 = sld [smem:[#c]] /* core id */", 1)])
def test_a_kernel_that_hangs_on_data_multiplies_as_often_as_the_roofline(core, cores):
    _, found, note = by_both({"kernel.1": MATMULS.replace("CORE", core)})
    # One core does all of it, unless the kernel asks which core it is. Its clock is not quite that of the data sheet.
    times = cores * (FLOPS / CHIP.flops) / on_matrix_units(MACS, CHIP)
    assert times > 100
    roofline, *_ = by_both({"product": straight(1)})
    expected = in_bundles(1, CHIP) * (OUTSIDE + times * INSIDE)
    assert found.busy == pytest.approx(roofline.busy - cost("kernel.1") + expected)
    assert "1 instructions by their bundles (1 with branches" in note


def test_bundles_that_cannot_be_followed_leave_the_roofline(monkeypatch):
    monkeypatch.setattr("limoe.plan.machine._MAX_STEPS", 1000)
    roofline, found, note = by_both({"product": ENDLESS, "layer": straight(1)})
    assert found._replace(compute=roofline.compute) == roofline
    assert note.startswith("1 instructions by") and "4 without bundles" in note


def test_without_a_schedule_the_note_says_why():
    costs = roofline_costs()
    nothing = ScheduledStep(None, "the compiler wrote no schedule of the step's instructions")
    assert schedule_step({}, costs, CHIP) == schedule_step({"TLP": straight(1)}, costs, CHIP) == nothing
    broken = "     0   :  { %9 = sbr.rel (!%p3_p0) target = $region5 }"
    times, note = schedule_step({"product": broken}, costs, CHIP)
    assert times is None and note.startswith("the compiler's schedule cannot be read: bundle 0 jumps to region 5")


@pytest.mark.aot
def test_the_command_prices_a_real_step_by_both_yardsticks():
    settings = ["model.depth=2", "model.moe_layers=1", "model.scan_unroll=1", "model.group_examples=1"]
    settings += ["train.batch_size=16", "model.width=128", "model.mlp_width=256", "model.num_experts=4"]
    settings += ["model.image_size=8", "model.patch_size=4", "model.text_length=3", "model.vocab_size=16"]
    command = ["plan", "--preset=tiny", f"--topology={POD.name}", "--schedule", "--json", "--set", *settings]
    done = subprocess.run(
        [sys.executable, "-m", "limoe", *command],
        env=os.environ | compiler.ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    roofline, schedule = found["modelled_times"], found["scheduled_times"]
    assert math.isfinite(found["scheduled_mfu"]) and found["scheduled_step_seconds"] == schedule["step"]
    # No instruction takes less than by the roofline; exchanges are priced alike. Longer work covers more of them.
    assert all(schedule[name] >= roofline[name] for name in ("compute", "hbm", "busy"))
    assert schedule["exchange"] == roofline["exchange"]
    # So no step is shorter than what the roofline counts without exchanges.
    assert schedule["step"] >= roofline["busy"]
    assert found["scheduled_mfu"] <= found["modelled_mfu"] * roofline["step"] / roofline["busy"]
    # In small matrices work on vectors takes far more than matmuls at peak.
    assert schedule["compute"] > 2 * roofline["compute"]
