"""Mixture-of-experts kernels for JAX: top-k routing, capacity-aware dispatch and combine, expert matmuls, gradients."""

from moe_kernels.backends import explain
from moe_kernels.backends.base import Problem
from moe_kernels.experts import expert_mlp, grouped_glu, grouped_matmul
from moe_kernels.figures import RoutingFigures, entropy_of_mean, routing_figures
from moe_kernels.layer import SAVED_NAMES, moe_mlp
from moe_kernels.parallel import mesh as expert_parallel
from moe_kernels.parallel.mesh import EXCHANGE_NAMES
from moe_kernels.permute import combine, dispatch
from moe_kernels.plan import bpr_priority, expert_capacity, make_plan, modality_priority, random_priority
from moe_kernels.routing import route, router_noise
from moe_kernels.types import (
    Activation,
    Layout,
    MatmulActivation,
    MlpWeights,
    MoeOutput,
    Plan,
    Priority,
    Routing,
    RoutingSums,
    Runs,
)

__all__ = [
    "EXCHANGE_NAMES",
    "SAVED_NAMES",
    "Activation",
    "Layout",
    "MatmulActivation",
    "MlpWeights",
    "MoeOutput",
    "Plan",
    "Priority",
    "Problem",
    "Routing",
    "RoutingFigures",
    "RoutingSums",
    "Runs",
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
    "modality_priority",
    "moe_mlp",
    "random_priority",
    "route",
    "router_noise",
    "routing_figures",
]
