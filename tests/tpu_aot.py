"""What the tests with the real TPU compiler share: chips, shapes, a compiled program and the VMEM of its kernels."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from limoe.plan import compiler
from moe_kernels.chips import TPUS
from moe_kernels.types import Layout, Runs

compiler.prepare()

TOPOLOGIES = {tpu.name: tpu.smallest_topology for tpu in TPUS.values()}
WIDTHS = [512, 768, 1024, 1280]
LAYOUTS = {
    # 16,384 tokens with c 1.05; without a limit; 64k tokens and 4 local experts, a run from each of 8 shards.
    "block": Layout(16384, 1, 1, 32, 32 * 544, 544),
    "dropless": Layout(16384, 1, 1, 32, 16384 + 256, None),
    "eight runs": Layout(65536, 1, 8, 4, 4 * 17280, 17280, 8),
    "8 experts": Layout(16384, 1, 1, 8, 8 * 2152, 2152),
}


class Chip:
    """One device of a chip that this machine does not have."""

    def __init__(self, name: str):
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[name])
        self.mesh = Mesh(np.array(topology.devices[:1]), ("x",))

    def array(self, shape, dtype) -> jax.ShapeDtypeStruct:
        """An argument of a program for it."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, PartitionSpec()))

    def runs(self, layout: Layout) -> Runs:
        """Where rows lie, as an argument."""
        return Runs(*[self.array((layout.num_experts * layout.runs_per_expert,), jnp.int32)] * 3)

    def compile(self, function, *arguments) -> str:
        """The program that its compiler makes of a function, as text."""
        mapped = jax.shard_map(
            function, mesh=self.mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
        )
        return jax.jit(mapped).trace(*arguments).lower(lowering_platforms=("tpu",)).compile().as_text()


def kernel_vmem(hlo: str, name: str) -> int:
    """Bytes of VMEM that a kernel uses: what is reported counts from 0, below its scope lies what XLA keeps there."""
    (line,) = (line for line in hlo.splitlines() if "tpu_custom_call" in line and f"%{name}" in line.split("=")[0])
    scope = re.search(r'"scoped_memory_configs":\[\{"memory_space":"1","offset":"(\d+)"', line)
    used = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"', line)
    assert scope and used, line
    return int(used[1]) - int(scope[1])


def check_vmem(hlo: str, name: str, computed: int) -> None:
    """What was computed for a kernel is never less than it uses, and at most 1.3x of it."""
    real = kernel_vmem(hlo, name)
    assert real <= computed <= 1.3 * real, f"{name}: computed {computed / 2**20:.2f} MiB, real {real / 2**20:.2f}"
