"""Compile the GPU kernels for an H200, or gathers for a B200, on a machine without: `python gpu_aot.py CHIP WIDTH...`.

The plugin's library is loaded by hand, since its own initialisation asks a driver that is not there. PTX and what ptxas
says come from Mosaic on standard output, between the lines printed here; `report` reads them.
"""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
BEGIN = "### compiling "
EXPERTS, ROWS_PER_EXPERT = 32, 544
# Dtypes of what is dispatched and combined.
GATHERED = ("bfloat16", "float32")
# Activations of gated matmuls.
GATED = {"gated": "gelu_tanh", "gated-erf": "gelu_erf", "gated-relu": "relu_squared"}


class Kernel(NamedTuple):
    """What ptxas made of a kernel."""

    registers: int
    stack: int
    spills: int
    wgmmas: int
    fetches: int
    """Plain bulk copies, without tensor and swizzle, from global to shared memory: a multiple of 16 bytes each."""
    stores: int
    """Stores to global memory of 16 bytes a thread."""
    tensors: int
    """Bulk copies of tensors."""
    narrow: int
    """Other stores to global memory of more than a number."""


class Compiled(NamedTuple):
    """The kernels of a pass, by name, and the shared memory that each that was traced allocates."""

    kernels: dict[str, Kernel]
    shared_memory: set[int]


def report(widths: list[int], chip: str = "H200") -> dict[tuple[int, str], Compiled]:
    """What was compiled, by width and pass."""
    dumps = {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_PTX": "1"}
    return parse(run("gpu_aot.py", chip, *map(str, widths), timeout=400 * len(widths), **dumps))


def run(script: str, *arguments: str, timeout: int, **variables: str) -> str:
    """What a script of this folder prints in a process of its own, with the compiler for GPUs."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_gpu_autotune_level=0",
        "PYTHONPATH": str(HERE.parent),
        **variables,
    }
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def chips(chip: str, count: int) -> list:
    """Chips that are not there; once a process."""
    import jax_plugins.xla_cuda13 as plugin
    from jax.experimental import topologies
    from jaxlib import xla_client

    api = xla_client.load_pjrt_plugin_dynamically("cuda", str(plugin._get_library_path()))
    target = (HERE / "h200.txtpb").read_text()
    if chip == "B200":
        # The same but for what the compiler must know: name and compute capability. One chip a process: Mosaic keeps
        # what it found out about the first.
        target = target.replace("major: 9 feature", "major: 10 feature").replace("H200", "B200")
    topology = xla_client.make_c_api_device_topology(api, "", topology=f"1x{count}x1", target_config=target)
    return topologies.TopologyDescription(topology._make_compile_only_devices()).devices


def parse(text: str) -> dict[tuple[int, str], Compiled]:
    """Split the output by compilation and kernel."""
    found = {}
    for part in text.split(BEGIN)[1:]:
        width, direction = part.split(None, 2)[:2]
        # From each kernel's entry to the next one: its instructions; then what ptxas says of it.
        ptx = re.findall(r"\.entry (\w+?)_mosaic_gpu_kernel\b(.*?)(?=\.entry |ptxas |\Z)", part, re.DOTALL)
        counts: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        for name, body in ptx:
            # Stores without a state space are generic: here to global memory, since those to shared memory name theirs.
            stores = re.findall(r"\bst\.(?:global\.)?(?:v([24])\.)?[a-z](\d+)\b", body)
            wide = sum(int(count or 1) * int(bits) == 128 for count, bits in stores)
            pairs = sum(count != "" and int(count) * int(bits) < 128 for count, bits in stores)
            least = body.count("wgmma.mma_async"), body.count("cp.async.bulk.shared::cta.global"), wide
            most = body.count("cp.async.bulk.tensor"), pairs
            before = counts.get(name, (least, most))
            counts[name] = tuple(map(min, least, before[0])), tuple(map(max, most, before[1]))
        said = re.findall(
            r"Compiling entry function '(\w+?)_mosaic_gpu_kernel'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads.*?Used (\d+) registers",
            part,
            re.DOTALL,
        )
        kernels: dict[str, Kernel] = {}
        for name, stack, stores, loads, registers in said:
            # Of kernels of one name (two weights), the worst of each figure.
            made = Kernel(int(registers), int(stack), int(stores) + int(loads), *counts[name][0], *counts[name][1])
            kernels[name] = Kernel(*map(max, made[:3], kernels.get(name, made)[:3]), *made[3:])
        (sizes,) = re.findall(r"^\[[\d, ]*\]$", part, re.MULTILINE)
        found[int(width), direction] = Compiled(kernels, set(json.loads(sizes)))
    return found


def main(chip: str, widths: list[int]) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental.mosaic.gpu import core as mosaic
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from moe_kernels import MoeSpec, RouteInputs, combine, dispatch, route
    from moe_kernels.backends import choose, problem_of
    from moe_kernels.backends.base import MatmulStatic, MatmulWeights, MlpStatic, apply, epilogue_of
    from moe_kernels.types import Layout, MlpWeights, Plan, Runs

    mesh = Mesh(np.array(chips(chip, 1)), ("x",))

    measure = mosaic._smem_tree_size
    sizes: list[int] = []
    mosaic._smem_tree_size = lambda tree: sizes.append(measure(tree)) or sizes[-1]

    layout = Layout(0, 1, 1, EXPERTS, EXPERTS * ROWS_PER_EXPERT, ROWS_PER_EXPERT)

    def forward(rows, weights, size, activation="gelu_tanh"):
        expert = jnp.arange(EXPERTS, dtype=jnp.int32)
        runs = Runs(expert, expert * ROWS_PER_EXPERT, size)
        problem = problem_of("expert_mlp", rows, EXPERTS, expert_width=weights.w1.shape[2], layout=layout)
        return apply(choose(problem, "gpu"), MlpStatic(layout, activation), (rows, weights), (runs,))

    def backward(rows, weights, size, dout, activation="gelu_tanh"):
        return jax.vjp(lambda rows, weights: forward(rows, weights, size, activation), rows, weights)[1](dout)

    def matmul(rows, weights, size, dout, activation):
        """A grouped matmul with what follows it, alone and with all gradients."""
        expert = jnp.arange(EXPERTS, dtype=jnp.int32)
        runs, shape = Runs(expert, expert * ROWS_PER_EXPERT, size), weights.weight.shape
        problem = problem_of(
            "grouped_matmul",
            rows,
            EXPERTS,
            expert_width=shape[2],
            layout=layout,
            epilogue=epilogue_of(weights, activation),
        )
        span, static = choose(problem, "gpu"), MatmulStatic(layout, activation)
        run = lambda rows, weights: apply(span, static, (rows, weights), (runs,))  # noqa: E731
        out, back = jax.vjp(run, rows, weights)
        return run(rows, weights), out, back(dout)

    def permute(tokens, rows, gate, row, source):
        """Dispatch and combine for as many tokens as rows and two choices, with all gradients."""
        moved = Layout(len(tokens), 2, 1, EXPERTS, len(rows), ROWS_PER_EXPERT)
        zeros = jnp.zeros(EXPERTS, jnp.int32)
        plan = Plan(row, source, Runs(zeros, zeros, zeros), jnp.zeros((1, 1, EXPERTS)), moved)
        out, back = jax.vjp(lambda tokens: dispatch(tokens, plan, backend="gpu"), tokens)
        y, weigh_back = jax.vjp(lambda rows, gate: combine(rows, gate, plan, backend="gpu"), rows, gate)
        return out, back(rows), y, weigh_back(tokens)

    def routed(tokens, router, noise, modality):
        """Routing of two choices in four groups, with noise and modalities, and its gradients."""

        def run(tokens, router):
            spec = MoeSpec(num_choices=2, num_groups=4, num_modalities=2)
            return route(tokens, router, spec, RouteInputs(noise=noise, modality=modality))

        found, back = jax.vjp(run, tokens, router)
        ones = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0) if a.dtype == jnp.int32 else a, found)
        return found, back(ones)

    def exact(function):
        return functools.partial(function, activation="gelu_erf")

    def struct(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def permuted(width, dtype):
        count = EXPERTS * ROWS_PER_EXPERT
        array, gate, row = (struct(*shape, dtype=kind) for shape, kind in (
            ((count, width), dtype), ((count, 2), "float32"), ((count, 2), "int32")
        ))  # fmt: skip
        return array, array, gate, row, struct(count, dtype="int32")

    for width in widths:
        hidden = 4 * width
        len_rows = EXPERTS * ROWS_PER_EXPERT
        rows, size = struct(len_rows, width), struct(EXPERTS, dtype=jnp.int32)
        f32 = lambda *shape: struct(*shape, dtype=jnp.float32)  # noqa: E731
        halved = lambda a: struct(*a.shape)  # noqa: E731
        weights = MlpWeights(
            f32(EXPERTS, width, hidden), f32(EXPERTS, hidden), f32(EXPERTS, hidden, width), f32(EXPERTS, width)
        )
        for name, function, arguments in (
            ("forward", forward, (rows, weights, size)),
            ("backward", backward, (rows, weights, size, rows)),
            ("forward-erf", exact(forward), (rows, weights, size)),
            # Weights of the rows' dtype have gradients of that dtype too.
            ("backward-erf", exact(backward), (rows, jax.tree.map(halved, weights), size, rows)),
            (
                "pointwise",
                functools.partial(matmul, activation="silu"),
                (rows, MatmulWeights(weights.w1, weights.b1), size, struct(len_rows, hidden)),
            ),
            *(
                (
                    name,
                    functools.partial(matmul, activation=activation),
                    (rows, MatmulWeights(weights.w1, up=weights.w1), size, struct(len_rows, hidden)),
                )
                for name, activation in GATED.items()
            ),
            (
                "route",
                routed,
                (struct(16384, width), f32(width, EXPERTS), f32(16384, EXPERTS), struct(16384, dtype="int32")),
            ),
            *((f"permute-{dtype}", permute, permuted(width, dtype)) for dtype in GATHERED),
        ):
            if chip == "B200" and not name.startswith("permute"):
                continue
            print(f"\n{BEGIN}{width} {name}", flush=True)
            sizes.clear()
            with jax.set_mesh(mesh):
                lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
            lowered.compile()
            print("\n" + json.dumps(sizes), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], [int(width) for width in sys.argv[2:]])
