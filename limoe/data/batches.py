"""The global batch of each step: a pure function of data, batch size, seed and step.

Of n examples an epoch shows floor(n / B) batches, in an order of its own: no example twice, and none in two epochs of
one batch, where it would be its own negative. A bad example is replaced by that of the same row one step later, or two,
... So no other row changes, a process that reads only some rows sees the same batch, and no replacement puts a pair
into a batch twice unless it comes from the next epoch. A run that was rewound to a step orders the data anew from there
on, so an example may come twice in that epoch, or not at all.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Int32, UInt8

from limoe.data.files import DataError
from limoe.data.images import Preprocess, augmented
from limoe.data.order import Epoch, Order, example_at
from limoe.data.source import Bad, Decoded, Source

# Rows that one thread decodes at a time. More would leave threads idle, fewer would pay Grain's cost per item often.
_CHUNK_ROWS = 16
# Examples to try for one row. If half of the data is bad, all of them are bad once in 10^300 rows.
_MAX_TRIES = 1000
_NUM_SHOWN = 5
# With fewer examples examined, the share of bad ones says nothing.
_MIN_EXAMINED = 100


class BadExamples(NamedTuple):
    """Numbers of examined and of bad examples, and the first few bad ones."""

    num_examined: int
    num_bad: int
    first: tuple[Bad, ...]


class Batch(NamedTuple):
    """Rows of the global batch of a step: uint8 images, int32 token ids, and keys."""

    images: UInt8[np.ndarray, "B H W 3"]
    tokens: Int32[np.ndarray, "B N"]
    keys: tuple[str, ...]
    bad: BadExamples


class _Row(NamedTuple):
    example: Decoded
    bad: tuple[Bad, ...]


class _Chunk(NamedTuple):
    rows: list[_Row]
    tokens: Int32[np.ndarray, "B N"]


class Batches:
    """The global batches over `source`, or the `rows` of them that one process needs.

    `encode` turns captions into int32 token ids [B, N]. Of several captions one is drawn for each row, and with
    `augment` a part of each picture. The seed of a run that was rewound, or that reads blocks, is an `Order`. With
    `threads=0` nothing is read ahead. Iteration stops if the share of bad examples, since it began, is above
    `max_bad_share`. Raises `ValueError` for a setting that is out of range, and `DataError` for fewer examples than a
    batch has, or more than Grain's index shuffle can order (2^32).
    """

    def __init__(
        self,
        source: Source,
        encode: Callable[[Sequence[str]], Int32[np.ndarray, "B N"]],
        *,
        batch_size: int,
        seed: int | Order,
        rows: Sequence[int] | None = None,
        threads: int = 2,
        max_bad_share: float = 0.05,
        augment: Preprocess | None = None,
    ) -> None:
        order = seed if isinstance(seed, Order) else Order(seed)
        rows = range(batch_size) if rows is None else rows
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be at least 1")
        if not len(rows) or list(rows) != sorted(set(rows)) or rows[0] < 0 or rows[-1] >= batch_size:
            raise ValueError(f"rows {rows} must be at least one row of range(0, {batch_size}), each once and in order")
        if order.seed < 0 or threads < 0 or not 0 <= max_bad_share <= 1:
            raise ValueError(
                f"seed {order.seed} and threads {threads} must not be negative, max_bad_share {max_bad_share} in 0..1"
            )
        if len(source) >= 2**32:
            raise DataError(f"{len(source)} examples are more than 2^32 - 1, which one order can hold; split the data")
        mixture = source.mixture
        self._sizes = mixture.sizes if mixture else (len(source),)
        part_of_row = mixture.rows(batch_size) if mixture else [0] * batch_size
        self._shares = [part_of_row.count(part) for part in range(len(self._sizes))]
        ranks = [itertools.count() for _ in self._sizes]
        self._place_of_row = [(part, next(ranks[part])) for part in part_of_row]
        for size, share, number in zip(self._sizes, self._shares, range(len(self._sizes)), strict=True):
            which = f"source {number} of data.sources" if mixture else "the data"
            if size < share:
                raise DataError(
                    f"{which} has {size} examples, fewer than the {share} of a batch (train.batch_size={batch_size}): "
                    "a pair would be its own negative; set a smaller train.batch_size, or give more data"
                )
            if not share:
                raise DataError(f"{which} has so small a weight that a batch of {batch_size} has none of it; raise it")
        self._source, self._encode, self._augment = source, encode, augment
        self._batch_size, self._rows, self._order = batch_size, rows, order
        self._threads, self._max_bad_share = threads, max_bad_share

    def at(self, step: int) -> Batch:
        """Read the batch of one step in this thread. Raises `DataError` if a row finds no good example."""
        return _assemble([self._read_rows(step, self._rows)])

    def from_step(self, step: int) -> Generator[Batch, None, None]:
        """Yield the batches of `step`, `step + 1`, ... without end. Grain's threads read about one batch ahead.

        Raises `DataError`, with the share, the limit and the first keys, if the share of bad examples is above
        `max_bad_share` by more than chance explains (four standard deviations), or if a row finds no good example.
        """
        chunks = [self._rows[first : first + _CHUNK_ROWS] for first in range(0, len(self._rows), _CHUNK_ROWS)]
        buffer_size = len(chunks) + 2 * self._threads if self._threads else 0
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=buffer_size)

        def read_chunk(number: int) -> _Chunk:
            step, chunk = divmod(number, len(chunks))
            return self._read_rows(step, chunks[chunk])

        iterator = iter(grain.MapDataset.range(sys.maxsize).map(read_chunk).to_iter_dataset(options))
        iterator.set_state({"next_index": step * len(chunks)})
        total = BadExamples(0, 0, ())
        with contextlib.closing(iterator):
            while True:
                batch = _assemble([next(iterator) for _ in chunks])
                total = _add(total, batch.bad)
                self._check_share(total)
                yield batch

    def _read_rows(self, step: int, rows: Sequence[int]) -> _Chunk:
        read = [self._read_row(step, row) for row in rows]
        return _Chunk(read, self._encode([row.example.caption for row in read]))

    def _read_row(self, step: int, row: int) -> _Row:
        bad: list[Bad] = []
        seed = self._order.at(step)
        for tried in range(_MAX_TRIES):
            example = self._source[self._example_at(step, row, seed, tried)]
            if isinstance(example, Decoded):
                return _Row(self._drawn(example, step, row), tuple(bad))
            bad.append(example)
        raise DataError(
            f"no usable example among {_MAX_TRIES} examined (the data has {len(self._source)}). First: {_shown(bad)}. "
            "Check that the shards hold key.jpg and key.txt members that are whole"
        )

    def _drawn(self, example: Decoded, step: int, row: int) -> Decoded:
        """Draw one of several captions and a part of the picture, as a function of seed, step and row."""
        captions = (example.caption, *example.more_captions)
        if len(captions) == 1 and self._augment is None:
            return example
        bits = np.random.Philox(np.random.SeedSequence([self._order.seed, step, row])).random_raw(6)
        draws = bits / 2.0**64
        image = example.image if self._augment is None else augmented(example.image, draws[1:], self._augment)
        return example._replace(image=image, caption=captions[int(draws[0] * len(captions)) % len(captions)])

    def _example_at(self, step: int, row: int, seed: tuple[int, ...], tried: int = 0) -> int:
        part, rank = self._place_of_row[row]
        size, share = self._sizes[part], self._shares[part]
        count = size // share
        epoch, batch = divmod(step, count)
        # Round the end of the epoch: an example of the next one may be in this batch already.
        epoch, batch = epoch + tried // count, (batch + tried) % count
        now = Epoch(seed, epoch, part, size, share)
        return sum(self._sizes[:part]) + example_at(now, batch, rank, self._order.blocks)

    def _check_share(self, total: BadExamples) -> None:
        if total.num_examined < min(len(self._source), _MIN_EXAMINED):
            return
        allowed = self._max_bad_share * total.num_examined
        if total.num_bad > allowed + 4 * math.sqrt(allowed):
            raise DataError(
                f"{total.num_bad} of {total.num_examined} examples examined ({total.num_bad / total.num_examined:.1%}) "
                f"are bad, more than max_bad_share={self._max_bad_share:g} allows. First: {_shown(total.first)}. "
                "Repair or remove them, or raise max_bad_share"
            )


def equal_captions(tokens: Int32[np.ndarray, "B N"]) -> int:
    """Count the rows whose caption another row has too.

    >>> equal_captions(np.array([[5, 0], [6, 0], [5, 0]], np.int32))
    2
    """
    counts = np.unique(tokens, axis=0, return_counts=True)[1]
    return int(counts[counts > 1].sum())


def _assemble(chunks: list[_Chunk]) -> Batch:
    rows = [row for chunk in chunks for row in chunk.rows]
    bad = [example for row in rows for example in row.bad]
    return Batch(
        images=np.stack([row.example.image for row in rows]),
        tokens=np.concatenate([chunk.tokens for chunk in chunks]),
        keys=tuple(row.example.key for row in rows),
        bad=BadExamples(len(rows) + len(bad), len(bad), tuple(bad[:_NUM_SHOWN])),
    )


def _add(total: BadExamples, more: BadExamples) -> BadExamples:
    first = (total.first + more.first)[:_NUM_SHOWN]
    return BadExamples(total.num_examined + more.num_examined, total.num_bad + more.num_bad, first)


def _shown(bad: Sequence[Bad]) -> str:
    return ", ".join(f"{example.key} ({example.reason})" for example in bad[:_NUM_SHOWN])
