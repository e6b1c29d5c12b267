"""Bytes between a chip and its main memory, in programs written by hand; S(1) is the memory on the chip."""

import pytest

from limoe.plan.hlo import HloError, Program

ROWS, ROW = 64 * 1024 * 4, 8 * 1024 * 4
HBM, CHIP = "{1,0:T(8,128)}", "{1,0:T(8,128)S(1)}"


def traffic(*lines: str, before: str = "") -> dict[str, int]:
    """What moves bytes in a program of these instructions, by name."""
    program = Program("\n  ".join([f"{before}\nENTRY %main () -> x {{", *lines]) + "\n}")
    return {run.instruction.name: program.traffic(run) for run in program.runs() if program.traffic(run)}


STARTS = {
    "((f32[64,1024]HBM), f32[64,1024]HBM, u32[]{:S(2)}, u32[]{:S(2)}) all-to-all-start(%x), dimensions={0}": 2 * ROWS,
    "(f32[64,1024]HBM, f32[128,1024]HBM) all-gather-start(%x), dimensions={0}": 3 * ROWS,
    "f32[64,1024]HBM all-reduce-start(%x), to_apply=%add": 2 * ROWS,
    "((f32[64,1024]HBM), f32[32,1024]HBM) reduce-scatter-start(%x), dimensions={0}": 3 * ROWS // 2,
    "(f32[64,1024]HBM, f32[64,1024]HBM, u32[], u32[]) collective-permute-start(%x)": 2 * ROWS,
    "(f32[64,1024]CHIP, f32[64,1024]HBM, u32[]{:S(2)}) copy-start(%x)": ROWS,
    "((f32[64,1024]HBM), f32[8,1024]CHIP, u32[]{:S(2)}) slice-start(%x), slice={[0:8], [0:1024]}": ROW,
}


@pytest.mark.parametrize("text", STARTS)
def test_what_is_asynchronous_moves_its_bytes_once(text):
    done = text.partition("-start(")[0].rpartition(" ")[2] + "-done"
    found = traffic(
        f"%x = f32[64,1024]{HBM} parameter(0)",
        f"%s = {text.replace('HBM', HBM).replace('CHIP', CHIP)}",
        f"ROOT %d = f32[64,1024]{HBM} {done}(%s)",
    )
    assert found == {"s": STARTS[text]}


@pytest.mark.parametrize(
    ("source", "target", "sides"), [(HBM, HBM, 2), (HBM, CHIP, 1), (CHIP, HBM, 1), (CHIP, CHIP, 0)]
)
@pytest.mark.parametrize(
    "opcode", ["dynamic-slice", "slice", "gather", "dynamic-update-slice", "scatter", "scatter of two"]
)
def test_a_slice_or_an_update_counts_on_each_side_that_is_in_main_memory(opcode, source, target, sides):
    whole, part = f"f32[64,1024]{{}} {opcode}", f"f32[8,1024]{{}} {opcode}"
    text = {
        "dynamic-slice": part.format(target) + "(%from, %i, %i)",
        "slice": part.format(target) + "(%from)",
        "gather": part.format(target) + "(%from, %i)",
        "dynamic-update-slice": whole.format(target) + "(%into, %row, %i, %i)",
        "scatter": whole.format(target) + "(%into, %i, %row), to_apply=%add",
        "scatter of two": f"(f32[64,1024]{target}, f32[64,1024]{target}) scatter(%into, %into, %i, %row, %row)",
    }[opcode]
    found = traffic(
        "%i = s32[]{:T(128)} constant(0)",
        f"%from = f32[64,1024]{source} parameter(0)",
        f"%into = f32[64,1024]{target} parameter(1)",
        f"%row = f32[8,1024]{source} parameter(2)",
        f"ROOT %y = {text}",
    )
    assert found.get("y", 0) == sides * ROW * (2 if opcode == "scatter of two" else 1)


FUSED = """
%inner (a: x) -> y {
  %a = f32[64,1024]{1,0:T(8,128)} parameter(0)
  ROOT %n = f32[64,1024]{1,0:T(8,128)} negate(%a)
}

%fused (p: x, q: x) -> y {
  %p = f32[64,1024]{1,0:T(8,128)} parameter(0)
  %q = f32[8,1024]{1,0:T(8,128)} parameter(1)
  %i = s32[] constant(0)
  %both = (f32[64,1024]{1,0:T(8,128)}, s32[64,1024]{1,0:T(8,128)}) sort(%p, %p), dimensions={0}
  %first = f32[64,1024]{1,0:T(8,128)} get-tuple-element(%both), index=0
  %n = f32[64,1024]{1,0:T(8,128)} fusion(%p), kind=kLoop, calls=%inner
  %u = f32[64,1024]{1,0:T(8,128)} dynamic-update-slice(%p, %q, %i, %i)
  %v = f32[64,1024]{1,0:T(8,128)} bitcast(%u)
  ROOT LINE
}
"""
# The root of a fusion, the memories of its results, and the bytes that it writes.
WRITTEN = [
    ("(f32[64,1024]{1,0}, s32[64,1024]{1,0}) sort(%p, %p), dimensions={0}", (HBM, HBM), 2 * ROWS),
    ("(f32[64,1024]{1,0}, s32[64,1024]{1,0}) sort(%p, %p), dimensions={0}", (HBM, CHIP), ROWS),
    ("(f32[64,1024]{1,0}, f32[64,1024]{1,0}) tuple(%first, %v)", (HBM, HBM), ROWS + ROW),
    ("(f32[64,1024]{1,0}, f32[64,1024]{1,0}) tuple(%v, %n)", (CHIP, HBM), ROWS),
    ("((f32[64,1024]{1,0}, s32[64,1024]{1,0}), f32[64,1024]{1,0}) tuple(%both, %v)", (HBM, CHIP, HBM), ROWS + ROW),
]


@pytest.mark.parametrize(("root", "memories", "expected"), WRITTEN)
def test_every_result_of_a_fusion_is_written(root, memories, expected):
    results = ", ".join(f"f32[64,1024]{memory}" for memory in memories)
    found = traffic(
        f"%x = f32[64,1024]{CHIP} parameter(0)",
        f"%y = f32[8,1024]{CHIP} parameter(1)",
        f"ROOT %f = ({results}) fusion(%x, %y), kind=kLoop, calls=%fused",
        before=FUSED.replace("LINE", f"%r = {root}"),
    )
    assert found == {"f": expected}


def test_a_root_with_other_results_than_its_fusion_is_refused():
    with pytest.raises(HloError, match=r"fused returns 3 arrays, but its root r names others"):
        traffic(
            f"%x = f32[64,1024]{CHIP} parameter(0)",
            "ROOT %f = (f32[8]{0}, f32[8]{0}, f32[8]{0}) fusion(%x, %x), kind=kLoop, calls=%fused",
            before=FUSED.replace("LINE", "%r = (f32[64,1024]{1,0}, f32[64,1024]{1,0}) tuple(%first, %v)"),
        )
