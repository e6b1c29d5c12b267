"""Block sizes of dispatch, experts and combine in one kernel, by arithmetic over VMEM; pure."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable

from moe_kernels.backends.tpu.common.tiling import PIECE, RowCuts, Sizes, Tiles, chunks, one_item, row_tiles
from moe_kernels.backends.tpu.common.vmem import fits, needed_vmem, vmem_bytes
from moe_kernels.backends.tpu.mlp.tiles import mlp_backward_bytes, mlp_forward_bytes
from moe_kernels.types import round_up

# Weights of each matmul in a stretch of code at most, where rows are moved beside them: compiling takes as long.
MOST_WEIGHTS = 1280 * 2560


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
def fused_tiles(sizes: Sizes, *, keep_rows: bool = False) -> FusedTiles | None:
    """Block sizes of dispatch, experts and combine in one kernel; None where all tokens and a chunk do not fit.

    With `keep_rows` there is place for the rows of two experts, which are written.

    >>> from moe_kernels.chips import TPUS
    >>> from moe_kernels.types import Layout
    >>> tiles = fused_tiles(Sizes(Layout(16384, 1, 1, 32, 17408, 544), 768, 3072, 2, 2, TPUS["v6e"]))
    >>> tiles.mlp.chunk, tiles.part
    (3072, 544)
    """
    rows, width, expert_width = next(row_tiles(sizes.layout, sizes.chip)), sizes.width, sizes.expert_width
    rows = dataclasses.replace(rows, pieces=rows.pieces[:1])
    even = [expert_width // n for n in range(1, 5) if expert_width % (128 * n) == 0]
    even = [(chunk, expert_width) for chunk in even if width * chunk <= MOST_WEIGHTS]
    # Longer chunks have the matmuls run on, longer blocks of tokens are fewer steps.
    # Chunks that do not fill the MXU come last: what fits with them is still moved less.
    some = [*even, *chunks(expert_width, sizes.chip.depth), *chunks(expert_width, 128)]

    def need(tiles: FusedTiles) -> int:
        words = 512 * tiles.planes * (tiles.stride + 2 * tiles.held_stride)
        held = (1 + keep_rows) * vmem_bytes(rows.rows, width, sizes.itemsize)
        return words + _moving(sizes, tiles, 6, 2) + held + mlp_forward_bytes(sizes, rows, tiles.mlp.chunk)

    return _choose(sizes, rows, itertools.product(some, (2048, 1024, 512)), need, least=512)


@functools.lru_cache
def fused_backward_tiles(sizes: Sizes) -> FusedTiles | None:
    """Block sizes of the backward pass in one kernel; None where all tokens, their cotangents and a chunk do not fit.

    >>> from moe_kernels.chips import TPUS
    >>> from moe_kernels.types import Layout
    >>> tiles = fused_backward_tiles(Sizes(Layout(16384, 1, 1, 32, 17408, 544), 768, 3072, 2, 2, TPUS["v6e"]))
    >>> tiles.mlp.chunk, tiles.part
    (1024, 192)
    """
    rows = next(row_tiles(sizes.layout, sizes.chip, contracted=True))

    def need(tiles: FusedTiles) -> int:
        words = 512 * tiles.planes * (2 * tiles.stride + 3 * tiles.held_stride)
        held = 2 * vmem_bytes(rows.rows, sizes.width, sizes.itemsize)
        return words + _moving(sizes, tiles, 8, 4) + held + mlp_backward_bytes(sizes, rows, tiles.mlp.chunk)

    some = itertools.product(chunks(sizes.expert_width, sizes.chip.depth), (1024, 512, 256))
    return _choose(sizes, rows, some, need, least=256)


def keeps_rows(sizes: Sizes) -> bool:
    """Whether the forward pass in one kernel writes the experts' rows: for a backward pass in parts, if they fit.

    >>> from moe_kernels.chips import TPUS
    >>> from moe_kernels.types import Layout
    >>> layout = Layout(16384, 1, 1, 32, 17408, 544)
    >>> [keeps_rows(Sizes(layout, 768, 3072, 2, 2, TPUS[name])) for name in ("v6e", "7x")]
    [False, True]
    """
    return fused_backward_tiles(sizes) is None and fused_tiles(sizes, keep_rows=True) is not None


def _choose(
    sizes: Sizes,
    rows: RowCuts,
    options: Iterable[tuple[tuple[int, int], int]],
    need: Callable[[FusedTiles], int],
    *,
    least: int,
) -> FusedTiles | None:
    """The first chunk, with F rounded up to it, and block of tokens that fit where an expert is one item."""
    if not one_item(sizes.layout, rows):
        return None
    for (chunk, padded), block in options:
        load = min(block, round_up(max(sizes.layout.num_tokens, 1), PIECE))
        inputs = -(-sizes.layout.num_tokens // load)
        part = round_up(-(-rows.rows // (rows.rows // rows.pieces[0] * (padded // chunk))), PIECE)
        planes = sizes.width * sizes.itemsize // 512
        tiles = FusedTiles(Tiles(rows, chunk, padded, vmem=0), load, inputs, planes, part)
        vmem = needed_vmem(need(tiles))
        if fits(vmem, sizes.chip) and chunk >= min(least, sizes.expert_width):
            return dataclasses.replace(tiles, mlp=dataclasses.replace(tiles.mlp, vmem=vmem))
    return None


def _moving(sizes: Sizes, tiles: FusedTiles, blocks: int, sides: int) -> int:
    """Blocks of tokens that come and go, and numbers of all tokens side by side."""
    numbers = vmem_bytes(tiles.inputs * -(-tiles.load // 128), 128, 4)
    return blocks * vmem_bytes(tiles.load, sizes.width, sizes.itemsize) + sides * numbers
