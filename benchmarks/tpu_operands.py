"""Compute the integer operands of Pallas kernels on the CPU, from the traced program.

They steer a kernel: which tiles it skips, and how long its grid is. Its schedule depends on them. The program is
evaluated lazily, so the large matmuls, on which no integer operand depends, are never computed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from limoe.plan.scheduled import Steering

# Parameters in which a primitive holds an inner program, and the primitives that call one.
_INSIDE = ("jaxpr", "call_jaxpr", "fun_jaxpr", "fwd_jaxpr", "call")
_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "shard_map", "custom_jvp_call")
_CALLS += ("custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vmap_call", "remat_opt")
# Kernels for one core or a grid, and kernels for all cores of a device (newer versions of JAX).
_KERNELS = ("pallas_call", "mpmd_map")


class _Lazy:
    """A value that is computed at the first `get`."""

    def __init__(self, compute: Callable[[], Any]) -> None:
        self._compute: Callable[[], Any] | None = compute
        self._value: Any = None

    def get(self) -> Any:
        if self._compute is not None:
            self._value, self._compute = self._compute(), None
        return self._value


def steering_operands(program: ClosedJaxpr, arguments: Sequence[Any]) -> list[Steering]:
    """Find all kernel calls of a traced program, in order, and compute their integer operands.

    It does not find calls inside loops and branches. A kernel runs interpreted if an integer operand depends on it.

    >>> import jax
    >>> traced = jax.jit(lambda x: x + 1).trace(jnp.zeros(2))
    >>> steering_operands(traced.jaxpr, [jnp.zeros(2)])
    []
    """
    found: list[tuple[str, dict[int, _Lazy]]] = []
    known = [_Lazy(lambda value=value: value) for value in arguments]
    _walk(program.jaxpr, [_Lazy(lambda value=value: value) for value in program.consts], known, found)
    return [
        (name, {index: np.asarray(value.get()).reshape(-1).tolist() for index, value in operands.items()})
        for name, operands in found
    ]


def _walk(jaxpr: Any, consts: list[_Lazy], arguments: list[_Lazy], found: list[Any]) -> list[_Lazy]:
    values: dict[Any, _Lazy] = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> _Lazy:
        return _Lazy(lambda: atom.val) if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        name = equation.primitive.name
        inner = next((equation.params[key] for key in _INSIDE if key in equation.params), None)
        if name in _CALLS and inner is not None:
            consts = [_Lazy(lambda value=value: value) for value in getattr(inner, "consts", [])]
            outputs = _walk(getattr(inner, "jaxpr", inner), consts, inputs, found)
        else:
            if name in _KERNELS:
                found.append((_kernel_name(equation), _integers(equation, inputs)))
            outputs = _outputs(equation, inputs)
        values |= dict(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _kernel_name(equation: Any) -> str:
    info = equation.params.get("name_and_src_info")
    return getattr(info, "name", None) or equation.params.get("name") or ""


def _integers(equation: Any, inputs: list[_Lazy]) -> dict[int, _Lazy]:
    return {
        index: value
        for index, (atom, value) in enumerate(zip(equation.invars, inputs, strict=True))
        if jnp.issubdtype(atom.aval.dtype, jnp.integer)
    }


def _outputs(equation: Any, inputs: list[_Lazy]) -> list[_Lazy]:
    def compute() -> list[Any]:
        params = equation.primitive.get_bind_params(equation.params)
        if equation.primitive.name == "pallas_call":
            params = params | {"interpret": True}
        with equation.ctx.manager:
            result = equation.primitive.bind(*(value.get() for value in inputs), **params)
        return list(result) if equation.primitive.multiple_results else [result]

    whole = _Lazy(compute)
    return [_Lazy(lambda index=index: whole.get()[index]) for index in range(len(equation.outvars))]
