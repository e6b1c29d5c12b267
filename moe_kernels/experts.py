"""Matmuls of experts over the runs of a plan, with their derivatives."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import NamedTuple

from jaxtyping import Array, Float

from moe_kernels import backends
from moe_kernels.activations import ClampedSwiglu, function_of
from moe_kernels.backends.base import MatmulStatic, MatmulWeights, MlpStatic, apply, epilogue_of
from moe_kernels.permute import check_rows
from moe_kernels.spec import MoeSpec
from moe_kernels.types import Activation, Epilogue, GluWeights, JoinedGluWeights, MlpWeights, PlainWeights, Plan


def grouped_matmul(
    rows: Float[Array, "R D"],
    weight: Float[Array, "E D F"],
    plan: Plan,
    *,
    bias: Float[Array, "E F"] | None = None,
    activation: Activation | None = None,
    backend: str | None = None,
    tiles: Hashable | None = None,
) -> Float[Array, "R F"]:
    """Multiply the rows of every expert by its own matrix, `act(x W_e + b_e)`; the result has the dtype of the rows.

    Matmuls accumulate in float32. The argument of an activation is rounded to the dtype of the rows; the activation
    itself is computed in float32. Rows, weight and bias get gradients: `dX_e = dH_e W_eᵀ`, `dW_e = X_eᵀ dH_e` and `db_e
    = Σ dH_e`, where `dH` is `dY` times the slope of the activation. Gradients of weights have the dtype of the weights
    and are exactly 0 for an expert without rows. For the backward pass, GPU kernels keep the argument of the
    activation; other back ends compute it again. Unused rows of the result may hold anything; unused rows of the input
    never affect a gradient. `tiles` are the block sizes of both passes (`GivenTiles` for the TPU kernels); by default
    the kernels choose. Raises ValueError for shapes that do not fit the plan, for an unknown activation, and for block
    sizes that do not fit.

    >>> import jax.numpy as jnp
    >>> from moe_kernels import dispatch, make_plan, route
    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> plan = make_plan(route(x, jnp.eye(2)), num_experts=2, capacity=1)
    >>> weight = jnp.stack([jnp.eye(2), 3 * jnp.eye(2)])
    >>> grouped_matmul(dispatch(x, plan), weight, plan)[8].tolist()
    [0.0, 3.0]
    >>> grouped_matmul(dispatch(x, plan), weight, plan, bias=jnp.ones((2, 2)))[8].tolist()
    [1.0, 4.0]
    """
    check_rows("rows", rows, plan.layout.num_rows)
    _check_weight("weight", weight, (plan.layout.num_experts, rows.shape[1], None))
    if bias is not None:
        _check_weight("bias", bias, (plan.layout.num_experts, weight.shape[2]))
    if activation is not None:
        function_of(activation)
    return _matmul(rows, MatmulWeights(weight, bias), plan, activation, backend, tiles)


def grouped_glu(
    rows: Float[Array, "R D"],
    gate_weight: Float[Array, "E D F"],
    up_weight: Float[Array, "E D F"],
    plan: Plan,
    *,
    activation: Activation = "silu",
    backend: str | None = None,
    tiles: Hashable | None = None,
) -> Float[Array, "R F"]:
    """Compute both first matmuls of gated expert MLPs, `act(x G_e) * (x U_e)`; kernels read the rows once for both.

    `silu` makes SwiGLU, `gelu_tanh` and `gelu_erf` make GEGLU. Both products are rounded to the dtype of the rows. The
    activation and its product with `x U_e` are computed in float32. Everything else, gradients included, is as in
    `grouped_matmul`. For the backward pass, GPU kernels keep both products; other back ends compute them again.

    >>> import jax.numpy as jnp
    >>> from moe_kernels import dispatch, make_plan, route
    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> plan = make_plan(route(x, jnp.eye(2)), num_experts=2, capacity=1)
    >>> gate, up = jnp.stack([jnp.eye(2)] * 2), jnp.full((2, 2, 2), 2.0)
    >>> [round(value, 4) for value in grouped_glu(dispatch(x, plan), gate, up, plan)[8].tolist()]
    [0.0, 1.4621]
    """
    check_rows("rows", rows, plan.layout.num_rows)
    _check_weight("gate_weight", gate_weight, (plan.layout.num_experts, rows.shape[1], None))
    _check_weight("up_weight", up_weight, gate_weight.shape)
    if up_weight.dtype != gate_weight.dtype:
        raise ValueError(f"up_weight has dtype {up_weight.dtype}; give it that of gate_weight, {gate_weight.dtype}")
    function_of(activation)
    return _matmul(rows, MatmulWeights(gate_weight, up=up_weight), plan, activation, backend, tiles)


def _matmul(
    rows: Float[Array, "R D"],
    weights: MatmulWeights,
    plan: Plan,
    activation: Activation | None,
    backend: str | None,
    tiles: Hashable | None,
) -> Float[Array, "R F"]:
    problem = backends.problem_of(
        "grouped_matmul",
        rows,
        plan.layout.num_experts,
        expert_width=weights.weight.shape[2],
        layout=plan.layout,
        epilogue=epilogue_of(weights, activation),
        weight_dtype=str(weights.weight.dtype),
        activation=activation or "",
    )
    span = backends.choose(dataclasses.replace(problem, tiles=tiles), backend)
    return apply(span, MatmulStatic(plan.layout, activation), (rows, weights), (plan.runs,))


def expert_mlp(
    rows: Float[Array, "R D"],
    weights: MlpWeights | GluWeights,
    plan: Plan,
    *,
    activation: Activation | None = None,
    backend: str | None = None,
    tiles: Hashable | None = None,
) -> Float[Array, "R D"]:
    """Apply every expert's MLP to its rows: `act(x w1 + b1) w2 + b2`, or gated, `(act(x gate) * (x up)) down`.

    Matmuls accumulate in float32. The activation (None: `gelu_tanh`, of gated experts `silu`) is computed in float32;
    the hidden layer is rounded to the dtype of the rows before and after it. Unused rows and `tiles` are as in
    `grouped_matmul`. Raises ValueError for shapes and block sizes that do not fit and for an unknown activation.

    >>> import jax.numpy as jnp
    >>> from moe_kernels import MlpWeights, dispatch, make_plan, route
    >>> x = jnp.ones((4, 2))
    >>> plan = make_plan(route(x, jnp.eye(2)), num_experts=2)
    >>> weights = MlpWeights(jnp.ones((2, 2, 8)), None, jnp.ones((2, 8, 2)), None)
    >>> expert_mlp(dispatch(x, plan), weights, plan).shape
    (16, 2)
    """
    check_rows("rows", rows, plan.layout.num_rows)
    check_experts(weights, plan.layout.num_experts, rows.shape[1])
    chosen, sizes = activation_of(weights, MoeSpec(activation=activation)), expert_sizes(weights)
    glu = glu_matmuls(weights, chosen)
    if glu is not None and glu.first != "gated":
        raise ValueError(
            "expert_mlp has no biases of gate and up, no clamp and no array of both; use moe_mlp, or grouped_matmul"
        )
    assert isinstance(chosen, str)
    problem = backends.problem_of(
        "expert_mlp" if glu is None else "expert_glu",
        rows,
        plan.layout.num_experts,
        expert_width=sizes.expert_width,
        layout=plan.layout,
        epilogue="none" if glu is None else glu.down,
        weight_dtype=sizes.dtype,
        activation=chosen,
    )
    span = backends.choose(dataclasses.replace(problem, tiles=tiles), backend)
    return apply(span, MlpStatic(plan.layout, chosen), (rows, weights), (plan.runs,))


class ExpertSizes(NamedTuple):
    """The expert width F and the dtype of the experts' weights."""

    expert_width: int
    dtype: str


def expert_sizes(weights: PlainWeights) -> ExpertSizes:
    """Read F and the dtype from the weights of plain or gated experts. Raises TypeError for anything else.

    >>> import jax.numpy as jnp
    >>> expert_sizes(MlpWeights(jnp.ones((2, 4, 8)), None, jnp.ones((2, 8, 4)), None)).expert_width
    8
    """
    if isinstance(weights, JoinedGluWeights):
        return ExpertSizes(weights.gate_up.shape[-1] // 2, str(weights.gate_up.dtype))
    if isinstance(weights, GluWeights):
        return ExpertSizes(weights.gate.shape[-1], str(weights.gate.dtype))
    if isinstance(weights, MlpWeights):
        return ExpertSizes(weights.w1.shape[-1], str(weights.w1.dtype))
    raise TypeError(
        f"weights are a {type(weights).__name__}; pass MlpWeights, GluWeights, JoinedGluWeights or WithShared"
    )


def activation_of(weights: PlainWeights, spec: MoeSpec) -> str | ClampedSwiglu:
    """Find the activation of a layer's experts. Raises ValueError for an unknown name.

    >>> import jax.numpy as jnp
    >>> activation_of(MlpWeights(jnp.ones((2, 4, 8)), None, jnp.ones((2, 8, 4)), None), MoeSpec())
    'gelu_tanh'
    """
    if isinstance(weights, MlpWeights):
        return plain_activation(spec)
    activation = spec.activation or "silu"
    if isinstance(activation, str):
        function_of(activation)
    return activation


def plain_activation(spec: MoeSpec) -> str:
    """Find the activation of experts that are not gated. Raises ValueError for one that is of gated experts alone.

    >>> plain_activation(MoeSpec(activation="relu"))
    'relu'
    """
    activation = spec.activation or "gelu_tanh"
    if not isinstance(activation, str):
        raise ValueError(f"activation={activation} is of gated experts; pass GluWeights or JoinedGluWeights")
    function_of(activation)
    return activation


@dataclasses.dataclass(frozen=True)
class GluMatmuls:
    """The matmuls of gated experts: the columns of the first, and what follows it and the second one.

    Where the first is not `gated` itself, it has only its bias, and what is between the matmuls is plain JAX.
    """

    columns: int
    first: Epilogue
    down: Epilogue


def glu_matmuls(weights: PlainWeights, activation: str | ClampedSwiglu) -> GluMatmuls | None:
    """Find the matmuls of gated experts; None for plain ones.

    >>> import jax.numpy as jnp
    >>> glu_matmuls(JoinedGluWeights(jnp.ones((2, 4, 16)), jnp.ones((2, 8, 4))), "silu")
    GluMatmuls(columns=16, first='none', down='none')
    """
    if isinstance(weights, MlpWeights):
        return None
    down = "none" if weights.down_bias is None else "pointwise"
    if isinstance(weights, JoinedGluWeights):
        return GluMatmuls(weights.gate_up.shape[-1], "none" if weights.gate_up_bias is None else "pointwise", down)
    alone = weights.gate_bias is None and isinstance(activation, str)
    first = "gated" if alone else "none" if weights.gate_bias is None else "pointwise"
    return GluMatmuls(weights.gate.shape[-1], first, down)


def check_experts(weights: PlainWeights, num_experts: int | None, width: int) -> None:
    """Refuse weights whose shapes do not fit each other or the rows; those of one expert have `num_experts=None`."""
    f, lead = expert_sizes(weights).expert_width, () if num_experts is None else (num_experts,)
    into, out, wide, narrow = (*lead, width, f), (*lead, f, width), (*lead, f), (*lead, width)
    if isinstance(weights, MlpWeights):
        wanted = into, wide, out, narrow
    elif isinstance(weights, GluWeights):
        wanted = into, into, out, wide, wide, narrow
        if (weights.gate_bias is None) != (weights.up_bias is None):
            raise ValueError("weights have a bias of gate or of up alone; give both (zeros for none), or neither")
    else:
        wanted = (*lead, width, 2 * f), out, (*lead, 2 * f), narrow
    for name, array, shape in zip(weights._fields, weights, wanted, strict=True):
        if array is not None:
            _check_weight(f"weights.{name}", array, shape)


def _check_weight(name: str, array: Float[Array, "..."], expected: tuple[int | None, ...]) -> None:
    fits = len(array.shape) == len(expected) and all(
        want is None or have == want for have, want in zip(array.shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(f"{name} has shape {array.shape}; it must be [{wanted}]")
