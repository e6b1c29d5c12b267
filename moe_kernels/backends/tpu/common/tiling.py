"""Block sizes of the matmul kernels, by arithmetic over VMEM: pure functions of shapes and the chip."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator

from moe_kernels.chips import MIB, Tpu
from moe_kernels.fitted import FITTED
from moe_kernels.types import Epilogue, Layout, round_up

# Rows of two bfloat16 in a register: pieces start at multiples of it.
PIECE = 16
# Rows of an item at most. An expert with more of them has its weights fetched again for each item, which hides under
# the matmuls: 2304 rows are that many multiply-adds for each weight. Packed runs seldom have as many.
MOST_ROWS, MOST_PACKED = 2304, 1152
# Rows of one matmul in a loop over pieces, for each row of the matrix unit's depth, in quarters: more shares a load of
# weights among more rows and takes longer to compile.
MATMUL_QUARTERS = 9


@dataclasses.dataclass(frozen=True)
class RowTiles:
    """How rows are cut: `rows` of an item in VMEM, `copied` the most that it fetches, worked on in `pieces`.

    Pieces descend; the first is repeated in a loop, the others take what is left.
    """

    rows: int
    copied: int
    pieces: tuple[int, ...]

    def shorter(self, depth: int) -> int:
        """A first piece that is a multiple of the MXU's depth, for rows that as many of those hold; 0 if none is.

        >>> [RowTiles(544, 544, (piece,)).shorter(depth) for piece, depth in ((544, 256), (272, 128), (256, 128))]
        [512, 256, 0]
        """
        short = self.pieces[0] // depth * depth
        return short if short < self.pieces[0] else 0


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Block sizes of a kernel: rows, and the part of the F axis in VMEM at a time (`padded` is F rounded up to it)."""

    rows: RowTiles
    chunk: int
    padded: int
    vmem: int
    """Bytes that it needs, at most."""

    @property
    def num_chunks(self) -> int:
        """Chunks of F."""
        return self.padded // self.chunk


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


def computed_rows(count: int, tiles: RowTiles, depth: int, *, shorter: bool = False) -> int:
    """Rows that matmuls run over for an item of `count` rows, `shorter` where as many shorter first pieces may do.

    >>> computed_rows(70, RowTiles(128, 128, (64, 32, 16)), 16)
    80
    >>> [computed_rows(512, RowTiles(544, 544, (272, 144)), 128, shorter=shorter) for shorter in (False, True)]
    [544, 512]
    """
    whole, tail = divmod(count, tiles.pieces[0])
    bits = covers(tiles.pieces, depth)[-(-tail // PIECE)]
    number, short = tiles.rows // tiles.pieces[0], tiles.shorter(depth)
    if shorter and short and whole + (bits & 1) == number and count <= number * short:
        return number * short
    return whole * tiles.pieces[0] + sum(size for n, size in enumerate(tiles.pieces) if bits >> n & 1)


def row_tiles(layout: Layout, chip: Tpu, *, contracted: bool = False) -> Iterator[RowTiles]:
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
        yield RowTiles(held, min(held, layout.rows_per_expert or layout.num_rows), sizes)


def _covered(rows: int, sizes: tuple[int, ...], depth: int) -> int:
    """Rows that pieces go over at most, for any number of rows up to `rows`.

    >>> _covered(544, (256, 128, 64, 32, 16), 128), _covered(560, (256, 128, 64, 32, 16), 128)
    (544, 576)
    """
    tiles = RowTiles(rows, rows, sizes)
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


def _choose(
    layout: Layout, expert_width: int, chip: Tpu, need: Callable[[RowTiles, int], int], *, contracted: bool = False
) -> Tiles | None:
    """The first way to cut the rows for which a chunk of F fits, and the largest chunk; None if nothing fits."""
    options = functools.partial(row_tiles, layout, chip, contracted=contracted)
    # All rows of an expert at once come before longer chunks: its weight gradients are then written once.
    others = ((rows, enough) for enough in (512, 256, 1) for rows in options())
    for rows, enough in itertools.chain([(next(options()), 256)], others):
        for chunk, padded in chunks(expert_width, chip.depth):
            vmem = needed_vmem(need(rows, chunk))
            if vmem <= chip.vmem - MIB and chunk >= min(enough, expert_width):
                return Tiles(rows, chunk, padded, vmem)
    return None


def needed_vmem(arrays: int) -> int:
    """Bytes of VMEM that a kernel needs for so many bytes of arrays and values."""
    return int(FITTED.margin * arrays) + FITTED.slack_bytes


def vmem_bytes(rows: int, columns: int, itemsize: int) -> int:
    """VMEM of an array: rows padded to registers, columns to 128 lanes."""
    return round_up(rows, 32 // itemsize) * round_up(columns, 128) * itemsize


@functools.lru_cache
def mlp_forward_tiles(
    layout: Layout,
    width: int,
    expert_width: int,
    itemsize: int,
    weight_itemsize: int,
    chip: Tpu,
    *,
    keep: bool = False,
) -> Tiles | None:
    """Block sizes of the fused forward pass, or None where not even the smallest fit; `keep` writes the hidden layer.

    >>> from moe_kernels.chips import TPUS
    >>> tiles = mlp_forward_tiles(Layout(16384, 1, 1, 32, 17408, 544), 768, 3072, 2, 2, TPUS["v6e"])
    >>> tiles.rows.rows, tiles.chunk
    (544, 1024)
    """

    def need(rows: RowTiles, chunk: int) -> int:
        weights = vmem_bytes(width, chunk, weight_itemsize) + vmem_bytes(chunk, width, weight_itemsize)
        cast = vmem_bytes(width, chunk, itemsize) + vmem_bytes(chunk, width, itemsize)
        biases = 2 * 8 * 4 * (round_up(chunk, 128) + round_up(width, 128))
        held = 2 * vmem_bytes(rows.rows, width, itemsize) + vmem_bytes(rows.rows, width, 4)
        held += 2 * vmem_bytes(rows.rows, chunk, itemsize) if keep else 0
        values = FITTED.hidden_copies[chip.name] * rows.pieces[0] * round_up(chunk, 128) * itemsize
        return 2 * weights + (cast if itemsize != weight_itemsize else 0) + biases + held + values

    return _choose(layout, expert_width, chip, need)


@functools.lru_cache
def mlp_backward_tiles(
    layout: Layout,
    width: int,
    expert_width: int,
    itemsize: int,
    weight_itemsize: int,
    chip: Tpu,
    *,
    keep: bool = False,
) -> Tiles | None:
    """Block sizes of the fused backward pass, or None where not even the smallest fit; `keep` reads the hidden layer.

    >>> from moe_kernels.chips import TPUS
    >>> tiles = mlp_backward_tiles(Layout(16384, 1, 1, 32, 17408, 544), 768, 3072, 2, 2, TPUS["v6e"])
    >>> tiles.rows.rows, tiles.chunk
    (544, 1024)
    """

    def need(rows: RowTiles, chunk: int) -> int:
        held = 4 * vmem_bytes(rows.rows, width, itemsize)
        held += 2 * vmem_bytes(rows.rows, chunk, itemsize) if keep else 0
        return held + mlp_backward_bytes(layout, rows, width, chunk, itemsize, weight_itemsize)

    return _choose(layout, expert_width, chip, need, contracted=True)


def mlp_backward_bytes(
    layout: Layout, rows: RowTiles, width: int, chunk: int, itemsize: int, weight_itemsize: int
) -> int:
    """VMEM of a backward pass beside its rows: weights and their gradients, sums, and the values between matmuls."""
    pair = lambda size: vmem_bytes(width, chunk, size) + vmem_bytes(chunk, width, size)  # noqa: E731
    out = weight_itemsize if one_item(layout, rows) else 4
    sums = 0 if out == 4 or straight(layout, rows) else pair(4)
    cast = pair(itemsize) if itemsize != weight_itemsize else 0
    biases = 4 * 8 * 4 * (round_up(chunk, 128) + round_up(width, 128))
    values = 3 * vmem_bytes(rows.pieces[0], chunk, 4) + 3 * vmem_bytes(rows.pieces[0], width, 4)
    return 2 * pair(weight_itemsize) + cast + 2 * pair(out) + sums + biases + vmem_bytes(rows.rows, width, 4) + values


@functools.lru_cache
def matmul_forward_tiles(
    layout: Layout,
    width: int,
    expert_width: int,
    itemsize: int,
    weight_itemsize: int,
    chip: Tpu,
    *,
    epilogue: Epilogue = "none",
) -> Tiles | None:
    """Block sizes of a grouped matmul, or None where not even the smallest fit.

    >>> from moe_kernels.chips import TPUS
    >>> matmul_forward_tiles(Layout(16384, 1, 1, 32, 17408, 544), 768, 3072, 2, 2, TPUS["v6e"]).chunk
    1024
    """

    matrices = 2 if epilogue == "gated" else 1

    def need(rows: RowTiles, chunk: int) -> int:
        cast = vmem_bytes(width, chunk, itemsize) if itemsize != weight_itemsize else 0
        held = 2 * vmem_bytes(rows.rows, width, itemsize) + 2 * vmem_bytes(rows.rows, chunk, itemsize)
        weights = matrices * (2 * vmem_bytes(width, chunk, weight_itemsize) + cast)
        # Rows as the MXU wants them; with an epilogue half of its product, or the first of a pair, rounded.
        values = vmem_bytes(rows.pieces[0], width, itemsize)
        values += {"none": 0, "pointwise": 1, "gated": 2}[epilogue] * vmem_bytes(rows.pieces[0], chunk, itemsize) // 2
        return weights + held + values

    return _choose(layout, expert_width, chip, need)


@functools.lru_cache
def matmul_backward_tiles(
    layout: Layout,
    width: int,
    expert_width: int,
    itemsize: int,
    weight_itemsize: int,
    chip: Tpu,
    *,
    epilogue: Epilogue = "none",
) -> Tiles | None:
    """Block sizes of both gradients of a grouped matmul, or None where not even the smallest fit.

    >>> from moe_kernels.chips import TPUS
    >>> matmul_backward_tiles(Layout(16384, 1, 1, 32, 17408, 544), 768, 3072, 2, 2, TPUS["v6e"]).chunk
    1024
    """

    matrices = 2 if epilogue == "gated" else 1

    def need(rows: RowTiles, chunk: int) -> int:
        out = weight_itemsize if one_item(layout, rows) else 4
        sums = 0 if out == 4 else vmem_bytes(width, chunk, 4)
        cast = vmem_bytes(width, chunk, itemsize) if itemsize != weight_itemsize else 0
        held = 2 * vmem_bytes(rows.rows, width, itemsize) + 2 * vmem_bytes(rows.rows, chunk, itemsize)
        each = 2 * (vmem_bytes(width, chunk, weight_itemsize) + vmem_bytes(width, chunk, out)) + cast + sums
        # The products that are added to dx; what is computed again: from rows as the MXU wants them, an activation's
        # argument, value and slope.
        products = min(matrices, FITTED.products_of_a_pair[chip.name])
        values = int(products * vmem_bytes(rows.pieces[0], width, 4) * FITTED.product_share)
        values += 0 if epilogue == "none" else vmem_bytes(rows.pieces[0], width, itemsize)
        values += {"none": 0, "pointwise": 1, "gated": 4}[epilogue] * vmem_bytes(rows.pieces[0], chunk, 4)
        # However few the rows are: what is computed again stands beside a part of a product for the weights.
        part = vmem_bytes(min(width, FITTED.weight_product_rows), chunk, 4)
        values = values if epilogue == "none" else max(values, part)
        return matrices * each + held + vmem_bytes(rows.rows, width, 4) + values

    return _choose(layout, expert_width, chip, need, contracted=True)


def one_item(layout: Layout, rows: RowTiles) -> bool:
    """Whether every expert's rows are always one item, so that its weight gradients are written once.

    >>> one_item(Layout(64, 1, 1, 4, 64, 16), RowTiles(16, 16, (16,)))
    True
    """
    return layout.rows_per_expert is not None and layout.rows_per_expert <= rows.rows


def straight(layout: Layout, rows: RowTiles) -> bool:
    """Whether every expert's rows are one item and one piece: then nothing of its weight gradients is added up."""
    return one_item(layout, rows) and rows.rows == rows.pieces[0]


def straight_pieces(rows: RowTiles, depth: int) -> tuple[int, ...]:
    """Pieces of which one holds all rows of an expert: those that fill the MXU's depth, and all rows.

    Matmuls that contract over rows take them by the depth, and loading weights takes as long as `depth` rows, so
    anything in between would cost as much as the next one.

    >>> straight_pieces(RowTiles(544, 544, (544, 272)), 256), straight_pieces(RowTiles(48, 48, (48, 32)), 256)
    ((256, 512, 544), (48,))
    """
    return (*range(depth, rows.rows, depth), rows.rows)
