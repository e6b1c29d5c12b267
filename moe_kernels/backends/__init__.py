"""The table of back ends, in order of preference, and the choice among them."""

from __future__ import annotations

import dataclasses
import difflib

import jax

from moe_kernels.backends.base import Backend, Problem, RouteStatic, Span, SpanName
from moe_kernels.backends.gpu import GPU
from moe_kernels.backends.tpu import TPU
from moe_kernels.backends.xla import XLA
from moe_kernels.types import Epilogue, Layout

BACKENDS: tuple[Backend, ...] = (TPU, GPU, XLA)

__all__ = ["BACKENDS", "choose", "explain", "find", "problem_of"]


def problem_of(
    span: SpanName,
    array: jax.Array | jax.ShapeDtypeStruct,
    num_experts: int,
    *,
    expert_width: int = 0,
    layout: Layout | None = None,
    epilogue: Epilogue = "none",
    route: RouteStatic | None = None,
    weight_dtype: str = "",
) -> Problem:
    """Describe a call by its span and its main array, on the device that the call is traced for.

    That is the device of the mesh inside `shard_map` or under `jax.set_mesh` (also when a program is compiled for a
    chip that this machine does not have), else JAX's default device.

    >>> import jax.numpy as jnp
    >>> problem_of("dispatch", jnp.zeros((4, 8)), 2).shape
    (4, 8)
    """
    platform, chip, num_cores = _device()
    return Problem(
        span,
        platform,
        str(array.dtype),
        tuple(array.shape),
        num_experts,
        expert_width=expert_width,
        layout=layout,
        route=route,
        chip=chip,
        num_cores=num_cores,
        epilogue=epilogue,
        weight_dtype=weight_dtype,
    )


def _device() -> tuple[str, str, int]:
    """Platform, device kind and cores (TensorCores, multiprocessors; 0 if unknown) of the device that is traced for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.platform, device.device_kind, device.num_cores or 0
    chosen = getattr(jax.config, "jax_default_device")  # noqa: B009 (set by jax.default_device; not in JAX's stubs)
    if isinstance(chosen, str):
        chosen = jax.devices(chosen)[0]
    chosen = chosen or jax.devices()[0]
    # A GPU counts its multiprocessors as `core_count`, which its abstract device calls `num_cores`.
    cores = getattr(chosen, "num_cores", None) or getattr(chosen, "core_count", None) or 0
    return chosen.platform, chosen.device_kind, cores


def choose(problem: Problem, name: str | None = None) -> Span:
    """Give the span of the first back end that takes the problem, or of the named one.

    An operation that the named back end does not have goes to the first that takes it, so that a whole layer can be
    asked for by the name of kernels that are only part of it. Raises ValueError for a name that does not exist and for
    a named back end that has the operation and refuses the problem, with its reason.

    >>> choose(Problem("dispatch", "cpu", "float32", (4, 8), 2), "xla").forward.__name__
    'dispatch_forward'
    """
    if name is not None:
        known = [backend.name for backend in BACKENDS]
        if name not in known:
            near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"backend {name!r} does not exist{hint} (back ends: {', '.join(known)})")
        named = dataclasses.replace(problem, named=True)
        backend = next(backend for backend in BACKENDS if backend.name == name)
        if problem.span in backend.spans and (problem.span not in backend.optional or backend.why_not(named) is None):
            problem = named
        else:
            name = None
    reasons = []
    for backend in BACKENDS:
        if name is not None and backend.name != name:
            continue
        reason = _why_not(backend, problem)
        if reason is None:
            return backend.spans[problem.span](problem)
        reasons.append(f"{backend.name}: {reason}")
    raise ValueError(f"no back end takes {problem}: {'; '.join(reasons)}")


def find(problem: Problem, name: str | None = None) -> Span | None:
    """Give the span of a longer piece of the layer where the back end that takes its parts fills it, else None.

    >>> find(Problem("dispatch_mlp_combine", "cpu", "float32", (4, 8), 2)) is None
    True
    """
    problem = dataclasses.replace(problem, named=name is not None)
    for backend in BACKENDS:
        if name in (None, backend.name) and _why_not(backend, problem) is None:
            return backend.spans[problem.span](problem)
    return None


def explain(problem: Problem) -> str:
    """Say line by line which back end a problem gets, and why the others do not take it.

    >>> print(explain(Problem("dispatch", "cpu", "float32", (4, 8), 2)))
    tpu: no, platform cpu is not tpu; named, it runs interpreted
    gpu: no, platform cpu is not gpu; kernels run there only by name, in a simulator that tests install with ...
    xla: chosen
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
    return backend.why_not(problem)
