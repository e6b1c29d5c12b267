"""Whether the hidden layer of an expert MLP is kept for the backward pass or computed again: by the roofline of a chip.

Keeping it saves one of seven matmuls, and moves it to HBM and back. The least time of each pass is the larger of its
multiply-adds at the peak and its bytes at full bandwidth, all of the data sheet: so both times are modelled.
"""

from __future__ import annotations

from typing import NamedTuple

from moe_kernels.backends.tpu.common.tiling import Sizes
from moe_kernels.backends.tpu.mlp.tiles import mlp_backward_tiles, mlp_forward_tiles
from moe_kernels.chips import FLOAT32_PASSES


class HiddenCost(NamedTuple):
    """Least seconds of a forward and a backward pass by the roofline, modelled."""

    again: float
    """With the hidden layer computed again."""
    kept: float


def hidden_cost(sizes: Sizes) -> HiddenCost:
    """Price both ways for all planned rows of a layout, on one core; several share rows and bandwidth alike.

    >>> from moe_kernels.chips import TPUS
    >>> from moe_kernels.types import Layout
    >>> layout = Layout(16384, 1, 1, 32, 17408, 544)
    >>> again, kept = hidden_cost(Sizes(layout, 768, 3072, 2, 2, TPUS["v6e"]))
    >>> f"{again:.2e} {kept:.2e}"
    '6.64e-04 7.64e-04'
    """
    chip, itemsize = sizes.chip, sizes.itemsize
    rows, entries, product = sizes.layout.num_rows, sizes.width * sizes.expert_width, product_seconds(sizes)
    weights = 2 * sizes.layout.num_experts * entries * sizes.weight_itemsize
    row, hidden = rows * sizes.width * itemsize, rows * sizes.expert_width * itemsize

    def seconds(products: int, moved: int) -> float:
        return max(products * product, moved * chip.num_cores / chip.hbm_bandwidth)

    # Forward: weights, x and y. Backward: weights, their gradients, x, dy and dx.
    there, back = weights + 2 * row, 2 * weights + 3 * row
    return HiddenCost(
        again=seconds(2, there) + seconds(5, back), kept=seconds(2, there + hidden) + seconds(4, back + hidden)
    )


def product_seconds(sizes: Sizes) -> float:
    """Least seconds of a product of all planned rows and a matrix of their experts, on one core."""
    chip = sizes.chip
    rate = chip.flops / chip.num_cores / (FLOAT32_PASSES if sizes.itemsize == 4 else 1)
    return 2 * sizes.layout.num_rows * sizes.width * sizes.expert_width / rate


def keeps_hidden(sizes: Sizes) -> bool:
    """Whether keeping takes less time, and fits VMEM. That of gated experts, which is two, is always computed again.

    >>> from moe_kernels.chips import TPUS
    >>> from moe_kernels.types import Layout
    >>> layout = Layout(16384, 1, 1, 32, 17408, 544)
    >>> [name for name, chip in TPUS.items() if keeps_hidden(Sizes(layout, 768, 3072, 2, 2, chip))]
    ['v4', 'v5e', 'v5p', '7x']
    """
    if sizes.gated:
        return False
    cost = hidden_cost(sizes)
    fits = all(choose(sizes, keep=True) is not None for choose in (mlp_forward_tiles, mlp_backward_tiles))
    return fits and cost.kept < cost.again
