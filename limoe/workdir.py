"""The work folder of a training run: whose it is, where its files lie, and its log of metrics.

    config.json      the settings; a run with other settings may not use the folder
    metrics.jsonl    one JSON object a step
    checkpoints/     see `limoe.checkpoint`
    tokenizer.model  the tokenizer of the run
    figures/         pictures
    summary.json     written last: the run is finished when it is there
    .lock            held by the run that uses the folder, freed by the system however that run ends

A folder is taken when it is empty or has a config.json; one that holds only other files is left alone.
"""

import fcntl
import fnmatch
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from limoe.config import Config, ConfigError
from limoe.data import files
from limoe.settings import both_values, differences, from_json, to_json

_CONFIG = "config.json"
_METRICS = "metrics.jsonl"
_SUMMARY = "summary.json"
_TOKENIZER = "tokenizer.model"
_FIGURES = "figures"
_LOCK = ".lock"
# What `files.atomic_writer` leaves behind when it is killed.
_LEFTOVERS = tuple(f".{name}.*.tmp" for name in (_CONFIG, _METRICS, _SUMMARY, _TOKENIZER))


class WorkdirError(RuntimeError):
    """The work folder cannot be used as asked; the message says why, and what to do."""


class Workdir:
    """A work folder whose config.json is `config`; made by `Workdir.open` or `Workdir.existing`.

    >>> import tempfile
    >>> from limoe.presets import preset
    >>> with tempfile.TemporaryDirectory() as folder, Workdir.open(folder, preset("tiny")) as workdir:
    ...     workdir.finished, workdir.config.preset, workdir.checkpoints.name
    (False, 'tiny', 'checkpoints')
    """

    def __init__(self, path: Path, config: Config, lock: int | None) -> None:
        self.path = path
        self.config = config
        self._lock = lock

    @classmethod
    def open(cls, path: str | Path, config: Config) -> "Workdir":
        """Takes the folder for a run with these settings: a new one is made, one of the same settings is continued.

        The folder stays locked until `close`, the end of a `with` block, or the end of the process.

        Raises:
          WorkdirError: it holds something else, was made with other settings, or another run is using it.
          limoe.data.files.StorageError: it cannot be written (full disk, permissions).
        """
        folder = Path(path).absolute()
        _refuse_foreign(folder)
        files.make_folder(folder)
        workdir = cls(folder, config, _take_lock(folder))
        try:
            if files.exists(folder / _CONFIG):
                _refuse_other_config(folder, _read_config(folder), config)
            else:
                files.write_bytes(folder / _CONFIG, to_json(config).encode())
            for pattern in (*_LEFTOVERS, f"{_FIGURES}/.*.tmp"):
                for leftover in folder.glob(pattern):
                    leftover.unlink()
            files.make_folder(workdir.figures)
        except BaseException:
            workdir.close()
            raise
        return workdir

    @classmethod
    def existing(cls, path: str | Path) -> "Workdir":
        """Looks at the folder of a run, which may be going on: nothing is made, changed or locked.

        Raises:
          WorkdirError: there is no work folder, or its config.json cannot be used.
        """
        folder = Path(path).absolute()
        if not files.exists(folder / _CONFIG):
            raise WorkdirError(f"{folder} is not a work folder: it has no {_CONFIG}; give the folder of a training run")
        return cls(folder, _read_config(folder), None)

    @property
    def checkpoints(self) -> Path:
        """The folder for `limoe.checkpoint.Checkpoints`."""
        return self.path / "checkpoints"

    @property
    def figures(self) -> Path:
        """The folder for pictures."""
        return self.path / _FIGURES

    @property
    def tokenizer(self) -> Path:
        """The file for the run's tokenizer."""
        return self.path / _TOKENIZER

    @property
    def metrics(self) -> Path:
        """The file for `MetricsLog`."""
        return self.path / _METRICS

    @property
    def summary(self) -> Path:
        """The file for `write_json` at the end of the run."""
        return self.path / _SUMMARY

    @property
    def finished(self) -> bool:
        """Whether the run in this folder came to its end: its summary is there."""
        return files.exists(self.summary)

    def discard_unstarted(self) -> bool:
        """Removes what a run wrote that ended before its first step, so that other settings may have the folder.

        A run that has logged a step or saved a checkpoint keeps everything, and gets False.
        """
        started = files.exists(self.metrics) and self.metrics.stat().st_size
        if started or (self.checkpoints.is_dir() and any(self.checkpoints.iterdir())):
            return False
        for path in (self.path / _CONFIG, self.tokenizer, self.metrics):
            path.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.figures):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        return True

    def close(self) -> None:
        """Frees the folder for another run; a second call does nothing."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise WorkdirError(f"{folder} is a file; give a folder with --workdir=DIR")
    names = os.listdir(folder)
    foreign = sorted(n for n in names if n != _LOCK and not any(fnmatch.fnmatch(n, p) for p in _LEFTOVERS))
    if foreign and _CONFIG not in foreign:
        raise WorkdirError(
            f"{folder} holds other files ({', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}) and no "
            f"{_CONFIG}, so it is not the work folder of a run; give an empty or a new folder with --workdir=DIR"
        )


def _take_lock(folder: Path) -> int:
    path = folder / _LOCK
    with files.explained("write", path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise WorkdirError(
            f"another run (process {holder or 'unknown'}) is using {folder}; "
            "wait for its end, stop it, or give another folder with --workdir=DIR"
        ) from error
    except OSError as error:
        os.close(descriptor)
        raise WorkdirError(f"{folder} cannot be locked ({error}); give a folder on a local disk") from error
    try:
        with files.explained("write", path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _read_config(folder: Path) -> Config:
    path = folder / _CONFIG
    try:
        return from_json(files.read_text(path))
    except (ConfigError, files.DataError) as error:
        raise WorkdirError(
            f"{path} cannot be used: {error}; put the original back, or give another folder with --workdir=DIR"
        ) from error


def _refuse_other_config(folder: Path, there: Config, here: Config) -> None:
    # The mesh may change on the way: neither the result nor what a checkpoint holds depends on it.
    names = [name for name in differences(there, here) if not name.startswith("mesh.")]
    if names:
        raise WorkdirError(
            f"{folder} was made with other settings: {both_values(names, there, here, 'there', 'now')}; "
            "continue it with its own settings, or start a new run with --workdir=DIR"
        )


class MetricsLog:
    """Appends one line of JSON a step to a file, so that after any number of stops each step is there exactly once.

    A line is handed to the system whole before `append` returns, so a killed process loses none; `sync` before a
    checkpoint is saved keeps them through a loss of power too. A half-written last line is removed when the file is
    opened. Figures may be numbers, NumPy or JAX arrays, texts, None, and lists, mappings and NamedTuples of them; as
    JSON has neither NaN nor infinity, a figure that is not finite is written as null.

    Raises:
      WorkdirError: the last whole line is not one of this log.
      limoe.data.files.StorageError: the file cannot be written (full disk, permissions).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     log = MetricsLog(Path(folder) / "metrics.jsonl")
    ...     for step in (1, 2, 3):
    ...         log.append(step, {"loss": 1 / step if step < 2 else math.nan})
    ...     log.truncate_after(2)
    ...     read_metrics(log.path)
    [{'step': 1, 'loss': 1.0}, {'step': 2, 'loss': None}]
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        with files.explained("write", self.path), open(self.path, "ab+") as file:
            file.seek(0)
            whole, last = 0, b""
            for line in file:
                if line.endswith(b"\n"):
                    whole, last = whole + len(line), line
            file.truncate(whole)
        self.last_step = _step(last, self.path) if last else None

    def append(self, step: int, figures: Mapping[str, object]) -> None:
        """Writes the figures of a step.

        Raises:
          ValueError: the step is not later than the last one in the file, or a figure is no value of JSON.
          limoe.data.files.StorageError: the disk is full; the file is as it was before.
        """
        if self.last_step is not None and step <= self.last_step:
            raise ValueError(
                f"{self.path} already holds step {self.last_step}, so step {step} cannot follow; use truncate_after"
            )
        if "step" in figures:
            raise ValueError("the figures have one named 'step'; that name is the log's own")
        line = (json.dumps(_plain({"step": step, **figures}, "figures"), allow_nan=False) + "\n").encode()
        # Unbuffered and opened for each line: no buffer whose rest a failed write would leave to be written later.
        with files.explained("write", self.path), open(self.path, "ab", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
            rest = memoryview(line)
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except BaseException:
                file.truncate(start)
                raise
        self.last_step = step

    def truncate_after(self, step: int) -> None:
        """Removes the lines of all steps after this one, atomically; for going on from the checkpoint of that step."""
        if self.last_step is None or self.last_step <= step:
            return
        kept = [line for line in self.path.read_bytes().splitlines(keepends=True) if _step(line, self.path) <= step]
        files.write_bytes(self.path, b"".join(kept))
        self.last_step = _step(kept[-1], self.path) if kept else None

    def sync(self) -> None:
        """Waits until every line is on the disk."""
        with files.explained("write", self.path), open(self.path, "ab") as file:
            os.fsync(file.fileno())


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a log of metrics in order, without a last line that was cut short; null becomes None.

    Raises:
      WorkdirError: another line is not one of a `MetricsLog`.
      FileNotFoundError: there is no such file.
    """
    lines = files.read_bytes(path).split(b"\n")[:-1]  # what follows the last line's end is empty or cut short
    return [_parsed(line, Path(path)) for line in lines]


def write_json(path: str | Path, value: Mapping[str, object]) -> None:
    """Writes an object as indented JSON, atomically; figures as in `MetricsLog`, null for what is not finite.

    Raises:
      ValueError: a figure is no value of JSON.
      limoe.data.files.StorageError: the file cannot be written; an old one is as it was.
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


def _step(line: bytes, path: Path) -> int:
    return _parsed(line, path)["step"]


def _plain(value: object, where: str) -> Any:
    """The value as JSON knows it."""
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
        # By way of float64, because bfloat16 is no number of Python.
        return _plain((array if array.dtype.kind in "biu" else array.astype(np.float64)).tolist(), where)
    raise ValueError(f"{where} is a {type(value).__name__}, which JSON has no form for; give a number, text or list")
