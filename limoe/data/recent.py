"""The values that were used last, for all threads."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """Values by key, of which the `limit` that were used last are kept. A value is made once, by one thread.

    >>> squares = Recent(2)
    >>> [squares.get(number, lambda: number**2) for number in (2, 3, 2)]
    [4, 9, 4]
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._values: collections.OrderedDict[Hashable, Future[T]] = collections.OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Give the value of a key, made if it is not kept. Raises what `make` raises, also in threads that waited."""
        with self._lock:
            future = self._values.get(key)
            if mine := future is None:
                future = self._values[key] = Future()
                while len(self._values) > self._limit:
                    self._values.popitem(last=False)
            else:
                self._values.move_to_end(key)
        if mine:
            try:
                future.set_result(make())
            except BaseException as error:
                with self._lock:
                    if self._values.get(key) is future:
                        del self._values[key]
                future.set_exception(error)
        return future.result()

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._values.clear()
