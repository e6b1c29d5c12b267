"""The definition of a back end: a name, a reason why it cannot take a problem, and the spans that it fills."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_kernels.axes import refuse_split, vary_like
from moe_kernels.spec import RouteInputs, RouterSpec
from moe_kernels.types import ROW_ALIGNMENT, Epilogue, Layout, RouterWeights

SpanName = Literal["route", "dispatch", "grouped_matmul", "expert_mlp", "expert_glu", "combine", "dispatch_mlp_combine"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static facts by which a back end is chosen: span, platform, shapes and dtypes.

    `shape` and `dtype` are those of the tokens or rows, `layout` is that of the rows. `expert_width` is the F of a
    matmul's weights. `route` has the static facts of a routing call. `chip` is JAX's device kind ("TPU v5 lite"), empty
    if unknown; `num_cores` counts its TensorCores or multiprocessors, 0 if unknown. `named` says that the user named
    this back end; only then does a kernel run interpreted on a CPU. `epilogue` is that of a grouped matmul, or of the
    last one of gated experts. `weight_dtype` is that of the experts' weights, and `activation` follows their first
    matmul; each is empty if unknown or absent. `tiles` are the call's own block sizes, of its back end's class for
    them; None to have them chosen.

    >>> Problem("dispatch", "cpu", "float32", (4, 8), 2).span
    'dispatch'
    """

    span: SpanName
    platform: str
    dtype: str
    shape: tuple[int, ...]
    num_experts: int
    expert_width: int = 0
    layout: Layout | None = None
    chip: str = ""
    num_cores: int = 1
    named: bool = False
    epilogue: Epilogue = "none"
    route: RouteStatic | None = None
    weight_dtype: str = ""
    activation: str = ""
    tiles: Hashable | None = None


@dataclasses.dataclass(frozen=True)
class RouteStatic:
    """Static facts of a routing call. `noise_std` is the standard deviation that the smooth load assumes.

    `biased` says that the router has a bias of either kind; `chosen` says that the choice is an input.
    """

    num_choices: int
    num_groups: int
    num_modalities: int
    noise_std: float
    router: RouterSpec = RouterSpec()  # noqa: RUF009 (frozen)
    biased: bool = False
    chosen: bool = False

    @property
    def beyond_kernels(self) -> str | None:
        """Why kernels cannot run it; they only take the K largest entries of a softmax.

        >>> RouteStatic(1, 1, 1, 0.5, RouterSpec("sigmoid")).beyond_kernels
        'the router is not a plain softmax with its K largest entries as gates'
        """
        if self.router != RouterSpec():
            return "the router is not a plain softmax with its K largest entries as gates"
        if self.biased:
            return "the router has a bias"
        return "the choice is already made" if self.chosen else None


@dataclasses.dataclass(frozen=True)
class MlpStatic:
    """Static facts of an expert MLP, plain or gated."""

    layout: Layout
    activation: str


class MatmulWeights(NamedTuple):
    """Weights of a grouped matmul: `act(x weight + bias)`, times `x up` if `up` is given."""

    weight: Float[Array, "E D F"]
    bias: Float[Array, "E F"] | None = None
    up: Float[Array, "E D F"] | None = None


@dataclasses.dataclass(frozen=True)
class MatmulStatic:
    """Static facts of a grouped matmul. Weights with `up` always have an activation."""

    layout: Layout
    activation: str | None = None


def epilogue_of(weights: MatmulWeights, activation: str | None) -> Epilogue:
    """Say what follows the matmul.

    >>> import jax.numpy as jnp
    >>> epilogue_of(MatmulWeights(jnp.ones((2, 4, 8))), "silu")
    'pointwise'
    """
    if weights.up is not None:
        return "gated"
    return "none" if weights.bias is None and activation is None else "pointwise"


class Span(NamedTuple):
    """A forward function and its hand-written derivative.

    `forward(static, *differentiable, *constants)` returns `(result, saved)`. `backward(static, saved, cotangent)`
    returns a tuple with one cotangent for each differentiable argument. The backward function of `route` also takes the
    cotangent of the tokens that it passed on, and adds it to its own. `static` is hashable. JAX differentiates neither
    function. `value` returns the result alone; it is set if that costs less than `forward`.

    >>> Span(lambda static, x: (2 * x, None), lambda static, saved, dx: (2 * dx,)).value is None
    True
    """

    forward: Callable[..., tuple[Any, Any]]
    backward: Callable[..., Any]
    value: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True)
class Backend:
    """A row of the table of back ends. `why_not` is pure: None if it takes the problem, else the reason.

    `spans` maps each span name to a function from a problem to a span. Equal problems should get the same span object,
    so that JAX finds earlier traces. If the user names this back end and it refuses a span in `optional`, another back
    end fills that span: a user may name a back end for its matmuls alone. `note` says how it runs a problem, if there
    are several ways; `work` says what it is made of. `tiles` is the class of the block sizes that a call may pass.

    >>> Backend("mine", lambda problem: "not today", spans={}).why_not(Problem("dispatch", "cpu", "float32", (4, 8), 2))
    'not today'
    """

    name: str
    why_not: Callable[[Problem], str | None]
    spans: dict[SpanName, Callable[[Problem], Span]] = dataclasses.field(hash=False)
    optional: frozenset[SpanName] = frozenset()
    note: Callable[[Problem], str | None] = lambda problem: None
    work: str = "Pallas kernel"
    tiles: type | None = None


@functools.lru_cache
def by_kernel_alone(span: Span) -> Span:
    """Adapt a routing span for a plain `[D, E]` matrix to `RouterWeights` without biases."""

    def forward(static: RouteStatic, tokens: Array, router: RouterWeights, inputs: RouteInputs) -> tuple[Any, Any]:
        return span.forward(static, tokens, router.kernel, inputs)

    def backward(
        static: RouteStatic, saved: Any, cotangent: Any, passed: Array | None = None
    ) -> tuple[Array, RouterWeights]:
        tokens, kernel = span.backward(static, saved, cotangent, passed)
        return tokens, RouterWeights(kernel)

    return Span(forward, backward)


KERNEL_ACTIVATIONS = ("gelu_tanh", "gelu_erf", "silu", "relu", "relu_squared")


def activation_misfit(problem: Problem) -> str | None:
    """Say why kernels cannot run an activation; they have hand-written slopes for these alone. None if they can.

    >>> activation_misfit(Problem("expert_mlp", "tpu", "float32", (16, 8), 2, activation="softplus"))
    "activation 'softplus' is none of gelu_tanh, gelu_erf, silu, relu, relu_squared"
    """
    if problem.activation in ("", *KERNEL_ACTIVATIONS):
        return None
    return f"activation {problem.activation!r} is none of {', '.join(KERNEL_ACTIVATIONS)}"


def rows_misfit(layout: Layout | None) -> str | None:
    """Say why kernels that copy eight rows at a time cannot take a layout. None if they can.

    >>> rows_misfit(Layout(8, 1, 1, 2, 24, 12))
    'runs of 12 rows do not start at multiples of 8'
    """
    if layout is None:
        return "the layout of the rows is not known"
    spacing = layout.num_rows if layout.rows_per_expert is None else layout.rows_per_expert // layout.runs_per_expert
    if spacing % ROW_ALIGNMENT:
        return f"runs of {spacing} rows do not start at multiples of {ROW_ALIGNMENT}"
    return None


def apply(span: Span, static: Any, differentiable: tuple[Any, ...], constants: tuple[Any, ...]) -> Any:
    """Run a span with its own derivative; `constants` get no gradient.

    Reverse mode works once. Forward mode and second derivatives raise TypeError.
    """
    refuse_split(arrays=(differentiable, constants))
    arguments = jax.tree.map(jnp.asarray, (differentiable, constants))
    arguments = vary_like(arguments, arguments)
    return _apply(span, static, *arguments)


# Outside of jit each function of a span is one program, and not one for each of its operations.
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _in_one_program(function: Callable[..., Any], static: Any, *arguments: Any) -> Any:
    return function(static, *arguments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _apply(span: Span, static: Any, differentiable: tuple[Any, ...], constants: tuple[Any, ...]) -> Any:
    if span.value is not None:
        result = _in_one_program(span.value, static, *differentiable, *constants)
    else:
        result, _ = _in_one_program(span.forward, static, *differentiable, *constants)
    return vary_like(result, differentiable)


def _apply_forward(span: Span, static: Any, differentiable: tuple[Any, ...], constants: tuple[Any, ...]) -> Any:
    result, saved = _in_one_program(span.forward, static, *differentiable, *constants)
    return vary_like(result, differentiable), saved


def _apply_backward(span: Span, static: Any, saved: Any, cotangent: Any) -> tuple[Any, None]:
    gradients = vary_like(_in_one_program(span.backward, static, saved, cotangent), cotangent)
    return jax.tree.map(_first_order_only, gradients), None


_apply.defvjp(_apply_forward, _apply_backward)


@jax.custom_jvp
def _first_order_only(value: jax.Array) -> jax.Array:
    return value


@_first_order_only.defjvp
def _refuse_second_order(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    raise TypeError(
        "moe_kernels has first derivatives only: the backward pass of a routed layer cannot be differentiated again; "
        "use jax.grad once (no jax.hessian, no grad of grad, no forward mode over it)"
    )
