"""Block sizes by arithmetic over shared memory and registers; pure."""

from __future__ import annotations

import dataclasses
from typing import Literal

from moe_kernels.backends.gpu.common.launch import CONSUMER_REGISTERS, NUM_CONSUMERS
from moe_kernels.backends.gpu.common.memory import ALLOCATION_BYTES, BARRIER_BYTES, REDUCTION_BYTES, most_stages
from moe_kernels.chips import Generation

# wgmma multiplies 64 rows of a warpgroup; a swizzled row of shared memory holds 128 bytes, 64 elements of 16 bits.
WARPGROUP_ROWS = 64
DEPTH = 64
CHUNK = 64
SWIZZLE_BYTES = 128
ITEMSIZE = 2
# Columns of wgmma in a tile, wider ones first. Widths that 128 does not divide would need copies that hang over.
COLUMNS = (256, 128)
WIDTH_ALIGNMENT = 128
# Registers of addresses, loop counters and barriers: what ptxas used above the accumulator (JAX 0.10.2, November 2026).
OTHER_REGISTERS = 40
# The ring of sums over rows.
SUM_STAGES = 8

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

    >>> choose_blocks("store", 768, Generation("hopper", 232448))
    Blocks(rows=128, columns=256, stages=4)
    >>> choose_blocks("activate_backward", 768, Generation("hopper", 232448)).columns
    128
    """
    assert columns % WIDTH_ALIGNMENT == 0
    if kernel == "column_sums":
        return Blocks(DEPTH, NUM_CONSUMERS * CHUNK, SUM_STAGES)
    width = next(w for w in COLUMNS if columns % w == 0 and registers(kernel, w) <= CONSUMER_REGISTERS)
    blocks = Blocks(NUM_CONSUMERS * WARPGROUP_ROWS, width, 0)
    with_stages = lambda stages: dataclasses.replace(blocks, stages=stages)  # noqa: E731
    return with_stages(most_stages(lambda stages: shared_memory(kernel, with_stages(stages), bias=bias), chip))


# What a consumer's wgmma can have, for three pieces of the router.
MOST_COLUMNS = 256


def route_shared_memory(columns: int, stages: int) -> int:
    """Bytes of shared memory that routing allocates: the ring, sums across warps, barriers."""
    stage = (NUM_CONSUMERS * WARPGROUP_ROWS + columns) * DEPTH * ITEMSIZE
    return stages * stage + REDUCTION_BYTES + 2 * stages * BARRIER_BYTES


def route_blocks(columns: int, chip: Generation) -> Blocks:
    """A tile of 128 tokens and all columns (experts, three times) with as many stages as fit.

    >>> route_blocks(96, Generation("hopper", 232448))
    Blocks(rows=128, columns=96, stages=6)
    """
    assert columns % 8 == 0 and columns <= MOST_COLUMNS
    stages = most_stages(lambda stages: route_shared_memory(columns, stages), chip)
    return Blocks(NUM_CONSUMERS * WARPGROUP_ROWS, columns, stages)
