"""The grouped matmul through the real TPU compiler: accepted on every chip, within the VMEM that was computed."""

import jax
import jax.numpy as jnp
import pytest
from tpu_aot import LAYOUTS, TOPOLOGIES, WIDTHS, Chip, check_vmem

from moe_kernels.backends import choose, problem_of
from moe_kernels.backends.base import MatmulStatic, MatmulWeights, apply, epilogue_of
from moe_kernels.backends.tpu.common.tiling import Sizes
from moe_kernels.backends.tpu.matmul.tiles import matmul_backward_tiles, matmul_forward_tiles
from moe_kernels.chips import find_tpu

pytestmark = pytest.mark.aot

# Not a multiple of 128 lanes, as in published models.
HALF_LANES = 2880


def check(chip, sizes, layout, weight_dtype, epilogue="none", dtype=jnp.bfloat16):
    """Compile both passes, as the table of back ends gives them, and compare with the computed VMEM."""
    device, layout, (width, expert_width) = Chip(chip), LAYOUTS[layout], sizes
    rows, out = (device.array((layout.num_rows, size), dtype) for size in sizes)
    matrix = device.array((layout.num_experts, width, expert_width), weight_dtype)
    bias = device.array((layout.num_experts, expert_width), jnp.float32)
    activation, weights = {
        "none": (None, MatmulWeights(matrix)),
        "pointwise": ("gelu_tanh", MatmulWeights(matrix, bias)),
        "gated": ("silu", MatmulWeights(matrix, up=matrix)),
    }[epilogue]
    static = MatmulStatic(layout, activation)
    assert epilogue_of(weights, activation) == epilogue
    chosen = []

    def both(rows, weights, runs, dout):
        problem = problem_of(
            "grouped_matmul", rows, layout.num_experts, expert_width=expert_width, layout=layout, epilogue=epilogue
        )
        chosen.append(problem)
        out, pull = jax.vjp(lambda *given: apply(choose(problem), static, given, (runs,)), rows, weights)
        return out, pull(dout)

    program = device.compile(both, rows, weights, device.runs(layout), out)
    itemsizes = jnp.dtype(dtype).itemsize, jnp.dtype(weight_dtype).itemsize
    given = Sizes(layout, width, expert_width, *itemsizes, find_tpu(chosen[0].chip))
    for name, tiles in (("forward", matmul_forward_tiles), ("backward", matmul_backward_tiles)):
        check_vmem(program, f"grouped_matmul_{name}", tiles(given, epilogue=epilogue).vmem)


@pytest.mark.parametrize(
    ("chip", "sizes", "layout", "weight_dtype", "epilogue"),
    [
        ("v5e", (768, 3072), "dropless", jnp.float32, "none"),
        ("v6e", (768, 3072), "block", jnp.bfloat16, "none"),
        ("v6e", (768, 3072), "block", jnp.bfloat16, "gated"),
    ],
)
def test_a_sample_compiles_within_its_vmem(chip, sizes, layout, weight_dtype, epilogue):
    check(chip, sizes, layout, weight_dtype, epilogue)


@pytest.mark.full
@pytest.mark.parametrize("epilogue", ["none", "pointwise", "gated"])
@pytest.mark.parametrize("weight_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("layout", ["block", "eight runs", "dropless"])
@pytest.mark.parametrize("sizes", [*((width, 4 * width) for width in WIDTHS), (HALF_LANES, HALF_LANES)])
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_all_compile_within_their_vmem(chip, sizes, layout, weight_dtype, epilogue):
    check(chip, sizes, layout, weight_dtype, epilogue)
