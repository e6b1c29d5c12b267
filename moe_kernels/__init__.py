"""Mixture-of-experts kernels for JAX: top-k routing, capacity-aware dispatch and combine, expert matmuls, gradients."""

from moe_kernels import balance, expert_parallel
from moe_kernels.activations import ACTIVATIONS, ClampedSwiglu
from moe_kernels.backends import BACKENDS
from moe_kernels.backends.base import Backend, Problem, Span
from moe_kernels.capacity import expert_capacity
from moe_kernels.experts import expert_mlp, grouped_glu, grouped_matmul
from moe_kernels.explanation import Explanation, explain
from moe_kernels.figures import RoutingFigures, entropy_of_mean, routing_figures
from moe_kernels.layer import moe_mlp
from moe_kernels.local import SAVED_NAMES
from moe_kernels.parallel.shard import EXCHANGE_NAMES, moe_mlp_on_shard
from moe_kernels.permute import combine, dispatch
from moe_kernels.plan import make_plan
from moe_kernels.priority import bpr_priority, modality_priority, random_priority
from moe_kernels.routers import ROUTERS, RouterFamily
from moe_kernels.routing import balance_bias, make_routing, route, router_noise
from moe_kernels.spec import ExchangeSpec, MoeSpec, RouteInputs, RouterSpec
from moe_kernels.types import (
    ExpertWeights,
    GluWeights,
    JoinedGluWeights,
    Layout,
    MlpWeights,
    MoeOutput,
    Plan,
    Priority,
    RouterWeights,
    Routing,
    RoutingSums,
    Runs,
    WithShared,
)

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "EXCHANGE_NAMES",
    "ROUTERS",
    "SAVED_NAMES",
    "Backend",
    "ClampedSwiglu",
    "ExchangeSpec",
    "ExpertWeights",
    "Explanation",
    "GluWeights",
    "JoinedGluWeights",
    "Layout",
    "MlpWeights",
    "MoeOutput",
    "MoeSpec",
    "Plan",
    "Priority",
    "Problem",
    "RouteInputs",
    "RouterFamily",
    "RouterSpec",
    "RouterWeights",
    "Routing",
    "RoutingFigures",
    "RoutingSums",
    "Runs",
    "Span",
    "WithShared",
    "balance",
    "balance_bias",
    "bpr_priority",
    "combine",
    "dispatch",
    "entropy_of_mean",
    "expert_capacity",
    "expert_mlp",
    "expert_parallel",
    "explain",
    "grouped_glu",
    "grouped_matmul",
    "make_plan",
    "make_routing",
    "modality_priority",
    "moe_mlp",
    "moe_mlp_on_shard",
    "random_priority",
    "route",
    "router_noise",
    "routing_figures",
]
