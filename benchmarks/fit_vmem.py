"""Fit the constants of moe_kernels/fitted.json to the installed TPU compiler. Print them, or write them with --write.

    python benchmarks/fit_vmem.py --tpu=v5e --tpu=7x
    python benchmarks/fit_vmem.py --write

Needs `pip install 'jax[tpu]'` but no TPU. For each chip it compiles one program with every kernel whose VMEM we
compute, and compares the computed bytes with those that the compiler reports. One constant at a time, it takes the
smallest value, in steps, with which no kernel uses more than was computed. The constants of the router's entries stay
as they are. A program takes up to a minute to compile, all chips together about an hour. A chip that is new in
moe_kernels/chips.py starts with the values of v6e, which needs most.
"""

import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from absl import app, flags  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from benchmarks.tpu_compile import mesh_of_one  # noqa: E402
from limoe.plan import compiler  # noqa: E402
from moe_kernels import (  # noqa: E402
    MlpWeights,
    dispatch,
    expert_mlp,
    grouped_glu,
    grouped_matmul,
    make_plan,
    route,
)
from moe_kernels.chips import MIB, TPUS  # noqa: E402
from moe_kernels.fitted import FILE, FITTED  # noqa: E402

_CHIP = flags.DEFINE_multi_enum("tpu", list(TPUS), list(TPUS), "TPU to compile for.")
_WRITE = flags.DEFINE_bool("write", False, "Write moe_kernels/fitted.json.")

# Step sizes of the constants.
STEPS = {
    "margin": 0.01,
    "slack_bytes": MIB // 8,
    "product_share": 0.125,
    "weight_product_rows": 128,
    "hidden_copies": 1,
    "products_of_a_pair": 1,
}
_TOKENS, _WIDTH, _EXPERT_WIDTH, _EXPERTS = 16_384, 768, 3_072, 32


class Vmem(NamedTuple):
    """Bytes of VMEM of a kernel: as computed by us, and as reported by the compiler."""

    name: str
    computed: int
    real: int


def kernels_vmem(hlo: str) -> list[Vmem]:
    """Find the kernels of a compiled program.

    A kernel's limit is what we computed plus a MiB. The reported size counts from 0; XLA's own data is below the offset
    of the kernel's scope.

    >>> config = '"scoped_memory_configs":[{"memory_space":"1","offset":"8","size":"1048600"}]'
    >>> used = '"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"28"}]'
    >>> kernels_vmem(f'%k.1 = f32[8] custom-call(), custom_call_target="tpu_custom_call", {config}, {used}')
    [Vmem(name='k', computed=24, real=20)]
    """
    found = []
    for line in hlo.splitlines():
        if '"tpu_custom_call"' not in line:
            continue
        name = re.search(r"%([\w\-]+)[\w.\-]* = ", line)
        scope = re.search(r'"scoped_memory_configs":\[\{"memory_space":"1","offset":"(\d+)","size":"(\d+)"', line)
        used = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"', line)
        assert name and scope and used, line[:300]
        found.append(Vmem(name[1], int(scope[2]) - MIB, int(used[1]) - int(scope[1])))
    return found


def measure(chip: str) -> list[Vmem]:
    """Compile the kernels of all verbs, forward and backward, for one device of a chip."""
    compiler.prepare()
    mesh = mesh_of_one(chip)

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    wide, back = array(_EXPERTS, _WIDTH, _EXPERT_WIDTH), array(_EXPERTS, _EXPERT_WIDTH, _WIDTH)
    biases = array(_EXPERTS, _EXPERT_WIDTH), array(_EXPERTS, _WIDTH)
    router = array(_WIDTH, _EXPERTS, dtype=jnp.float32)
    arguments = (array(_TOKENS, _WIDTH), router, MlpWeights(wide, biases[0], back, biases[1]), wide, wide)

    def loss(tokens: Any, router: Any, mlp: MlpWeights, gate: Any, up: Any) -> jax.Array:
        routing = route(tokens, router)
        plan = make_plan(routing, num_experts=_EXPERTS, capacity=-(-_TOKENS // _EXPERTS))
        rows = dispatch(tokens, plan)
        results = (
            expert_mlp(rows, mlp, plan),
            grouped_matmul(rows, gate, plan),
            grouped_matmul(rows, up, plan, bias=mlp.b1, activation="gelu_tanh"),
            grouped_glu(rows, gate, up, plan),
            routing.gate,
        )
        return sum((jnp.sum(jnp.square(result.astype(jnp.float32))) for result in results), jnp.float32(0))

    run = jax.shard_map(
        jax.grad(loss, argnums=(0, 1, 2, 3, 4)), mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(),
        check_vma=False,
    )  # fmt: skip
    compiled = jax.jit(run).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    return kernels_vmem(compiled.as_text() or "")


def too_small(constants: Mapping[str, Any], chip: str) -> list[Vmem]:
    """Find the kernels that use more than was computed with these constants.

    It runs in a new process, because block sizes and libtpu's options do not change within a process.
    """
    command = [sys.executable, str(Path(__file__).resolve()), "--", json.dumps(constants), chip]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{chip} does not compile with {constants}: {done.stderr[-500:]}")
    return [Vmem(*one) for one in json.loads(done.stdout.splitlines()[-1]) if one[1] < one[2]]


def fit(constants: dict[str, Any], name: str, chips: list[str]) -> dict[str, Any]:
    """Change one constant to the smallest value that is enough for these chips."""

    def changed(by: float) -> dict[str, Any]:
        value = constants[name]
        if isinstance(value, dict):
            return constants | {name: {chip: size + by * (chip in chips) for chip, size in value.items()}}
        return constants | {name: round(value + by, 6)}

    step, enough = STEPS[name], lambda some: not any(too_small(some, chip) for chip in chips)
    if not enough(constants):
        while not enough(constants := changed(step)):
            pass
        return constants
    while enough(smaller := changed(-step)):
        constants = smaller
    return constants


def main(argv: list[str]) -> None:
    """Fit one constant after the other. Constants of a chip are fitted for each chip alone."""
    if argv[1:]:
        constants, chip = argv[1:]
        vars(FITTED).update(json.loads(constants))
        print(json.dumps(measure(chip)))
        return
    constants = dataclasses.asdict(FITTED)
    for name in ("hidden_copies", "products_of_a_pair"):
        constants[name] = {chip: constants[name].get(chip, constants[name]["v6e"]) for chip in TPUS}
    for name in STEPS:
        alone = isinstance(constants[name], dict)
        for chips in [[chip] for chip in _CHIP.value] if alone else [_CHIP.value]:
            constants = fit(constants, name, chips)
            print(f"{name} for {', '.join(chips)}: {constants[name]}", flush=True)
    constants["compiler"] = f"libtpu {importlib.metadata.version('libtpu')}"
    text = json.dumps(constants, indent=2) + "\n"
    print(text)
    if _WRITE.value:
        FILE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
