"""Block sizes of the kernel that gathers rows, by arithmetic over VMEM; pure."""

from __future__ import annotations

import dataclasses
import functools

from moe_kernels.backends.tpu.common.tiling import PIECE
from moe_kernels.backends.tpu.common.vmem import needed_vmem
from moe_kernels.chips import Tpu
from moe_kernels.types import round_up


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
