"""The log of a run: one line of JSON for each step."""

import bisect
import json
import math
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from limoe.data import files
from limoe.workdir.folder import WorkdirError

_COMPACT = (",", ":")


class MetricsLog:
    """Appends one line of JSON for each step to a file. However often a run stops, the file has each step exactly once.

    `append` writes a whole line before it returns, so a killed process loses none. `sync` before a checkpoint also
    protects lines against a loss of power. Opening the file removes a half-written last line. It reads only the end of
    the file, and `truncate_after` little more, however long the log is. Figures may be numbers, NumPy or JAX arrays,
    texts, None, and lists, mappings and NamedTuples of them. JSON has neither NaN nor infinity: figures that are not
    finite become null. A float32 is written with the fewest digits that identify it.

    Raises:
      WorkdirError: the last whole line is not a line of this log.
      limoe.data.files.StorageError: the file cannot be written (full disk, permissions).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     log = MetricsLog(Path(folder) / "metrics.jsonl")
    ...     for step in (1, 2, 3):
    ...         log.append(step, {"loss": 1 / step if step < 2 else math.nan})
    ...     log.truncate_after(2)
    ...     list(read_metrics(log.path))
    [{'step': 1, 'loss': 1.0}, {'step': 2, 'loss': None}]
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        with files.explained("write", self.path), open(self.path, "ab+") as file:
            line, end = _last_line(file)
            file.truncate(end)
        self.last = _parsed(line, self.path) if line else None

    @property
    def last_step(self) -> int | None:
        """The step of the last line."""
        return None if self.last is None else self.last["step"]

    def append(self, step: int, figures: Mapping[str, object]) -> None:
        """Writes the figures of a step.

        Raises:
          ValueError: the step is not later than the last one in the file, or JSON cannot hold a figure.
          limoe.data.files.StorageError: the disk is full; the file is unchanged.
        """
        if self.last_step is not None and step <= self.last_step:
            raise ValueError(
                f"{self.path} already holds step {self.last_step}, so step {step} cannot follow; use truncate_after"
            )
        if "step" in figures:
            raise ValueError("a figure is named 'step'; the log uses that name itself")
        record = _plain({"step": step, **figures}, "figures")
        line = (json.dumps(record, allow_nan=False, separators=_COMPACT) + "\n").encode()
        # Unbuffered and opened for each line: after a failed write, no buffer may write its rest later.
        with files.explained("write", self.path), open(self.path, "ab", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
            rest = memoryview(line)
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except BaseException:
                file.truncate(start)
                raise
        self.last = record

    def truncate_after(self, step: int, *, kept: Path | None = None) -> None:
        """Removes the lines of all later steps, to continue from the checkpoint of this step.

        If it is killed, the file has either all lines or only those that stay. It needs no space on the disk, except
        with `kept`, a file that gets the removed lines first.
        """
        if self.last_step is None or self.last_step <= step:
            return

        def next_step(offset: int) -> int:
            """Read the step of the first line at or after this offset; without such a line, a step to remove."""
            file.seek(max(offset - 1, 0))
            if offset:
                file.readline()
            line = file.readline()
            return _parsed(line, self.path)["step"] if line else step + 1

        with files.explained("write", self.path), open(self.path, "rb+") as file:
            size = file.seek(0, os.SEEK_END)
            first = bisect.bisect_right(range(size), step, key=next_step)
            if first:  # one byte into the last line that stays
                file.seek(first)
                first += len(file.readline())
            if kept is not None:
                file.seek(first)
                with files.atomic_writer(kept) as copy:
                    shutil.copyfileobj(file, copy)
            file.truncate(first)
            line, _ = _last_line(file)
        self.last = _parsed(line, self.path) if line else None

    def sync(self) -> None:
        """Waits until every line is on disk."""
        with files.explained("write", self.path), open(self.path, "ab") as file:
            os.fsync(file.fileno())


def skipped_in_row(line: Mapping[str, Any]) -> int:
    """Return how many steps in a row were left out, up to that of a line; versions that wrote no number left none out.

    >>> skipped_in_row({"step": 3}), skipped_in_row({"step": 3, "skipped_in_row": 2})
    (0, 2)
    """
    return line.get("skipped_in_row", 0)


def read_metrics(path: str | Path) -> Iterator[dict[str, Any]]:
    """Reads the lines of a log of metrics one after another, except a half-written last line; null becomes None.

    Raises:
      WorkdirError: another line is not a line of a `MetricsLog`.
      FileNotFoundError: there is no such file.
    """
    with files.open_binary(path) as file:
        for line in file:
            if line.endswith(b"\n"):
                yield _parsed(line, Path(path))


def write_json(path: str | Path, value: Mapping[str, object]) -> None:
    """Writes an object as indented JSON, atomically. Figures are written as in `MetricsLog`.

    Raises:
      ValueError: JSON cannot hold a figure.
      limoe.data.files.StorageError: the file cannot be written; an old file is unchanged.
    """
    files.write_bytes(path, (json.dumps(_plain(value, "value"), indent=2, allow_nan=False) + "\n").encode())


def _parsed(line: bytes, path: Path) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise WorkdirError(
            f"{path} has a line that is not a step's figures: {line[:60]!r}; remove that line, or move the file away"
        )
    return record


def _last_line(file: BinaryIO) -> tuple[bytes, int]:
    """Read the last whole line (empty if there is none) and where it ends."""
    if not file.seek(0, os.SEEK_END):
        return b"", 0  # an empty file cannot be mapped
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = content.rfind(b"\n") + 1
        begin = content.rfind(b"\n", 0, max(end - 1, 0)) + 1
        return content[begin:end], end


def _plain(value: object, where: str) -> Any:
    """Convert a value to what JSON can hold."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.dtype == np.float32:
            array = array.astype(str)  # the fewest digits; float64 would need twice as many
        # Python has no bfloat16.
        return _plain((array if array.dtype.kind in "biu" else array.astype(np.float64)).tolist(), where)
    raise ValueError(f"{where} is a {type(value).__name__}, which JSON cannot hold; give a number, text or list")
