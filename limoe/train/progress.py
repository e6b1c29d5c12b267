"""Progress: a bar on a terminal, a line now and then in a file or a pipe."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable

from tqdm import tqdm

# Short enough that loss and success rates fit in 80 columns.
_FORMAT = "{desc}{n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}"
_SECONDS_BETWEEN_DRAWINGS, _SECONDS_BETWEEN_LINES = 0.5, 30.0


class _Lines:
    """Standard error that writes a line each time a bar is drawn, instead of returning to the start of the line."""

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text:
            sys.stderr.write(f"{text}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def beside_bars(say: Callable[[str], None]) -> Callable[[str], None]:
    """Adapt `say` for use while a bar is drawn."""

    def tell(text: str) -> None:
        with tqdm.external_write_mode():
            say(text)

    return tell


def progress_bar(description: str, *, total: int, unit: str, done: int = 0, delay: float = 0.0) -> tqdm:
    """Make a bar on standard error; without a terminal it prints a line every half minute and one at the end.

    Nothing is shown if the bar finishes within `delay` seconds.

    >>> with progress_bar("reading", total=10, unit="file", done=4) as bar:
    ...     _ = bar.update(6)
    >>> bar.n
    10
    """
    watched = sys.stderr.isatty()
    terminal = shutil.get_terminal_size()
    return tqdm(
        desc=f"{description}: ",
        total=total,
        initial=done,
        unit=unit,
        bar_format=_FORMAT,
        file=sys.stderr if watched else _Lines(),
        # tqdm's own guess draws nothing on a terminal that does not know its size.
        ncols=terminal.columns if watched else None,
        nrows=terminal.lines if watched else None,
        mininterval=_SECONDS_BETWEEN_DRAWINGS if watched else _SECONDS_BETWEEN_LINES,
        miniters=1,
        delay=delay,
    )


def progress_callback(description: str, unit: str) -> Callable[[int, int], None]:
    """Make a function of (done, total) that draws a bar."""
    bar: list[tqdm] = []

    def progress(done: int, total: int) -> None:
        if not bar:
            bar.append(progress_bar(description, total=total, unit=unit, delay=1.0))
        bar[0].update(done - bar[0].n)
        if done == total:
            bar[0].close()

    return progress
