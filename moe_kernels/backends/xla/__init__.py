"""The XLA back end: plain JAX, every platform, every shape; the one that CPUs and older GPUs use."""

from __future__ import annotations

from moe_kernels.backends.base import Backend, Problem, Span
from moe_kernels.backends.xla.matmul import grouped_matmul_backward, grouped_matmul_forward
from moe_kernels.backends.xla.mlp import expert_mlp_backward, expert_mlp_forward
from moe_kernels.backends.xla.permute import combine_backward, combine_forward, dispatch_backward, dispatch_forward
from moe_kernels.backends.xla.routing import route_backward, route_forward

FLOATS = ("float32", "bfloat16", "float16")

_ROUTE = Span(route_forward, route_backward)
_DISPATCH = Span(dispatch_forward, dispatch_backward)
_GROUPED_MATMUL = Span(grouped_matmul_forward, grouped_matmul_backward)
_EXPERT_MLP = Span(expert_mlp_forward, expert_mlp_backward)
_COMBINE = Span(combine_forward, combine_backward)


def why_not(problem: Problem) -> str | None:
    """Refuse what has no defined rounding: anything but float32, bfloat16 and float16.

    >>> why_not(Problem("dispatch", "cpu", "int8", (4, 8), 2))
    "dtype int8 is none of ('float32', 'bfloat16', 'float16')"
    """
    if problem.dtype not in FLOATS:
        return f"dtype {problem.dtype} is none of {FLOATS}"
    return None


XLA = Backend(
    name="xla",
    why_not=why_not,
    spans={
        "route": lambda _: _ROUTE,
        "dispatch": lambda _: _DISPATCH,
        "grouped_matmul": lambda _: _GROUPED_MATMUL,
        "expert_mlp": lambda _: _EXPERT_MLP,
        "combine": lambda _: _COMBINE,
    },
)
