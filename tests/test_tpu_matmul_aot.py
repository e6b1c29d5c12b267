"""The grouped matmul through the real TPU compiler: accepted on every chip, within the VMEM that was computed."""

import jax
import jax.numpy as jnp
import pytest
from tpu_aot import LAYOUTS, TOPOLOGIES, WIDTHS, Chip, check_vmem

from moe_kernels.backends import choose, problem_of
from moe_kernels.backends.base import apply
from moe_kernels.backends.tiling import CHIPS, matmul_backward_tiles, matmul_forward_tiles

pytestmark = pytest.mark.aot

# Not a multiple of 128 lanes, as in published models.
HALF_LANES = 2880


def check(chip, sizes, layout, weight_dtype, dtype=jnp.bfloat16):
    """Compile both passes, as the table of back ends gives them, and compare with the computed VMEM."""
    device, layout, (width, expert_width) = Chip(chip), LAYOUTS[layout], sizes
    rows, out = (device.array((layout.num_rows, size), dtype) for size in sizes)
    weight = device.array((layout.num_experts, width, expert_width), weight_dtype)
    chosen = []

    def both(rows, weight, runs, dout):
        problem = problem_of("grouped_matmul", rows, layout.num_experts, expert_width=expert_width, layout=layout)
        chosen.append(problem)
        out, pull = jax.vjp(lambda *given: apply(choose(problem), layout, given, (runs,)), rows, weight)
        return out, pull(dout)

    program = device.compile(both, rows, weight, device.runs(layout), out)
    facts = CHIPS[chosen[0].chip]
    given = (layout, width, expert_width, jnp.dtype(dtype).itemsize, jnp.dtype(weight_dtype).itemsize, facts)
    check_vmem(program, "grouped_matmul_forward", matmul_forward_tiles(*given).vmem)
    check_vmem(program, "grouped_matmul_backward", matmul_backward_tiles(*given).vmem)


@pytest.mark.parametrize(
    ("chip", "sizes", "layout", "weight_dtype"),
    [
        ("v5e", (768, 3072), "dropless", jnp.float32),
        ("v6e", (768, 3072), "block", jnp.bfloat16),
    ],
)
def test_a_sample_compiles_within_its_vmem(chip, sizes, layout, weight_dtype):
    check(chip, sizes, layout, weight_dtype)


@pytest.mark.full
@pytest.mark.parametrize("weight_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("layout", ["block", "eight runs", "dropless"])
@pytest.mark.parametrize("sizes", [*((width, 4 * width) for width in WIDTHS), (HALF_LANES, HALF_LANES)])
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_all_compile_within_their_vmem(chip, sizes, layout, weight_dtype):
    check(chip, sizes, layout, weight_dtype)
