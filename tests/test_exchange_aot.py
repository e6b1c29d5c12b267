"""The exchange through the real TPU compiler: beside the experts' matmuls, and ragged where nothing limits it."""

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
from sharding_cases import collectives

from moe_kernels import MlpWeights, expert_parallel

pytestmark = pytest.mark.aot

EXPERTS, WIDTH, HIDDEN, GROUPS, GROUP = 32, 1024, 4096, 16, 32 * 212


def compiled_text(*, asynchronous: bool, **options) -> str:
    """Value and gradient of a layer of L/16 on four v5p chips, in the order in which they run."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
    mesh = Mesh(np.array(devices).reshape(1, 4), ("data", "expert"))

    def array(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    e, d, f = EXPERTS, WIDTH, HIDDEN
    weights = MlpWeights(*(array(s, jnp.float32, "expert") for s in ((e, d, f), (e, f), (e, f, d), (e, d))))

    def loss(tokens, router, weights):
        output = expert_parallel.moe_mlp(tokens, router, weights, mesh=mesh, num_groups=GROUPS, **options)
        return jnp.sum(jnp.sin(output.tokens.astype(jnp.float32)))

    arguments = array((GROUPS * GROUP, d), jnp.bfloat16, ("data", "expert")), array((d, e), jnp.float32), weights
    lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).trace(*arguments).lower(lowering_platforms=("tpu",))
    settings = {"xla_tpu_enable_async_all_to_all": "true"} if asynchronous else {}
    text = lowered.compile(compiler_options=settings).as_text()
    assert "is_scheduled=true" in text
    return text


def matmuls_within_exchanges(text: str) -> dict[str, int]:
    """How many instructions that hold a matmul, the experts' kernels among them, each exchange has in its course."""
    blocks = re.split(r"\n(?=%|ENTRY)", text)
    with_matmul = {
        name[1] for block in blocks if " convolution(" in block and (name := re.match(r"(%[\w.-]+) ", block))
    }
    (entry,) = (block for block in blocks if block.startswith("ENTRY"))
    started: dict[str, int] = {}
    within: dict[str, int] = {}
    count = 0
    for line in entry.splitlines():
        called = re.search(r"calls=(%[\w.-]+)", line)
        count += " convolution(" in line or (called is not None and called[1] in with_matmul)
        count += re.match(r"\s*(ROOT )?%expert_mlp_(forward|backward)[\w.-]* =.* custom-call\(", line) is not None
        if (start := re.search(r"(%[\w.-]+) = .* all-to-all-start\(", line)) is not None:
            started[start[1]] = count
        elif (done := re.search(r" all-to-all-done\((%[\w.-]+)\)", line)) is not None:
            within[done[1]] = count - started.pop(done[1])
    assert not started
    return within


def test_exchanges_in_chunks_run_beside_the_experts():
    within = matmuls_within_exchanges(compiled_text(asynchronous=True, num_chunks=2, capacity_factor=1.05))
    assert len(within) == 8
    # Of each direction, there and back, one chunk can run beside the matmuls of the other: at least one forward and one
    # backward do.
    assert sum(count > 0 for count in within.values()) >= 3, within


@pytest.mark.full
def test_exchanges_are_synchronous_unless_the_compiler_is_told():
    text = compiled_text(asynchronous=False, num_chunks=2, capacity_factor=1.05)
    assert matmuls_within_exchanges(text) == {}
    assert sum(one.kind == "all-to-all" and "bf16" in one.dtypes for one in collectives(text)) == 8


@pytest.mark.full
def test_without_a_limit_rows_go_by_ragged_exchanges():
    found = collectives(compiled_text(asynchronous=True, buffer_factor=2))
    ragged = [one for one in found if one.kind == "ragged-all-to-all"]
    assert len(ragged) == 4 and all("bf16" in one.dtypes for one in ragged)
    gathered = [one for one in found if one.kind == "all-gather"]
    assert [one.shapes for one in gathered] == [(("s32", (4, 2, EXPERTS)),)]
