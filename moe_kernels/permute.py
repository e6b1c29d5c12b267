"""Copy tokens to expert rows and back. Both directions and both derivatives are gathers."""

from __future__ import annotations

from jaxtyping import Array, Float

from moe_kernels import backends
from moe_kernels.backends.base import apply
from moe_kernels.types import Plan


def dispatch(tokens: Float[Array, "T D"], plan: Plan, *, backend: str | None = None) -> Float[Array, "R D"]:
    """Copy tokens into the rows that the plan gave them; unused rows are 0.

    Derivative: `dtokens[t] = sum_k drows[row[t, k]]` over the choices that found a place. Raises ValueError for a plan
    of another number of tokens.

    >>> import jax.numpy as jnp
    >>> from moe_kernels import make_plan, route
    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> rows = dispatch(x, make_plan(route(x, jnp.eye(2)), num_experts=2, capacity=1))
    >>> rows[0].tolist(), rows[8].tolist()
    ([1.0, 0.0], [0.0, 1.0])
    """
    check_rows("tokens", tokens, plan.layout.num_tokens)
    problem = backends.problem_of("dispatch", tokens, plan.layout.num_experts, layout=plan.layout)
    span = backends.choose(problem, backend)
    return apply(span, None, (tokens,), (plan,))


def combine(
    rows: Float[Array, "R D"], gate: Float[Array, "T K"], plan: Plan, *, backend: str | None = None
) -> Float[Array, "T D"]:
    """Weigh each token's rows by its gates and add them in float32: `y[t] = sum_k gate[t, k] rows[row[t, k]]`.

    A choice without a place adds 0. A gate that is not finite makes its token NaN. Raises ValueError for shapes that do
    not fit the plan.

    >>> import jax.numpy as jnp
    >>> from moe_kernels import make_plan, route
    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> plan = make_plan(route(x, jnp.eye(2)), num_experts=2, capacity=1)
    >>> combine(dispatch(x, plan), jnp.array([[0.5], [0.25]]), plan).tolist()
    [[0.5, 0.0], [0.0, 0.25]]
    """
    check_rows("rows", rows, plan.layout.num_rows)
    expected = (plan.layout.num_tokens, plan.layout.num_choices)
    if gate.shape != expected:
        raise ValueError(f"gate has shape {gate.shape}; the plan is for [T, K] = {expected}")
    problem = backends.problem_of("combine", rows, plan.layout.num_experts, layout=plan.layout)
    span = backends.choose(problem, backend)
    return apply(span, None, (rows, gate), (plan,))


def check_rows(name: str, array: Float[Array, "R D"], expected: int) -> None:
    """Refuse an array that is not `[expected, D]`."""
    if array.ndim != 2 or array.shape[0] != expected:
        raise ValueError(f"{name} has shape {array.shape}; the plan is for [{expected}, D]")
