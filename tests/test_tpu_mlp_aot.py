"""The fused expert MLP through the real TPU compiler: accepted on every chip, within the VMEM that was computed."""

import os
import re

# Read when libtpu is loaded: there is no metadata server, and other processes may compile at the same time.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_kernels import MlpWeights
from moe_kernels.backends import choose, problem_of
from moe_kernels.backends.base import MlpStatic
from moe_kernels.backends.tiling import CHIPS, mlp_backward_tiles, mlp_forward_tiles
from moe_kernels.types import Layout, Runs

pytestmark = pytest.mark.aot

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
WIDTHS = [512, 768, 1024, 1280]
LAYOUTS = {
    # 16,384 tokens with c 1.05; without a limit; 64k tokens and 4 local experts, a run from each of 8 shards.
    "block": Layout(16384, 1, 1, 32, 32 * 544, 544),
    "dropless": Layout(16384, 1, 1, 32, 16384 + 256, None),
    "eight runs": Layout(65536, 1, 8, 4, 4 * 17280, 17280, 8),
    "8 experts": Layout(16384, 1, 1, 8, 8 * 2152, 2152),
}


def compile_both(chip: str, width: int, layout: Layout, weight_dtype, dtype=jnp.bfloat16):
    """Compiled forward and backward pass, as the table of back ends gives them, and their computed VMEM."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    e, f, runs = layout.num_experts, 4 * width, layout.num_experts * layout.runs_per_expert

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    rows = array((layout.num_rows, width), dtype)
    weights = MlpWeights(
        array((e, width, f), weight_dtype), array((e, f), jnp.float32), array((e, f, width), weight_dtype),
        array((e, width), jnp.float32),
    )  # fmt: skip
    chosen = []

    def span(rows):
        problem = problem_of("expert_mlp", rows, e, expert_width=f, layout=layout)
        chosen.append(problem)
        return choose(problem)

    static = MlpStatic(layout, "gelu_tanh")

    def forward(rows, weights, runs):
        return span(rows).forward(static, rows, weights, runs)[0]

    def backward(rows, weights, runs, dout):
        saved = jax.eval_shape(lambda *args: span(rows).forward(static, *args)[1], rows, weights, runs)
        saved = jax.tree.unflatten(jax.tree.structure(saved), jax.tree.leaves((rows, weights, runs)))
        return span(rows).backward(static, saved, dout)

    compiled = []
    for function, arguments in (
        (forward, (rows, weights, Runs(*[array((runs,), jnp.int32)] * 3))),
        (backward, (rows, weights, Runs(*[array((runs,), jnp.int32)] * 3), rows)),
    ):
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
        )
        compiled.append(jax.jit(mapped).trace(*arguments).lower(lowering_platforms=("tpu",)).compile())
    facts = CHIPS[chosen[0].chip]
    sizes = (layout, width, f, jnp.dtype(dtype).itemsize, jnp.dtype(weight_dtype).itemsize, facts)
    return compiled, [mlp_forward_tiles(*sizes).vmem, mlp_backward_tiles(*sizes).vmem]


def kernel_vmem(hlo: str, name: str) -> int:
    """Bytes of VMEM that a kernel uses: what is reported counts from 0, below its scope lies what XLA keeps there."""
    (line,) = (line for line in hlo.splitlines() if "tpu_custom_call" in line and f"%{name}" in line.split("=")[0])
    scope = re.search(r'"scoped_memory_configs":\[\{"memory_space":"1","offset":"(\d+)"', line)
    used = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"', line)
    assert scope and used, line
    return int(used[1]) - int(scope[1])


def check(chip, width, layout, weight_dtype):
    compiled, computed = compile_both(chip, width, LAYOUTS[layout], weight_dtype)
    for program, name, estimate in zip(compiled, ("forward", "backward"), computed, strict=True):
        real = kernel_vmem(program.as_text(), f"expert_mlp_{name}")
        assert real <= estimate <= 1.3 * real, f"{name}: computed {estimate / 2**20:.2f} MiB, real {real / 2**20:.2f}"


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
