"""What a generation of GPUs has: sets of kernels, each with the spans that it fills."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from moe_kernels.backends.base import Problem, Span, SpanName


class Kernels(NamedTuple):
    """Spans whose functions take the device first, and the reason, if any, why they cannot take a problem."""

    spans: dict[SpanName, Span]
    why_not: Callable[[Problem], str | None]
