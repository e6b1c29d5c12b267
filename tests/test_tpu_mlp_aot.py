"""The fused expert MLP through the real TPU compiler: accepted on every chip, within the VMEM that was computed."""

import jax.numpy as jnp
import numpy as np
import pytest
from tpu_aot import LAYOUTS, TOPOLOGIES, WIDTHS, Chip, check_vmem

from moe_kernels import GluWeights, MlpWeights
from moe_kernels.backends import choose, problem_of
from moe_kernels.backends.base import MlpStatic
from moe_kernels.backends.tpu.common.tiling import GivenTiles, Sizes
from moe_kernels.backends.tpu.mlp.forward import MlpSaved
from moe_kernels.backends.tpu.mlp.hidden import keeps_hidden
from moe_kernels.backends.tpu.mlp.one_or_two import glu_cost
from moe_kernels.backends.tpu.mlp.tiles import mlp_backward_tiles, mlp_forward_tiles
from moe_kernels.chips import TPUS

pytestmark = pytest.mark.aot


def check(chip, width, layout, weight_dtype, dtype=jnp.bfloat16, *, gated=False):
    """Compile both passes, as the table of back ends gives them, and compare with the computed VMEM."""
    device, layout = Chip(chip), LAYOUTS[layout]
    e, f, array, runs = layout.num_experts, 4 * width, device.array, device.runs(layout)
    rows = array((layout.num_rows, width), dtype)
    first, second = array((e, width, f), weight_dtype), array((e, f, width), weight_dtype)
    weights = MlpWeights(first, array((e, f), jnp.float32), second, array((e, width), jnp.float32))
    if gated:
        weights = GluWeights(first, first, second)
    static, facts = MlpStatic(layout, "silu" if gated else "gelu_tanh"), TPUS[chip]
    sizes = Sizes(layout, width, f, jnp.dtype(dtype).itemsize, jnp.dtype(weight_dtype).itemsize, facts, gated)
    keep = keeps_hidden(sizes)
    tiles, back_tiles = mlp_forward_tiles(sizes, keep=keep), mlp_backward_tiles(sizes, keep=keep)
    if gated and (tiles is None or back_tiles is None):
        assert glu_cost(sizes).one == np.inf
        return
    hidden = array((layout.num_rows, tiles.padded), dtype) if keep else None

    def span(rows):
        # Gated, with the block sizes that would be chosen: as one kernel, also where two take less time.
        given = {"tiles": GivenTiles(tiles, back_tiles)} if gated else {}
        name = "expert_glu" if gated else "expert_mlp"
        return choose(problem_of(name, rows, e, expert_width=f, layout=layout, weight_dtype=str(first.dtype), **given))

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


@pytest.mark.parametrize(
    ("chip", "width", "layout", "weight_dtype"),
    [
        ("v5p", 768, "dropless", jnp.bfloat16),
        ("v6e", 1024, "block", jnp.float32),
        ("7x", 512, "8 experts", jnp.bfloat16),
    ],
)
def test_gated_experts_compile_within_their_vmem(chip, width, layout, weight_dtype):
    check(chip, width, layout, weight_dtype, gated=True)


@pytest.mark.full
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("weight_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_all_compile_within_their_vmem(chip, width, layout, weight_dtype, gated):
    check(chip, width, layout, weight_dtype, gated=gated)
