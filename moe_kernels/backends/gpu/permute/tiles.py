"""Pieces of rows that a gather moves, by arithmetic over shared memory; pure."""

from __future__ import annotations

import dataclasses

from moe_kernels.backends.gpu.common.launch import NUM_CONSUMERS
from moe_kernels.backends.gpu.common.memory import ALLOCATION_BYTES, BARRIER_BYTES, REDUCTION_BYTES, most_stages
from moe_kernels.chips import Generation
from moe_kernels.types import round_up

# A gather moves 16 bytes a thread, half a warp along a row; 8 rows a consumer, up to 2 KB of each at a time.
ACCESS_BYTES = 16
HALF_WARP = 16
GATHER_ROWS = 8
PIECE_BYTES = 2048
WIDTH_ALIGNMENT = 128


@dataclasses.dataclass(frozen=True)
class GatherBlocks:
    """A stage of a gather: pieces of so many columns, over a ring of `stages`."""

    columns: int
    stages: int


def gather_shared_memory(blocks: GatherBlocks, itemsize: int, *, weighed: bool, products: bool) -> int:
    """Bytes of shared memory that a gather allocates: pieces, indices and weights of every stage, barriers."""
    rows = NUM_CONSUMERS * GATHER_ROWS * blocks.stages
    arrays = [blocks.columns * itemsize] * (2 if products else 1) + [4] * (2 if weighed else 1)
    held = sum(round_up(rows * size, ALLOCATION_BYTES) for size in arrays)
    return held + 2 * blocks.stages * BARRIER_BYTES + (REDUCTION_BYTES if products else 0)


def gather_blocks(width: int, itemsize: int, chip: Generation, *, products: bool = False) -> GatherBlocks:
    """The widest piece that divides a row, with as many stages as fit.

    >>> gather_blocks(768, 2, Generation("hopper", 232448))
    GatherBlocks(columns=768, stages=6)
    >>> gather_blocks(7168, 4, Generation("hopper", 232448), products=True)
    GatherBlocks(columns=512, stages=3)
    """
    assert width % WIDTH_ALIGNMENT == 0
    widest = PIECE_BYTES // itemsize // WIDTH_ALIGNMENT
    columns = next(n for n in range(widest, 0, -1) if width // WIDTH_ALIGNMENT % n == 0) * WIDTH_ALIGNMENT

    def bytes_with(stages: int) -> int:
        return gather_shared_memory(GatherBlocks(columns, stages), itemsize, weighed=True, products=products)

    return GatherBlocks(columns, most_stages(bytes_with, chip))
