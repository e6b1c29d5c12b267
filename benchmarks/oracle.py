"""Compare an answer with `reference`, in two stages.

A small twin of the case has the same groups, choices, capacity factor, distribution and dtype, but 32 tokens in a group
and widths 8 and 24. There, results and all gradients are compared. At the full size, NumPy's loops would take hours.
There, only routing and plan are computed for all tokens. Results and token gradients are compared for a few sampled
tokens without dropped choices, and oracle_weights.py compares weight gradients of single experts.
"""

import functools
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

import reference
from benchmarks.cases import Case, Inputs
from benchmarks.jobs import Answer
from benchmarks.roofline import Load, Op
from benchmarks.rounding import compare, unit

# The most float64 entries of sampled experts' weights to hold in memory.
_WEIGHT_LIMIT = 1 << 26

_PER_TOKEN, _PER_CHOICE = ("tokens", "gate"), ("rows", "kept")


class Truth(NamedTuple):
    """Inputs of a problem, with routing and plan by the reference. All implementations share them."""

    case: Case
    inputs: Inputs
    routing: reference.Routing
    plan: reference.Plan

    @property
    def load(self) -> Load:
        """Count the used rows, and the experts that have any."""
        return Load(int(self.plan.size.sum()), int((self.plan.size > 0).sum()))


class Expected(NamedTuple):
    """The right answer; with sampled `tokens`, only the parts that belong to them."""

    result: np.ndarray
    gradients: dict[str, Any]
    tokens: np.ndarray | None
    added: Mapping[str, np.ndarray] = types.MappingProxyType({})
    """Root mean square of the terms of each row of a gradient (see rounding.py), for rows that may cancel."""


def find_truth(case: Case, inputs: Inputs) -> Truth:
    """Route and plan all tokens by the reference. Raises AssertionError if the noise did not impose the experts."""
    routing = reference.route(
        to_double(inputs.tokens),
        to_double(inputs.router),
        num_choices=case.choices,
        num_groups=case.groups,
        noise=to_double(inputs.noise),
    )
    assert (routing.expert == inputs.expert).all(), "the noise must decide"
    plan = _plan(case, routing.expert, routing.gate, case.experts, case.capacity_factor is not None)
    return Truth(case, inputs, routing, plan)


def sample_tokens(truth: Truth) -> np.ndarray:
    """Sample up to four tokens without dropped choices, fewer if the weights of their experts are large."""
    case = truth.case
    entries = 2 * case.width * case.expert_width * case.choices
    whole = np.flatnonzero((truth.plan.position >= 0).all(axis=1))
    count = max(1, min(4, _WEIGHT_LIMIT // entries, len(whole)))
    return np.sort(np.random.default_rng(0).choice(whole, count, replace=False))


def expect(op: Op, truth: Truth, tokens: np.ndarray | None = None, *, is_dense: bool = False) -> Expected:
    """Compute an operation by the reference, for all tokens or for sampled ones.

    The dense MLP is computed as one expert that takes every choice, with gates of 1.
    """
    case, inputs = truth.case, truth.inputs
    chosen = np.arange(case.tokens) if tokens is None else tokens
    choices = (chosen[:, None] * case.choices + np.arange(case.choices)).reshape(-1)
    if op == "plan":
        kept = (truth.plan.position >= 0).astype(float).reshape(-1, 1)
        return Expected(kept[choices], {}, tokens)

    expert = np.zeros((len(chosen), case.choices), int) if is_dense else truth.routing.expert[chosen]
    gate = np.ones(expert.shape) if is_dense else truth.routing.gate[chosen]
    used = np.arange(1 if is_dense else case.experts) if tokens is None else np.unique(expert)
    plan = truth.plan
    if tokens is not None or is_dense:
        plan = _plan(case, np.searchsorted(used, expert), gate, len(used), limited=False)
    weights = reference.MlpWeights(*(to_double(w[used]) for w in inputs.weights if w is not None))
    x, router, noise = to_double(inputs.tokens[chosen]), to_double(inputs.router), to_double(inputs.noise[chosen])
    d_tokens, rows = to_double(inputs.d_tokens[chosen]), _rows(plan, to_double(inputs.rows[choices]))
    d_rows, d_gate = _rows(plan, to_double(inputs.d_rows[choices])), to_double(inputs.d_gate[chosen])
    groups = case.groups if tokens is None else 1

    @functools.cache
    def routing() -> reference.Routing:
        return reference.route(x, router, num_choices=case.choices, num_groups=groups, noise=noise)

    def d_logits(d_gate: np.ndarray) -> np.ndarray:
        nothing = reference.zero_sums(num_groups=groups, num_modalities=1, num_experts=case.experts)
        return reference.route_gradient(routing(), d_gate, nothing)

    if op == "routing":
        d_a = d_logits(d_gate)
        return Expected(gate, {"tokens": d_a @ router.T, "router": x.T @ d_a}, tokens)
    if op == "dispatch":
        gradient = reference.dispatch_gradient(d_rows, plan)
        return Expected(_choices(plan, reference.dispatch(x, plan)), {"tokens": gradient}, tokens)
    if op == "combine":
        back = reference.combine_gradient(rows, gate, d_tokens, plan)
        gradients = {"rows": _choices(plan, back.rows), "gate": back.gate}
        return Expected(reference.combine(rows, gate, plan), gradients, tokens, _gates_added_up(rows, d_tokens, plan))
    if op == "grouped_matmul":
        d_hidden, result = to_double(inputs.d_hidden[choices]), reference.grouped_matmul(rows, weights.w1, plan)
        back = reference.grouped_matmul_gradient(rows, weights.w1, _rows(plan, d_hidden), plan)
        return Expected(_choices(plan, result), {"rows": _choices(plan, back.rows), "w1": back.weight}, tokens)
    if op == "expert_mlp":
        back = reference.expert_mlp_gradient(rows, weights, d_rows, plan)
        gradients = {"rows": _choices(plan, back.rows), "weights": back.weights}
        result = _choices(plan, reference.expert_mlp(rows, weights, plan))
        return Expected(result, gradients, tokens, _added_up(rows, weights, d_rows, plan))

    dispatched = reference.dispatch(x, plan)
    expert_rows = reference.expert_mlp(dispatched, weights, plan)
    combined = reference.combine_gradient(expert_rows, gate, d_tokens, plan)
    d_expert_rows = d_rows if is_dense else combined.rows
    experts = reference.expert_mlp_gradient(dispatched, weights, d_expert_rows, plan)
    added = _added_up(dispatched, weights, d_expert_rows, plan)
    added["dtokens"] = np.sqrt(np.square(added["drows"]).reshape(-1, case.choices).sum(axis=1))
    gradients = {"tokens": reference.dispatch_gradient(experts.rows, plan), "weights": experts.weights}
    if is_dense:
        return Expected(_choices(plan, expert_rows), gradients, tokens, added)
    d_a = d_logits(combined.gate)
    gradients |= {"tokens": gradients["tokens"] + d_a @ router.T, "router": x.T @ d_a}
    # A gate's gradient is a product of two rows. Their sizes determine its rounding error.
    picked = _choices(plan, expert_rows).reshape(*gate.shape, -1)
    sizes = np.sqrt(np.square(picked).mean(axis=2)) * np.linalg.norm(d_tokens, axis=1, keepdims=True)
    of_logits = sum(np.square(d_logits(np.where(np.arange(case.choices) == k, sizes, 0))) for k in range(case.choices))
    added["drouter"] = np.sqrt(np.square(x).T @ np.mean(of_logits, axis=1))
    return Expected(reference.combine(expert_rows, gate, plan), gradients, tokens, added)


def _gates_added_up(rows: np.ndarray, d_tokens: np.ndarray, plan: reference.Plan) -> dict[str, np.ndarray]:
    """Compute the size of the terms of each gate's gradient, the product of its row and its token's gradient."""
    products = _choices(plan, rows).reshape(len(d_tokens), -1, d_tokens.shape[1]) * d_tokens[:, None]
    return {"dgate": np.linalg.norm(products, axis=2)}


class AddedUp(NamedTuple):
    """Root mean square of the terms of an expert's gradients: for each row, or for each entry of the matrices."""

    rows: np.ndarray  # [R]
    w1: np.ndarray  # [D, F]
    b1: np.ndarray  # []
    w2: np.ndarray  # [F, D]


def add_up(rows: np.ndarray, w1: np.ndarray, b1: np.ndarray, w2: np.ndarray, d_out: np.ndarray) -> AddedUp:
    """Compute the sizes for dX = dZ W1^T, dW1 = X^T dZ, db1 = sum dZ, dW2 = gelu(Z)^T dY, dZ = (dY W2^T) gelu'(Z).

    For z < 0, gelu(z) is a small difference of numbers of size z, and gelu'(z) one of numbers of size 1. Those sizes
    count instead.
    """
    z_square, d_square = np.square(rows) @ np.square(w1) + np.square(b1), np.square(d_out @ w2.T)
    return AddedUp(
        rows=np.sqrt((d_square @ np.square(w1).T).mean(axis=1)),
        w1=np.sqrt(np.square(rows).T @ d_square),
        b1=np.sqrt(d_square.mean(axis=1).sum()),
        w2=np.sqrt(z_square.T @ np.square(d_out)),
    )


def _added_up(
    rows: np.ndarray, weights: reference.MlpWeights, d_out: np.ndarray, plan: reference.Plan
) -> dict[str, np.ndarray]:
    """Compute the sizes for all experts, by names of gradients."""
    runs = [slice(first, first + size) for first, size in zip(plan.first, plan.size, strict=True)]
    experts = [add_up(rows[run], weights.w1[e], weights.b1[e], weights.w2[e], d_out[run]) for e, run in enumerate(runs)]
    of_rows = np.zeros(len(rows))
    for run, expert in zip(runs, experts, strict=True):
        of_rows[run] = expert.rows
    weight_rows = {f"d{name}": np.stack([getattr(expert, name) for expert in experts]) for name in ("w1", "b1", "w2")}
    return {"drows": _choices(plan, of_rows), **weight_rows}


def find_fault(answer: Answer, expected: Expected, case: Case, dtype: str, result: str) -> str | None:
    """Describe the first fault of an answer, or return None."""
    pairs = [] if answer.result is None else [(result, answer.result, expected.result)]
    for name, gradient in (answer.gradients or {}).items():
        if name == "weights":
            fields = zip(gradient._fields, gradient, expected.gradients[name], strict=True)
            pairs += [(f"d{field}", mine, theirs) for field, mine, theirs in fields]
        else:
            pairs.append((f"d{name}", gradient, expected.gradients[name]))
    length = max(case.width, case.expert_width, case.tokens)
    for name, mine, theirs in pairs:
        if expected.tokens is not None:
            index = _sampled(name.removeprefix("d"), expected.tokens, case)
            if index is None:
                continue
            mine = mine[index]
        mine, theirs = to_double(mine), np.asarray(theirs, np.float64)
        if name.endswith("gate"):
            # Each gate is compared by itself, as a row of one entry.
            mine, theirs = mine.reshape(-1, 1), theirs.reshape(-1, 1)
        if fault := compare(mine, theirs, unit(dtype, length), expected.added.get(name)):
            return f"{name}: {fault}"
    return None


def _sampled(name: str, tokens: np.ndarray, case: Case) -> np.ndarray | None:
    """Find the rows of an array that belong to sampled tokens; None for sums over all tokens (weights, router)."""
    if name in _PER_TOKEN:
        return tokens
    if name in _PER_CHOICE:
        return (tokens[:, None] * case.choices + np.arange(case.choices)).reshape(-1)
    return None


def _plan(case: Case, expert: np.ndarray, gate: np.ndarray, experts: int, limited: bool) -> reference.Plan:
    groups = case.groups if len(expert) == case.tokens else 1
    capacity = case.capacity if limited else None
    return reference.make_plan(expert, gate, num_experts=experts, num_groups=groups, capacity=capacity)


def _rows(plan: reference.Plan, choices: np.ndarray) -> np.ndarray:
    """Bring values from the order of choices into the reference's rows."""
    return np.concatenate([choices, np.zeros_like(choices[:1])])[plan.source]


def _choices(plan: reference.Plan, rows: np.ndarray) -> np.ndarray:
    """Bring the reference's rows into the order of choices; 0 for a dropped choice."""
    return np.concatenate([rows, np.zeros_like(rows[:1])])[plan.row.reshape(-1)]


def to_double(array: Any) -> np.ndarray:
    """Convert an array to float64 on the host."""
    return np.asarray(array).astype(np.float64)
