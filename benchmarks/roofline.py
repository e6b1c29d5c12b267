"""What an operation must compute and move by its definition, and what the device could do: the roofline.

Work counts useful rows only (choices that found room), each array read or written once, and the weights of experts that
have rows. So an implementation that computes padding, or moves data twice, is further from its roofline.
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
# The two halves of a backward pass, gradients of rows and of weights, where each is a matmul of its own.
HALVES: tuple[Pass, ...] = ("dx", "dw")


class Work(NamedTuple):
    """Floating-point operations and bytes."""

    flops: float
    bytes: float


class Load(NamedTuple):
    """How much of a case is real: choices that found room, and experts that have any."""

    rows: int
    experts: int


@dataclasses.dataclass(frozen=True)
class Device:
    """Peaks of a device: FLOP/s by dtype (float32: exact products), bytes/s of its memory, and their source."""

    name: str
    flops: dict[str, float]
    bandwidth: float
    source: str


# Products of all rows with the matrices of their experts, in the operations that have any.
EXPERT_MATMULS: dict[Op, int] = {"grouped_matmul": 1, "expert_mlp": 2, "layer": 2}


def work(op: Op, passes: Pass, case: Case, load: Load, itemsize: int) -> Work:
    """Count an operation from its definition; a backward pass reads the inputs and the cotangent, and writes gradients.

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
    # For each: FLOPs forward, and bytes of what is differentiated, of what else is read, and of the result.
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
    """Inputs, outputs, gradients and the routed rows (once) of a layer's forward and backward pass.

    >>> needed_bytes(Case("x", 4, 1, 8, 16, 2, 1, None), 32, 4)
    6176
    """
    tokens, router = case.tokens * case.width * itemsize, case.width * case.experts * 4
    weights = case.experts * (2 * case.width * case.expert_width + case.width + case.expert_width) * itemsize
    noise = case.tokens * case.experts * 4
    # Four of one row a token: the tokens, the result, and the gradients of both.
    return 4 * tokens + noise + 2 * (weights + router) + rows * case.width * itemsize


def percent(done: Work, seconds: float, device: Device, dtype: str) -> float | None:
    """Per cent of what the device could do, max(compute, memory); None where its peak is not known.

    >>> percent(Work(1e9, 1e6), 0.01, Device("x", {"float32": 1e12}, 1e12, "given"), "float32")
    10.0
    """
    if dtype not in device.flops:
        return None
    return 100 * max(done.flops / device.flops[dtype], done.bytes / device.bandwidth) / seconds


def sheet(kind: str) -> Device | None:
    """The data sheet of a device by the name that JAX gives it, None if there is none here.

    >>> sheet("NVIDIA H200 141GB HBM3e").bandwidth, sheet("TPU v5 lite").flops["bfloat16"], sheet("NVIDIA H200 NVL")
    (4800000000000.0, 197000000000000.0, None)
    """
    rates = find_rates(kind)
    if rates is None:
        return None
    return Device(kind, {"float32": rates.float32, "bfloat16": rates.bfloat16}, rates.memory, "data sheet")


def this_device() -> Device:
    """Look the device up. A CPU has no data sheet here: its peaks are measured beside every problem (see `probes`)."""
    kind = jax.devices()[0].device_kind
    if device := sheet(kind):
        return device
    if jax.default_backend() == "cpu":
        return Device(_cpu_name(), {}, float("inf"), "a large matmul and a large copy, measured beside every problem")
    return Device(kind, {}, float("inf"), "none: the peaks of this device are not known")


def _cpu_name() -> str:
    """The name that Linux gives; elsewhere that of the architecture."""
    info = Path("/proc/cpuinfo")
    names = [text for text in info.read_text().splitlines() if text.startswith("model name")] if info.exists() else []
    name = names[0].partition(":")[2].strip() if names else platform.processor()
    return f"{os.cpu_count()} cores of {name}"


def probes(dtype: str) -> list[Program]:
    """A large matmul and a large copy, to be timed in turns with what they are the measure of."""
    if jax.default_backend() != "cpu":
        return []
    matrix = jnp.ones((_PROBE_WIDTH, _PROBE_WIDTH), dtype)
    large = jnp.ones(_PROBE_ENTRIES, jnp.float32)
    return [
        compile_program("large matmul", lambda a: a @ a, (matrix,), dtype),
        compile_program("large copy", lambda x: x + 1, (large,), dtype),
    ]


def with_probes(device: Device, timed: list[Program], dtype: str) -> Device:
    """The device with the largest rates that the probes reached; itself if nothing was timed."""
    if not timed or not all(probe.seconds for probe in timed):
        return device
    matmul, copy = (min(probe.seconds.values()) for probe in timed)
    rates = {dtype: 2 * _PROBE_WIDTH**3 / matmul}
    return dataclasses.replace(device, flops=rates, bandwidth=2 * 4 * _PROBE_ENTRIES / copy)
