"""Block sizes of the expert MLP, by arithmetic over VMEM; pure."""

from __future__ import annotations

import functools

from moe_kernels.backends.tpu.common.tiling import RowCuts, Sizes, Tiles, choose_tiles, one_item, straight
from moe_kernels.backends.tpu.common.vmem import vmem_bytes
from moe_kernels.fitted import FITTED
from moe_kernels.types import round_up


@functools.lru_cache
def mlp_forward_tiles(sizes: Sizes, *, keep: bool = False) -> Tiles | None:
    """Block sizes of the forward pass, or None where not even the smallest fit; `keep` writes the hidden layer.

    >>> from moe_kernels.chips import TPUS
    >>> from moe_kernels.types import Layout
    >>> tiles = mlp_forward_tiles(Sizes(Layout(16384, 1, 1, 32, 17408, 544), 768, 3072, 2, 2, TPUS["v6e"]))
    >>> tiles.rows.rows, tiles.chunk
    (544, 1024)
    """
    return choose_tiles(sizes, functools.partial(mlp_forward_need, keep=keep))


@functools.lru_cache
def mlp_backward_tiles(sizes: Sizes, *, keep: bool = False) -> Tiles | None:
    """Block sizes of the backward pass, or None where not even the smallest fit; `keep` reads the hidden layer.

    >>> from moe_kernels.chips import TPUS
    >>> from moe_kernels.types import Layout
    >>> tiles = mlp_backward_tiles(Sizes(Layout(16384, 1, 1, 32, 17408, 544), 768, 3072, 2, 2, TPUS["v6e"]))
    >>> tiles.rows.rows, tiles.chunk
    (544, 1024)
    """
    return choose_tiles(sizes, functools.partial(mlp_backward_need, keep=keep), contracted=True)


def mlp_forward_need(sizes: Sizes, rows: RowCuts, chunk: int, *, keep: bool = False) -> int:
    """Bytes of the forward pass: two items' rows, chunks of the hidden layer, and what a chunk of weights needs."""
    return _rows(sizes, rows, chunk, 2, keep) + mlp_forward_bytes(sizes, rows, chunk)


def mlp_backward_need(sizes: Sizes, rows: RowCuts, chunk: int, *, keep: bool = False) -> int:
    """Bytes of the backward pass, likewise: rows and their gradients."""
    return _rows(sizes, rows, chunk, 4, keep) + mlp_backward_bytes(sizes, rows, chunk)


def mlp_forward_bytes(sizes: Sizes, rows: RowCuts, chunk: int) -> int:
    """VMEM of a forward pass beside its rows: weights, sums, and the values between matmuls."""
    copies = FITTED.hidden_copies[sizes.chip.name]
    values = (copies + 2 * sizes.gated) * rows.pieces[0] * round_up(chunk, 128) * sizes.itemsize
    total = vmem_bytes(rows.rows, sizes.width, 4)
    return _weights(sizes, chunk) + 2 * _biases(sizes, chunk) + total + values


def mlp_backward_bytes(sizes: Sizes, rows: RowCuts, chunk: int) -> int:
    """VMEM of a backward pass beside its rows: weights and their gradients, sums, and the values between matmuls."""
    out = sizes.weight_itemsize if one_item(sizes.layout, rows) else 4
    sums = 0 if out == 4 or straight(sizes.layout, rows) else _matrices(sizes, chunk, 4)
    hidden, width = vmem_bytes(rows.pieces[0], chunk, 4), vmem_bytes(rows.pieces[0], sizes.width, 4)
    values = (5 if sizes.gated else 3) * hidden + 3 * width
    total = vmem_bytes(rows.rows, sizes.width, 4)
    return _weights(sizes, chunk) + 2 * _matrices(sizes, chunk, out) + sums + 4 * _biases(sizes, chunk) + total + values


def _rows(sizes: Sizes, rows: RowCuts, chunk: int, places: int, keep: bool) -> int:
    held = places * vmem_bytes(rows.rows, sizes.width, sizes.itemsize)
    return held + (2 * vmem_bytes(rows.rows, chunk, sizes.itemsize) if keep else 0)


def _matrices(sizes: Sizes, chunk: int, itemsize: int) -> int:
    """A chunk of every matrix."""
    return (1 + sizes.gated) * vmem_bytes(sizes.width, chunk, itemsize) + vmem_bytes(chunk, sizes.width, itemsize)


def _weights(sizes: Sizes, chunk: int) -> int:
    """Chunks of two steps, and one in the dtype of the rows."""
    return 2 * _matrices(sizes, chunk, sizes.weight_itemsize) + sizes.cast * _matrices(sizes, chunk, sizes.itemsize)


def _biases(sizes: Sizes, chunk: int) -> int:
    """A chunk of both biases: a register's sublanes each."""
    return 8 * 4 * (round_up(chunk, 128) + round_up(sizes.width, 128))
