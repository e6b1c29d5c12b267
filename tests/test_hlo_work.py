"""What single instructions amount to, in programs written by hand: matmuls, kernels, exchanges and their groups."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from limoe.plan.hlo import HloError, Program
from limoe.plan.hlo_work import (
    FLOAT32_WEIGHTS,
    Collective,
    Kernel,
    Matmul,
    axes_of,
    collectives,
    groups_of,
    kernels,
    matmuls,
)

ROOT = Path(__file__).parents[1]


def of(count, *lines: str, before: str = "") -> list:
    """What `count` finds in a program of these instructions."""
    program = Program("\n  ".join([f"{before}\nENTRY %main () -> x {{", *lines]) + "\n}")
    return [one for run in program.runs() for one in count(program, run.instruction, run.computation)]


# What the TPU compiler makes of x @ w, of a batched product, and of a product that sums over examples.
CONVOLUTIONS = {
    "bf16[4,53,768]{2,1,0} convolution(%a, %b), window={size=1}, dim_labels=b0f_io0->b0f": (
        "bf16[4,53,512]{2,1,0}",
        "bf16[512,768,1]{2,1,0}",
        Matmul(1, 4 * 53, 768, 512),
    ),
    "f32[4,3,16,20]{3,2,1,0} convolution(%a, %b), window={size=4x3 stride=3x2 lhs_dilate=4x3}, "
    "dim_labels=0b1f_0o1i->01bf": (
        "bf16[4,16,3,8]{3,2,1,0}",
        "bf16[4,20,3,8]{3,2,1,0}",
        Matmul(12, 16, 20, 8),
    ),
}


@pytest.mark.parametrize("text", CONVOLUTIONS)
def test_convolutions_of_a_tpu_are_matmuls(text):
    left, right, expected = CONVOLUTIONS[text]
    lines = [f"%a = {left} parameter(0)", f"%b = {right} parameter(1)", f"ROOT %c = {text}"]
    assert of(matmuls, *lines) == [expected]


def convolution(batch_groups: int, feature_groups: int) -> list[Matmul]:
    """Of a real one as JAX writes it: 8 images of 9 x 9 x 12, 16 filters of 3 x 3, a stride of 2."""

    def convolve(images, filters):
        return jax.lax.conv_general_dilated(
            images,
            filters,
            (2, 2),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            batch_group_count=batch_groups,
            feature_group_count=feature_groups,
        )

    shapes = (
        jax.ShapeDtypeStruct((8, 9, 9, 12), jnp.float32),
        jax.ShapeDtypeStruct((3, 3, 12 // feature_groups, 16), jnp.float32),
    )
    module = jax.jit(convolve).lower(*shapes).compiler_ir("hlo").get_hlo_module()
    program = Program(module.to_string())
    return [one for run in program.runs() for one in matmuls(program, run.instruction, run.computation)]


@pytest.mark.parametrize(("batch_groups", "feature_groups"), [(1, 1), (4, 1), (1, 4), (8, 1), (1, 2)])
def test_convolutions_in_groups(batch_groups, feature_groups):
    (found,) = convolution(batch_groups, feature_groups)
    groups = batch_groups * feature_groups
    places, taps = 8 // batch_groups * 4 * 4, 9 * 12 // feature_groups
    assert found == Matmul(groups, places, 16 // groups, taps, ("f32", "f32"))
    assert found.flops == 2 * places * 16 * taps


PASSES = {"default": 1, "high": 3, "highest": 6}


@pytest.mark.parametrize("precision", PASSES)
@pytest.mark.parametrize(
    "line",
    [
        "f32[8,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        "f32[8,8]{1,0} convolution(%a, %b), dim_labels=bf_io->bf",
    ],
)
def test_a_float32_product_takes_the_passes_of_its_precision(line, precision):
    said = "" if precision == "default" else f", operand_precision={{{precision},{precision}}}"
    counts = {}
    for left, right in itertools.product(("f32", "bf16"), repeat=2):
        (found,) = of(
            matmuls,
            f"%a = {left}[8,8]{{1,0}} parameter(0)",
            f"%b = {right}[8,8]{{1,0}} parameter(1)",
            f"ROOT %c = {line}{said}",
        )
        assert found.dtypes == (left, right) and found.precision == (precision, precision)
        counts[left, right] = found.passes
    # A factor of bfloat16 has one part, so that only those of the other are left.
    one = {"default": 1, "high": 2, "highest": 3}[precision]
    assert counts == {
        ("f32", "f32"): PASSES[precision],
        ("f32", "bf16"): one,
        ("bf16", "f32"): one,
        ("bf16", "bf16"): 1,
    }


def test_the_precision_of_a_real_product():
    def found(precision):
        x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
        module = jax.jit(lambda x: jnp.dot(x, x, precision=precision)).lower(x).compiler_ir("hlo").get_hlo_module()
        program = Program(module.to_string())
        (one,) = (m for run in program.runs() for m in matmuls(program, run.instruction, run.computation))
        return one.passes

    assert [found(name) for name in PASSES] == list(PASSES.values())


def test_a_precision_that_is_not_known_is_refused():
    with pytest.raises(HloError, match=r"matmul c has a precision other than default, high, highest: .*packed_nibble"):
        of(
            matmuls,
            "%a = s8[8,8]{1,0} parameter(0)",
            "ROOT %c = s32[8,8]{1,0} dot(%a, %a), rhs_contracting_dims={0}, operand_precision={packed_nibble,default}",
        )


KERNEL = (
    'custom-call(%n, %x, %w), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{ESTIMATE}}'
)
ESTIMATE = '"cost_estimate":{"flops":"12","transcendentals":"0"},'


@pytest.mark.parametrize(("rows", "weights", "passes"), [("bf16", "f32", 1), ("bf16", "bf16", 1), ("f32", "f32", 6)])
def test_a_kernel_counts_by_its_own_estimate(rows, weights, passes):
    parameters = (
        "%n = s32[4]{0} parameter(0)",
        f"%x = {rows}[8]{{0}} parameter(1)",
        f"%w = {weights}[8]{{0}} parameter(2)",
    )
    line = f"ROOT %k = {rows}[8]{{0}} {KERNEL.replace('ESTIMATE', ESTIMATE)}"
    assert of(kernels, *parameters, line) == [Kernel(12, passes)]
    wrapped = "\n  ".join(["%wrapped (n: x, x: x, w: x) -> y {", *parameters, line]) + "\n}\n"
    start = f"%s = ((s32[4]{{0}}), {rows}[8]{{0}}) async-start(%n, %x, %w), calls=%wrapped"
    assert of(kernels, *parameters, start, before=wrapped) == [Kernel(12, passes)]
    router = line.replace("%k =", "%route_forward.1 =")
    assert of(kernels, *parameters, router) == [Kernel(12, 6 if rows == "f32" else 3)]
    with pytest.raises(HloError, match="the kernel k has no cost estimate"):
        of(kernels, *parameters, line.replace(ESTIMATE, ""))


def test_kernels_with_float32_weights_are_named_as_in_the_table():
    sources = [path.read_text() for path in (ROOT / "moe_kernels" / "backends" / "tpu").rglob("*.py")]
    assert all(any(f'"{name}"' in source for source in sources) for name in FLOAT32_WEIGHTS)


def test_padding_to_the_matrix_unit():
    full = Matmul(1, 1024, 512, 256)
    assert full.on_array(128) == full.on_array(256) == full.flops
    # A depth of 64 fills half of an array; of rows and columns only one has to be whole.
    assert Matmul(3, 100, 1024, 64).on_array(128) == 2 * 3 * 100 * 1024 * 128


# A device's part is f32[1024] or, of two at once, also f32[2048]; two devices exchange.
PAIR = ((0, 1),)
X, Y = 4 * 1024, 4 * 2048
EXCHANGES = {
    "f32[1024]{0} all-to-all(%x)": ("all-to-all", X),
    "((f32[1024]{0}), f32[1024]{0}, u32[]{:S(2)}, u32[]{:S(2)}) all-to-all-start(%x)": ("all-to-all", X),
    "((f32[1024]{0}, f32[2048]{0}), (f32[1024]{0}, f32[2048]{0})) all-to-all-start(%x, %y)": ("all-to-all", X + Y),
    "f32[2048]{0} all-gather(%x)": ("all-gather", 2 * X),
    "(f32[1024]{0}, f32[2048]{0}) all-gather-start(%x)": ("all-gather", 2 * X),
    "((f32[2048]{0}, f32[1024]{0}), (f32[4096]{0}, f32[2048]{0})) all-gather-start(%y, %x)": (
        "all-gather",
        2 * (X + Y),
    ),
    "f32[512]{0} reduce-scatter(%x)": ("reduce-scatter", X),
    "((f32[1024]{0}), f32[512]{0}) reduce-scatter-start(%x)": ("reduce-scatter", X),
    "(f32[1024]{0}, f32[2048]{0}) all-reduce(%x, %y)": ("all-reduce", X + Y),
    "(f32[1024]{0}, f32[2048]{0}) all-reduce-start(%x, %y)": ("all-reduce", X + Y),
    "f32[1024]{0} all-reduce-start(%x)": ("all-reduce", X),
    "(f32[1024]{0}, f32[1024]{0}, u32[], u32[]) collective-permute-start(%x)": ("collective-permute", X),
}
PARAMETERS = ("%x = f32[1024]{0} parameter(0)", "%y = f32[2048]{0} parameter(1)")


@pytest.mark.parametrize("text", EXCHANGES)
def test_the_bytes_of_an_exchange(text):
    line = f"%s = {text}, replica_groups={{{{0,1}}}}"
    done = f"ROOT %d = f32[8]{{0}} {EXCHANGES[text][0]}-done(%s)"
    assert of(collectives, *PARAMETERS, line, done) == [Collective(EXCHANGES[text][0], PAIR, EXCHANGES[text][1])]


@pytest.mark.parametrize("opcode", ["async-start", "fusion"])
def test_an_exchange_inside_another_instruction_counts_once(opcode):
    inside = "\n  ".join(
        ["%w (x: x, y: x) -> y {", *PARAMETERS, "ROOT %c = f32[2048]{0} all-gather(%x), replica_groups={{0,1}}\n}\n"]
    )
    result = "((f32[1024]{0}, f32[2048]{0}), f32[2048]{0})" if opcode == "async-start" else "f32[2048]{0}"
    line = f"%s = {result} {opcode}(%x, %y), calls=%w"
    assert of(collectives, *PARAMETERS, line, before=inside) == [Collective("all-gather", PAIR, 2 * X)]


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
