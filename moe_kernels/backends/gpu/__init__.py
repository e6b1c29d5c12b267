"""The GPU back end: Pallas kernels for Mosaic GPU, by generation; on a CPU only in a simulator."""

from __future__ import annotations

import functools

from moe_kernels.backends.base import Backend, Problem, Span, SpanName, by_kernel_alone
from moe_kernels.backends.gpu.common.kernels import Kernels
from moe_kernels.backends.gpu.common.launch import GpuTarget, Simulator
from moe_kernels.backends.gpu.permute import PERMUTE
from moe_kernels.backends.gpu.sm90 import SM90
from moe_kernels.backends.mlp_parts import in_two_matmuls, problems_of
from moe_kernels.chips import Generation, find_generation

# What each generation has; what it has not goes to XLA.
GENERATIONS: dict[str, tuple[Kernels, ...]] = {"hopper": (SM90, PERMUTE), "blackwell": (PERMUTE,)}
SPANS: tuple[SpanName, ...] = ("route", "grouped_matmul", "dispatch", "combine", "expert_mlp", "expert_glu")
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
    """Refuse other platforms (but for a simulator, by name), other GPUs, and what the kernels of this one do not take.

    >>> why_not(Problem("expert_mlp", "tpu", "bfloat16", (16, 128), 2))
    'platform tpu is not gpu'
    >>> why_not(Problem("expert_mlp", "gpu", "bfloat16", (16, 128), 2, chip="NVIDIA A100-SXM4-80GB"))
    "chip 'NVIDIA A100-SXM4-80GB' has not compute capability 9.0 (H100, H200, H800, H20, GH200) or 10.0"
    """
    if problem.span == "expert_glu":
        return next(filter(None, map(why_not, problems_of(problem))), None)
    if problem.platform == "cpu" and not (problem.named and _simulator):
        return NEEDS_SIMULATOR
    if problem.platform not in ("cpu", "gpu"):
        return f"platform {problem.platform} is not gpu"
    chip = _chip(problem)
    if chip is None:
        return f"chip {problem.chip!r} has not compute capability 9.0 (H100, H200, H800, H20, GH200) or 10.0"
    if problem.platform == "gpu" and problem.num_cores < 1:
        return f"chip {problem.chip!r} does not say how many multiprocessors it has"
    kernels = _kernels(problem, chip)
    if kernels is None:
        return f"chip {problem.chip!r} multiplies by tcgen05, which the interpreter of JAX 0.10.2 does not know"
    return kernels.why_not(problem)


def _chip(problem: Problem) -> Generation | None:
    return find_generation(STAND_IN if problem.platform == "cpu" else problem.chip)


def _kernels(problem: Problem, chip: Generation) -> Kernels | None:
    return next((kernels for kernels in GENERATIONS[chip.name] if problem.span in kernels.spans), None)


def _span(problem: Problem) -> Span:
    if problem.span == "expert_glu":
        return in_two_matmuls(*map(_span, problems_of(problem)))
    chip = _chip(problem)
    assert chip is not None, "refused by why_not"
    kernels = _kernels(problem, chip)
    assert kernels is not None, "refused by why_not"
    device = (
        GpuTarget(chip, SIMULATED_SMS, _simulator) if problem.platform == "cpu" else GpuTarget(chip, problem.num_cores)
    )
    span = _on(device, kernels.spans[problem.span])
    return by_kernel_alone(span) if problem.span == "route" else span


@functools.lru_cache
def _on(device: GpuTarget, span: Span) -> Span:
    """One span for each device, so that JAX finds what it has traced before."""
    value = None if span.value is None else functools.partial(span.value, device)
    return Span(functools.partial(span.forward, device), functools.partial(span.backward, device), value)


def note(problem: Problem) -> str | None:
    """Which kernels gated experts are.

    >>> note(Problem("expert_glu", "gpu", "bfloat16", (16, 128), 2))
    'Pallas kernels: grouped_glu, then grouped_matmul'
    """
    return "Pallas kernels: grouped_glu, then grouped_matmul" if problem.span == "expert_glu" else None


GPU = Backend(
    "gpu", why_not, dict.fromkeys(SPANS, _span), optional=frozenset(("route", "dispatch", "combine")), note=note
)
