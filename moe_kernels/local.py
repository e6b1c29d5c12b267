"""The layer on one device: route, plan, dispatch, experts, combine, with spans that were chosen once."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from moe_kernels.activations import function_of, gated
from moe_kernels.axes import refuse_symbolic
from moe_kernels.backends import Choice, Traced, reasons_of
from moe_kernels.backends.base import MatmulStatic, MatmulWeights, MlpStatic, RouteStatic, Span, apply
from moe_kernels.backends.xla.activation import glu_backward, glu_forward
from moe_kernels.backends.xla.permute import weigh_backward, weigh_forward
from moe_kernels.capacity import capacity_of, plan_layout
from moe_kernels.choice import LayerChoice, LayerShapes, choose_layer
from moe_kernels.experts import activation_of, check_experts, expert_sizes, glu_matmuls, plain_activation
from moe_kernels.plan import make_plan
from moe_kernels.priority import priority_of
from moe_kernels.routing import check_route, is_biased, route_static, routed
from moe_kernels.spec import MoeSpec, RouteInputs
from moe_kernels.types import (
    ExpertWeights,
    JoinedGluWeights,
    Layout,
    MlpWeights,
    MoeOutput,
    PlainWeights,
    Plan,
    RouterWeights,
    Routing,
    Runs,
    WithShared,
)

# Names of values that every remat policy should save. If routing were computed again, a near tie could flip.
SAVED_NAMES = ("moe_routing", "moe_plan")

# Plain JAX on every platform: `act(gate) * up` between two matmuls, and gates on the input of the experts.
_GLU = Span(glu_forward, glu_backward)
_WEIGH = Span(weigh_forward, weigh_backward)


class Decision(NamedTuple):
    """Where every token goes: the routing, the priority by which tokens claimed places, the plan, and the tokens as the
    router passed them on."""

    routing: Routing
    priority: Float[Array, " T"] | None
    plan: Plan
    tokens: Float[Array, "T D"]

    def output(self, tokens: Float[Array, "T D"]) -> MoeOutput:
        """Combine the decision with the layer's output tokens."""
        return MoeOutput(tokens, self.routing.sums, self.plan.kept, self.routing.expert, self.priority)


def shapes_of(
    tokens: Float[Array, "T D"], router: RouterWeights | Routing, weights: PlainWeights, spec: MoeSpec
) -> LayerShapes:
    """Read sizes and dtypes from a layer's arguments, which may be arrays or `jax.ShapeDtypeStruct`s.

    >>> weights = MlpWeights(jnp.ones((2, 4, 8)), None, jnp.ones((2, 8, 4)), None)
    >>> shapes_of(jnp.ones((6, 4)), RouterWeights(jnp.ones((4, 2))), weights, MoeSpec()).expert_width
    8
    """
    sizes, activation = expert_sizes(weights), activation_of(weights, spec)
    return LayerShapes(
        num_tokens=tokens.shape[0],
        width=tokens.shape[1],
        expert_width=sizes.expert_width,
        num_experts=num_experts_of(router),
        dtype=str(tokens.dtype),
        weight_dtype=sizes.dtype,
        activation=activation,
        glu=glu_matmuls(weights, activation),
        gates_on_input=spec.gates_on == "input",
    )


def num_experts_of(router: RouterWeights | Routing) -> int:
    """Read E from a router or a routing.

    >>> num_experts_of(RouterWeights(jnp.ones((4, 2))))
    2
    """
    return router.kernel.shape[1] if isinstance(router, RouterWeights) else router.sums.wanted.shape[-1]


def layout_of(spec: MoeSpec, shapes: LayerShapes, rows_per_expert: int | None = None) -> Layout:
    """Choose the layout of a layer's rows.

    >>> layout_of(MoeSpec(), LayerShapes(8, 4, 16, 2, "float32", "float32", "silu")).num_rows
    16
    """
    capacity = capacity_of(spec, shapes.num_tokens, shapes.num_experts)
    return plan_layout(
        shapes.num_tokens, spec.num_choices, spec.num_groups, shapes.num_experts, capacity, rows_per_expert
    )


def moe_mlp_here(
    tokens: Float[Array, "T D"],
    router: RouterWeights | Routing,
    weights: PlainWeights,
    spec: MoeSpec,
    inputs: RouteInputs,
) -> MoeOutput:
    """Run the routed experts of `moe_mlp` on one device."""
    check_router(tokens, router, spec, inputs)
    check_experts(weights, num_experts_of(router), tokens.shape[1])
    shapes = shapes_of(tokens, router, weights, spec)
    choice = choose_here(router, shapes, spec, inputs)
    decided = decide(tokens, router, spec, inputs, choice)
    routing, _, plan, tokens = decided
    if choice.layer.span is not None and isinstance(weights, MlpWeights):
        static = MlpStatic(plan.layout, plain_activation(spec))
        out = apply(choice.layer.span, static, (tokens, routing.gate, weights), (plan,))
    else:
        rows = dispatch_rows(decided, choice, spec)
        rows = run_experts(rows, weights, plan.runs, plan.layout, choice, spec)
        out = combine_rows(rows, decided, choice, spec)
    return decided.output(out)


def dispatch_rows(decided: Decision, choice: LayerChoice, spec: MoeSpec) -> Float[Array, "R D"]:
    """Copy tokens into their rows, and weigh them if gates are on the input of the experts."""
    rows = apply(span_of(choice.dispatch), None, (decided.tokens,), (decided.plan,))
    if spec.gates_on == "output":
        return rows
    return apply(_WEIGH, None, (rows, decided.routing.gate), (decided.plan,))


def combine_rows(
    rows: Float[Array, "R D"], decided: Decision, choice: LayerChoice, spec: MoeSpec
) -> Float[Array, "T D"]:
    """Add the rows of each token, weighed unless gates are on the input of the experts."""
    gate = decided.routing.gate
    if spec.gates_on == "input":
        gate = jnp.where(jnp.isfinite(gate), jnp.float32(1), jnp.float32(jnp.nan))
    return apply(span_of(choice.combine), None, (rows, gate), (decided.plan,))


def choose_here(
    router: RouterWeights | Routing,
    shapes: LayerShapes,
    spec: MoeSpec,
    inputs: RouteInputs,
    on: Traced | None = None,
) -> LayerChoice:
    """Choose the spans of a layer on one device."""
    return choose_layer(shapes, static_of(router, spec, inputs), layout_of(spec, shapes), backend=spec.backend, on=on)


def static_of(router: RouterWeights | Routing, spec: MoeSpec, inputs: RouteInputs) -> RouteStatic:
    """Collect the static facts of the routing, whether the layer computes it or the caller made it."""
    biased = isinstance(router, RouterWeights) and is_biased(router)
    return route_static(spec, num_experts_of(router), inputs, biased=biased)


def span_of(choice: Choice) -> Span:
    """Get the chosen span. Raises ValueError if no back end took the problem, with the reason of each."""
    if choice.span is None:
        raise ValueError(f"{reasons_of(choice)}; no back end takes this layer")
    return choice.span


def decide(
    tokens: Float[Array, "T D"],
    router: RouterWeights | Routing,
    spec: MoeSpec,
    inputs: RouteInputs,
    choice: LayerChoice,
    rows_per_expert: int | None = None,
) -> Decision:
    """Route, unless the caller made a `Routing`, and plan. With `rows_per_expert`, rows are an `[E, rows_per_expert]`
    block."""
    num_experts = num_experts_of(router)
    if isinstance(router, RouterWeights):
        routing, tokens = routed(span_of(choice.route), static_of(router, spec, inputs), tokens, router, inputs)
    else:
        routing = router
        if inputs.mask is not None:  # whatever the caller's arithmetic made of the gates of padding
            routing = routing._replace(gate=jnp.where(inputs.mask[:, None], routing.gate, jnp.float32(0)))
    priority = priority_of(spec, routing, inputs)
    plan = make_plan(
        routing,
        num_experts=num_experts,
        num_groups=spec.num_groups,
        capacity=capacity_of(spec, tokens.shape[0], num_experts),
        priority=priority,
        modality=inputs.modality,
        num_modalities=spec.num_modalities,
        rows_per_expert=rows_per_expert,
    )
    return Decision(routing, priority, jax.tree.map(lambda leaf: checkpoint_name(leaf, "moe_plan"), plan), tokens)


def check_router(
    tokens: Float[Array, "T D"], router: RouterWeights | Routing, spec: MoeSpec, inputs: RouteInputs
) -> None:
    """Refuse a router, or a routing that the caller made, that does not fit these tokens and this spec."""
    if isinstance(router, RouterWeights):
        check_route(tokens, router, spec, inputs)
        return
    routing = router
    refuse_symbolic(tokens=tokens, router=routing)
    wanted = (tokens.shape[0], spec.num_choices)
    if routing.expert.shape != wanted or routing.gate.shape != wanted:
        raise ValueError(
            f"the routing has experts {routing.expert.shape} and gates {routing.gate.shape}; the layer needs "
            f"[T, K] = {wanted}"
        )
    groups = (spec.num_groups, spec.num_modalities)
    if routing.sums.tokens.shape != groups:
        raise ValueError(
            f"the routing's sums have {routing.sums.tokens.shape} groups and modalities, the layer has {groups}; "
            "pass the layer's spec to make_routing"
        )


def run_experts(
    rows: Float[Array, "R D"],
    weights: PlainWeights,
    runs: Runs,
    layout: Layout,
    choice: LayerChoice,
    spec: MoeSpec,
) -> Float[Array, "R D"]:
    """Apply every expert's MLP to its rows: one span, or two matmuls around what no span has between them."""
    first, activation = span_of(choice.experts), activation_of(weights, spec)
    if choice.down is None:
        assert isinstance(activation, str), "others are two matmuls"
        return apply(first, MlpStatic(layout, activation), (rows, weights), (runs,))
    assert not isinstance(weights, MlpWeights)

    def product(weight: Array, bias: Array | None) -> Float[Array, "R F"]:
        return apply(first, MatmulStatic(layout), (rows, MatmulWeights(weight, bias)), (runs,))

    if isinstance(weights, JoinedGluWeights):
        both = halves(product(weights.gate_up, weights.gate_up_bias), spec.interleaved)
    else:
        both = product(weights.gate, weights.gate_bias), product(weights.up, weights.up_bias)
    hidden = apply(_GLU, activation, both, ())
    down = MatmulWeights(weights.down, weights.down_bias)
    return apply(span_of(choice.down), MatmulStatic(layout), (hidden, down), (runs,))


def halves(both: Float[Array, "T H"], interleaved: bool) -> tuple[Float[Array, "T F"], Float[Array, "T F"]]:
    """Split the product with `gate_up` into that with the gate and that with `up`.

    >>> [half.tolist() for half in halves(jnp.arange(4.0)[None], True)]
    [[[0.0, 2.0]], [[1.0, 3.0]]]
    """
    if interleaved:
        return both[:, ::2], both[:, 1::2]
    width = both.shape[1] // 2
    return both[:, :width], both[:, width:]


def routed_of(weights: ExpertWeights) -> PlainWeights:
    """Get the experts that the router chooses among."""
    return weights.routed if isinstance(weights, WithShared) else weights


def with_shared(output: MoeOutput, tokens: Float[Array, "T D"], weights: ExpertWeights, spec: MoeSpec) -> MoeOutput:
    """Add the shared expert's output to that of the routed experts, if there is a shared expert."""
    if not isinstance(weights, WithShared):
        return output
    return output._replace(tokens=output.tokens + shared_expert(tokens, weights, spec))


def shared_expert(tokens: Float[Array, "T D"], weights: WithShared, spec: MoeSpec) -> Float[Array, "T D"]:
    """Compute the shared expert, `s(x) shared(x)`. Matmuls accumulate in float32; the hidden layer is rounded."""
    one, dtype = weights.shared, tokens.dtype
    check_experts(one, None, tokens.shape[1])

    def product(x: Array, weight: Array, bias: Array | None = None) -> Array:
        out = jnp.dot(x, weight.astype(dtype), preferred_element_type=jnp.float32)
        return out if bias is None else out + bias[None].astype(jnp.float32)

    if isinstance(one, MlpWeights):
        hidden = function_of(plain_activation(spec))(product(tokens, one.w1, one.b1))
        out = product(hidden.astype(dtype), one.w2, one.b2)
    else:
        if isinstance(one, JoinedGluWeights):
            both = halves(product(tokens, one.gate_up, one.gate_up_bias), spec.interleaved)
        else:
            both = product(tokens, one.gate, one.gate_bias), product(tokens, one.up, one.up_bias)
        out = product(gated(*both, activation_of(one, spec)).astype(dtype), one.down, one.down_bias)
    if weights.gate is not None:
        out *= jax.nn.sigmoid(product(tokens, weights.gate))[:, None]
    return out.astype(dtype)
