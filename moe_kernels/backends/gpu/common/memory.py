"""What Mosaic GPU sets aside in shared memory, and how many stages of a ring fit beside it; pure."""

from __future__ import annotations

from collections.abc import Callable

from moe_kernels.chips import Generation

BARRIER_BYTES = 8
# For sums across the warps of a warpgroup.
REDUCTION_BYTES = 2048
# Arrays are aligned to this.
ALLOCATION_BYTES = 1024
MAX_STAGES = 6


def most_stages(bytes_with: Callable[[int], int], chip: Generation) -> int:
    """How many stages a ring gets: as many as fit, from two to MAX_STAGES.

    >>> most_stages(lambda stages: stages * 50_000, Generation("hopper", 232_448))
    4
    """
    for stages in range(MAX_STAGES, 1, -1):
        if bytes_with(stages) <= chip.shared_memory:
            return stages
    raise AssertionError(f"two stages take {bytes_with(2)} bytes of shared memory; there are {chip.shared_memory}")
