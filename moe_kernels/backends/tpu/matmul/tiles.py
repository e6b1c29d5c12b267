"""Block sizes of the grouped matmul, by arithmetic over VMEM; pure."""

from __future__ import annotations

import functools

from moe_kernels.backends.tpu.common.tiling import RowCuts, Sizes, Tiles, choose_tiles, one_item
from moe_kernels.backends.tpu.common.vmem import vmem_bytes
from moe_kernels.fitted import FITTED
from moe_kernels.types import Epilogue


@functools.lru_cache
def matmul_forward_tiles(sizes: Sizes, *, epilogue: Epilogue = "none") -> Tiles | None:
    """Block sizes of a grouped matmul, or None where not even the smallest fit.

    >>> from moe_kernels.chips import TPUS
    >>> from moe_kernels.types import Layout
    >>> matmul_forward_tiles(Sizes(Layout(16384, 1, 1, 32, 17408, 544), 768, 3072, 2, 2, TPUS["v6e"])).chunk
    1024
    """
    return choose_tiles(sizes, functools.partial(matmul_forward_need, epilogue=epilogue))


@functools.lru_cache
def matmul_backward_tiles(sizes: Sizes, *, epilogue: Epilogue = "none") -> Tiles | None:
    """Block sizes of all gradients of a grouped matmul, or None where not even the smallest fit.

    >>> from moe_kernels.chips import TPUS
    >>> from moe_kernels.types import Layout
    >>> matmul_backward_tiles(Sizes(Layout(16384, 1, 1, 32, 17408, 544), 768, 3072, 2, 2, TPUS["v6e"])).chunk
    1024
    """
    return choose_tiles(sizes, functools.partial(matmul_backward_need, epilogue=epilogue), contracted=True)


def matmul_forward_need(sizes: Sizes, rows: RowCuts, chunk: int, *, epilogue: Epilogue = "none") -> int:
    """Bytes of the forward pass: rows, results, chunks of each matrix, and the values between matmuls."""
    width, itemsize = sizes.width, sizes.itemsize
    weights = 2 * vmem_bytes(width, chunk, sizes.weight_itemsize) + sizes.cast * vmem_bytes(width, chunk, itemsize)
    # Rows as the MXU wants them; with an epilogue half of its product, or the first of a pair, rounded.
    values = vmem_bytes(rows.pieces[0], width, itemsize)
    values += {"none": 0, "pointwise": 1, "gated": 2}[epilogue] * vmem_bytes(rows.pieces[0], chunk, itemsize) // 2
    return _matrices(epilogue) * weights + _held(sizes, rows, chunk) + values


def matmul_backward_need(sizes: Sizes, rows: RowCuts, chunk: int, *, epilogue: Epilogue = "none") -> int:
    """Bytes of the backward pass: the same, gradients of each matrix, and the sums of those of rows."""
    width, itemsize, matrices = sizes.width, sizes.itemsize, _matrices(epilogue)
    out = sizes.weight_itemsize if one_item(sizes.layout, rows) else 4
    each = 2 * (vmem_bytes(width, chunk, sizes.weight_itemsize) + vmem_bytes(width, chunk, out))
    each += sizes.cast * vmem_bytes(width, chunk, itemsize) + (0 if out == 4 else vmem_bytes(width, chunk, 4))
    # The products that are added to dx; what is computed again: from rows as the MXU wants them, an activation's
    # argument, value and slope.
    products = min(matrices, FITTED.products_of_a_pair[sizes.chip.name])
    values = int(products * vmem_bytes(rows.pieces[0], width, 4) * FITTED.product_share)
    values += 0 if epilogue == "none" else vmem_bytes(rows.pieces[0], width, itemsize)
    values += {"none": 0, "pointwise": 1, "gated": 4}[epilogue] * vmem_bytes(rows.pieces[0], chunk, 4)
    # However few the rows are: what is computed again stands beside a part of a product for the weights.
    part = vmem_bytes(min(width, FITTED.weight_product_rows), chunk, 4)
    values = values if epilogue == "none" else max(values, part)
    return matrices * each + _held(sizes, rows, chunk) + vmem_bytes(rows.rows, width, 4) + values


def _matrices(epilogue: Epilogue) -> int:
    return 2 if epilogue == "gated" else 1


def _held(sizes: Sizes, rows: RowCuts, chunk: int) -> int:
    """Rows of two items, and chunks of two steps."""
    return 2 * vmem_bytes(rows.rows, sizes.width, sizes.itemsize) + 2 * vmem_bytes(rows.rows, chunk, sizes.itemsize)
