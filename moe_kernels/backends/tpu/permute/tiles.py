"""Block sizes of the kernels that move rows, alone or around the experts, by arithmetic over VMEM; pure."""

from __future__ import annotations

import dataclasses
import functools
import itertools

from moe_kernels.backends.tpu.common.tiling import (
    PIECE,
    Tiles,
    chunks,
    mlp_backward_bytes,
    needed_vmem,
    one_item,
    row_tiles,
    vmem_bytes,
)
from moe_kernels.chips import MIB, Tpu
from moe_kernels.fitted import FITTED
from moe_kernels.types import Layout, round_up

# Weights of each matmul in a stretch of code at most, where rows are moved beside them: compiling takes as long.
MOST_WEIGHTS = 1280 * 2560


@dataclasses.dataclass(frozen=True)
class GatherTiles:
    """Block sizes of a gather: `load` rows at a time into VMEM, `out` results at a time out of it.

    A row is a sublane of each of `planes`, which lie `stride` sublanes apart (`out_stride` where a tile is assembled).
    """

    load: int
    inputs: int
    out: int
    outputs: int
    planes: int
    unrolled: int
    vmem: int
    """Bytes that it needs, at most."""

    @property
    def stride(self) -> int:
        """An odd multiple of 8, so that 4 sublanes can be read at once; zeros lie in the last 8."""
        return self.inputs * self.load + 8

    @property
    def out_stride(self) -> int:
        """An odd multiple of 8."""
        return self.out + 8


@functools.lru_cache
def gather_tiles(length: int, count: int, width: int, itemsize: int, terms: int, chip: Tpu) -> GatherTiles | None:
    """Block sizes of `count` sums of `terms` rows each out of `length` rows; None where those do not fit VMEM.

    >>> from moe_kernels.chips import TPUS
    >>> tiles = gather_tiles(16384, 17408, 768, 2, 1, TPUS["v6e"])
    >>> tiles.planes, tiles.stride, tiles.out
    (3, 16392, 512)
    """
    load, out = (min(512, round_up(rows, PIECE)) for rows in (length, count))
    inputs, outputs, planes = -(-length // load), -(-count // out), width * itemsize // 512
    held = planes * 512 * (inputs * load + 8 + terms * (out + 8)) + 512 * terms * out
    # Blocks come and go while others are worked on; a tile of float32 values lies in between.
    moving = 2 * width * itemsize * (load + out) + 2 * 512 * max(load, out)
    vmem = needed_vmem(held + moving)
    tiles = GatherTiles(load, inputs, out, outputs, planes, min(16, out), vmem)
    return tiles if vmem <= chip.vmem else None


@dataclasses.dataclass(frozen=True)
class FusedTiles:
    """Block sizes of dispatch, experts and combine in one kernel: those of its matmuls, and how tokens move.

    Tokens come and go `load` at a time. `part` rows of a neighbouring expert are moved beside every piece of a chunk.
    """

    mlp: Tiles
    load: int
    inputs: int
    planes: int
    part: int

    @property
    def num_pieces(self) -> int:
        """Pieces of an expert that is full."""
        return self.mlp.rows.rows // self.mlp.rows.pieces[0]

    @property
    def moved(self) -> int:
        """Rows that a full expert moves for its neighbour; no fewer than an expert has."""
        return self.part * self.num_pieces * self.mlp.num_chunks

    @property
    def stride(self) -> int:
        """An odd multiple of 8, so that 4 sublanes can be read at once; a spare row lies in the last 8."""
        return self.inputs * self.load + 8

    @property
    def held_stride(self) -> int:
        """An odd multiple of 8."""
        return self.moved + 8


@functools.lru_cache
def fused_tiles(
    layout: Layout,
    width: int,
    expert_width: int,
    itemsize: int,
    weight_itemsize: int,
    chip: Tpu,
    *,
    keep_rows: bool = False,
) -> FusedTiles | None:
    """Block sizes of dispatch, experts and combine in one kernel; None where all tokens and a chunk do not fit.

    With `keep_rows` there is place for the rows of two experts, which are written.

    >>> from moe_kernels.chips import TPUS
    >>> tiles = fused_tiles(Layout(16384, 1, 1, 32, 17408, 544), 768, 3072, 2, 2, TPUS["v6e"])
    >>> tiles.mlp.chunk, tiles.part
    (3072, 544)
    """
    rows = next(row_tiles(layout, chip))
    rows = dataclasses.replace(rows, pieces=rows.pieces[:1])
    if not one_item(layout, rows):
        return None
    planes = width * itemsize // 512
    even = [expert_width // n for n in range(1, 5) if expert_width % (128 * n) == 0]
    even = [(chunk, expert_width) for chunk in even if width * chunk <= MOST_WEIGHTS]
    # Longer chunks have the matmuls run on, longer blocks of tokens are fewer steps.
    # Chunks that do not fill the MXU come last: what fits with them is still moved less.
    some = [*even, *chunks(expert_width, chip.depth), *chunks(expert_width, 128)]
    for (chunk, padded), block in itertools.product(some, (2048, 1024, 512)):
        load = min(block, round_up(max(layout.num_tokens, 1), PIECE))
        inputs = -(-layout.num_tokens // load)
        steps = rows.rows // rows.pieces[0] * (padded // chunk)
        part = round_up(-(-rows.rows // steps), PIECE)
        weights = vmem_bytes(width, chunk, weight_itemsize) + vmem_bytes(chunk, width, weight_itemsize)
        cast = (
            vmem_bytes(width, chunk, itemsize) + vmem_bytes(chunk, width, itemsize)
            if itemsize != weight_itemsize
            else 0
        )
        biases = 2 * 8 * 4 * (round_up(chunk, 128) + round_up(width, 128))
        words = 512 * planes * (inputs * load + 8 + 2 * (part * steps + 8))
        moving = 6 * vmem_bytes(load, width, itemsize) + 2 * vmem_bytes(inputs * -(-load // 128), 128, 4)
        held = (1 + keep_rows) * vmem_bytes(rows.rows, width, itemsize) + vmem_bytes(rows.rows, width, 4)
        values = FITTED.hidden_copies[chip.name] * rows.pieces[0] * round_up(chunk, 128) * itemsize
        vmem = needed_vmem(2 * weights + cast + biases + words + moving + held + values)
        if vmem <= chip.vmem - MIB and chunk >= min(512, expert_width):
            return FusedTiles(Tiles(rows, chunk, padded, vmem), load, inputs, planes, part)
    return None


def keeps_rows(layout: Layout, width: int, expert_width: int, itemsize: int, weight_itemsize: int, chip: Tpu) -> bool:
    """Whether the forward pass in one kernel writes the experts' rows: for a backward pass in parts, if they fit.

    >>> from moe_kernels.chips import TPUS
    >>> layout = Layout(16384, 1, 1, 32, 17408, 544)
    >>> [keeps_rows(layout, 768, 3072, 2, 2, TPUS[name]) for name in ("v6e", "7x")]
    [False, True]
    """
    sizes = (layout, width, expert_width, itemsize, weight_itemsize, chip)
    return fused_backward_tiles(*sizes) is None and fused_tiles(*sizes, keep_rows=True) is not None


@functools.lru_cache
def fused_backward_tiles(
    layout: Layout, width: int, expert_width: int, itemsize: int, weight_itemsize: int, chip: Tpu
) -> FusedTiles | None:
    """Block sizes of the backward pass in one kernel; None where all tokens, their cotangents and a chunk do not fit.

    >>> from moe_kernels.chips import TPUS
    >>> tiles = fused_backward_tiles(Layout(16384, 1, 1, 32, 17408, 544), 768, 3072, 2, 2, TPUS["v6e"])
    >>> tiles.mlp.chunk, tiles.part
    (1024, 192)
    """
    rows = next(row_tiles(layout, chip, contracted=True))
    if not one_item(layout, rows):
        return None
    planes = width * itemsize // 512
    for (chunk, padded), block in itertools.product(chunks(expert_width, chip.depth), (1024, 512, 256)):
        load = min(block, round_up(max(layout.num_tokens, 1), PIECE))
        inputs = -(-layout.num_tokens // load)
        steps = rows.rows // rows.pieces[0] * (padded // chunk)
        part = round_up(-(-rows.rows // steps), PIECE)
        words = 512 * planes * (2 * (inputs * load + 8) + 3 * (part * steps + 8))
        moving = 8 * vmem_bytes(load, width, itemsize) + 4 * vmem_bytes(inputs * -(-load // 128), 128, 4)
        held = 2 * vmem_bytes(rows.rows, width, itemsize)
        matmuls = mlp_backward_bytes(layout, rows, width, chunk, itemsize, weight_itemsize)
        vmem = needed_vmem(words + moving + held + matmuls)
        if vmem <= chip.vmem - MIB and chunk >= min(256, expert_width):
            return FusedTiles(Tiles(rows, chunk, padded, vmem), load, inputs, planes, part)
    return None
