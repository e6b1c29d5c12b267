"""What `reference` says that an operation computes, and the verdict on an answer.

Two stages. On a small twin of the case (same groups, choices, capacity factor, distribution and dtype; 32 tokens a
group, widths 8 and 24) everything is compared: results and all gradients. At the full size NumPy's loops would take
hours, so there the routing and the plan are computed for all tokens, and results and token gradients are compared for a
few sampled tokens, all of whose choices found room; oracle_weights.py compares weight gradients of single experts.
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

# How many float64 entries of sampled experts' weights may be held.
_WEIGHT_LIMIT = 1 << 26

_PER_TOKEN, _PER_CHOICE = ("tokens", "gate"), ("rows", "kept")


class Truth(NamedTuple):
    """Routing and plan of a problem by the reference; shared by all implementations."""

    case: Case
    inputs: Inputs
    routing: reference.Routing
    plan: reference.Plan

    @property
    def load(self) -> Load:
        """Rows in use, and experts that have any."""
        return Load(int(self.plan.size.sum()), int((self.plan.size > 0).sum()))


class Expected(NamedTuple):
    """What an answer must be; with `tokens` sampled, only the parts that belong to them."""

    result: np.ndarray
    gradients: dict[str, Any]
    tokens: np.ndarray | None
    added: Mapping[str, np.ndarray] = types.MappingProxyType({})
    """Root mean square of what was added up in each row of a gradient (see rounding.py), where the row may cancel."""


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
    """A few tokens, all of whose choices found room; as few as the weights of their experts allow."""
    case = truth.case
    entries = 2 * case.width * case.expert_width * case.choices
    whole = np.flatnonzero((truth.plan.position >= 0).all(axis=1))
    count = max(1, min(4, _WEIGHT_LIMIT // entries, len(whole)))
    return np.sort(np.random.default_rng(0).choice(whole, count, replace=False))


def expect(op: Op, truth: Truth, tokens: np.ndarray | None = None, *, is_dense: bool = False) -> Expected:
    """Compute an operation by the reference, for all tokens or for sampled ones.

    The dense MLP is the same with one expert that takes every choice and gates of 1.
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
    if tokens is None and not is_dense:
        plan = truth.plan
    else:
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
        found = _matmul(rows, weights.w1, _rows(plan, to_double(inputs.d_hidden[choices])), plan)
        return Expected(_choices(plan, found.out), {"rows": _choices(plan, found.rows), "w1": found.w1}, tokens)
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
    # A gate's gradient is a product of two rows, whose size is what its rounding goes by.
    picked = _choices(plan, expert_rows).reshape(*gate.shape, -1)
    sizes = np.sqrt(np.square(picked).mean(axis=2)) * np.linalg.norm(d_tokens, axis=1, keepdims=True)
    of_logits = sum(np.square(d_logits(np.where(np.arange(case.choices) == k, sizes, 0))) for k in range(case.choices))
    added["drouter"] = np.sqrt(np.square(x).T @ np.mean(of_logits, axis=1))
    return Expected(reference.combine(expert_rows, gate, plan), gradients, tokens, added)


def _gates_added_up(rows: np.ndarray, d_tokens: np.ndarray, plan: reference.Plan) -> dict[str, np.ndarray]:
    """What the gradient of each gate adds up: the product of its row and of its token's gradient."""
    products = _choices(plan, rows).reshape(len(d_tokens), -1, d_tokens.shape[1]) * d_tokens[:, None]
    return {"dgate": np.linalg.norm(products, axis=2)}


class Matmul(NamedTuple):
    """A grouped matmul of rows, and its gradients."""

    out: np.ndarray  # [R, F]
    rows: np.ndarray  # [R, D]
    w1: np.ndarray  # [E, D, F]


def _matmul(rows: np.ndarray, w1: np.ndarray, d_hidden: np.ndarray, plan: reference.Plan) -> Matmul:
    found = Matmul(np.zeros_like(d_hidden), np.zeros_like(rows), np.zeros_like(w1))
    for e, (first, size) in enumerate(zip(plan.first, plan.size, strict=True)):
        run = slice(first, first + size)
        found.out[run], found.rows[run] = rows[run] @ w1[e], d_hidden[run] @ w1[e].T
        found.w1[e] = rows[run].T @ d_hidden[run]
    return found


class AddedUp(NamedTuple):
    """Root mean square of what each row of an expert's gradients adds up; of the matrices' each entry."""

    rows: np.ndarray  # [R]
    w1: np.ndarray  # [D, F]
    b1: np.ndarray  # []
    w2: np.ndarray  # [F, D]


def add_up(rows: np.ndarray, w1: np.ndarray, b1: np.ndarray, w2: np.ndarray, d_out: np.ndarray) -> AddedUp:
    """Of dX = dZ W1^T, dW1 = X^T dZ, db1 = sum dZ and dW2 = gelu(Z)^T dY, with dZ = (dY W2^T) gelu'(Z).

    Where z < 0, gelu(z) is a small difference of numbers of the size of z, and gelu'(z) one of numbers of the size of
    1, so those sizes count instead.
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
    """The same for all experts, by the names of the gradients."""
    runs = [slice(first, first + size) for first, size in zip(plan.first, plan.size, strict=True)]
    experts = [add_up(rows[run], weights.w1[e], weights.b1[e], weights.w2[e], d_out[run]) for e, run in enumerate(runs)]
    of_rows = np.zeros(len(rows))
    for run, expert in zip(runs, experts, strict=True):
        of_rows[run] = expert.rows
    weight_rows = {f"d{name}": np.stack([getattr(expert, name) for expert in experts]) for name in ("w1", "b1", "w2")}
    return {"drows": _choices(plan, of_rows), **weight_rows}


def find_fault(answer: Answer, expected: Expected, case: Case, dtype: str, result: str) -> str | None:
    """The first thing that is wrong with an answer, in words, or None."""
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
            # Each is a softmax value or a sum of its own.
            mine, theirs = mine.reshape(-1, 1), theirs.reshape(-1, 1)
        if fault := compare(mine, theirs, unit(dtype, length), expected.added.get(name)):
            return f"{name}: {fault}"
    return None


def _sampled(name: str, tokens: np.ndarray, case: Case) -> np.ndarray | None:
    """Where the sampled part of an array lies; None for sums over all tokens (weights, router)."""
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
    """From the order of choices to the reference's rows."""
    return np.concatenate([choices, np.zeros_like(choices[:1])])[plan.source]


def _choices(plan: reference.Plan, rows: np.ndarray) -> np.ndarray:
    """From the reference's rows to the order of choices; 0 for a choice without room."""
    return np.concatenate([rows, np.zeros_like(rows[:1])])[plan.row.reshape(-1)]


def to_double(array: Any) -> np.ndarray:
    """As float64 on the host."""
    return np.asarray(array).astype(np.float64)
