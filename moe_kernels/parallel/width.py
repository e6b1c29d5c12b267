"""Experts whose hidden layer is split over a mesh axis too: for experts that do not fit on a device.

Devices that differ only in `ExchangeSpec.width_axis` have the same tokens, decide the same and exchange the same rows.
Each computes its part of the hidden layer of its experts, `y = Σ act(x w1[:, part]) w2[part] + b2`. Combine is linear
in the rows, so the parts are added up after it: `[T, D]` once forward. An output's bias is added by the first device.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from moe_kernels.experts import expert_sizes
from moe_kernels.spec import ExchangeSpec, MoeSpec
from moe_kernels.types import JoinedGluWeights, PlainWeights

# The axis F of an array of weights. Biases of the output have none.
WIDTH_AT = {"w1": 2, "gate": 2, "up": 2, "gate_up": 2, "w2": 1, "down": 1}
WIDTH_AT |= {"b1": 1, "gate_bias": 1, "up_bias": 1, "gate_up_bias": 1}
OUTPUT_BIASES = ("b2", "down_bias")


def split_weights(weights: PlainWeights, exchange: ExchangeSpec) -> Any:
    """Say how the experts' weights are split over the mesh, as a `PartitionSpec` for each.

    >>> from moe_kernels import GluWeights
    >>> weights = GluWeights(jnp.ones((2, 4, 8)), jnp.ones((2, 4, 8)), jnp.ones((2, 8, 4)))
    >>> split_weights(weights, ExchangeSpec(width_axis="width")).down == PartitionSpec("expert", "width")
    True
    """
    experts, width = exchange.expert_axis, exchange.width_axis

    def split(name: str) -> PartitionSpec:
        if width is None or name not in WIDTH_AT:
            return PartitionSpec(experts)
        return PartitionSpec(experts, *(None,) * (WIDTH_AT[name] - 1), width)

    return weights._make(split(name) for name in weights._fields)


def check_width(weights: PlainWeights, spec: MoeSpec, num_devices: int) -> None:
    """Refuse experts whose hidden layer cannot be split over this many devices. Raises ValueError."""
    width, axis = expert_sizes(weights).expert_width, spec.exchange.width_axis
    if width % num_devices:
        raise ValueError(
            f"experts of width F={width} cannot be split over {num_devices} devices of mesh axis {axis!r}; use a "
            f"divisor of {width}"
        )
    if isinstance(weights, JoinedGluWeights) and not spec.interleaved and num_devices > 1:
        raise ValueError(
            f"gate_up with all columns of gate first cannot be split over mesh axis {axis!r}; pass GluWeights, or let "
            "the columns alternate (MoeSpec.interleaved)"
        )


def own_part(weights: PlainWeights, exchange: ExchangeSpec) -> PlainWeights:
    """Leave the biases of the output to the first device of the width axis, so that they are added once."""
    if exchange.width_axis is None:
        return weights
    first = jax.lax.axis_index(exchange.width_axis) == 0
    biases = {name: getattr(weights, name, None) for name in OUTPUT_BIASES}
    own = {name: jnp.where(first, bias, jnp.zeros((), bias.dtype)) for name, bias in biases.items() if bias is not None}
    return weights._replace(**own)


def sum_parts(tokens: Float[Array, "T D"], exchange: ExchangeSpec) -> Float[Array, "T D"]:
    """Add up the outputs of the devices of the width axis."""
    return tokens if exchange.width_axis is None else jax.lax.psum(tokens, exchange.width_axis)
