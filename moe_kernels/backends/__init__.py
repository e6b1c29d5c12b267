"""The table of back ends, in order of preference, and the choice among them."""

from __future__ import annotations

import difflib

import jax

from moe_kernels.backends.base import Backend, Problem, Span, SpanName
from moe_kernels.backends.xla import XLA

BACKENDS: tuple[Backend, ...] = (XLA,)

__all__ = ["BACKENDS", "choose", "explain", "problem_of"]


def problem_of(span: SpanName, array: jax.Array, num_experts: int) -> Problem:
    """Describe a call by its span and its main array, on the platform that JAX would use by default.

    >>> import jax.numpy as jnp
    >>> problem_of("dispatch", jnp.zeros((4, 8)), 2).shape
    (4, 8)
    """
    return Problem(span, jax.default_backend(), str(array.dtype), tuple(array.shape), num_experts)


def choose(problem: Problem, name: str | None = None) -> Span:
    """Give the span of the first back end that takes the problem, or of the named one.

    Raises ValueError for a name that does not exist and for a named back end that refuses, with its reason.

    >>> choose(Problem("dispatch", "cpu", "float32", (4, 8), 2), "xla").forward.__name__
    'dispatch_forward'
    """
    if name is not None:
        known = [backend.name for backend in BACKENDS]
        if name not in known:
            near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"backend {name!r} does not exist{hint} (back ends: {', '.join(known)})")
    reasons = []
    for backend in BACKENDS:
        if name is not None and backend.name != name:
            continue
        reason = _why_not(backend, problem)
        if reason is None:
            return backend.spans[problem.span]
        reasons.append(f"{backend.name}: {reason}")
    raise ValueError(f"no back end takes {problem}: {'; '.join(reasons)}")


def explain(problem: Problem) -> str:
    """Say line by line which back end a problem gets, and why the others do not take it.

    >>> explain(Problem("dispatch", "cpu", "float32", (4, 8), 2))
    'xla: chosen'
    """
    lines, chosen = [], False
    for backend in BACKENDS:
        reason = _why_not(backend, problem)
        if reason is not None:
            lines.append(f"{backend.name}: no, {reason}")
        else:
            lines.append(f"{backend.name}: {'also possible' if chosen else 'chosen'}")
            chosen = True
    return "\n".join(lines)


def _why_not(backend: Backend, problem: Problem) -> str | None:
    if problem.span not in backend.spans:
        return f"has no {problem.span}"
    return backend.why_not(problem)
