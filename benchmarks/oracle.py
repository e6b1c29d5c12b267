"""What `reference` says that an operation computes, and the verdict on an answer.

Two stages. On a small twin of the case (same groups, choices, capacity factor, distribution and dtype; 32 tokens a
group, widths 8 and 24) everything is compared: results and all gradients. At the full size NumPy's loops would take
hours, so there the routing and the plan are computed for all tokens, and results and token gradients are compared for a
few sampled tokens, all of whose choices found room. Weight gradients are thus compared on the small twin only.
"""

from typing import Any, NamedTuple

import numpy as np

import reference
from benchmarks.cases import Case, Inputs
from benchmarks.jobs import Answer
from benchmarks.roofline import Load, Op

# Roundings that follow on each other, each allowed 2 eps sqrt(length) of the largest entry.
_ROUNDINGS = 16
# In bfloat16 the rounding of stored values dominates, which does not grow with the length of sums.
_BFLOAT16_TOLERANCE = 8 * 2.0**-8
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


def find_truth(case: Case, inputs: Inputs) -> Truth:
    """Route and plan all tokens by the reference. Raises AssertionError if the noise did not impose the experts."""
    routing = reference.route(
        _double(inputs.tokens),
        _double(inputs.router),
        num_choices=case.choices,
        num_groups=case.groups,
        noise=_double(inputs.noise),
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
    weights = reference.MlpWeights(*(_double(w[used]) for w in inputs.weights if w is not None))
    x, router, noise = _double(inputs.tokens[chosen]), _double(inputs.router), _double(inputs.noise[chosen])
    d_tokens, rows = _double(inputs.d_tokens[chosen]), _rows(plan, _double(inputs.rows[choices]))
    d_rows, d_gate = _rows(plan, _double(inputs.d_rows[choices])), _double(inputs.d_gate[chosen])

    def d_logits(d_gate: np.ndarray) -> np.ndarray:
        groups = case.groups if tokens is None else 1
        routing = reference.route(x, router, num_choices=case.choices, num_groups=groups, noise=noise)
        nothing = reference.zero_sums(num_groups=groups, num_modalities=1, num_experts=case.experts)
        return reference.route_gradient(routing, d_gate, nothing)

    if op == "routing":
        d_a = d_logits(d_gate)
        return Expected(gate, {"tokens": d_a @ router.T, "router": x.T @ d_a}, tokens)
    if op == "dispatch":
        gradient = reference.dispatch_gradient(d_rows, plan)
        return Expected(_choices(plan, reference.dispatch(x, plan)), {"tokens": gradient}, tokens)
    if op == "combine":
        back = reference.combine_gradient(rows, gate, d_tokens, plan)
        gradients = {"rows": _choices(plan, back.rows), "gate": back.gate}
        return Expected(reference.combine(rows, gate, plan), gradients, tokens)
    if op == "grouped_matmul":
        d_hidden = _rows(plan, _double(inputs.d_hidden[choices]))
        out, d_in, d_w1 = np.zeros_like(d_hidden), np.zeros_like(rows), np.zeros_like(weights.w1)
        for e, (first, size) in enumerate(zip(plan.first, plan.size, strict=True)):
            run = slice(first, first + size)
            out[run], d_in[run] = rows[run] @ weights.w1[e], d_hidden[run] @ weights.w1[e].T
            d_w1[e] = rows[run].T @ d_hidden[run]
        return Expected(_choices(plan, out), {"rows": _choices(plan, d_in), "w1": d_w1}, tokens)
    if op == "expert_mlp":
        back = reference.expert_mlp_gradient(rows, weights, d_rows, plan)
        gradients = {"rows": _choices(plan, back.rows), "weights": back.weights}
        return Expected(_choices(plan, reference.expert_mlp(rows, weights, plan)), gradients, tokens)

    dispatched = reference.dispatch(x, plan)
    expert_rows = reference.expert_mlp(dispatched, weights, plan)
    combined = reference.combine_gradient(expert_rows, gate, d_tokens, plan)
    experts = reference.expert_mlp_gradient(dispatched, weights, d_rows if is_dense else combined.rows, plan)
    gradients = {"tokens": reference.dispatch_gradient(experts.rows, plan), "weights": experts.weights}
    if is_dense:
        return Expected(_choices(plan, expert_rows), gradients, tokens)
    d_a = d_logits(combined.gate)
    gradients |= {"tokens": gradients["tokens"] + d_a @ router.T, "router": x.T @ d_a}
    return Expected(reference.combine(expert_rows, gate, plan), gradients, tokens)


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
    tolerance = _BFLOAT16_TOLERANCE if dtype == "bfloat16" else _ROUNDINGS * 2 * 2.0**-23 * np.sqrt(length)
    for name, mine, theirs in pairs:
        if expected.tokens is not None:
            index = _sampled(name.removeprefix("d"), expected.tokens, case)
            if index is None:
                continue
            mine = mine[index]
        if fault := _compare(_double(mine), np.asarray(theirs, np.float64), tolerance):
            return f"{name} {fault}"
    return None


def _sampled(name: str, tokens: np.ndarray, case: Case) -> np.ndarray | None:
    """Where the sampled part of an array lies; None for sums over all tokens (weights, router)."""
    if name in _PER_TOKEN:
        return tokens
    if name in _PER_CHOICE:
        return (tokens[:, None] * case.choices + np.arange(case.choices)).reshape(-1)
    return None


def _compare(mine: np.ndarray, theirs: np.ndarray, tolerance: float) -> str | None:
    if mine.shape != theirs.shape:
        return f"has shape {mine.shape}, not {theirs.shape}"
    scale = float(np.abs(theirs).max(initial=0.0))
    error = np.abs(mine - theirs)
    if not error.max(initial=0.0) <= tolerance * scale:
        return (
            f"is off by {np.nanmax(error):.2g} where the largest entry is {scale:.2g} (allowed {tolerance:.1g} of it)"
        )
    rows = tuple(range(1, theirs.ndim))
    if (mine[(theirs == 0).all(axis=rows)] != 0).any():
        return "is not exactly 0 where nothing was sent"
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


def _double(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float64)
