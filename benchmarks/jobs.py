"""One operation of one implementation on one problem, as a function that can be compiled, timed and checked."""

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
    """`function(arguments, constants)` and what is needed around it. Gradients are those of all `arguments`.

    `rows` names the arguments and results that lie in the implementation's own rows, so that they can be compared.
    """

    function: Callable[[tuple[Any, ...], tuple[Any, ...]], Any]
    arguments: tuple[Any, ...]
    constants: tuple[Any, ...]
    cotangent: Any
    """Of the result; None for an operation without a derivative."""
    names: tuple[str, ...]
    """Names of the arguments: tokens, router, rows, gate, w1, weights."""
    to_choices: Callable[[Array], Array]
    """From the implementation's rows to the order of choices."""
    result: str
    """What the result is: tokens, rows, gate or kept."""


class Answer(NamedTuple):
    """What a job computed, comparable between implementations; None for what a pass does not compute."""

    result: Array | None
    gradients: dict[str, Any] | None


def make_job(op: Op, implementation: Implementation, case: Case, inputs: Inputs, gate: np.ndarray) -> Job:
    """Bring the inputs into the implementation's form. `gate [T, K]` is what the router gives, for the plan.

    Raises KeyError for an operation that the implementation does not have.
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
        # Integers have the cotangent type float0; the sums get zeros, as losses that are switched off would give.
        cotangent = jax.tree.map(_zero_cotangent, out)._replace(gate=inputs.d_gate)
        return job(arguments, (inputs.noise,), cotangent, "gate", lambda a, c: operation(case, *a, *c))
    if op == "plan":
        ones = jnp.ones((case.tokens * case.choices, 1), jnp.float32)

        def kept(plan: Any) -> Float[Array, "M 1"]:
            """1 for every choice that the plan gives a row of its own (a row shared by two would hold 2)."""
            return implementation.pick(case, plan, implementation.place(case, plan, ones))

        made = job({}, (choice, weight), None, "kept", lambda a, c: operation(case, *c))
        return made._replace(to_choices=kept)
    if op == "dispatch":
        return job(
            {"tokens": inputs.tokens},
            (plan,),
            place(inputs.d_rows),
            "rows",
            lambda a, c: operation(case, c[0], *a),
        )
    if op == "combine":
        return job(
            {"rows": place(inputs.rows), "gate": weight},
            (plan,),
            inputs.d_tokens,
            "tokens",
            lambda a, c: operation(case, c[0], *a),
        )
    if op == "grouped_matmul":
        return job(
            {"rows": place(inputs.rows), "w1": weights.w1},
            (plan,),
            place(inputs.d_hidden),
            "rows",
            lambda a, c: operation(case, c[0], *a),
        )
    if op == "expert_mlp":
        return job(
            {"rows": place(inputs.rows), "weights": weights},
            (plan,),
            place(inputs.d_rows),
            "rows",
            lambda a, c: operation(case, c[0], *a),
        )
    if implementation.is_dense:
        arguments = {"tokens": inputs.tokens, "weights": weights}
        return job(arguments, (), inputs.d_rows, "rows", lambda a, c: operation(case, *a))
    arguments = {"tokens": inputs.tokens, "router": inputs.router, "weights": weights}
    return job(arguments, (inputs.noise,), inputs.d_tokens, "tokens", lambda a, c: operation(case, *a, *c))


@functools.cache
def _plan_call(implementation: Implementation, case: Case) -> Callable[..., Any]:
    return jax.jit(functools.partial(implementation.operations["plan"], case))


def _zero_cotangent(leaf: jax.ShapeDtypeStruct) -> Any:
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros(leaf.shape, leaf.dtype)
    return np.zeros(leaf.shape, jax.dtypes.float0)


class Prepared(NamedTuple):
    """A pass of a job: `call(*arguments)`, what it reads, and how to read its result."""

    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    answer: Callable[[Any], Answer]


def prepare(job: Job, passes: Pass) -> Prepared:
    """A pass of a job as a function of arrays. The backward pass starts from what the forward pass saved."""
    if passes == "forward":
        return Prepared(job.function, (job.arguments, job.constants), lambda out: _answer(job, out, None))
    assert job.cotangent is not None
    # float0 cotangents are no arguments of a compiled function: they are closed over.
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
        # What is not asked for is not computed: XLA removes it.
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
