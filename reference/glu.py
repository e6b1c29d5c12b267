"""Gated experts, row by row, and their gradients derived by hand."""

from typing import NamedTuple

import numpy as np

from reference.activations import Activation, activate, activate_derivative, sigmoid
from reference.plan import Plan


class GluWeights(NamedTuple):
    """The weights of all gated experts; a missing bias is zero.

    >>> GluWeights._fields[:3]
    ('gate', 'up', 'down')
    """

    gate: np.ndarray  # [E, D, F]
    up: np.ndarray  # [E, D, F]
    down: np.ndarray  # [E, F, D]
    gate_bias: np.ndarray  # [E, F]
    up_bias: np.ndarray  # [E, F]
    down_bias: np.ndarray  # [E, D]


class Clamped(NamedTuple):
    """gpt-oss's activation: g sigmoid(alpha g) (u + shift), with g = min(gate, limit), u = clip(up, -limit, limit).

    >>> Clamped(1.702, 7.0, 1.0).limit
    7.0
    """

    alpha: float
    limit: float
    shift: float


class Hidden(NamedTuple):
    """The hidden layer h, and its derivatives with respect to gate and up.

    >>> Hidden._fields
    ('value', 'in_gate', 'in_up')
    """

    value: np.ndarray
    in_gate: np.ndarray
    in_up: np.ndarray


class GluGradients(NamedTuple):
    """The result of `glu_experts_gradient`.

    >>> GluGradients._fields
    ('rows', 'weights')
    """

    rows: np.ndarray  # [R, D]
    weights: GluWeights


def gate_hidden(gate: np.ndarray, up: np.ndarray, activation: Activation | Clamped) -> Hidden:
    """h = act(g) u, with dh/dg = act'(g) u and dh/du = act(g).

    Clamped, with g = min(gate, limit), s = sigmoid(alpha g), u = clip(up, -limit, limit):  h = g s (u + shift),
      dh/dgate = (s + alpha g s (1 - s)) (u + shift) up to the limit, then 0;  dh/dup = g s within the limits, else 0.

    >>> gate_hidden(np.array([2.0]), np.array([3.0]), "relu").in_gate
    array([3.])
    """
    if not isinstance(activation, Clamped):
        value = activate(gate, activation)
        return Hidden(value * up, activate_derivative(gate, activation) * up, value)
    g, u = np.minimum(gate, activation.limit), np.clip(up, -activation.limit, activation.limit)
    s = sigmoid(activation.alpha * g)
    slope = (s + activation.alpha * g * s * (1.0 - s)) * (u + activation.shift)
    return Hidden(
        g * s * (u + activation.shift),
        np.where(gate <= activation.limit, slope, 0.0),
        np.where(np.abs(up) <= activation.limit, g * s, 0.0),
    )


def glu_experts(
    rows: np.ndarray, weights: GluWeights, plan: Plan, activation: Activation | Clamped = "silu"
) -> np.ndarray:
    """Every gated expert on its own rows [R, D]: h down + b, with h of x gate + b and x up + b; unused rows are zero.

    >>> from reference.plan import make_plan
    >>> plan, one = make_plan(np.array([[0]]), np.array([[1.0]]), num_experts=1), np.ones((1, 1, 1))
    >>> glu_experts(np.array([[2.0]]), GluWeights(one, one, one, *np.zeros((3, 1, 1))), plan, "relu").tolist()
    [[4.0]]
    """
    output = np.zeros(rows.shape)
    for e in range(len(plan.first)):
        for r in range(plan.first[e], plan.first[e] + plan.size[e]):
            gate = rows[r] @ weights.gate[e] + weights.gate_bias[e]
            up = rows[r] @ weights.up[e] + weights.up_bias[e]
            output[r] = gate_hidden(gate, up, activation).value @ weights.down[e] + weights.down_bias[e]
    return output


def glu_experts_gradient(
    rows: np.ndarray,
    weights: GluWeights,
    d_output: np.ndarray,
    plan: Plan,
    activation: Activation | Clamped = "silu",
) -> GluGradients:
    """Compute the gradients of the rows [R, D] and weights of `glu_experts` from that of its output [R, D].

    For one row x of expert e, with g = x G + b, u = x U + c, h of both, y = h W + d:
      dW += h^T dy    dd += dy    dh = dy W^T    dg = dh (dh/dg)    du = dh (dh/du)
      dG += x^T dg    db += dg    dU += x^T du    dc += du    dx = dg G^T + du U^T

    >>> from reference.plan import make_plan
    >>> plan, one = make_plan(np.array([[0]]), np.array([[1.0]]), num_experts=1), np.ones((1, 1, 1))
    >>> weights = GluWeights(one, one, one, *np.zeros((3, 1, 1)))
    >>> glu_experts_gradient(np.array([[2.0]]), weights, np.ones((1, 1)), plan, "relu").rows.tolist()
    [[4.0]]
    """
    d_rows = np.zeros(rows.shape)
    total = GluWeights(*(np.zeros(np.shape(weight)) for weight in weights))
    for e in range(len(plan.first)):
        for r in range(plan.first[e], plan.first[e] + plan.size[e]):
            x, dy = rows[r], d_output[r]
            hidden = gate_hidden(
                x @ weights.gate[e] + weights.gate_bias[e], x @ weights.up[e] + weights.up_bias[e], activation
            )
            d_hidden = weights.down[e] @ dy
            d_gate, d_up = d_hidden * hidden.in_gate, d_hidden * hidden.in_up
            parts = (np.outer(x, d_gate), np.outer(x, d_up), np.outer(hidden.value, dy), d_gate, d_up, dy)
            for mine, part in zip(total, parts, strict=True):
                mine[e] += part
            d_rows[r] = weights.gate[e] @ d_gate + weights.up[e] @ d_up
    return GluGradients(d_rows, total)
