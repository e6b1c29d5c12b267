"""Hopper's kernels, of compute capability 9.0: routing, grouped matmul and expert MLP by wgmma."""

from __future__ import annotations

from moe_kernels.backends.base import Problem, Span, activation_misfit, rows_misfit
from moe_kernels.backends.gpu.common.kernels import Kernels
from moe_kernels.backends.gpu.sm90.matmul import grouped_matmul_backward, grouped_matmul_forward, grouped_matmul_value
from moe_kernels.backends.gpu.sm90.mlp import expert_mlp_backward, expert_mlp_forward, expert_mlp_value
from moe_kernels.backends.gpu.sm90.routing import PIECES, route_forward
from moe_kernels.backends.gpu.sm90.routing_backward import route_backward
from moe_kernels.backends.gpu.sm90.tiling import MOST_COLUMNS, WIDTH_ALIGNMENT
from moe_kernels.types import round_up

DTYPES = ("bfloat16", "float16")
# Choices and modalities are written out one after the other in the router.
MOST_UNROLLED = 16


def why_not(problem: Problem) -> str | None:
    """Refuse float32 and shapes that tiles do not divide."""
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


SM90 = Kernels(
    {
        "route": Span(route_forward, route_backward),
        "grouped_matmul": Span(grouped_matmul_forward, grouped_matmul_backward, grouped_matmul_value),
        "expert_mlp": Span(expert_mlp_forward, expert_mlp_backward, expert_mlp_value),
    },
    why_not,
)
