"""SIGTERM and Ctrl-C end a run without losing anything: at once, or after the current step."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_STANDARD_ERROR = 2


class StopSignals:
    """While this is open, both signals raise KeyboardInterrupt; inside `patiently` the first one is only noted.

    Use it in the main thread only, because Python delivers signals there.

    >>> with StopSignals() as signals, signals.patiently():
    ...     os.kill(os.getpid(), signal.SIGTERM)
    ...     signals.received
    'SIGTERM'
    """

    def __init__(self) -> None:
        self.received = ""
        self._patient = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for which in _SIGNALS:
            self._before[which] = signal.signal(which, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)

    @contextlib.contextmanager
    def patiently(self) -> Iterator[None]:
        """In this block the first signal only sets `received`; a second signal interrupts."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self.received = bool(self.received), signal.Signals(number).name
        if again or not self._patient:
            raise KeyboardInterrupt
        # Not print, because the signal may have interrupted a print.
        os.write(_STANDARD_ERROR, f"\n{self.received}: saving after this step\n".encode())
