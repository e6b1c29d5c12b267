"""The MoE layer, row by row, and its gradients derived by hand (paper, section 2)."""

from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np

from reference.activations import Activation, activate, activate_derivative
from reference.glu import Clamped, GluWeights, glu_experts, glu_experts_gradient
from reference.plan import Plan, Priority, expert_capacity, make_plan
from reference.routing import Router, Routing, RoutingSums, route, route_gradient, zero_sums


class MlpWeights(NamedTuple):
    """The weights of all experts.

    >>> MlpWeights(np.zeros((2, 3, 5)), np.zeros((2, 5)), np.zeros((2, 5, 3)), np.zeros((2, 3))).w1.shape
    (2, 3, 5)
    """

    w1: np.ndarray  # [E, D, F]
    b1: np.ndarray  # [E, F]
    w2: np.ndarray  # [E, F, D]
    b2: np.ndarray  # [E, D]


class CombineGradients(NamedTuple):
    """The result of `combine_gradient`.

    >>> CombineGradients(rows=np.zeros((4, 2)), gate=np.zeros((3, 1))).gate.shape
    (3, 1)
    """

    rows: np.ndarray  # [R, D]
    gate: np.ndarray  # [T, K]


class ExpertGradients(NamedTuple):
    """The result of `expert_mlp_gradient`.

    >>> ExpertGradients._fields
    ('rows', 'weights')
    """

    rows: np.ndarray  # [R, D]
    weights: MlpWeights


class MoeOutput(NamedTuple):
    """The results of the layer, and all intermediate values, for comparison and for the gradient.

    >>> MoeOutput._fields[:3]
    ('tokens', 'sums', 'kept')
    """

    tokens: np.ndarray  # [T, D]
    sums: RoutingSums
    kept: np.ndarray  # [G, M, E]
    routing: Routing
    plan: Plan
    rows: np.ndarray  # [R, D], after dispatch, times their gates if those are on the input
    expert_rows: np.ndarray  # [R, D], after the experts


class MoeGradients(NamedTuple):
    """Gradients of the layer's arguments, and of gates and rows.

    >>> MoeGradients._fields
    ('tokens', 'router', 'weights', 'gate', 'rows', 'bias')
    """

    tokens: np.ndarray  # [T, D]
    router: np.ndarray  # [D, E]
    weights: MlpWeights | GluWeights
    gate: np.ndarray  # [T, K]
    rows: np.ndarray  # [R, D]
    bias: np.ndarray  # [E], of the router


def dispatch(tokens: np.ndarray, plan: Plan) -> np.ndarray:
    """Copy each token [T, D] to the rows [R, D] of its choices; unused rows are zero.

    >>> plan = make_plan(np.array([[0], [0]]), np.array([[0.5], [0.6]]), num_experts=1)
    >>> dispatch(np.array([[1.0], [2.0]]), plan).tolist()
    [[2.0], [1.0]]
    """
    tokens = np.asarray(tokens, np.float64)
    num_choices = plan.row.shape[1]
    rows = np.zeros((len(plan.source), tokens.shape[1]))
    for r, source in enumerate(plan.source):
        if source < plan.row.size:
            rows[r] = tokens[source // num_choices]
    return rows


def dispatch_gradient(d_rows: np.ndarray, plan: Plan) -> np.ndarray:
    """Compute the gradient [T, D] of the tokens: dx_t is the sum of drows over the kept choices of t.

    >>> plan = make_plan(np.array([[0, 1]]), np.array([[0.5, 0.5]]), num_experts=2)
    >>> dispatch_gradient(np.array([[1.0], [2.0]]), plan).tolist()
    [[3.0]]
    """
    d_tokens = np.zeros((plan.row.shape[0], d_rows.shape[1]))
    for (t, k), position in np.ndenumerate(plan.position):
        if position >= 0:
            d_tokens[t] += d_rows[plan.row[t, k]]
    return d_tokens


def expert_mlp(rows: np.ndarray, weights: MlpWeights, plan: Plan, activation: Activation = "gelu_tanh") -> np.ndarray:
    """Apply every expert's MLP to its own rows [R, D]: act(x w1 + b1) w2 + b2; unused rows are zero.

    >>> plan = make_plan(np.array([[0]]), np.array([[1.0]]), num_experts=1, row_multiple=2)
    >>> weights = MlpWeights(np.zeros((1, 2, 3)), np.zeros((1, 3)), np.zeros((1, 3, 2)), np.ones((1, 2)))
    >>> expert_mlp(np.ones((2, 2)), weights, plan).tolist()
    [[1.0, 1.0], [0.0, 0.0]]
    """
    output = np.zeros(rows.shape)
    for e in range(len(plan.first)):
        for r in range(plan.first[e], plan.first[e] + plan.size[e]):
            hidden = activate(rows[r] @ weights.w1[e] + weights.b1[e], activation)
            output[r] = hidden @ weights.w2[e] + weights.b2[e]
    return output


def expert_mlp_gradient(
    rows: np.ndarray, weights: MlpWeights, d_output: np.ndarray, plan: Plan, activation: Activation = "gelu_tanh"
) -> ExpertGradients:
    """Compute the gradients of the rows [R, D] and weights of `expert_mlp` from that of its output [R, D].

    For one row x of expert e, with a = x w1 + b1, h = act(a), y = h w2 + b2:
      dw2 += h^T dy    db2 += dy    da = (dy w2^T) act'(a)    dw1 += x^T da    db1 += da    dx = da w1^T
    Experts without rows get exactly zero.

    >>> plan = make_plan(np.array([[0]]), np.array([[1.0]]), num_experts=2)
    >>> weights = MlpWeights(np.ones((2, 1, 1)), np.zeros((2, 1)), np.ones((2, 1, 1)), np.zeros((2, 1)))
    >>> expert_mlp_gradient(np.ones((1, 1)), weights, np.ones((1, 1)), plan).weights.b2.tolist()
    [[1.0], [0.0]]
    """
    d_rows = np.zeros(rows.shape)
    d_weights = MlpWeights(*(np.zeros(np.shape(weight)) for weight in weights))
    for e in range(len(plan.first)):
        for r in range(plan.first[e], plan.first[e] + plan.size[e]):
            before = rows[r] @ weights.w1[e] + weights.b1[e]
            d_weights.w2[e] += np.outer(activate(before, activation), d_output[r])
            d_weights.b2[e] += d_output[r]
            d_before = (weights.w2[e] @ d_output[r]) * activate_derivative(before, activation)
            d_weights.w1[e] += np.outer(rows[r], d_before)
            d_weights.b1[e] += d_before
            d_rows[r] = weights.w1[e] @ d_before
    return ExpertGradients(d_rows, d_weights)


def combine(rows: np.ndarray, gate: np.ndarray, plan: Plan) -> np.ndarray:
    """Add up the rows [R, D] of each token's kept choices, weighted by their gates [T, K].

    A token without a place gets zero, a token with NaN gates (its logits were not finite) gets NaN.

    >>> plan = make_plan(np.array([[0], [0]]), np.array([[0.5], [0.25]]), num_experts=1, capacity=1)
    >>> combine(np.array([[8.0]]), np.array([[0.5], [0.25]]), plan).tolist()
    [[4.0], [0.0]]
    """
    output = np.zeros((plan.row.shape[0], rows.shape[1]))
    for (t, k), position in np.ndenumerate(plan.position):
        if position >= 0:
            output[t] += gate[t, k] * rows[plan.row[t, k]]
        elif np.isnan(gate[t, k]):
            output[t] = np.nan
    return output


def combine_gradient(rows: np.ndarray, gate: np.ndarray, d_tokens: np.ndarray, plan: Plan) -> CombineGradients:
    """Compute the gradients of the rows [R, D] and gates [T, K] of `combine` from that of its output [T, D].

    For a kept choice k of token t in row r:  drows_r = gate_tk dy_t,  dgate_tk = rows_r . dy_t.  Dropped: dgate = 0.

    >>> plan = make_plan(np.array([[0], [0]]), np.array([[0.5], [0.25]]), num_experts=1, capacity=1)
    >>> combine_gradient(np.array([[8.0]]), np.array([[0.5], [0.25]]), np.ones((2, 1)), plan).gate.tolist()
    [[8.0], [0.0]]
    """
    d_rows, d_gate = np.zeros(rows.shape), np.zeros(gate.shape)
    for (t, k), position in np.ndenumerate(plan.position):
        if position >= 0:
            r = plan.row[t, k]
            d_rows[r] = gate[t, k] * d_tokens[t]
            d_gate[t, k] = rows[r] @ d_tokens[t]
    return CombineGradients(d_rows, d_gate)


def weigh(rows: np.ndarray, gate: np.ndarray, plan: Plan) -> np.ndarray:
    """Multiply each row [R, D] by the gate of the choice that fills it.

    >>> plan = make_plan(np.array([[0]]), np.array([[0.5]]), num_experts=1)
    >>> weigh(np.array([[4.0]]), np.array([[0.5]]), plan).tolist()
    [[2.0]]
    """
    weighed = np.zeros(rows.shape)
    for (t, k), position in np.ndenumerate(plan.position):
        if position >= 0:
            weighed[plan.row[t, k]] = gate[t, k] * rows[plan.row[t, k]]
    return weighed


def in_float64(weights: MlpWeights | GluWeights) -> MlpWeights | GluWeights:
    """Convert weights to float64.

    >>> in_float64(MlpWeights(*np.zeros((4, 1), np.float32))).b1.dtype
    dtype('float64')
    """
    return type(weights)(*(np.asarray(weight, np.float64) for weight in weights))


def run_experts(rows: np.ndarray, weights: MlpWeights | GluWeights, plan: Plan, activation: Any) -> np.ndarray:
    """Run plain or gated experts, depending on the kind of their weights.

    >>> plan = make_plan(np.array([[0]]), np.array([[1.0]]), num_experts=1)
    >>> run_experts(np.ones((1, 1)), GluWeights(*np.ones((3, 1, 1, 1)), *np.zeros((3, 1, 1))), plan, "relu").tolist()
    [[1.0]]
    """
    if isinstance(weights, GluWeights):
        return glu_experts(rows, weights, plan, activation)
    return expert_mlp(rows, weights, plan, activation)


def run_experts_gradient(
    rows: np.ndarray, weights: MlpWeights | GluWeights, d_output: np.ndarray, plan: Plan, activation: Any
) -> Any:
    """Compute the gradients of `run_experts`.

    >>> plan, weights = make_plan(np.array([[0]]), np.array([[1.0]]), num_experts=1), np.ones((3, 1, 1, 1))
    >>> weights = GluWeights(*weights, *np.zeros((3, 1, 1)))
    >>> run_experts_gradient(np.ones((1, 1)), weights, np.ones((1, 1)), plan, "relu").rows.tolist()
    [[2.0]]
    """
    if isinstance(weights, GluWeights):
        return glu_experts_gradient(rows, weights, d_output, plan, activation)
    return expert_mlp_gradient(rows, weights, d_output, plan, activation)


def moe_layer(
    tokens: np.ndarray,
    router: np.ndarray,
    weights: MlpWeights | GluWeights,
    *,
    settings: Router = Router(),  # noqa: B008 (a tuple)
    bias: np.ndarray | None = None,
    choice_bias: np.ndarray | None = None,
    gates_on: Literal["output", "input"] = "output",
    num_choices: int = 1,
    capacity_factor: float | str | Fraction | None = None,
    num_groups: int = 1,
    priority: Priority = "bpr",
    noise: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    modality: np.ndarray | None = None,
    num_modalities: int = 1,
    activation: Activation | Clamped = "gelu_tanh",
    first_modality: int = 0,
    priority_values: np.ndarray | None = None,
    expert: np.ndarray | None = None,
    row_multiple: int = 1,
) -> MoeOutput:
    """Run the layer: y_t is the sum of gate * MLP_expert(x_t) over kept choices; see `route` and `make_plan`.

    With gates on the input it is the sum of MLP_expert(gate * x_t). No capacity factor means dropless. Paper, section
    2.

    >>> weights = MlpWeights(np.zeros((2, 2, 3)), np.zeros((2, 3)), np.zeros((2, 3, 2)), np.ones((2, 2)))
    >>> moe_layer(np.eye(2), np.zeros((2, 2)), weights, capacity_factor=1).tokens.tolist()
    [[0.5, 0.5], [0.0, 0.0]]
    """
    tokens, num_experts = np.asarray(tokens, np.float64), np.shape(router)[1]
    weights = in_float64(weights)
    routing = route(
        tokens,
        router,
        settings=settings,
        bias=bias,
        choice_bias=choice_bias,
        num_choices=num_choices,
        num_groups=num_groups,
        noise=noise,
        modality=modality,
        num_modalities=num_modalities,
        mask=mask,
        expert=expert,
    )
    capacity = None
    if capacity_factor is not None:
        capacity = expert_capacity(len(tokens) // num_groups, num_choices, num_experts, capacity_factor)
    plan = make_plan(
        routing.expert,
        routing.gate,
        num_experts=num_experts,
        num_groups=num_groups,
        capacity=capacity,
        priority=priority,
        first_modality=first_modality,
        priority_values=priority_values,
        modality=modality,
        num_modalities=num_modalities,
        mask=mask,
        row_multiple=row_multiple,
    )
    rows, gate = dispatch(tokens, plan), routing.gate
    if gates_on == "input":
        rows, gate = weigh(rows, gate, plan), np.where(np.isnan(gate), np.nan, 1.0)
    expert_rows = run_experts(rows, weights, plan, activation)
    output = combine(expert_rows, gate, plan)
    return MoeOutput(output, routing.sums, plan.kept, routing, plan, rows, expert_rows)


def moe_layer_gradient(
    tokens: np.ndarray,
    router: np.ndarray,
    weights: MlpWeights | GluWeights,
    output: MoeOutput,
    d_tokens: np.ndarray,
    d_sums: RoutingSums | None = None,
    *,
    activation: Activation | Clamped = "gelu_tanh",
    gates_on: Literal["output", "input"] = "output",
) -> MoeGradients:
    """Compute the gradients of `moe_layer` from those of its output tokens [T, D] and of its sums (None: zero).

    Backwards through combine, the experts and dispatch; the gates and the sums go back through `route_gradient` to the
    logits A = x W, and from there dW = x^T dA and dx = dA W^T (+ dispatch). Who sits where is piecewise constant.
    `tokens` and `wanted` in `d_sums` are ignored: they are counts. A token that is masked or whose logits are not
    finite takes part in nothing: its own gradient is zero, and it adds nothing to any other. With gates on the input,
    for a kept choice k of token t in row r:  dx_t += gate_tk drows_r,  dgate_tk = x_t . drows_r.

    >>> weights = MlpWeights(np.zeros((2, 2, 3)), np.zeros((2, 3)), np.zeros((2, 3, 2)), np.ones((2, 2)))
    >>> output = moe_layer(np.eye(2), np.zeros((2, 2)), weights)
    >>> moe_layer_gradient(np.eye(2), np.zeros((2, 2)), weights, output, np.ones((2, 2))).weights.b2.tolist()
    [[1.0, 1.0], [0.0, 0.0]]
    """
    tokens, router = np.asarray(tokens, np.float64), np.asarray(router, np.float64)
    weights = in_float64(weights)
    routing, plan = output.routing, output.plan
    if d_sums is None:
        num_groups, num_modalities, num_experts = output.kept.shape
        d_sums = zero_sums(num_groups=num_groups, num_modalities=num_modalities, num_experts=num_experts)

    gate = np.ones(routing.gate.shape) if gates_on == "input" else routing.gate
    combined = combine_gradient(output.expert_rows, gate, np.asarray(d_tokens, np.float64), plan)
    experts = run_experts_gradient(output.rows, weights, combined.rows, plan, activation)
    d_rows, d_gate = experts.rows, combined.gate
    if gates_on == "input":
        d_gate = combine_gradient(d_rows, routing.gate, tokens, plan).gate
        d_rows = weigh(d_rows, routing.gate, plan)
    d_input = dispatch_gradient(d_rows, plan)

    d_logits = route_gradient(routing, d_gate, d_sums)
    d_router = np.zeros(router.shape)
    for t in range(len(tokens)):
        if routing.active[t]:
            d_router += np.outer(tokens[t], d_logits[t])
            d_input[t] += router @ d_logits[t]
    return MoeGradients(d_input, d_router, experts.weights, d_gate, d_rows, d_logits.sum(axis=0))
