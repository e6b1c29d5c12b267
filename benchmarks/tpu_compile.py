"""Compile an operation of an implementation for a TPU that need not be here, in its own process.

The compiler reads its options from the environment before JAX loads it, and mixes the dumps of a process's programs.
Therefore each program gets its own process and folder. Needs `pip install 'jax[tpu]'`.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from limoe.plan.compiler import ENVIRONMENT, read_schedules, schedule_options
from limoe.plan.scheduled import Steering

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Request:
    """What to compile, by names of cases, implementations and chips; passes are forward or both.

    The distribution of tokens is not part of it, because it changes values but not the program.
    """

    chip: str
    implementation: str
    op: str
    passes: str
    case: str
    dtype: str


class Compiled(NamedTuple):
    """The results of the compiler. `texts` has the final bundles of each instruction; the top level is named TLP."""

    texts: dict[str, str]
    steering: dict[str, list[Steering]]
    """For each distribution, the integer operands of every Pallas kernel, in the program's order."""
    temp_bytes: int
    compile_seconds: float
    estimated_seconds: float
    """XLA's own estimate. It omits sorts, gathers and kernels, and may be negative."""


class CompileError(RuntimeError):
    """The compiler or the implementation refused; the message is the last line of its output."""


def compile_for_tpu(request: Request, distributions: Sequence[str], timeout: float = 900) -> Compiled:
    """Compile once for all distributions, in a child process. Raises CompileError with the reason if that fails."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
            "LIBTPU_INIT_ARGS": schedule_options(Path(folder)),
        }
        environment = os.environ | ENVIRONMENT | settings
        asked = json.dumps([dataclasses.asdict(request), *distributions])
        command = [sys.executable, "-m", "benchmarks.tpu_compile", asked]
        try:
            done = subprocess.run(
                command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            raise CompileError(f"took more than {timeout:.0f} s") from None
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise CompileError(lines[-1] if lines else f"exit status {done.returncode}")
        said = json.loads(done.stdout.splitlines()[-1])
        steering = {
            distribution: [
                (name, {int(index): values for index, values in operands.items()}) for name, operands in calls
            ]
            for distribution, calls in said.pop("steering").items()
        }
        return Compiled(texts=read_schedules(Path(folder)), steering=steering, **said)


def mesh_of_one(chip: str) -> Any:
    """Make the mesh of one device of a chip that need not be here."""
    from jax.experimental import topologies
    from jax.sharding import Mesh

    from moe_kernels.chips import TPUS

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[chip].smallest_topology)
    return Mesh(np.array(topology.devices[:1]), ("device",))


def _compile(request: Request, distributions: Sequence[str]) -> dict[str, Any]:
    """In the child process, trace for the chip, compile, and compute the integer operands of the kernels."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from benchmarks.cases import CASES
    from benchmarks.tpu_implementations import IMPLEMENTATIONS
    from benchmarks.tpu_operands import steering_operands

    if reason := IMPLEMENTATIONS[request.implementation].why_not(CASES[request.case], request.dtype, "tpu"):
        raise CompileError(reason)
    prepared = _prepare(request, distributions[0])
    mesh, everywhere = mesh_of_one(request.chip), PartitionSpec()
    # Mosaic kernels are not partitioned automatically, not even on one device.
    call = jax.shard_map(prepared.call, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, everywhere)),
        prepared.arguments,
    )
    with jax.default_matmul_precision("highest" if request.dtype == "float32" else None):
        traced = jax.jit(call).trace(*arguments)
    lowered = traced.lower(lowering_platforms=("tpu",))
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    assert memory is not None, "the TPU compiler reports a program's memory"
    values = {name: jax.tree.leaves(_prepare(request, name).arguments) for name in distributions}
    return {
        "steering": {name: steering_operands(traced.jaxpr, leaves) for name, leaves in values.items()},
        "temp_bytes": int(memory.temp_size_in_bytes),
        "compile_seconds": seconds,
        "estimated_seconds": float(costs.get("optimal_seconds", float("nan"))),
    }


def _prepare(request: Request, distribution: str) -> Any:
    """Make the program and its arguments. Only the arguments that decide where tokens go have real values."""
    import jax
    import jax.numpy as jnp

    from benchmarks.cases import CASES, Inputs, draw_experts, imposing_noise, make_inputs
    from benchmarks.jobs import make_job, prepare
    from benchmarks.tpu_implementations import IMPLEMENTATIONS

    case, implementation = CASES[request.case], IMPLEMENTATIONS[request.implementation]
    expert = draw_experts(case, distribution)
    noise = imposing_noise(case, expert)
    shapes = jax.eval_shape(lambda: make_inputs(case, distribution, request.dtype)._replace(expert=None))
    # Broadcast zeros take no memory until they are read.
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), shapes)
    inputs = Inputs(*zeros)._replace(noise=jnp.asarray(noise), expert=expert)
    gate = np.take_along_axis(np.asarray(jax.nn.softmax(noise, axis=1)), expert, axis=1)
    job = make_job(request.op, implementation, case, inputs, gate)  # type: ignore[arg-type]
    return prepare(job, request.passes)  # type: ignore[arg-type]


if __name__ == "__main__":
    asked, *names = json.loads(sys.argv[1])
    # An option of tokamax; without it, the gradients of its kernels need a TPU in this machine.
    sys.argv.append("--tokamax_cross_compile")
    print(json.dumps(_compile(Request(**asked), names)))
