"""The roofline: the work of an operation by its definition, and the peaks of the device.

Work counts only useful rows (choices that found room) and the weights of experts that have rows, with each array read
or written once. An implementation that computes padding, or moves data twice, is further from its roofline.
"""

import dataclasses
import os
import platform
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from benchmarks.cases import Case
from benchmarks.timing import Program, compile_program
from moe_kernels.chips import find_rates

# 17 GFLOP, and 256 MB read and written.
_PROBE_WIDTH, _PROBE_ENTRIES = 2_048, 1 << 26

Op = Literal["routing", "plan", "dispatch", "combine", "grouped_matmul", "expert_mlp", "layer"]
Pass = Literal["forward", "backward", "both", "dx", "dw"]
OPS: tuple[Op, ...] = get_args(Op)
PASSES: tuple[Pass, ...] = get_args(Pass)
# The two halves of a grouped matmul's backward pass: gradients of rows, and of weights.
HALVES: tuple[Pass, ...] = ("dx", "dw")


@dataclasses.dataclass(frozen=True)
class Problem:
    """What an implementation is run on."""

    op: Op
    passes: Pass
    case: Case
    distribution: str
    dtype: str
    without: tuple[str, ...] = ()
    """Implementations that a suite leaves out here to save time."""


class Work(NamedTuple):
    """Floating-point operations, and bytes read and written."""

    flops: float
    bytes: float


class Load(NamedTuple):
    """The useful part of a case: choices that found room, and experts that have any."""

    rows: int
    experts: int


@dataclasses.dataclass(frozen=True)
class Device:
    """Peaks of a device: FLOP/s by dtype (float32 with exact products), bytes/s of memory, and their source."""

    name: str
    flops: dict[str, float]
    bandwidth: float
    source: str


# Number of grouped matmuls in the operations that have any.
EXPERT_MATMULS: dict[Op, int] = {"grouped_matmul": 1, "expert_mlp": 2, "layer": 2}


def work(op: Op, passes: Pass, case: Case, load: Load, itemsize: int) -> Work:
    """Count the work of an operation. A backward pass reads inputs and cotangent, and writes gradients.

    >>> case = Case("x", 4, 1, 8, 16, 2, 1, None)
    >>> work("expert_mlp", "forward", case, Load(4, 2), 4)
    Work(flops=2048.0, bytes=2496.0)
    >>> work("expert_mlp", "both", case, Load(4, 2), 4).flops
    6144.0
    """
    t, d, f, e, k = case.tokens, case.width, case.expert_width, case.experts, case.choices
    tokens, rows, hidden = (count * itemsize for count in (t * d, load.rows * d, load.rows * f))
    matrix, biases = load.experts * d * f * itemsize, load.experts * (d + f) * itemsize
    router, noise, gate, ids = 4 * d * e, 4 * t * e, 4 * t * k, 4 * t * k
    both_matrices = 2 * matrix + biases
    route_flops, matmul_flops, combine_flops = 2.0 * t * d * e, 2.0 * load.rows * d * f, 2.0 * load.rows * d
    # Forward FLOPs, then bytes of differentiated inputs, of other inputs, and of results.
    flops, arguments, constants, result = {
        "routing": (route_flops, tokens + router, noise, gate + ids),
        "plan": (0.0, 0, gate + ids, ids + 4 * load.rows),
        "dispatch": (0.0, rows, ids, rows),
        "combine": (combine_flops, rows + gate, ids, tokens),
        "grouped_matmul": (matmul_flops, rows + matrix, 0, hidden),
        "expert_mlp": (2 * matmul_flops, rows + both_matrices, 0, rows),
        "layer": (route_flops + 2 * matmul_flops + combine_flops, tokens + router + both_matrices, noise, tokens),
    }[op]
    read = arguments + constants + result
    if passes == "forward":
        return Work(flops, float(read))
    if passes in HALVES:
        assert op == "grouped_matmul"
        return Work(flops, float(rows + matrix + hidden))
    if passes == "backward":
        return Work(2 * flops, float(read + arguments))
    return Work(3 * flops, float(read + result + arguments))


def needed_bytes(case: Case, rows: int, itemsize: int) -> int:
    """Count the bytes of inputs, outputs, gradients and routed rows (once) of a layer's forward and backward pass.

    >>> needed_bytes(Case("x", 4, 1, 8, 16, 2, 1, None), 32, 4)
    6176
    """
    tokens, router = case.tokens * case.width * itemsize, case.width * case.experts * 4
    weights = case.experts * (2 * case.width * case.expert_width + case.width + case.expert_width) * itemsize
    noise = case.tokens * case.experts * 4
    # Four arrays like the tokens: tokens, result, and the gradients of both.
    return 4 * tokens + noise + 2 * (weights + router) + rows * case.width * itemsize


def percent(done: Work, seconds: float, device: Device, dtype: str) -> float | None:
    """Compute the per cent of the roofline, max(compute, memory). None if the peak is not known.

    >>> percent(Work(1e9, 1e6), 0.01, Device("x", {"float32": 1e12}, 1e12, "given"), "float32")
    10.0
    """
    if dtype not in device.flops:
        return None
    return 100 * max(done.flops / device.flops[dtype], done.bytes / device.bandwidth) / seconds


def sheet(kind: str) -> Device | None:
    """Get the data sheet of a device by its JAX device kind; None if there is none.

    >>> sheet("NVIDIA H200 141GB HBM3e").bandwidth, sheet("TPU v5 lite").flops["bfloat16"], sheet("NVIDIA H200 NVL")
    (4800000000000.0, 197000000000000.0, None)
    """
    rates = find_rates(kind)
    if rates is None:
        return None
    return Device(kind, {"float32": rates.float32, "bfloat16": rates.bfloat16}, rates.memory, "data sheet")


def this_device() -> Device:
    """Look up this device. A CPU has no data sheet here; its peaks are measured with every problem (see `probes`)."""
    kind = jax.devices()[0].device_kind
    if device := sheet(kind):
        return device
    if jax.default_backend() == "cpu":
        return Device(_cpu_name(), {}, float("inf"), "a large matmul and a large copy, measured beside every problem")
    return Device(kind, {}, float("inf"), "none: the peaks of this device are not known")


def _cpu_name() -> str:
    """Get the CPU's name from Linux, elsewhere its architecture."""
    info = Path("/proc/cpuinfo")
    names = [text for text in info.read_text().splitlines() if text.startswith("model name")] if info.exists() else []
    name = names[0].partition(":")[2].strip() if names else platform.processor()
    return f"{os.cpu_count()} cores of {name}"


def probes(dtype: str) -> list[Program]:
    """Make a large matmul and a large copy. They are timed in turns with the problem, and give the peaks of a CPU."""
    if jax.default_backend() != "cpu":
        return []
    matrix = jnp.ones((_PROBE_WIDTH, _PROBE_WIDTH), dtype)
    large = jnp.ones(_PROBE_ENTRIES, jnp.float32)
    return [
        compile_program("large matmul", lambda a: a @ a, (matrix,), dtype),
        compile_program("large copy", lambda x: x + 1, (large,), dtype),
    ]


def with_probes(device: Device, timed: list[Program], dtype: str) -> Device:
    """Set the device's peaks to the largest rates of the probes; no change if nothing was timed."""
    if not timed or not all(probe.seconds for probe in timed):
        return device
    matmul, copy = (min(probe.seconds.values()) for probe in timed)
    rates = {dtype: 2 * _PROBE_WIDTH**3 / matmul}
    return dataclasses.replace(device, flops=rates, bandwidth=2 * 4 * _PROBE_ENTRIES / copy)
