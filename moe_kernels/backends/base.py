"""What a back end is: a name, the reason why it cannot take a problem, and the spans that it fills."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple

import jax
from jaxtyping import Array, Float

from moe_kernels.spec import RouteInputs, RouterSpec
from moe_kernels.types import ROW_ALIGNMENT, Epilogue, Layout, RouterWeights

SpanName = Literal["route", "dispatch", "grouped_matmul", "expert_mlp", "combine", "dispatch_mlp_combine"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static facts by which a back end is chosen: what is asked for, on which platform, in which shape and dtype.

    `shape` and `dtype` are those of the tokens or rows; `expert_width` is the F of a matmul's weights; `layout` is that
    of the rows, and `route` what is static about a routing call; `chip` is the device kind as JAX names it ("TPU v5
    lite"), empty if unknown, `num_cores` its TensorCores or multiprocessors, 0 if unknown; `named` says that the user
    asked for this back end by name, which is how a kernel runs interpreted on a CPU; `epilogue` is that of a grouped
    matmul; `weight_dtype` is that of the experts' weights and `activation` what follows their first
    matmul, both empty if unknown or not there; `tiles` are block sizes that a call brings along, of the class that its
    back end has for them, None to have them chosen.

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
    """Static facts of a routing call; `noise_std` is the standard deviation that the smooth load assumes.

    `biased` says that the router has a bias of either kind, `chosen` that the choice is an input.
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
        """Why kernels, which take the K largest of a softmax, cannot work it.

        >>> RouteStatic(1, 1, 1, 0.5, RouterSpec("sigmoid")).beyond_kernels
        'the router is not a softmax of which the largest are taken as they are'
        """
        if self.router != RouterSpec():
            return "the router is not a softmax of which the largest are taken as they are"
        if self.biased:
            return "the router has a bias"
        return "the choice is already made" if self.chosen else None


@dataclasses.dataclass(frozen=True)
class MlpStatic:
    """Static facts of an expert MLP."""

    layout: Layout
    activation: str


class MatmulWeights(NamedTuple):
    """What a grouped matmul is of: `act(x weight + bias)`, times `x up` where there is an `up`."""

    weight: Float[Array, "E D F"]
    bias: Float[Array, "E F"] | None = None
    up: Float[Array, "E D F"] | None = None


@dataclasses.dataclass(frozen=True)
class MatmulStatic:
    """Static facts of a grouped matmul; with an `up` there is an activation."""

    layout: Layout
    activation: str | None = None


def epilogue_of(weights: MatmulWeights, activation: str | None) -> Epilogue:
    """What follows the matmul.

    >>> import jax.numpy as jnp
    >>> epilogue_of(MatmulWeights(jnp.ones((2, 4, 8))), "silu")
    'pointwise'
    """
    if weights.up is not None:
        return "gated"
    return "none" if weights.bias is None and activation is None else "pointwise"


class Span(NamedTuple):
    """A forward function and its hand-written derivative.

    `forward(static, *differentiable, *constants)` returns `(result, saved)`; `backward(static, saved, cotangent)`
    returns a tuple with one cotangent for each differentiable argument; that of `route` also takes the cotangent of
    tokens that were passed on, to be added to theirs. `static` is hashable. Neither is ever differentiated by JAX.
    `value` is the result alone, where that costs less than `forward`.

    >>> Span(lambda static, x: (2 * x, None), lambda static, saved, dx: (2 * dx,)).value is None
    True
    """

    forward: Callable[..., tuple[Any, Any]]
    backward: Callable[..., Any]
    value: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True)
class Backend:
    """A row of the table of back ends. `why_not` is pure: None if the problem is taken, else the reason.

    `spans` gives for each operation the function from a problem that is taken to its span; equal problems should get
    the same span, so that JAX finds what it has traced before. Those in `optional` go to the first back end that takes
    them where this one was named and refuses: a whole layer can be asked for by the name of its matmuls. `note` says
    how a problem that is taken is worked, where there is a choice, `work` what all its work is made of, and `tiles` the
    class of the block sizes that a call may bring along.

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
    """A routing span whose router is a plain `[D, E]` matrix, for `RouterWeights` without biases."""

    def forward(static: RouteStatic, tokens: Array, router: RouterWeights, inputs: RouteInputs) -> tuple[Any, Any]:
        return span.forward(static, tokens, router.kernel, inputs)

    def backward(
        static: RouteStatic, saved: Any, cotangent: Any, passed: Array | None = None
    ) -> tuple[Array, RouterWeights]:
        tokens, kernel = span.backward(static, saved, cotangent, passed)
        return tokens, RouterWeights(kernel)

    return Span(forward, backward)


KERNEL_ACTIVATIONS = ("gelu_tanh", "gelu_erf", "silu")


def activation_misfit(problem: Problem) -> str | None:
    """Why kernels, which have slopes of their own, cannot work an activation.

    >>> activation_misfit(Problem("expert_mlp", "tpu", "float32", (16, 8), 2, activation="relu"))
    "activation 'relu' is none of gelu_tanh, gelu_erf, silu"
    """
    if problem.activation in ("", *KERNEL_ACTIVATIONS):
        return None
    return f"activation {problem.activation!r} is none of {', '.join(KERNEL_ACTIVATIONS)}"


def rows_misfit(layout: Layout | None) -> str | None:
    """Why kernels that copy rows by eights cannot work on rows that lie so.

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
    """Run a span with its own derivative; constants get none.

    Reverse mode works once. Forward mode and second derivatives raise TypeError.
    """
    return _apply(span, static, differentiable, constants)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _apply(span: Span, static: Any, differentiable: tuple[Any, ...], constants: tuple[Any, ...]) -> Any:
    if span.value is not None:
        return span.value(static, *differentiable, *constants)
    return span.forward(static, *differentiable, *constants)[0]


def _apply_forward(span: Span, static: Any, differentiable: tuple[Any, ...], constants: tuple[Any, ...]) -> Any:
    return span.forward(static, *differentiable, *constants)


def _apply_backward(span: Span, static: Any, saved: Any, cotangent: Any) -> tuple[Any, None]:
    return jax.tree.map(_first_order_only, span.backward(static, saved, cotangent)), None


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
