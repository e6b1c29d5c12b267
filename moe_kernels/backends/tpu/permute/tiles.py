"""Block sizes of the kernel that gathers rows, by arithmetic over VMEM; pure."""

from __future__ import annotations

import dataclasses
import functools

from moe_kernels.backends.tpu.common.tiling import PIECE
from moe_kernels.backends.tpu.common.vmem import needed_vmem
from moe_kernels.chips import LANES, Tpu
from moe_kernels.types import round_up

# Bytes of a row that is one sublane of a plane.
PLANE_BYTES = 512


@dataclasses.dataclass(frozen=True)
class GatherTiles:
    """Block sizes of a gather: `load` rows at a time into VMEM, `out` results at a time out of it.

    D is cut into `blocks` of columns, one after the other. A row of a block is a sublane of each of `planes`, which
    lie `stride` sublanes apart (`out_stride` where a tile is assembled).
    """

    load: int
    inputs: int
    out: int
    outputs: int
    planes: int
    blocks: int
    unrolled: int
    """Results whose rows are picked in straight code."""
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

    @property
    def weighed(self) -> int:
        """Rows of a tile that are weighed and added up in straight code: 128, or all of a small tile."""
        return self.out if self.out % LANES else LANES


@functools.lru_cache
def gather_tiles(length: int, count: int, width: int, itemsize: int, terms: int, chip: Tpu) -> GatherTiles | None:
    """Block sizes of `count` sums of `terms` rows each out of `length` rows; None if not even one plane fits VMEM.

    Every block of columns picks all rows again, so there are as few as fit; cores share several evenly where that
    leaves no block without columns. The last may reach behind the last column.

    >>> from moe_kernels.chips import TPUS
    >>> tiles = gather_tiles(16384, 17408, 768, 2, 1, TPUS["v6e"])
    >>> tiles.planes, tiles.blocks, tiles.stride, tiles.out
    (3, 1, 16392, 512)
    >>> tiles = gather_tiles(8192, 16384, 4096, 2, 1, TPUS["v5p"])
    >>> tiles.planes, tiles.blocks
    (8, 2)
    """
    load, out = (min(512, round_up(rows, PIECE)) for rows in (length, count))
    inputs, outputs, total = -(-length // load), -(-count // out), -(-width * itemsize // PLANE_BYTES)
    # Of several terms fewer results, so that the code is not longer.
    unrolled = min(out, 16, 2 ** max(0, (32 // terms).bit_length() - 1))
    for blocks in (1, *range(chip.num_cores, total + chip.num_cores, chip.num_cores)):
        planes = -(-total // blocks)
        held = planes * PLANE_BYTES * (inputs * load + 8 + terms * (out + 8)) + PLANE_BYTES * terms * out
        # Blocks come and go while others are worked on; a tile of float32 values lies in between.
        moving = 2 * planes * PLANE_BYTES * (load + out) + 2 * PLANE_BYTES * max(load, out)
        vmem = needed_vmem(held + moving)
        if vmem <= chip.vmem:
            # Planes that were rounded up may need one block less. None may lie behind the last column.
            return GatherTiles(load, inputs, out, outputs, planes, -(-total // planes), unrolled, vmem)
    return None
