"""The table of back ends, in order of preference, and the choice among them."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, NamedTuple

import jax

from moe_kernels.backends.base import Backend, Problem, Span, SpanName
from moe_kernels.backends.gpu import GPU
from moe_kernels.backends.tpu import TPU
from moe_kernels.backends.xla import XLA

BACKENDS: list[Backend] = [TPU, GPU, XLA]
"""The first back end that takes a problem gets it. A program may insert its own."""

__all__ = [
    "BACKENDS",
    "Choice",
    "Traced",
    "choice_of",
    "choose",
    "explain",
    "find",
    "problem_of",
    "reasons_of",
    "traced_for",
]


class Traced(NamedTuple):
    """The device for which a program is traced: its platform, kind and cores (0 if unknown)."""

    platform: str
    chip: str
    num_cores: int


def traced_for() -> Traced:
    """Find the device of the mesh inside `shard_map` or under `jax.set_mesh`, else JAX's default device.

    The mesh may be of a chip that this machine does not have. Cores are TensorCores or multiprocessors.

    >>> traced_for().platform
    'cpu'
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return Traced(device.platform, device.device_kind, device.num_cores or 0)
    chosen = getattr(jax.config, "jax_default_device")  # noqa: B009 (set by jax.default_device; not in JAX's stubs)
    if isinstance(chosen, str):
        chosen = jax.devices(chosen)[0]
    chosen = chosen or jax.devices()[0]
    # A GPU calls the number of its multiprocessors `core_count`; its abstract device calls it `num_cores`.
    cores = getattr(chosen, "num_cores", None) or getattr(chosen, "core_count", None) or 0
    return Traced(chosen.platform, chosen.device_kind, cores)


def problem_of(
    span: SpanName, array: jax.Array | jax.ShapeDtypeStruct, num_experts: int, *, on: Traced | None = None, **facts: Any
) -> Problem:
    """Describe a call by its span, its main array and further `facts` of `Problem`, on the device `on`.

    The default is the device for which the call is traced.

    >>> import jax.numpy as jnp
    >>> problem_of("dispatch", jnp.zeros((4, 8)), 2).shape
    (4, 8)
    """
    platform, chip, num_cores = on or traced_for()
    return Problem(
        span,
        platform,
        str(jax.dtypes.canonicalize_dtype(array.dtype)),
        tuple(array.shape),
        num_experts,
        chip=chip,
        num_cores=num_cores,
        **facts,
    )


class Choice(NamedTuple):
    """The back end that takes a problem, and why others do not; `backend` and `span` are None if none does."""

    backend: str | None
    span: Span | None
    how: str
    """How the back end runs it."""
    refused: dict[str, str]
    """The reason of each back end that refuses it."""
    name: SpanName
    """The span that the problem is of."""


def choice_of(problem: Problem, name: str | None = None) -> Choice:
    """Choose the first back end that takes the problem, or the named one.

    If the named back end lacks the span, the first back end that takes it gets it: the named kernels may be only part
    of a layer. A span of several verbs never goes to another back end than the named one. Raises ValueError for an
    unknown name.

    >>> choice_of(Problem("dispatch", "cpu", "float32", (4, 8), 2)).backend
    'xla'
    """
    if name is not None:
        backend = _named(name)
        named = dataclasses.replace(problem, named=True)
        alone = problem.span in backend.spans and (problem.span not in backend.optional or _takes(backend, named))
        if alone or problem.span == "dispatch_mlp_combine":
            return _first(named, [backend])
    return _first(problem, BACKENDS)


def _named(name: str) -> Backend:
    known = {backend.name: backend for backend in BACKENDS}
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"backend {name!r} does not exist{hint} (back ends: {', '.join(known)})")
    return known[name]


def _takes(backend: Backend, problem: Problem) -> bool:
    return backend.why_not(problem) is None


def _first(problem: Problem, backends: list[Backend]) -> Choice:
    reasons = {backend.name: _why_not(backend, problem) for backend in backends}
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    for backend in backends:
        if backend.name not in refused:
            how = backend.note(problem) or backend.work
            return Choice(backend.name, backend.spans[problem.span](problem), how, refused, problem.span)
    return Choice(None, None, "", refused, problem.span)


def choose(problem: Problem, name: str | None = None) -> Span:
    """Get the span of the back end that `choice_of` finds.

    Raises ValueError if no back end takes the problem, with the reason of each.

    >>> choose(Problem("dispatch", "cpu", "float32", (4, 8), 2), "xla").forward.__name__
    'dispatch_forward'
    """
    choice = choice_of(problem, name)
    if choice.span is None:
        raise ValueError(f"{reasons_of(choice)}; no back end takes {problem}")
    return choice.span


def reasons_of(choice: Choice) -> str:
    """Say why no back end takes a problem, that of the last resort first.

    >>> reasons_of(choice_of(Problem("dispatch", "cpu", "int8", (4, 8), 2))).split(";")[0]
    "xla: dtype int8 is none of ('float32', 'bfloat16', 'float16')"
    """
    return "; ".join(f"{backend}: {reason}" for backend, reason in reversed(choice.refused.items()))


def find(problem: Problem, name: str | None = None) -> Span | None:
    """Get the span if some back end fills it, else None.

    >>> find(Problem("dispatch_mlp_combine", "cpu", "float32", (4, 8), 2)) is None
    True
    """
    return choice_of(problem, name).span


def explain(problem: Problem) -> str:
    """Say line by line which back end takes a problem, and why others do not.

    >>> print(explain(Problem("dispatch", "tpu", "int8", (4, 8), 2)))
    tpu: no, dtype int8 is none of ('float32', 'bfloat16')
    gpu: no, platform tpu is not gpu
    xla: no, dtype int8 is none of ('float32', 'bfloat16', 'float16')
    """
    lines, chosen = [], False
    for backend in BACKENDS:
        reason = _why_not(backend, problem)
        if reason is not None:
            lines.append(f"{backend.name}: no, {reason}")
        else:
            how = backend.note(problem)
            lines.append(f"{backend.name}: {'also possible' if chosen else 'chosen'}{f', {how}' if how else ''}")
            chosen = True
    return "\n".join(lines)


def _why_not(backend: Backend, problem: Problem) -> str | None:
    if problem.span not in backend.spans:
        return f"has no {problem.span}"
    if problem.tiles is not None and (backend.tiles is None or not isinstance(problem.tiles, backend.tiles)):
        return f"block sizes of class {type(problem.tiles).__name__} are not those of its kernels"
    return backend.why_not(problem)
