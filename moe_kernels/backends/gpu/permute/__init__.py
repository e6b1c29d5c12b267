"""Dispatch and combine for every generation: rows are copied and added up, which needs no tensor cores."""

from __future__ import annotations

from moe_kernels.backends.base import Problem, Span
from moe_kernels.backends.gpu.common.kernels import Kernels
from moe_kernels.backends.gpu.permute.tiles import WIDTH_ALIGNMENT
from moe_kernels.backends.gpu.permute.verbs import (
    combine_backward,
    combine_forward,
    dispatch_backward,
    dispatch_forward,
)

DTYPES = ("bfloat16", "float16", "float32")


def why_not(problem: Problem) -> str | None:
    """Refuse other dtypes, widths that pieces do not divide, and what has no rows."""
    layout, width = problem.layout, problem.shape[-1]
    if problem.dtype not in DTYPES:
        return f"dtype {problem.dtype} is none of {DTYPES}"
    if width < 1 or width % WIDTH_ALIGNMENT:
        return f"width {width} is not a multiple of {WIDTH_ALIGNMENT}"
    if layout is None:
        return "the layout of the rows is not known"
    return "there are no rows" if 0 in (layout.num_tokens, layout.num_rows) else None


PERMUTE = Kernels(
    {"dispatch": Span(dispatch_forward, dispatch_backward), "combine": Span(combine_forward, combine_backward)},
    why_not,
)
