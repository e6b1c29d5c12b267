"""One operation of an implementation on a problem, as a function to compile, time and check."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from benchmarks.cases import Case, Inputs
from benchmarks.implementations import Implementation
from benchmarks.roofline import HALVES, Op, Pass


class Job(NamedTuple):
    """`function(arguments, constants)` with its inputs and cotangent. Gradients are those of all `arguments`.

    An argument or result named `rows` is in the implementation's own layout; `to_choices` makes it comparable.
    """

    function: Callable[[tuple[Any, ...], tuple[Any, ...]], Any]
    arguments: tuple[Any, ...]
    constants: tuple[Any, ...]
    cotangent: Any
    """The cotangent of the result; None for an operation without a derivative."""
    names: tuple[str, ...]
    """Names of the arguments: tokens, router, rows, gate, w1, weights."""
    to_choices: Callable[[Array], Array]
    """Bring the implementation's rows into the order of choices."""
    result: str
    """The kind of the result: tokens, rows, gate or kept."""


class Answer(NamedTuple):
    """The results of a job, comparable between implementations. A pass that does not compute one has None."""

    result: Array | None
    gradients: dict[str, Any] | None


def make_job(op: Op, implementation: Implementation, case: Case, inputs: Inputs, gate: np.ndarray) -> Job:
    """Bring the inputs into the implementation's layout. `gate [T, K]` has the router's gates, for the plan.

    Raises KeyError if the implementation does not have the operation.
    """
    operation = implementation.operations[op]
    weights = jax.tree.map(lambda w: w[:1], inputs.weights) if implementation.is_dense else inputs.weights
    choice, weight = jnp.asarray(inputs.expert), jnp.asarray(gate, jnp.float32)
    plan = None if implementation.is_dense else _plan_call(implementation, case)(choice, weight)

    def place(choices: Float[Array, "M D"]) -> Array:
        return implementation.place(case, plan, choices)

    def to_choices(rows: Array) -> Float[Array, "M D"]:
        return implementation.pick(case, plan, rows)

    def job(arguments: dict[str, Any], constants: tuple[Any, ...], cotangent: Any, result: str, function: Any) -> Job:
        names = tuple(arguments)
        return Job(function, tuple(arguments.values()), constants, cotangent, names, to_choices, result)

    if op == "routing":
        arguments = {"tokens": inputs.tokens, "router": inputs.router}
        out = jax.eval_shape(lambda: operation(case, inputs.tokens, inputs.router, inputs.noise))
        # Integers have cotangents of type float0. The sums get zeros, as without auxiliary losses.
        cotangent = jax.tree.map(_zero_cotangent, out)._replace(gate=inputs.d_gate)
        return job(arguments, (inputs.noise,), cotangent, "gate", lambda a, c: operation(case, *a, *c))
    if op == "plan":
        ones = jnp.ones((case.tokens * case.choices, 1), jnp.float32)

        def kept(plan: Any) -> Float[Array, "M 1"]:
            """Count the choices in the row of each choice: 1 if it is kept, 0 if dropped, 2 if two share a row."""
            return implementation.pick(case, plan, implementation.place(case, plan, ones))

        made = job({}, (choice, weight), None, "kept", lambda a, c: operation(case, *c))
        return made._replace(to_choices=kept)
    if op == "layer" and implementation.is_dense:
        arguments = {"tokens": inputs.tokens, "weights": weights}
        return job(arguments, (), inputs.d_rows, "rows", lambda a, c: operation(case, *a))
    if op == "layer":
        arguments = {"tokens": inputs.tokens, "router": inputs.router, "weights": weights}
        return job(arguments, (inputs.noise,), inputs.d_tokens, "tokens", lambda a, c: operation(case, *a, *c))
    if op == "dispatch":
        arguments, cotangent, result = {"tokens": inputs.tokens}, place(inputs.d_rows), "rows"
    elif op == "combine":
        arguments, cotangent, result = {"rows": place(inputs.rows), "gate": weight}, inputs.d_tokens, "tokens"
    elif op == "grouped_matmul":
        arguments, cotangent, result = {"rows": place(inputs.rows), "w1": weights.w1}, place(inputs.d_hidden), "rows"
    else:
        arguments, cotangent, result = {"rows": place(inputs.rows), "weights": weights}, place(inputs.d_rows), "rows"
    return job(arguments, (plan,), cotangent, result, lambda a, c: operation(case, *c, *a))


@functools.cache
def _plan_call(implementation: Implementation, case: Case) -> Callable[..., Any]:
    return jax.jit(functools.partial(implementation.operations["plan"], case))


def _zero_cotangent(leaf: jax.ShapeDtypeStruct) -> Any:
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros(leaf.shape, leaf.dtype)
    return np.zeros(leaf.shape, jax.dtypes.float0)


class Prepared(NamedTuple):
    """A pass of a job: the program `call(*arguments)`, and a function from its result to the answer."""

    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    answer: Callable[[Any], Answer]


def prepare(job: Job, passes: Pass) -> Prepared:
    """Make a pass of a job as a function of arrays. The backward pass starts from the saved values."""
    if passes == "forward":
        return Prepared(job.function, (job.arguments, job.constants), lambda out: _answer(job, out, None))
    assert job.cotangent is not None
    # A compiled function cannot take float0 arguments, so it closes over them.
    leaves, tree = jax.tree.flatten(job.cotangent)
    real = [leaf for leaf in leaves if leaf.dtype != jax.dtypes.float0]

    def pull_back(pull: Any, real: list[Array]) -> Any:
        given = iter(real)
        filled = [leaf if leaf.dtype == jax.dtypes.float0 else next(given) for leaf in leaves]
        return pull(tree.unflatten(filled))[0]

    def forward(arguments: tuple[Any, ...], constants: tuple[Any, ...]) -> tuple[Any, Any]:
        return jax.vjp(lambda arguments: job.function(arguments, constants), arguments)

    def both(arguments: tuple[Any, ...], constants: tuple[Any, ...], real: list[Array]) -> tuple[Any, Any]:
        out, pull = forward(arguments, constants)
        return out, pull_back(pull, real)

    if passes == "both":
        return Prepared(both, (job.arguments, job.constants, real), lambda out: _answer(job, *out))
    _, pull = jax.jit(forward)(job.arguments, job.constants)
    if passes in HALVES:
        # XLA removes the other half.
        chosen = HALVES.index(passes)
        half = job._replace(names=job.names[chosen : chosen + 1])
        return Prepared(
            lambda pull, real: (pull_back(pull, real)[chosen],), (pull, real), lambda out: _answer(half, None, out)
        )
    return Prepared(pull_back, (pull, real), lambda out: _answer(job, None, out))


def _answer(job: Job, out: Any, gradients: tuple[Any, ...] | None) -> Answer:
    named = None if gradients is None else dict(zip(job.names, gradients, strict=True))
    if named is not None and "rows" in named:
        named["rows"] = job.to_choices(named["rows"])
    if out is None:
        return Answer(None, named)
    if job.result in ("rows", "kept"):
        return Answer(job.to_choices(out), named)
    return Answer(out.gate if job.result == "gate" else out, named)
