"""The kernels in a scan over layers with gradients, as every trainer has them, through the TPU's compiler.

A scan stacks what the backward pass needs. XLA may make one fusion of a kernel and that, and then no longer knows how
much VMEM the kernel asked for.
"""

import jax
import jax.numpy as jnp
import pytest
from tpu_aot import LAYOUTS, Chip

from moe_kernels import MlpWeights, MoeSpec, moe_mlp
from moe_kernels.backends import choose, problem_of
from moe_kernels.backends.base import MlpStatic, apply
from moe_kernels.types import Runs

LAYERS, WIDTH, EXPERT_WIDTH = 2, 768, 3072


def layer(chip: Chip):
    """The whole layer: one kernel from dispatch to combine where the chip has one TensorCore."""

    def block(tokens, weights):
        router, experts = weights
        return tokens + moe_mlp(tokens, router, experts, MoeSpec(capacity_factor=1.05)).tokens

    weights = chip.array((LAYERS, WIDTH, 32), jnp.float32), mlp_weights(chip, 32)
    return block, (16384, WIDTH), weights


def experts(chip: Chip):
    """Experts of rows that other shards sent, whose hidden layer v5p keeps."""
    layout = LAYOUTS["eight runs"]

    def block(rows, weights):
        runs, experts = weights
        problem = problem_of("expert_mlp", rows, layout.num_experts, expert_width=EXPERT_WIDTH, layout=layout)
        return rows + apply(choose(problem), MlpStatic(layout, "gelu_tanh"), (rows, experts), (runs,))

    runs = Runs(*[chip.array((LAYERS, layout.num_experts * layout.runs_per_expert), jnp.int32)] * 3)
    return block, (layout.num_rows, WIDTH), (runs, mlp_weights(chip, layout.num_experts))


def mlp_weights(chip: Chip, count: int) -> MlpWeights:
    shapes = (WIDTH, EXPERT_WIDTH), (EXPERT_WIDTH,), (EXPERT_WIDTH, WIDTH), (WIDTH,)
    return MlpWeights(*(chip.array((LAYERS, count, *shape), jnp.float32) for shape in shapes))


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "case", "kernel"),
    [("v6e", layer, "dispatch_mlp_combine_forward"), ("v5p", experts, "expert_mlp_forward")],
)
def test_a_scan_with_gradients_is_accepted(name, case, kernel):
    chip = Chip(name)
    block, shape, weights = case(chip)

    def loss(rows, weights):
        stepped, _ = jax.lax.scan(lambda rows, own: (block(rows, own), None), rows, weights)
        return (stepped.astype(jnp.float32) ** 2).mean()

    def gradient(rows, weights):
        return jax.grad(loss, argnums=(0, 1), allow_int=True)(rows, weights)

    assert f"%{kernel}" in chip.compile(gradient, chip.array(shape, jnp.bfloat16), weights)
