"""The TPU back end: Pallas kernels for the Mosaic compiler; interpreted on other platforms when asked for by name."""

from __future__ import annotations

import functools

from moe_kernels.backends.base import Backend, Problem, Span
from moe_kernels.backends.tpu.launch import STAND_IN, Target
from moe_kernels.backends.tpu.mlp import expert_mlp_forward
from moe_kernels.backends.tiling import CHIPS
