"""Whether gated experts are one kernel or two: by the roofline of a chip, as in `hidden.py`.

Two kernels move the hidden layer to HBM and back. One holds a chunk of three matrices at a time, so that fewer rows may
fit beside them, and an expert with many rows fetches its weights again for each item.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from moe_kernels.backends.tpu.common.tiling import Sizes, Tiles, one_item
from moe_kernels.backends.tpu.matmul.tiles import matmul_backward_tiles, matmul_forward_tiles
from moe_kernels.backends.tpu.mlp.hidden import product_seconds
from moe_kernels.backends.tpu.mlp.tiles import mlp_backward_tiles, mlp_forward_tiles


class GluCost(NamedTuple):
    """Least seconds of a forward and a backward pass by the roofline, modelled; infinite for what does not fit VMEM."""

    one: float
    two: float


def glu_cost(sizes: Sizes) -> GluCost:
    """Price both ways for all planned rows of a layout, on one core, with as many rows for each expert.

    >>> from moe_kernels.chips import TPUS
    >>> from moe_kernels.types import Layout
    >>> one, two = glu_cost(Sizes(Layout(16384, 1, 1, 32, 17408, 544), 768, 3072, 2, 2, TPUS["v6e"], gated=True))
    >>> f"{one:.2e} {two:.2e}"
    '1.02e-03 1.31e-03'
    """
    rows = sizes.layout.num_rows * sizes.itemsize
    row, hidden = rows * sizes.width, rows * sizes.expert_width
    down = dataclasses.replace(sizes, width=sizes.expert_width, expert_width=sizes.width, gated=False)
    # Backward, one kernel reads x and dy and writes dx; two also read the hidden layer, and move its gradient.
    return GluCost(
        one=_seconds(sizes, mlp_forward_tiles(sizes), 3, 3, 2 * row)
        + _seconds(sizes, mlp_backward_tiles(sizes), 8, 3, 3 * row, gradients=True),
        two=_seconds(sizes, matmul_forward_tiles(sizes, epilogue="gated"), 2, 2, row + hidden)
        + _seconds(down, matmul_forward_tiles(down), 1, 1, hidden + row)
        + _seconds(down, matmul_backward_tiles(down), 2, 1, 2 * hidden + row, gradients=True)
        + _seconds(sizes, matmul_backward_tiles(sizes, epilogue="gated"), 6, 2, 2 * row + hidden, gradients=True),
    )


def _seconds(
    sizes: Sizes, tiles: Tiles | None, products: int, matrices: int, moved: int, *, gradients: bool = False
) -> float:
    """A pass with so many products of all rows and a matrix, which moves so many bytes beside its matrices."""
    if tiles is None:
        return math.inf
    layout, chip = sizes.layout, sizes.chip
    items = max(1, -(-layout.num_rows // (layout.num_experts * tiles.rows.rows)))
    each = items * sizes.weight_itemsize
    if gradients:
        # Sums of an expert's last item are read again.
        each += sizes.weight_itemsize if one_item(layout, tiles.rows) else (2 * items - 1) * 4
    moved += matrices * layout.num_experts * sizes.width * sizes.expert_width * each
    return max(products * product_seconds(sizes), moved * chip.num_cores / chip.hbm_bandwidth)
