"""Weights inside a kernel, in the dtype of the rows that they meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe_kernels.backends.tpu.common.launch import Operand
from moe_kernels.backends.tpu.common.rows import Scalar


def room_for_casts(weights: Sequence[Operand], dtype: Any) -> tuple[Any, ...] | None:
    """Scratch memory for a chunk of each weight in the dtype of the rows; None where all have that."""
    if all(weight.array.dtype == dtype for weight in weights):
        return None
    blocks: list[Any] = [weight.spec.block_shape for weight in weights]
    return tuple(pltpu.VMEM(block[1:], dtype) for block in blocks)


def cast_weights(weights: Sequence[Any], casts: Sequence[Any] | None, busy: Scalar) -> tuple[Any, ...]:
    """The chunks of the weights in the dtype of the rows, where there are rows."""
    if casts is None:
        return tuple(weight.at[0] for weight in weights)

    @pl.when(busy)
    def _() -> None:
        for weight, cast in zip(weights, casts, strict=True):
            cast[...] = weight[0].astype(cast.dtype)

    return tuple(casts)
