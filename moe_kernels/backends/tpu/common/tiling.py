"""How kernels with experts' weights cut rows and F: what the block sizes of every verb are chosen from; pure."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator

from moe_kernels.backends.tpu.common.vmem import fits, needed_vmem
from moe_kernels.chips import MIB, Tpu
from moe_kernels.types import Layout, round_up

# Rows of two bfloat16 in a register: pieces start at multiples of it.
PIECE = 16
# Rows of an item at most. An expert with more of them has its weights fetched again for each item, which hides under
# the matmuls: 2304 rows are that many multiply-adds for each weight. Packed runs seldom have as many.
MOST_ROWS, MOST_PACKED = 2304, 1152
# Rows of one matmul in a loop over pieces, for each row of the matrix unit's depth, in quarters: more shares a load of
# weights among more rows and takes longer to compile.
MATMUL_QUARTERS = 9


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What block sizes are chosen by: where rows lie, D and F, bytes of an entry of the rows and of the weights."""

    layout: Layout
    width: int
    expert_width: int
    itemsize: int
    weight_itemsize: int
    chip: Tpu
    gated: bool = False
    """Whether an expert MLP has two first matrices, of which one is a gate."""

    @property
    def cast(self) -> bool:
        """Whether weights are brought to the dtype of the rows."""
        return self.itemsize != self.weight_itemsize


@dataclasses.dataclass(frozen=True)
class RowCuts:
    """How rows are cut: `rows` of an item in VMEM, `copied` the most that it fetches, worked on in `pieces`.

    Pieces descend; the first is repeated in a loop, the others take what is left.
    """

    rows: int
    copied: int
    pieces: tuple[int, ...]

    def shorter(self, depth: int) -> int:
        """A first piece that is a multiple of the MXU's depth, for rows that as many of those hold; 0 if none is.

        >>> [RowCuts(544, 544, (piece,)).shorter(depth) for piece, depth in ((544, 256), (272, 128), (256, 128))]
        [512, 256, 0]
        """
        short = self.pieces[0] // depth * depth
        return short if short < self.pieces[0] else 0


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Block sizes of a kernel: rows, and the part of the F axis in VMEM at a time (`padded` is F rounded up to it)."""

    rows: RowCuts
    chunk: int
    padded: int
    vmem: int = 0
    """Bytes that it needs, at most; counted for block sizes that are given by hand."""

    @property
    def num_chunks(self) -> int:
        """Chunks of F."""
        return self.padded // self.chunk


@dataclasses.dataclass(frozen=True)
class GivenTiles:
    """Block sizes that a call brings along for its passes; None for a pass whose sizes are chosen by arithmetic."""

    forward: Tiles | None = None
    backward: Tiles | None = None


def tiles_misfit(tiles: Tiles, sizes: Sizes, needed: int) -> str | None:
    """Why block sizes that are given by hand, and need so many bytes of VMEM, cannot be taken.

    >>> from moe_kernels.chips import TPUS
    >>> sizes = Sizes(Layout(64, 1, 1, 4, 64, 16), 128, 512, 2, 2, TPUS["v6e"])
    >>> tiles_misfit(Tiles(RowCuts(16, 16, (16,)), chunk=384, padded=512), sizes, 0)
    'padded=512 is not at least F=512 and a multiple of chunk=384'
    """
    rows, pieces, depth = tiles.rows.rows, tiles.rows.pieces, sizes.chip.depth
    if not pieces or any(n < PIECE or n % PIECE for n in pieces) or list(pieces) != sorted(set(pieces), reverse=True):
        return f"pieces={pieces} do not descend in multiples of {PIECE} rows"
    if rows < pieces[0] or rows % PIECE or _covered(rows, pieces, depth) > rows:
        return f"pieces={pieces} go over more than rows={rows}; make it a multiple of the first"
    copied = min(rows, sizes.layout.rows_per_expert or sizes.layout.num_rows)
    if tiles.rows.copied != copied:
        return f"copied={tiles.rows.copied} is not {copied}, the most rows that an item has"
    if tiles.padded % tiles.chunk or tiles.padded < sizes.expert_width:
        return f"padded={tiles.padded} is not at least F={sizes.expert_width} and a multiple of chunk={tiles.chunk}"
    if tiles.chunk % 128 and tiles.chunk != tiles.padded:
        return f"chunk={tiles.chunk} is neither a multiple of 128 nor all of F"
    if not fits(needed, sizes.chip):
        return f"they need {needed / MIB:.1f} MiB of VMEM; {sizes.chip.name} has {sizes.chip.vmem // MIB}"
    return None


def pieces(largest: int) -> tuple[int, ...]:
    """A piece and its halves down to 16 rows.

    >>> pieces(272)
    (272, 144, 80, 48, 32, 16)
    """
    sizes = [largest]
    while sizes[-1] > PIECE:
        sizes.append(round_up(sizes[-1] // 2, PIECE) if sizes[-1] // 2 > PIECE else PIECE)
    return tuple(sizes)


def fine_pieces(largest: int) -> tuple[int, ...]:
    """Pieces for rows of any number where two short pieces take longer than one: so close that one nearly fits.

    >>> fine_pieces(560)
    (560, 496, 432, 352, 288, 240, 192, 144, 80, 32)
    """
    shares = (1, 7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 7, 1 / 3, 1 / 4, 1 / 7, 1 / 18)
    return tuple(dict.fromkeys(round_up(math.ceil(largest * share), PIECE) for share in shares))


@functools.lru_cache
def covers(sizes: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """For 0, 16, 32, ... rows: the cheapest set of pieces that covers them, as bits (bit 0 is the first piece).

    A piece costs its rows, or `depth` if that is more: the time that loading the weights takes.

    >>> covers((64, 32, 16), 32)  # 48 rows: 32 + 16 take as long as 64 and compute fewer
    (0, 4, 2, 6, 1)
    """
    options = sorted(
        (sum(max(size, depth) for size in part), sum(part), sum(1 << sizes.index(size) for size in part))
        for n in range(min(4, len(sizes) + 1))
        for part in itertools.combinations(sizes, n)
        if sum(part) <= sizes[0]
    )
    return tuple(next(bits for _, held, bits in options if held >= rows) for rows in range(0, sizes[0] + 1, PIECE))


def computed_rows(count: int, tiles: RowCuts, depth: int, *, shorter: bool = False) -> int:
    """Rows that matmuls run over for an item of `count` rows, `shorter` where as many shorter first pieces may do.

    >>> computed_rows(70, RowCuts(128, 128, (64, 32, 16)), 16)
    80
    >>> [computed_rows(512, RowCuts(544, 544, (272, 144)), 128, shorter=shorter) for shorter in (False, True)]
    [544, 512]
    """
    whole, tail = divmod(count, tiles.pieces[0])
    bits = covers(tiles.pieces, depth)[-(-tail // PIECE)]
    number, short = tiles.rows // tiles.pieces[0], tiles.shorter(depth)
    if shorter and short and whole + (bits & 1) == number and count <= number * short:
        return number * short
    return whole * tiles.pieces[0] + sum(size for n, size in enumerate(tiles.pieces) if bits >> n & 1)


def row_tiles(layout: Layout, chip: Tpu, *, contracted: bool = False) -> Iterator[RowCuts]:
    """Ways to cut the rows, those that fetch weights least often first.

    Where matmuls contract over rows (weight gradients) the MXU takes them by its depth, so a piece of several is a
    multiple of that: 272 rows would cost 384 of a depth of 128, and 544 cost 768 of 256.
    """
    whole = max(layout.rows_per_expert or layout.num_rows, PIECE)
    parts = itertools.count(-(-whole // (MOST_ROWS if layout.rows_per_expert else MOST_PACKED)))
    previous = 0
    while previous != PIECE:
        rows = round_up(-(-whole // next(parts)), PIECE)
        if rows == previous:
            continue
        previous = rows
        steps = -(-rows // (chip.depth * MATMUL_QUARTERS // 4))
        piece = round_up(-(-rows // steps), PIECE)
        if contracted and steps > 1 and piece >= chip.depth:
            piece = piece // chip.depth * chip.depth
        held = round_up(rows, piece)
        sizes = pieces(piece) if layout.rows_per_expert is not None or chip.depth <= 128 else fine_pieces(piece)
        if contracted:
            held = _covered(rows, sizes, chip.depth)
        yield RowCuts(held, min(held, layout.rows_per_expert or layout.num_rows), sizes)


def _covered(rows: int, sizes: tuple[int, ...], depth: int) -> int:
    """Rows that pieces go over at most, for any number of rows up to `rows`.

    >>> _covered(544, (256, 128, 64, 32, 16), 128), _covered(560, (256, 128, 64, 32, 16), 128)
    (544, 576)
    """
    tiles = RowCuts(rows, rows, sizes)
    # Up to the last whole piece it is no more than that.
    return max(computed_rows(count, tiles, depth) for count in range(rows - rows % sizes[0], rows + 1, PIECE))


def chunks(expert_width: int, depth: int) -> Iterator[tuple[int, int]]:
    """Chunks of F and F rounded up to them, the largest first; more than 7% of padding is never worth it.

    A chunk costs the MXU a multiple of its depth. Those of 512 and more that need no padding come before all others: to
    pad weights is to copy them.

    >>> list(chunks(5120, 128))[:4], list(chunks(5120, 256))[:3]
    ([(1024, 5120), (640, 5120), (512, 5120), (768, 5376)], [(1024, 5120), (512, 5120), (768, 5376)])
    """
    if expert_width <= 1024:
        yield expert_width, expert_width
    sizes = [chunk for chunk in (1024, 768, 640, 512, 384, 256, 128) if chunk < expert_width]
    whole = [chunk for chunk in sizes if chunk >= 512 and expert_width % chunk == 0 and chunk % depth == 0]
    yield from ((chunk, expert_width) for chunk in whole)
    for chunk in sizes:
        number = -(-expert_width // chunk)
        if chunk not in whole and (number * round_up(chunk, depth) <= 1.07 * expert_width or chunk in (128, depth)):
            yield chunk, number * chunk


def choose_tiles(sizes: Sizes, need: Callable[[Sizes, RowCuts, int], int], *, contracted: bool = False) -> Tiles | None:
    """The first way to cut the rows for which a chunk of F fits, and the largest chunk; None if nothing fits.

    `need(sizes, rows, chunk)` are the bytes of the kernel's arrays and values.
    """
    expert_width, chip = sizes.expert_width, sizes.chip
    options = functools.partial(row_tiles, sizes.layout, chip, contracted=contracted)
    # All rows of an expert at once come before longer chunks: its weight gradients are then written once.
    others = ((rows, enough) for enough in (512, 256, 1) for rows in options())
    for rows, enough in itertools.chain([(next(options()), 256)], others):
        for chunk, padded in chunks(expert_width, chip.depth):
            vmem = needed_vmem(need(sizes, rows, chunk))
            if fits(vmem, chip) and chunk >= min(enough, expert_width):
                return Tiles(rows, chunk, padded, vmem)
    return None


def one_item(layout: Layout, rows: RowCuts) -> bool:
    """Whether every expert's rows are always one item, so that its weight gradients are written once.

    >>> one_item(Layout(64, 1, 1, 4, 64, 16), RowCuts(16, 16, (16,)))
    True
    """
    return layout.rows_per_expert is not None and layout.rows_per_expert <= rows.rows


def straight(layout: Layout, rows: RowCuts) -> bool:
    """Whether every expert's rows are one item and one piece: then nothing of its weight gradients is added up."""
    return one_item(layout, rows) and rows.rows == rows.pieces[0]


def straight_pieces(rows: RowCuts, depth: int) -> tuple[int, ...]:
    """Pieces of which one holds all rows of an expert: those that fill the MXU's depth, and all rows.

    Matmuls that contract over rows take them by the depth, and loading weights takes as long as `depth` rows, so
    anything in between would cost as much as the next one.

    >>> straight_pieces(RowCuts(544, 544, (544, 272)), 256), straight_pieces(RowCuts(48, 48, (48, 32)), 256)
    ((256, 512, 544), (48,))
    """
    return (*range(depth, rows.rows, depth), rows.rows)
