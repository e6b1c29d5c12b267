"""The modelled benchmark for TPUs: reading the compiler's bundles, running their scalar program, and the arithmetic."""

import collections
import dataclasses
import doctest
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from benchmarks import tpu_operands, tpu_report
from benchmarks.cases import CASES, draw_experts, imposing_noise
from benchmarks.roofline import Load
from benchmarks.tpu_compile import Compiled, CompileError, Request, compile_for_tpu
from benchmarks.tpu_operands import steering_operands
from benchmarks.tpu_report import against_peers, floor_seconds, line, summarise
from limoe.plan import bundles, machine, scheduled
from limoe.plan.bundles import parse
from limoe.plan.machine import Ran, run
from limoe.plan.scheduled import module_cost, part_cost, read_codes
from moe_kernels.chips import TPUS

# A Pallas kernel for v5e: a grid of 4 steps with a window of 8 x 128 floats in and out; step i adds the window sizes[i]
# times, a loop of 3 bundles and the 4 that run after its branch.
SAMPLE = (Path(__file__).parent / "tpu_bundles_sample.txt").read_text()
DELAY, WINDOW = 4, 8 * 128 * 4
LOOP = range(0x35, 0x3D)


def test_the_sample_is_read():
    program = parse(SAMPLE)
    assert len(program.bundles) == 0x58
    assert program.branch_delay() == DELAY
    assert program.integers == {0: 4} and program.in_hbm == {0, 1, 2}
    assert [index for index, bundle in enumerate(program.bundles) if bundle.branch] == [0x26, 0x30, 0x38, 0x4F]


@pytest.mark.parametrize("sizes", [[3, 0, 2, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 5, 0, 0]])
def test_loops_run_as_often_as_the_operand_says(sizes):
    ran = run(parse(SAMPLE), DELAY, {0: sizes})
    assert ran.unknown_branches == 0
    assert {int(ran.counts[index]) for index in LOOP} == {sum(sizes)}
    # Two more turns of the pipeline than steps: one to fill it, one to empty it.
    assert ran.counts[0xB] == 6 and ran.counts[0x2C] == 4


def test_copies_run_when_their_predicate_holds():
    ran = run(parse(SAMPLE), DELAY, {0: [1, 1, 1, 1]})
    granules = WINDOW // 32
    assert ran.copies == {("hbm_to_smem", 16): 1, ("hbm_to_vmem", granules): 4, ("vmem_to_hbm", granules): 4}


def test_what_is_not_known_counts_once_and_is_reported():
    ran = run(parse(SAMPLE), DELAY)
    # The branch around the loop, and the loop.
    assert ran.unknown_branches == 2
    assert {int(ran.counts[index]) for index in LOOP} == {4}


def test_a_program_that_does_not_end_is_an_error(monkeypatch):
    monkeypatch.setattr("limoe.plan.machine._MAX_STEPS", 100)
    with pytest.raises(RuntimeError, match="did not end after 100 steps"):
        run(parse(SAMPLE), DELAY, {0: [1000] * 4})


CHOICES = """
     0   :  { %s1_s0 = inlined_call_operand.<no memory space> [shape: s32[], index: 0, kind: input, shape index: {}] }
   0x1   :  { %s2_s1 = smul.u32 3, %s1_s0  ;;  %s3_s2 = smov 4294967295 }
   0x2   :  { %s4_s3 = sadd.s32 %s3_s2, %s2_s1  ;;  %p5_p0 = scmp.lt.s32.totalorder %s2_s1, 4 }
   0x3   :  { %s6_s4 = smov (%p5_p0, %s4_s3), 7  ;;  %7 = sst [smem:[#allocation2_spill]] %s4_s3 }
   0x4   :  { %s8_s5 = sld [smem:[#allocation2_spill]]  ;;  %v9_v0 = vmatmul.bf16.gmra.mxu0 %v1_v1 }
   0x5   :  { %s10_s6 = sand.u32 (!%p5_p0), 1, %s8_s5 }
   0x6   :  { %11 = dma.hbm_to_vmem [thread:$0]  (!%p5_p0), %s1_s0, %s6_s4, %s8_s5, 0 }
   0x7   :  { %12 = dma.vmem_to_hbm [thread:$0]  (%p5_p0), %s1_s0, %s6_s4, %s8_s5, 0 }
   0x8   :  { %13 = sbr.rel (%p5_p0) target = $region9 }
   0x9   :  {} /* Start region 8 */
   0xa PF:  {} /* Start/End empty region 9 */
"""


@pytest.mark.parametrize(("operand", "copy"), [(1, ("vmem_to_hbm", 7)), (2, ("hbm_to_vmem", 5))])
def test_arithmetic_selection_and_spills(operand, copy):
    program = parse(CHOICES)
    assert program.branch_delay() == 0
    ran = run(program, 0, {0: [operand]})
    assert ran.copies == {copy: 1}
    assert ran.counts[9] == (operand == 2)
    assert ran.streamed_rows == 16


DIVISION = """
     0   :  { %s1_s0 = inlined_call_operand.<no memory space> [shape: s32[], index: 0, kind: input, shape index: {}] }
   0x1   :  { %s2_s1 = ssub.s32 0, %s1_s0  ;;  %p3_p0 = scmp.lt.s32.totalorder %s1_s0, 0 }
   0x2   :  { %s4_s2 = smin.u32 %s2_s1, %s1_s0 }
   0x3   :  { %s5_s3 = smulhi.u32 4042322161, %s4_s2  ;;  %6 = sdivrem.u32 %s4_s2, 24 /* kRem */ }
   0x4   :  { %s7_s4 = sshrl.u32 %s5_s3, 9  ;;  %s8_s5 = spop.drf %6 }
   0x5   :  { %s9_s6 = sadd.s32 %s7_s4, %s8_s5 }
   0x6   :  { %10 = dma.hbm_to_vmem %s1_s0, %s9_s6, %s1_s0, 0 }
"""


def test_division():
    """544 is divided by as a multiplication with 2^41 / 544, 24 by the divider and its queue."""
    ran = run(parse(DIVISION), 0, {0: [1600]})
    assert ran.copies == {("hbm_to_vmem", 1600 // 544 + 1600 % 24): 1}


def test_arithmetic_with_an_address():
    text = """
     0   :  { %s1_s0 = smov [#allocation5] }
   0x1   :  { %s2_s1 = ssub.s32 [#allocation5 + $0x38], %s1_s0 }
   0x2   :  { %3 = dma.hbm_to_vmem %s1_s0, %s2_s1, %s1_s0, 0 }
"""
    assert run(parse(text), 0).copies == {("hbm_to_vmem", 56): 1}


def test_the_three_limits():
    chip = TPUS["v6e"]
    granules = chip.hbm_bandwidth * 1e-6 / 32
    rows = round(1e-6 * chip.gigahertz * 1e9 * chip.macs_per_cycle / chip.depth**2)

    def part(bundles, rows, granules):
        copies = collections.Counter({("hbm_to_vmem", round(granules)): 1})
        return part_cost("x", 2, [Ran(np.array([bundles]), copies, collections.Counter(), 0, rows, 0)], chip)

    for bound, (ran, streamed, copied) in {
        "bundles": (1750 * 3, rows, granules),
        "MXU": (1750, 3 * rows, granules),
        "HBM": (1750, rows, 3 * granules),
    }.items():
        limited = part(ran, streamed, copied)
        assert limited.bound == bound
        assert limited.seconds == pytest.approx(6e-6, rel=1e-3)


def test_cores_share_an_instruction():
    chip = TPUS["v5p"]
    runs = [
        Ran(np.array([n]), collections.Counter({("hbm_to_vmem", 10): 1}), collections.Counter(), 0, 8, n)
        for n in (5, 7)
    ]
    part = part_cost("x", 1, runs, chip)
    assert (part.bundles, part.hbm_bytes, part.macs) == (7, 640, 16 * 128**2)


TOP = """
     0   :  { %1 = inlined_call %s1_s0 /* %sums.1 = custom-call(%sizes.1, %x.1) */ }
   0x1   :  { %s2_s0 = smov 0 }
   0x2 LB: > { %s3_s0 = sadd.s32 1, %s2_s0  ;;  %s2_s0 = sphi %s2_s0, %s3_s0 } /* Start region 5 */
   0x3   : > { %2 = inlined_call %s1_s0 /* %sort.2 = sort(%x.1) */  ;;  %p4_p0 = scmp.ge.s32.totalorder %s3_s0, 3 }
   0x4   :  { %5 = sbr.rel (!%p4_p0) target = $region5 }
   0x5   :  {}
   0x6   :  {}
   0x7   :  {}
   0x8   :  {}
   0x9   :  {} /* Start region 6 */
"""


def cost_of(texts, steering):
    return module_cost({name: parse(text) for name, text in texts.items()}, steering, TPUS["v5e"])


def test_a_module_adds_up():
    texts = {"TLP": TOP, "sums.1": SAMPLE}
    steering = [("other", {0: [9, 9, 9, 9]}), ("sums", {0: [3, 0, 2, 1]})]
    cost = cost_of(texts, steering)
    assert cost.missing == ("sort.2",) and cost.unknown_branches == 0
    by_name = {part.name: part for part in cost.parts}
    assert by_name["sums.1"].bundles == run(parse(SAMPLE), DELAY, {0: [3, 0, 2, 1]}).bundles
    assert cost.hbm_bytes == 8 * WINDOW + 16 * 32
    # Each of the 8 copies of windows is small enough for a row's.
    assert by_name["sums.1"].row_copies == 8
    assert cost.with_descriptors(1000) == pytest.approx(8e-6 + by_name["TLP"].seconds)


def test_floors_are_the_formulas():
    case, chip = CASES["h14"], TPUS["7x"]
    load = Load(case.tokens, case.experts)
    macs = 2 * 16_384 * 1_280 * 5_120
    assert floor_seconds("layer", "forward", case, load, chip, "bfloat16") == pytest.approx(
        2 * macs / chip.clocked_flops
    )
    assert floor_seconds("layer", "both", case, load, chip, "bfloat16") == pytest.approx(6 * macs / chip.clocked_flops)
    # A quarter of the experts: a quarter of the weights need to be read.
    few = floor_seconds("layer", "forward", CASES["b16"], Load(16_384, 8), TPUS["v6e"], "bfloat16")
    assert few == pytest.approx(4 * 16_384 * 768 * 3_072 / TPUS["v6e"].clocked_flops)


def test_chips_have_the_peaks_of_their_data_sheets():
    for chip in TPUS.values():
        assert chip.clocked_flops == pytest.approx(chip.flops, rel=1e-2)


def test_a_line_says_what_is_missing():
    texts = {"TLP": TOP, "sums.1": SAMPLE}
    compiled = Compiled(texts, {"balanced": []}, 1_000_000, 2.0, 3e-6)
    request = Request("v5e", "dense", "layer", "forward", "b16", "bfloat16")
    text = line(summarise(request, "balanced", cost_of(texts, []), compiled))
    assert "2 branches or copies depend on unknown data" in text and "without a schedule: sort.2" in text


def double(sizes, x):
    def kernel(sizes, x, y):
        y[...] = x[...] * sizes[0]

    grid = pl.GridSpec(grid=(1,), in_specs=[pl.BlockSpec(), pl.BlockSpec()], out_specs=pl.BlockSpec())
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(kernel, grid_spec=grid, out_shape=out, interpret=True, name="double")(sizes, x)


def test_steering_operands_are_computed_and_nothing_else():
    def program(x):
        sizes = jnp.bincount(x, length=4).astype(jnp.int32)
        # Too large to be computed: 2^80 multiply-adds.
        huge = jnp.zeros((1 << 20, 1 << 20), jnp.float32)
        return jax.jit(lambda sizes: double(sizes, huge @ huge))(sizes)

    (call,) = steering_operands(jax.make_jaxpr(program)(jnp.zeros(3, jnp.int32)), [jnp.array([0, 2, 2], jnp.int32)])
    assert call[1] == {0: [1, 0, 2, 0]}


def test_cycles_beside_matmuls():
    """Of the bundles of a loop, those between two places where control can come or go, if a matmul is among them."""
    text = """
     0   :  { %s1_s0 = smov 0 }
   0x1 LB: > { %s2_s0 = sadd.s32 1, %s1_s0  ;;  %s1_s0 = sphi %s1_s0, %s2_s0 } /* Start region 5 */
   0x2   : > { %p3_p0 = scmp.ge.s32.totalorder %s2_s0, 4  ;;  %v9_v0 = vmatmul.bf16.gmra.mxu0 %v1_v1 }
   0x3   :  { %9 = sbr.rel (!%p3_p0) target = $region5 }
   0x4   : > {}
   0x5   :  {}
   0x6   :  {}
"""
    ran = run(parse(text), delay=1)
    assert ran.bundles == 1 + 4 * 4 + 2 and ran.matmul_bundles == 4 * 4 and ran.streamed_rows == 4 * 16


def test_peers_stand_in_the_order_of_their_time_and_dense_last():
    def result(name, us):
        texts = {"TLP": TOP, "sums.1": SAMPLE}
        request = Request("v5e", name, "layer", "forward", "b16", "bfloat16")
        made = summarise(request, "zipf", cost_of(texts, []), Compiled(texts, {}, 0, 1.0, 0.0))
        return dataclasses.replace(made, modelled_us=us)

    results = [
        result(name, us) for name, us in (("dense", 2.0), ("one-hot", 8.0), ("moe_kernels", 4.0), ("megablox", 5.0))
    ]
    assert against_peers(results) == (
        "layer forward, b16, zipf, v5e: moe_kernels takes 0.80 of megablox, 0.50 of one-hot, 2.00 of dense (modelled)"
    )
    assert against_peers(results[:2]) == ""


@pytest.mark.parametrize(
    "module", [bundles, machine, scheduled, tpu_operands, tpu_report], ids=lambda module: module.__name__
)
def test_examples_in_docstrings(module):
    done = doctest.testmod(module)
    assert done.failed == 0 and done.attempted > 0


def test_noise_imposes_the_experts():
    case = CASES["tiny"]
    expert = draw_experts(case, "zipf")
    noise = imposing_noise(case, expert)
    assert (np.argmax(noise, axis=1)[:, None] == expert).all()


@pytest.mark.aot
def test_a_grouped_matmul_issues_what_its_tiles_say():
    """megablox in tiles of 128 x 512 x 512 at D 768: 1.33 times the multiply-adds where groups are whole tiles."""
    request = Request("v5e", "megablox", "grouped_matmul", "forward", "b16-8groups", "bfloat16")
    compiled = compile_for_tpu(request, ["balanced"])
    cost = module_cost(read_codes(compiled.texts), compiled.steering["balanced"], TPUS["v5e"])
    kernel = max(cost.parts, key=lambda part: part.macs)
    useful = 16_384 * 768 * 3_072
    assert kernel.macs == useful * 1024 / 768 and kernel.unknown_branches == 0
    # What the model could not decide lies in the program around the kernels, and is reported.
    assert {part.name for part in cost.parts if part.unknown_branches} <= {"TLP"}
    assert cost.unknown_branches == sum(part.unknown_branches for part in cost.parts)
    # Weights come once for every tile of rows of a group, and the result leaves once.
    assert kernel.hbm_bytes > 2 * 16_384 * 3_072
    assert kernel.seconds >= kernel.macs / (TPUS["v5e"].clocked_flops / 2)


def test_a_program_that_takes_too_long_counts_as_one_that_does_not_compile():
    with pytest.raises(CompileError, match="took more than 0 s"):
        compile_for_tpu(Request("v5e", "megablox", "layer", "forward", "olmoe", "bfloat16"), ["balanced"], 0.01)


@pytest.mark.aot
def test_a_refusal_is_an_error_with_its_reason():
    with pytest.raises(CompileError, match="needs a capacity"):
        compile_for_tpu(Request("v5e", "one-hot", "layer", "forward", "mixtral-8x7b", "bfloat16"), ["balanced"])
