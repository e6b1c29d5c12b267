"""Matmuls of every expert's rows with its own matrices, what may follow them, and their gradients derived by hand."""

from typing import NamedTuple

import numpy as np

from reference.activations import Activation, activate, activate_derivative
from reference.plan import Plan


class MatmulGradients(NamedTuple):
    """The result of `grouped_matmul_gradient`; None for the gradient of an argument that is None.

    >>> MatmulGradients._fields
    ('rows', 'weight', 'bias', 'up')
    """

    rows: np.ndarray  # [R, D]
    weight: np.ndarray  # [E, D, F]
    bias: np.ndarray | None  # [E, F]
    up: np.ndarray | None  # [E, D, F]


def grouped_matmul(
    rows: np.ndarray,
    weight: np.ndarray,
    plan: Plan,
    *,
    bias: np.ndarray | None = None,
    up: np.ndarray | None = None,
    activation: Activation | None = None,
) -> np.ndarray:
    """Map every row x of expert e, [R, D] to [R, F], to act(x weight_e + bias_e), times x up_e if given.

    Unused rows are zero.

    >>> from reference.plan import make_plan
    >>> plan = make_plan(np.array([[0]]), np.array([[1.0]]), num_experts=1, row_multiple=2)
    >>> grouped_matmul(np.ones((2, 2)), np.ones((1, 2, 3)), plan, up=np.full((1, 2, 3), 2.0)).tolist()
    [[8.0, 8.0, 8.0], [0.0, 0.0, 0.0]]
    """
    output = np.zeros((len(rows), weight.shape[2]))
    for e in range(len(plan.first)):
        for r in range(plan.first[e], plan.first[e] + plan.size[e]):
            before = rows[r] @ weight[e] + (0.0 if bias is None else bias[e])
            output[r] = activate(before, activation) * (1.0 if up is None else rows[r] @ up[e])
    return output


def grouped_matmul_gradient(
    rows: np.ndarray,
    weight: np.ndarray,
    d_output: np.ndarray,
    plan: Plan,
    *,
    bias: np.ndarray | None = None,
    up: np.ndarray | None = None,
    activation: Activation | None = None,
) -> MatmulGradients:
    """Compute the gradients of `grouped_matmul` from that of its output [R, F].

    For one row x of expert e, with h = x W + b, u = x U (or 1), y = act(h) u:
      dh = dy u act'(h)    du = dy act(h)    dW += x^T dh    db += dh    dU += x^T du    dx = dh W^T + du U^T

    >>> from reference.plan import make_plan
    >>> plan = make_plan(np.array([[0]]), np.array([[1.0]]), num_experts=2)
    >>> grouped_matmul_gradient(np.ones((1, 1)), np.ones((2, 1, 1)), np.ones((1, 1)), plan).weight.tolist()
    [[[1.0]], [[0.0]]]
    """
    d_rows, d_weight = np.zeros(np.shape(rows)), np.zeros(np.shape(weight))
    d_bias = None if bias is None else np.zeros(np.shape(bias))
    d_up = None if up is None else np.zeros(np.shape(up))
    for e in range(len(plan.first)):
        for r in range(plan.first[e], plan.first[e] + plan.size[e]):
            before = rows[r] @ weight[e] + (0.0 if bias is None else bias[e])
            d_before = d_output[r] * (1.0 if up is None else rows[r] @ up[e]) * activate_derivative(before, activation)
            d_weight[e] += np.outer(rows[r], d_before)
            d_rows[r] = weight[e] @ d_before
            if d_bias is not None:
                d_bias[e] += d_before
            if up is not None and d_up is not None:
                d_gated = d_output[r] * activate(before, activation)
                d_up[e] += np.outer(rows[r], d_gated)
                d_rows[r] += up[e] @ d_gated
    return MatmulGradients(d_rows, d_weight, d_bias, d_up)
