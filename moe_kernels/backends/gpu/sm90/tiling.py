"""Block sizes by arithmetic over shared memory and registers; pure."""

from __future__ import annotations

import dataclasses
from typing import Literal

from moe_kernels.chips import Generation
from moe_kernels.types import round_up

# wgmma multiplies 64 rows of a warpgroup; a swizzled row of shared memory holds 128 bytes, 64 elements of 16 bits.
WARPGROUP_ROWS = 64
DEPTH = 64
CHUNK = 64
SWIZZLE_BYTES = 128
ITEMSIZE = 2
# Tiles are 128 rows, two consumers' worth; widths that 128 does not divide would need copies that hang over.
WIDTH_ALIGNMENT = 128
NUM_CONSUMERS = 2
# 65,536 registers are 512 for each thread of a warpgroup: 40 for the producer's leave 232 for both consumers'.
PRODUCER_REGISTERS = 40
CONSUMER_REGISTERS = 232
# Registers of addresses, loop counters and barriers: what ptxas used above the accumulator (JAX 0.10.2, November 2026).
OTHER_REGISTERS = 40
BARRIER_BYTES = 8
MAX_STAGES = 6
# A gather moves 16 bytes a thread, half a warp along a row; 8 rows a consumer, up to 2 KB of each at a time.
ACCESS_BYTES = 16
HALF_WARP = 16
GATHER_ROWS = 8
PIECE_BYTES = 2048

# The sums' ring; and what Mosaic sets aside for sums across the warps of a warpgroup.
SUM_STAGES = 8
REDUCTION_BYTES = 2048
ALLOCATION_BYTES = 1024

Kernel = Literal["store", "activate", "gated", "gated_erf", "activate_backward", "weight_gradient", "column_sums"]
# Float32 tiles of 64 x 64 that a consumer's epilogue holds in registers beside the accumulator.
LIVE_CHUNKS: dict[Kernel, int] = {
    "store": 1,
    "activate": 2,
    "gated": 2,
    "gated_erf": 3,
    "activate_backward": 4,
    "weight_gradient": 1,
    "column_sums": 2,
}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile of a kernel: `rows x columns` of the result, worked 64 deep at a time over a ring of `stages`."""

    rows: int
    columns: int
    stages: int


@dataclasses.dataclass(frozen=True)
class GatherBlocks:
    """A stage of a gather: pieces of so many columns, over a ring of `stages`."""

    columns: int
    stages: int


def registers(kernel: Kernel, columns: int) -> int:
    """Registers a consumer thread needs: accumulator, live tiles of the epilogue, and the rest.

    >>> registers("store", 256)
    200
    """
    per_thread = WARPGROUP_ROWS * columns // 128
    return per_thread + LIVE_CHUNKS[kernel] * (WARPGROUP_ROWS * CHUNK // 128) + OTHER_REGISTERS


def shared_memory(kernel: Kernel, blocks: Blocks, *, bias: bool = False) -> int:
    """Bytes of shared memory that a kernel allocates: ring, buffers of the epilogue, barriers.

    >>> shared_memory("store", Blocks(128, 256, 4)) <= 232448
    True
    """
    if kernel == "column_sums":
        ring = blocks.stages * blocks.columns * DEPTH * ITEMSIZE
        return ring + ALLOCATION_BYTES + REDUCTION_BYTES + 2 * blocks.stages * BARRIER_BYTES
    stage = (blocks.rows + blocks.columns) * DEPTH * ITEMSIZE
    buffers = NUM_CONSUMERS * 2 * WARPGROUP_ROWS * SWIZZLE_BYTES
    total = blocks.stages * stage + buffers
    barriers = 2 * blocks.stages
    if kernel == "activate_backward":
        total += buffers
        barriers += 2 * NUM_CONSUMERS
    if kernel == "weight_gradient":
        barriers += 1
    if bias:
        total += NUM_CONSUMERS * blocks.columns * 4
        barriers += NUM_CONSUMERS
    return total + barriers * BARRIER_BYTES


def choose_blocks(kernel: Kernel, columns: int, chip: Generation, *, bias: bool = False) -> Blocks:
    """The widest tile that divides the columns and fits the registers, with as many stages as fit.

    >>> from moe_kernels.chips import find_generation
    >>> choose_blocks("store", 768, find_generation("NVIDIA H200"))
    Blocks(rows=128, columns=256, stages=4)
    >>> from moe_kernels.chips import find_generation
    >>> choose_blocks("activate_backward", 768, find_generation("NVIDIA H200")).columns
    128
    """
    assert columns % WIDTH_ALIGNMENT == 0
    if kernel == "column_sums":
        return Blocks(DEPTH, NUM_CONSUMERS * CHUNK, SUM_STAGES)
    fitting = (w for w in chip.columns if columns % w == 0 and registers(kernel, w) <= CONSUMER_REGISTERS)
    width = next(fitting)
    for stages in range(MAX_STAGES, 1, -1):
        blocks = Blocks(NUM_CONSUMERS * WARPGROUP_ROWS, width, stages)
        if shared_memory(kernel, blocks, bias=bias) <= chip.shared_memory:
            return blocks
    raise AssertionError(f"no two stages of {kernel} with {width} columns fit {chip.shared_memory} bytes")


def gather_shared_memory(blocks: GatherBlocks, itemsize: int, *, weighed: bool, products: bool) -> int:
    """Bytes of shared memory that a gather allocates: pieces, indices and weights of every stage, barriers."""
    rows = NUM_CONSUMERS * GATHER_ROWS * blocks.stages
    arrays = [blocks.columns * itemsize] * (2 if products else 1) + [4] * (2 if weighed else 1)
    held = sum(round_up(rows * size, ALLOCATION_BYTES) for size in arrays)
    return held + 2 * blocks.stages * BARRIER_BYTES + (REDUCTION_BYTES if products else 0)


def gather_blocks(width: int, itemsize: int, chip: Generation, *, products: bool = False) -> GatherBlocks:
    """The widest piece that divides a row, with as many stages as fit.

    >>> from moe_kernels.chips import find_generation
    >>> gather_blocks(768, 2, find_generation("NVIDIA H200"))
    GatherBlocks(columns=768, stages=6)
    >>> from moe_kernels.chips import find_generation
    >>> gather_blocks(7168, 4, find_generation("NVIDIA H200"), products=True)
    GatherBlocks(columns=512, stages=3)
    """
    assert width % WIDTH_ALIGNMENT == 0
    widest = PIECE_BYTES // itemsize // WIDTH_ALIGNMENT
    pieces = next(n for n in range(widest, 0, -1) if width // WIDTH_ALIGNMENT % n == 0)
    for stages in range(MAX_STAGES, 1, -1):
        blocks = GatherBlocks(pieces * WIDTH_ALIGNMENT, stages)
        if gather_shared_memory(blocks, itemsize, weighed=True, products=products) <= chip.shared_memory:
            return blocks
    raise AssertionError(f"no two stages of {pieces * WIDTH_ALIGNMENT} columns fit {chip.shared_memory} bytes")


# What a consumer's wgmma can have, for three pieces of the router.
MOST_COLUMNS = 256


def route_shared_memory(columns: int, stages: int) -> int:
    """Bytes of shared memory that routing allocates: the ring, sums across warps, barriers."""
    stage = (NUM_CONSUMERS * WARPGROUP_ROWS + columns) * DEPTH * ITEMSIZE
    return stages * stage + REDUCTION_BYTES + 2 * stages * BARRIER_BYTES


def route_blocks(columns: int, chip: Generation) -> Blocks:
    """A tile of 128 tokens and all columns (experts, three times) with as many stages as fit.

    >>> from moe_kernels.chips import find_generation
    >>> route_blocks(96, find_generation("NVIDIA H200"))
    Blocks(rows=128, columns=96, stages=6)
    """
    assert columns % 8 == 0 and columns <= MOST_COLUMNS
    stages = next(n for n in range(MAX_STAGES, 1, -1) if route_shared_memory(columns, n) <= chip.shared_memory)
    return Blocks(NUM_CONSUMERS * WARPGROUP_ROWS, columns, stages)
