"""Dispatch and combine through the real TPU compiler, within the VMEM that was computed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_tpu_mlp_aot import TOPOLOGIES

from moe_kernels import combine, dispatch
from moe_kernels.backends import explain, problem_of
from moe_kernels.types import Layout, Plan, Runs

pytestmark = pytest.mark.aot

BLOCK = Layout(16384, 1, 1, 32, 32 * 544, 544)
LAYOUTS = {"one choice": BLOCK, "two choices": dataclasses.replace(BLOCK, num_tokens=8192, num_choices=2)}
# Rows of Mixtral 8x7B and Qwen3-30B-A3B, in blocks of columns.
WIDE = {
    "Mixtral": Layout(8192, 2, 1, 8, 8192 * 2 + 8 * 8, None),
    "Qwen3": Layout(8192, 8, 1, 128, 8192 * 8 + 128 * 8, None),
}


def check(chip, width, layout, dtype):
    """Compile both operations and their derivatives; the kernel takes them, and the compiler finds room for it."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    ids = [array((32,), jnp.int32)] * 3
    row, source = array((layout.num_tokens, layout.num_choices), jnp.int32), array((layout.num_rows,), jnp.int32)
    plan = Plan(row, source, Runs(*ids), array((1, 1, 32), jnp.float32), layout)
    tokens, rows = (array((n, width), dtype) for n in (layout.num_tokens, layout.num_rows))
    said = []

    def both(plan, tokens, rows, gate):
        said.append(explain(problem_of("dispatch", tokens, 32, layout=layout)))
        out, back = jax.vjp(lambda tokens: dispatch(tokens, plan), tokens)
        y, weigh_back = jax.vjp(lambda rows, gate: combine(rows, gate, plan), rows, gate)
        return out, back(rows), y, weigh_back(tokens)

    mapped = jax.shard_map(both, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    arguments = plan, tokens, rows, array(row.shape, jnp.float32)
    compiled = jax.jit(mapped).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    assert said[0].startswith("tpu: chosen")
    # Dispatch, combine, and three for their derivatives.
    assert (compiled.as_text() or "").count("tpu_custom_call") >= 5


@pytest.mark.parametrize(
    ("chip", "width", "layout"),
    [
        ("v5e", 768, "two choices"),
        # Two TensorCores.
        ("v5p", 2048, "Qwen3"),
        ("v6e", 4096, "Mixtral"),
        ("7x", 1024, "one choice"),
    ],
)
def test_a_sample_compiles(chip, width, layout):
    check(chip, width, (LAYOUTS | WIDE)[layout], jnp.bfloat16)


# 64 MiB of VMEM hold the rows of 16,384 tokens of up to 3 KB.
EVERY = [
    (chip, width, layout, dtype)
    for chip in ("v5e", "v5p", "v6e", "7x")
    for width in (512, 768, 1024, 1280)
    for layout in LAYOUTS
    for dtype in (jnp.bfloat16, jnp.float32)
    if chip in ("v5e", "v6e") or width * jnp.dtype(dtype).itemsize <= 3072
]


@pytest.mark.full
@pytest.mark.parametrize(("chip", "width", "layout", "dtype"), EVERY)
def test_all_compile(chip, width, layout, dtype):
    check(chip, width, LAYOUTS[layout], dtype)
