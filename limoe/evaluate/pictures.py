"""Pictures of evaluation data, read when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import overload

import numpy as np
from jaxtyping import UInt8

from limoe.data.files import DataError
from limoe.data.source import Bad, Decoded


class Pictures:
    """Pictures by the numbers of their examples. None is held: `read` gives each again whenever it is asked for.

    >>> examples = [Decoded(np.full((1, 1, 3), number, np.uint8), "", "", None) for number in range(9)]
    >>> Pictures(examples.__getitem__, [0, 8])[np.array([1, 0, 1])][:, 0, 0, 0].tolist()
    [8, 0, 8]
    """

    def __init__(
        self, read: Callable[[int], Decoded | Bad], numbers: Sequence[int] | np.ndarray, *, threads: int = 1
    ) -> None:
        self._example, self._numbers, self._threads = read, np.asarray(numbers, np.int64), max(threads, 1)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, chosen: int | np.integer) -> UInt8[np.ndarray, "H W 3"]: ...

    @overload
    def __getitem__(self, chosen: np.ndarray | slice) -> UInt8[np.ndarray, "N H W 3"]: ...

    def __getitem__(self, chosen: int | np.integer | np.ndarray | slice) -> UInt8[np.ndarray, "... H W 3"]:
        """Read one picture, or some at once. Raises DataError for one that was good before and is not any more."""
        numbers = self._numbers[chosen]
        if numbers.ndim == 0:
            return self._read(int(numbers))
        # Copies of the last row fill up a batch: each picture is decoded once.
        once, places = np.unique(numbers, return_inverse=True)
        with ThreadPoolExecutor(self._threads) as pool:
            return np.stack(list(pool.map(self._read, once.tolist())))[places]

    def take(self, rows: np.ndarray) -> Pictures:
        """Choose some of the pictures without reading them."""
        return Pictures(self._example, self._numbers[rows], threads=self._threads)

    def _read(self, number: int) -> UInt8[np.ndarray, "H W 3"]:
        example = self._example(number)
        if isinstance(example, Bad):
            raise DataError(f"{example.key} was read before, and now: {example.reason}; evaluate again")
        return example.image
