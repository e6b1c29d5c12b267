"""Check weight gradients at the full size: of two experts, for some of their hidden units, by matmuls in float64.

The loops of `reference` would take hours, and a small twin may take other branches of a kernel. X and dY are the rows
of an expert and their cotangent; the units are a few columns of W1 (rows of W2):
Z = X W1 + b1,  dZ = (dY W2^T) gelu'(Z),  dW1 = X^T dZ,  db1 = sum dZ,  dW2 = gelu(Z)^T dY,  db2 = sum dY.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

import reference
from benchmarks.cases import Case
from benchmarks.jobs import Answer
from benchmarks.oracle import AddedUp, Truth, add_up, to_double
from benchmarks.roofline import EXPERT_MATMULS, Op
from benchmarks.rounding import compare, unit

# The most products in a matmul, and float64 entries of an expert's rows (1 GB).
_PRODUCT_LIMIT, _ROW_LIMIT = 1 << 32, 1 << 27


class ExpertGradient(NamedTuple):
    """Gradients of an expert for U of its hidden units; None if the operation does not have one."""

    expert: int
    units: np.ndarray
    w1: np.ndarray  # [D, U]
    b1: np.ndarray | None = None  # [U]
    w2: np.ndarray | None = None  # [U, D]
    b2: np.ndarray | None = None  # [D]
    added: AddedUp | None = None


def expect_weights(op: Op, truth: Truth, *, is_dense: bool = False) -> list[ExpertGradient]:
    """Compute the gradients of the expert with the most rows and of the one with the fewest, but at least one.

    The list is empty for an operation without weights, and omits an expert whose rows would take more than 1 GB.
    """
    size, choices = truth.plan.size, truth.case.choices
    if op not in EXPERT_MATMULS:
        return []
    if is_dense:
        runs = {0: np.arange(truth.case.tokens * choices)}
    else:
        chosen = {int(size.argmax()), int(np.where(size > 0, size, size.max() + 1).argmin())}
        runs = {e: truth.plan.source[truth.plan.first[e] :][: size[e]] for e in sorted(chosen)}
    fits = {e: run for e, run in runs.items() if len(run) * truth.case.width <= _ROW_LIMIT}
    return [_of_expert(op, truth, e, run, is_dense) for e, run in fits.items()]


def _of_expert(op: Op, truth: Truth, expert: int, run: np.ndarray, is_dense: bool) -> ExpertGradient:
    case, inputs = truth.case, truth.inputs
    token = run // case.choices
    count = min(max(_PRODUCT_LIMIT // (len(run) * case.width), 8), case.expert_width)
    units = np.sort(np.random.default_rng(0).choice(case.expert_width, count, replace=False))
    rows = to_double(inputs.tokens)[token] if op == "layer" else to_double(inputs.rows)[run]
    if op == "grouped_matmul":
        return ExpertGradient(expert, units, rows.T @ to_double(np.asarray(inputs.d_hidden)[run][:, units]))
    if op == "layer" and not is_dense:
        d_out = to_double(inputs.d_tokens)[token] * truth.routing.gate.reshape(-1, 1)[run]
    else:
        d_out = to_double(inputs.d_rows)[run]
    w = reference.MlpWeights(*(to_double(array[expert]) for array in inputs.weights if array is not None))
    w1, b1, w2 = w.w1[:, units], w.b1[units], w.w2[units]
    z = rows @ w1 + b1
    d_z = (d_out @ w2.T) * reference.gelu_derivative(z)
    return ExpertGradient(
        expert,
        units,
        w1=rows.T @ d_z,
        b1=d_z.sum(axis=0),
        w2=reference.gelu(z).T @ d_out,
        b2=d_out.sum(axis=0),
        added=add_up(rows, w1, b1, w2, d_out),
    )


def find_weight_fault(answer: Answer, expected: Sequence[ExpertGradient], case: Case, dtype: str) -> str | None:
    """Describe the first wrong weight gradient, or return None."""
    gradients = answer.gradients or {}
    weights = gradients["weights"]._asdict() if "weights" in gradients else gradients
    u = unit(dtype, max(case.width, case.expert_width, case.tokens * case.choices))
    for exact in expected:
        columns = {"w1": np.s_[:, exact.units], "b1": np.s_[exact.units], "w2": np.s_[exact.units], "b2": np.s_[:]}
        for name, where in columns.items():
            theirs = getattr(exact, name)
            if name in weights and theirs is not None:
                mine = to_double(weights[name][exact.expert])[where]
                if fault := compare(mine, theirs, u, getattr(exact.added, name, None)):
                    return f"d{name} of expert {exact.expert}: {fault}"
    return None
