"""In which order the examples of an epoch come: a pure function of their number, the seed, and the place in the epoch.

`examples`: any example may come next. `blocks`: blocks of neighbours in an order of their own, which a buffer mixes, so
that a tar is read in long pieces. There, the rows of a batch are dealt to 64 lanes; each lane reads a stretch of the
epoch's blocks, and mixes it within windows. So a process that has some of the rows reads the blocks of its lanes alone,
and any step begins with the blocks of its windows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from grain.experimental import index_shuffle

# Grain's index shuffle permutes at least 2^14 places, until one is in range: 4 us for an index with 2^14 examples or
# more, but 0.2 ms with 100 and 10 ms with 2 (Xeon, 2026-11). Smaller data sets are ordered by a sort instead.
_SMALL = 2**14
_LANES = 64


class BlockOrder(NamedTuple):
    """How blocks are read: examples of a block, and examples of all windows together."""

    size: int
    buffer: int


class Order(NamedTuple):
    """By which seed the data are ordered, the steps of a run's rewinds, in the order in which they were made; blocks.

    Without `blocks`, any example may come next.
    """

    seed: int
    rewound_at: Sequence[int] = ()
    blocks: BlockOrder | None = None

    def at(self, step: int) -> tuple[int, ...]:
        """Give the seed of the order after `step` finished steps; from the n-th rewind on it has n too.

        >>> [Order(7, (100, 50)).at(step) for step in (49, 50, 100)]
        [(7,), (7, 2), (7, 2)]
        """
        numbers = [number for number, at in enumerate(self.rewound_at, 1) if at <= step]
        return self.seed, *numbers[-1:]


class Epoch(NamedTuple):
    """An epoch of one source: the seed, its number, that of the source, its examples, and its rows in a batch."""

    seed: tuple[int, ...]
    number: int
    part: int
    size: int
    share: int


def example_at(epoch: Epoch, batch: int, rank: int, blocks: BlockOrder | None) -> int:
    """Give the number of the example in a batch of an epoch, as the row of this rank among those of its source."""
    if blocks is not None:
        return _numbered(epoch, _place_in_lane(epoch, batch, rank, blocks.buffer), blocks.size)
    place, size, numbers = batch * epoch.share + rank, epoch.size, (epoch.seed, epoch.number, epoch.part)
    if size < _SMALL:
        return int(_small_order(size, *numbers)[place])
    return index_shuffle(place, max_index=size - 1, seed=_epoch_seed(*numbers), rounds=4)


def _place_in_lane(epoch: Epoch, batch: int, rank: int, buffer: int) -> int:
    """Give the place in the sequence of blocks: of the row's lane, mixed within a window of the lane's stretch."""
    count, share = epoch.size // epoch.share, epoch.share
    lanes = min(_LANES, share)
    lane = rank * lanes // share
    first, end = -(-lane * share // lanes), -(-(lane + 1) * share // lanes)
    place, stretch = batch * (end - first) + rank - first, count * (end - first)
    length = max(1, buffer // lanes)
    # Windows of the lanes end at different steps, so that not all of them need new blocks at once.
    phase = length * lane // lanes
    window = (place + phase) // length
    start, stop = max(0, window * length - phase), min(stretch, (window + 1) * length - phase)
    mixed = _mixed(stop - start, epoch.seed, epoch.number, epoch.part, lane, window)
    return count * first + start + int(mixed[place - start])


def _numbered(epoch: Epoch, place: int, block: int) -> int:
    """Give the number of the example at a place in the epoch's sequence of blocks.

    Blocks begin at another example in each epoch, so that the same neighbours do not always come together, and what
    fills no block, or no batch, is not always the same.
    """
    size, numbers = epoch.size, (epoch.seed, epoch.number, epoch.part)
    num_blocks = size // block
    which, inside = divmod(place, block)
    if which < num_blocks:
        if num_blocks < _SMALL:
            which = int(_mixed(num_blocks, *numbers, _LANES, 0)[which])
        else:
            which = index_shuffle(which, max_index=num_blocks - 1, seed=_epoch_seed(*numbers), rounds=4)
    return (which * block + inside + _epoch_seed(*numbers)) % size


@functools.lru_cache(maxsize=64)
def _epoch_seed(seed: tuple[int, ...], epoch: int, part: int) -> int:
    # A hash, not a sum: with seed + epoch, epoch 1 of seed 0 would have the order of epoch 0 of seed 1.
    return int(_order_of(seed, epoch, part).generate_state(1)[0])


def _order_of(seed: tuple[int, ...], epoch: int, part: int) -> np.random.SeedSequence:
    # The number of a rewind comes after that of the part, so that no two orders have equal seeds.
    first, *rewinds = seed
    return np.random.SeedSequence([first, epoch, part, *rewinds] if part or rewinds else [first, epoch])


@functools.lru_cache(maxsize=64)
def _small_order(num_examples: int, seed: tuple[int, ...], epoch: int, part: int) -> np.ndarray:
    # Raw bits of a bit generator never change with NumPy's version; results of Generator's methods may.
    return np.argsort(np.random.Philox(_order_of(seed, epoch, part)).random_raw(num_examples), kind="stable")


@functools.lru_cache(maxsize=512)
def _mixed(length: int, seed: tuple[int, ...], epoch: int, part: int, lane: int, window: int) -> np.ndarray:
    """Order a window of a lane; "lane" 64 has the blocks themselves."""
    first, *rewinds = seed
    numbers = np.random.SeedSequence([first, epoch, part], spawn_key=(lane, window, *rewinds))
    return np.argsort(np.random.Philox(numbers).random_raw(length), kind="stable")
