"""The GPU back end: Pallas kernels for Mosaic GPU on Hopper; on a CPU only in a simulator."""

from __future__ import annotations

import functools
from typing import Any

from moe_kernels.backends.base import Backend, Problem, Span, activation_misfit, by_kernel_alone, rows_misfit
from moe_kernels.backends.gpu.common.launch import Device, Simulator
from moe_kernels.backends.gpu.permute import (
    combine_backward,
    combine_forward,
    dispatch_backward,
    dispatch_forward,
)
from moe_kernels.backends.gpu.sm90.matmul import grouped_matmul_backward, grouped_matmul_forward, grouped_matmul_value
from moe_kernels.backends.gpu.sm90.mlp import expert_mlp_backward, expert_mlp_forward, expert_mlp_value
from moe_kernels.backends.gpu.sm90.routing import PIECES, route_forward
from moe_kernels.backends.gpu.sm90.routing_backward import route_backward
from moe_kernels.backends.gpu.sm90.tiling import MOST_COLUMNS, WIDTH_ALIGNMENT
from moe_kernels.chips import Generation, find_generation
from moe_kernels.types import round_up

DTYPES = ("bfloat16", "float16")
# What is copied and added up needs no tensor cores.
GATHER_DTYPES = (*DTYPES, "float32")
GATHERS = ("dispatch", "combine")
# Choices and modalities are written out one after the other in the router.
MOST_UNROLLED = 16
# What a simulator stands for. Its multiprocessors run one after the other: two show that tiles are dealt out right.
STAND_IN, SIMULATED_SMS = "NVIDIA H200", 2
NEEDS_SIMULATOR = (
    "platform cpu is not gpu; kernels run there only by name, in a simulator that tests install with "
    "moe_kernels.backends.gpu.install_simulator"
)
_simulator: Simulator | None = None


def install_simulator(simulator: Simulator | None) -> None:
    """Have this process run GPU kernels on CPUs where they are asked for by name: for tests; None takes it away."""
    global _simulator
    _simulator = simulator


def why_not(problem: Problem) -> str | None:
    """Refuse other platforms (but for a simulator, by name), other GPUs, float32, and shapes that tiles do not divide.

    >>> why_not(Problem("expert_mlp", "tpu", "bfloat16", (16, 128), 2))
    'platform tpu is not gpu'
    >>> why_not(Problem("expert_mlp", "gpu", "bfloat16", (16, 128), 2, chip="NVIDIA A100-SXM4-80GB"))
    "chip 'NVIDIA A100-SXM4-80GB' has not compute capability 9.0 (H100, H200, H800, H20, GH200) or 10.0"
    """
    if problem.platform == "cpu" and not (problem.named and _simulator):
        return NEEDS_SIMULATOR
    if problem.platform not in ("cpu", "gpu"):
        return f"platform {problem.platform} is not gpu"
    chip = _chip(problem)
    if chip is None:
        return f"chip {problem.chip!r} has not compute capability 9.0 (H100, H200, H800, H20, GH200) or 10.0"
    if problem.platform == "gpu" and problem.num_cores < 1:
        return f"chip {problem.chip!r} does not say how many multiprocessors it has"
    if problem.span in GATHERS:
        return _gather_misfit(problem)
    if not chip.columns:
        return f"chip {problem.chip!r} multiplies by tcgen05, which the interpreter of JAX 0.10.2 does not know"
    if problem.span == "route":
        return _route_misfit(problem)
    if problem.dtype not in DTYPES:
        return f"dtype {problem.dtype} is none of {DTYPES}: wgmma cannot read tf32 as these factors lie"
    for name, size in (("width", problem.shape[-1]), ("expert width", problem.expert_width)):
        if size < 1 or size % WIDTH_ALIGNMENT:
            return f"{name} {size} is not a multiple of {WIDTH_ALIGNMENT}"
    layout = problem.layout
    if layout is not None and (layout.num_rows == 0 or layout.num_experts == 0):
        return "there are no rows"
    return activation_misfit(problem) or rows_misfit(layout)


def _gather_misfit(problem: Problem) -> str | None:
    layout, width = problem.layout, problem.shape[-1]
    if problem.dtype not in GATHER_DTYPES:
        return f"dtype {problem.dtype} is none of {GATHER_DTYPES}"
    if width < 1 or width % WIDTH_ALIGNMENT:
        return f"width {width} is not a multiple of {WIDTH_ALIGNMENT}"
    if layout is None:
        return "the layout of the rows is not known"
    if 0 in (layout.num_tokens, layout.num_rows):
        return "there are no rows"
    return None


def _route_misfit(problem: Problem) -> str | None:
    num_tokens, width = problem.shape
    if problem.dtype != "bfloat16":
        return f"dtype {problem.dtype} is not bfloat16: only that multiplies exactly with pieces of a float32 router"
    if width < 1 or width % WIDTH_ALIGNMENT:
        return f"width {width} is not a multiple of {WIDTH_ALIGNMENT}"
    if PIECES * round_up(problem.num_experts, 8) > MOST_COLUMNS:
        return f"{problem.num_experts} experts are more than the {MOST_COLUMNS // PIECES // 8 * 8} of one product"
    if problem.route is None:
        return "what is static about the routing is not known"
    if reason := problem.route.beyond_kernels:
        return reason
    if max(problem.route.num_choices, problem.route.num_modalities) > MOST_UNROLLED:
        return f"more than {MOST_UNROLLED} choices or modalities"
    return "there are no tokens" if num_tokens == 0 else None


def _chip(problem: Problem) -> Generation | None:
    return find_generation(STAND_IN if problem.platform == "cpu" else problem.chip)


def _device(problem: Problem) -> Device:
    chip = _chip(problem)
    assert chip is not None, "refused by why_not"
    return Device(chip, SIMULATED_SMS, _simulator) if problem.platform == "cpu" else Device(chip, problem.num_cores)


@functools.lru_cache
def _span(forward: Any, backward: Any, device: Device, value: Any = None) -> Span:
    """One span for each device, so that JAX finds what it has traced before."""
    alone = None if value is None else functools.partial(value, device)
    return Span(functools.partial(forward, device), functools.partial(backward, device), alone)


GPU = Backend(
    name="gpu",
    why_not=why_not,
    spans={
        "route": lambda problem: by_kernel_alone(_span(route_forward, route_backward, _device(problem))),
        "grouped_matmul": lambda problem: _span(
            grouped_matmul_forward, grouped_matmul_backward, _device(problem), grouped_matmul_value
        ),
        "dispatch": lambda problem: _span(dispatch_forward, dispatch_backward, _device(problem)),
        "combine": lambda problem: _span(combine_forward, combine_backward, _device(problem)),
        "expert_mlp": lambda problem: _span(
            expert_mlp_forward, expert_mlp_backward, _device(problem), expert_mlp_value
        ),
    },
    optional=frozenset(("route", *GATHERS)),
)
