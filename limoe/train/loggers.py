"""Loggers: where the figures of each step go besides metrics.jsonl. A service needs one class and one `register`
call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from limoe.config.schema import Config
from limoe.errors import LimoeError


class LoggerError(LimoeError, RuntimeError):
    """A registered logger failed. The message says which logger, at which step, and what to do."""


class Logger(Protocol):
    """Gets the figures of each finished step, in order, in the first process only.

    The figures are those of a line of metrics.jsonl: numbers, texts, NumPy arrays and None. A run that continues from a
    checkpoint logs the steps after it again.
    """

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Take the figures of a step. The training loop waits for this call, so do slow work in a thread."""
        ...

    def close(self) -> None:
        """Finish: the command makes no more steps, for whatever reason."""
        ...


_REGISTERED: dict[str, Callable[[Path, Config], Logger]] = {}


def register(name: str, make: Callable[[Path, Config], Logger]) -> None:
    """Make every later run of this program also log to `make(work folder, config)`.

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
    """Remove a logger. Raises KeyError if there is none of that name."""
    del _REGISTERED[name]


@contextlib.contextmanager
def registered(name: str, make: Callable[[Path, Config], Logger]) -> Iterator[None]:
    """Have a logger in a `with` block alone. Raises ValueError if another one has that name."""
    register(name, make)
    try:
        yield
    finally:
        unregister(name)


class Loggers:
    """The open loggers of a run. An error in one of them ends the run as a LoggerError."""

    def __init__(self, folder: Path, config: Config) -> None:
        self._open: dict[str, Logger] = {}
        for name, make in _REGISTERED.items():
            with _named(name, "opening"):
                self._open[name] = make(folder, config)

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Pass the figures of a step to each logger."""
        for name, logger in self._open.items():
            with _named(name, f"step {step}"):
                logger.log(step, figures)

    def close(self) -> None:
        """Close each logger."""
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
            f"logger {name!r} failed at {when}: {type(error).__name__}: {error}; fix or unregister it; the same "
            "command then continues from the last checkpoint"
        ) from error
