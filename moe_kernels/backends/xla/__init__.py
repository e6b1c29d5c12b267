"""The XLA back end: plain JAX, every platform, every shape; the one that CPUs and older GPUs use."""

from __future__ import annotations

import functools

from moe_kernels.backends.base import Backend, Problem, Span
from moe_kernels.backends.xla.block import OverExperts, batched, looped
from moe_kernels.backends.xla.matmul import grouped_matmul_backward, grouped_matmul_forward
from moe_kernels.backends.xla.mlp import expert_mlp_backward, expert_mlp_forward
from moe_kernels.backends.xla.permute import combine_backward, combine_forward, dispatch_backward, dispatch_forward
from moe_kernels.backends.xla.routing import route_backward, route_forward

FLOATS = ("float32", "bfloat16", "float16")

_ROUTE = Span(route_forward, route_backward)
_DISPATCH = Span(dispatch_forward, dispatch_backward)
_COMBINE = Span(combine_forward, combine_backward)


@functools.cache
def _grouped_matmul(way: OverExperts) -> Span:
    return Span(functools.partial(grouped_matmul_forward, way), functools.partial(grouped_matmul_backward, way))


@functools.cache
def _expert_mlp(way: OverExperts) -> Span:
    return Span(functools.partial(expert_mlp_forward, way), functools.partial(expert_mlp_backward, way))


def why_not(problem: Problem) -> str | None:
    """Refuse what has no defined rounding: anything but float32, bfloat16 and float16.

    >>> why_not(Problem("dispatch", "cpu", "int8", (4, 8), 2))
    "dtype int8 is none of ('float32', 'bfloat16', 'float16')"
    """
    if problem.dtype not in FLOATS:
        return f"dtype {problem.dtype} is none of {FLOATS}"
    return None


def _way(problem: Problem) -> OverExperts:
    return looped if problem.platform == "cpu" else batched


XLA = Backend(
    name="xla",
    work="plain JAX",
    why_not=why_not,
    spans={
        "route": lambda _: _ROUTE,
        "dispatch": lambda _: _DISPATCH,
        "grouped_matmul": lambda problem: _grouped_matmul(_way(problem)),
        "expert_mlp": lambda problem: _expert_mlp(_way(problem)),
        "expert_glu": lambda problem: _expert_mlp(_way(problem)),
        "combine": lambda _: _COMBINE,
    },
)
