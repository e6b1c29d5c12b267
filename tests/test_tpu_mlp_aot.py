"""The fused expert MLP through the real TPU compiler: accepted on every chip, within the VMEM that was computed."""

import jax.numpy as jnp
import pytest
from tpu_aot import LAYOUTS, TOPOLOGIES, WIDTHS, Chip, check_vmem

from moe_kernels import MlpWeights
from moe_kernels.backends import choose, problem_of
from moe_kernels.backends.base import MlpStatic
from moe_kernels.backends.tpu.common.tiling import Sizes
from moe_kernels.backends.tpu.mlp.forward import MlpSaved
from moe_kernels.backends.tpu.mlp.hidden import keeps_hidden
from moe_kernels.backends.tpu.mlp.tiles import mlp_backward_tiles, mlp_forward_tiles
from moe_kernels.chips import TPUS

pytestmark = pytest.mark.aot


def check(chip, width, layout, weight_dtype, dtype=jnp.bfloat16):
    """Compile both passes, as the table of back ends gives them, and compare with the computed VMEM."""
    device, layout = Chip(chip), LAYOUTS[layout]
    e, f, array, runs = layout.num_experts, 4 * width, device.array, device.runs(layout)
    rows = array((layout.num_rows, width), dtype)
    weights = MlpWeights(
        array((e, width, f), weight_dtype), array((e, f), jnp.float32), array((e, f, width), weight_dtype),
        array((e, width), jnp.float32),
    )  # fmt: skip
    static, facts = MlpStatic(layout, "gelu_tanh"), TPUS[chip]
    sizes = Sizes(layout, width, f, jnp.dtype(dtype).itemsize, jnp.dtype(weight_dtype).itemsize, facts)
    keep = keeps_hidden(sizes)
    tiles, back_tiles = mlp_forward_tiles(sizes, keep=keep), mlp_backward_tiles(sizes, keep=keep)
    hidden = array((layout.num_rows, tiles.padded), dtype) if keep else None

    def span(rows):
        return choose(problem_of("expert_mlp", rows, e, expert_width=f, layout=layout))

    def forward(rows, weights, runs):
        out, saved = span(rows).forward(static, rows, weights, runs)
        assert (saved.hidden is not None) == keep
        return out, saved.hidden

    def backward(rows, weights, runs, hidden, dout):
        return span(rows).backward(static, MlpSaved(rows, weights, runs, hidden), dout)

    there = device.compile(forward, rows, weights, runs)
    back = device.compile(backward, rows, weights, runs, hidden, rows)
    check_vmem(there, "expert_mlp_forward", tiles.vmem)
    check_vmem(back, "expert_mlp_backward", back_tiles.vmem)


@pytest.mark.parametrize(
    ("chip", "width", "layout", "weight_dtype"),
    [
        ("v4", 1024, "block", jnp.bfloat16),
        ("v5e", 768, "dropless", jnp.float32),
        ("v5p", 768, "eight runs", jnp.bfloat16),
        ("v6e", 768, "block", jnp.bfloat16),
        ("7x", 512, "8 experts", jnp.bfloat16),
    ],
)
def test_a_sample_compiles_within_its_vmem(chip, width, layout, weight_dtype):
    check(chip, width, layout, weight_dtype)


@pytest.mark.full
@pytest.mark.parametrize("weight_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_all_compile_within_their_vmem(chip, width, layout, weight_dtype):
    check(chip, width, layout, weight_dtype)
