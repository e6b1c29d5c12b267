"""Where the figures of each step go besides metrics.jsonl: one class for a service, and one line that registers it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from limoe.config.schema import Config
from limoe.errors import LimoeError


class LoggerError(LimoeError, RuntimeError):
    """A registered logger failed; the message says which, at which step, and what to do."""


class Logger(Protocol):
    """Gets the figures of each finished step, in order, in the first process only.

    They are those of a line of metrics.jsonl, as numbers, texts, NumPy arrays and None. A run that goes on from a
    checkpoint logs the steps after it again.
    """

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Take the figures of a step; the loop waits meanwhile, so hand over to a thread what takes long."""
        ...

    def close(self) -> None:
        """The command makes no more steps, whatever the reason."""
        ...


_REGISTERED: dict[str, Callable[[Path, Config], Logger]] = {}


def register(name: str, make: Callable[[Path, Config], Logger]) -> None:
    """Have every later run of this program log to `make(work folder, config)` too.

    Raises ValueError if another logger has that name.

    >>> class Printer:
    ...     def __init__(self, folder, config):
    ...         pass
    ...
    ...     def log(self, step, figures):
    ...         print(step, figures["total"])
    ...
    ...     def close(self):
    ...         pass
    >>> register("printer", Printer)
    >>> unregister("printer")
    """
    if name in _REGISTERED:
        raise ValueError(f"there is a logger {name!r} already; choose another name, or unregister it first")
    _REGISTERED[name] = make


def unregister(name: str) -> None:
    """Log there no more; KeyError if there is no such logger."""
    del _REGISTERED[name]


class Loggers:
    """The registered loggers of a run, open; an error of one ends the run as a LoggerError."""

    def __init__(self, folder: Path, config: Config) -> None:
        self._open: dict[str, Logger] = {}
        for name, make in _REGISTERED.items():
            with _named(name, "opening"):
                self._open[name] = make(folder, config)

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Hand the figures of a step to each."""
        for name, logger in self._open.items():
            with _named(name, f"step {step}"):
                logger.log(step, figures)

    def close(self) -> None:
        """Close each."""
        with contextlib.ExitStack() as stack:
            for name, logger in self._open.items():
                stack.enter_context(_named(name, "closing"))
                stack.callback(logger.close)


@contextlib.contextmanager
def _named(name: str, when: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise LoggerError(
            f"logger {name!r} failed at {when}: {type(error).__name__}: {error}; mend it or leave it out, and the same "
            "command goes on from the last checkpoint"
        ) from error
