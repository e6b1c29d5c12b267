"""The oracle: LIMoE in NumPy and float64, in loops that can be checked by eye. It shares no code with the product."""

from reference import losses, metrics, model
from reference.matmul import MatmulGradients, grouped_matmul, grouped_matmul_gradient
from reference.moe import (
    MlpWeights,
    MoeGradients,
    MoeOutput,
    combine,
    combine_gradient,
    dispatch,
    dispatch_gradient,
    expert_mlp,
    expert_mlp_gradient,
    gelu,
    gelu_derivative,
    moe_layer,
    moe_layer_gradient,
)
from reference.plan import Plan, claim_order, expert_capacity, make_plan
from reference.routing import Routing, RoutingSums, entropy, logsumexp, route, route_gradient, softmax, zero_sums

__all__ = [
    "MatmulGradients",
    "MlpWeights",
    "MoeGradients",
    "MoeOutput",
    "Plan",
    "Routing",
    "RoutingSums",
    "claim_order",
    "combine",
    "combine_gradient",
    "dispatch",
    "dispatch_gradient",
    "entropy",
    "expert_capacity",
    "expert_mlp",
    "expert_mlp_gradient",
    "gelu",
    "gelu_derivative",
    "grouped_matmul",
    "grouped_matmul_gradient",
    "logsumexp",
    "losses",
    "make_plan",
    "metrics",
    "model",
    "moe_layer",
    "moe_layer_gradient",
    "route",
    "route_gradient",
    "softmax",
    "zero_sums",
]
