"""The exchange through the real TPU compiler: beside the experts' matmuls, and ragged where nothing limits it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sharding_cases import collectives
from spec_cases import spec_and_inputs

from limoe.plan import compiler
from moe_kernels import MlpWeights, moe_mlp, moe_mlp_on_shard

compiler.prepare()

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
        output = moe_mlp(tokens, router, weights, *spec_and_inputs(num_groups=GROUPS, **options), mesh=mesh)
        return jnp.sum(jnp.sin(output.tokens.astype(jnp.float32)))

    arguments = array((GROUPS * GROUP, d), jnp.bfloat16, ("data", "expert")), array((d, e), jnp.float32), weights
    lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).trace(*arguments).lower(lowering_platforms=("tpu",))
    settings = {"xla_tpu_enable_async_all_to_all": "true"} if asynchronous else {}
    text = lowered.compile(compiler_options=settings).as_text()
    assert "is_scheduled=true" in text
    return text


def test_kernels_compile_in_a_shard_map_that_checks_what_varies():
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2").devices
    mesh, split, whole = Mesh(np.array(devices), ("expert",)), PartitionSpec("expert"), PartitionSpec()
    e, d, f = 8, 256, 512

    def array(shape, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def loss(tokens, router, weights):
        return jax.lax.psum(jnp.sum(jnp.square(moe_mlp_on_shard(tokens, router, weights).tokens)), "expert")

    weights = MlpWeights(array((e, d, f), split), None, array((e, f, d), split), None)
    arguments = array((4096, d), split, jnp.bfloat16), array((d, e), whole), weights
    inside = jax.shard_map(loss, mesh=mesh, in_specs=(split, whole, split), out_specs=whole)
    traced = jax.jit(jax.value_and_grad(inside, argnums=(0, 1, 2))).trace(*arguments)
    text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    for kernel in ("route_forward", "route_backward", "expert_mlp_forward", "expert_mlp_backward"):
        assert re.search(rf"%{kernel}[\w.-]* =.* custom-call\(", text), kernel


def experts_within_exchanges(text: str) -> list[list[str]]:
    """Passes of the experts' kernels that run in the course of each asynchronous exchange, in the order of the ends."""
    blocks = re.split(r"\n(?=%|ENTRY)", text)
    (entry,) = (block for block in blocks if block.startswith("ENTRY"))
    started: dict[str, int] = {}
    within: list[list[str]] = []
    kernels: list[str] = []
    for line in entry.splitlines():
        if kernel := re.match(r"\s*(?:ROOT )?%expert_mlp_(forward|backward)[\w.-]* =.* custom-call\(", line):
            kernels.append(kernel[1])
        if (start := re.search(r"(%[\w.-]+) = .* all-to-all-start\(", line)) is not None:
            started[start[1]] = len(kernels)
        elif (done := re.search(r" all-to-all-done\((%[\w.-]+)\)", line)) is not None:
            within.append(kernels[started.pop(done[1]) :])
    assert not started and sorted(kernels) == ["backward"] * 2 + ["forward"] * 2
    return within


def test_exchanges_in_chunks_run_beside_the_experts():
    text = compiled_text(asynchronous=True, num_chunks=2, capacity_factor=1.05)
    # Two chunks' rows there and back in each pass; what has nothing to run beside the compiler leaves synchronous.
    assert len(re.findall(r"= \(?\(?bf16\[.* all-to-all(?:-start)?\(", text)) == 8
    within = experts_within_exchanges(text)
    # In each pass one chunk's rows can arrive or go back beside the experts of the other chunk, and some do.
    assert ["forward"] in within and ["backward"] in within, within


@pytest.mark.full
def test_exchanges_are_synchronous_unless_the_compiler_is_told():
    text = compiled_text(asynchronous=False, num_chunks=2, capacity_factor=1.05)
    assert experts_within_exchanges(text) == []
    assert sum(one.kind == "all-to-all" and "bf16" in one.dtypes for one in collectives(text)) == 8


@pytest.mark.full
def test_without_a_limit_rows_go_by_ragged_exchanges():
    found = collectives(compiled_text(asynchronous=True, buffer_factor=2))
    ragged = [one for one in found if one.kind == "ragged-all-to-all"]
    assert len(ragged) == 4 and all("bf16" in one.dtypes for one in ragged)
    gathered = [one for one in found if one.kind == "all-gather"]
    assert [one.shapes for one in gathered] == [(("s32", (4, 2, EXPERTS)),)]
