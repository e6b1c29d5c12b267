"""The oracle: LIMoE in NumPy and float64, as simple loops. It shares no code with the product."""

from reference import losses, metrics, model
from reference.activations import activate, activate_derivative, gelu, gelu_derivative
from reference.glu import Clamped, GluWeights, glu_experts, glu_experts_gradient
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
    moe_layer,
    moe_layer_gradient,
)
from reference.plan import Plan, claim_order, expert_capacity, make_plan
from reference.routing import (
    Router,
    Routing,
    RoutingSums,
    entropy,
    logsumexp,
    route,
    route_gradient,
    softmax,
    zero_sums,
)

__all__ = [
    "Clamped",
    "GluWeights",
    "MatmulGradients",
    "MlpWeights",
    "MoeGradients",
    "MoeOutput",
    "Plan",
    "Router",
    "Routing",
    "RoutingSums",
    "activate",
    "activate_derivative",
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
    "glu_experts",
    "glu_experts_gradient",
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
