"""The work folder of a training run: its settings, its lock and its files.

    config.json      the settings, and what the run itself adds (`_RECORDED`); only settings that do not affect the
                     result may change later (`_MAY_CHANGE`)
    metrics.jsonl    one JSON object for each step
    checkpoints/     see `limoe.workdir.checkpoint`
    tokenizer.model  the tokenizer of the run
    data.json        what the run learns from, see `limoe.workdir.data`
    figures/         pictures
    versions.json    the versions of Python and packages that trained it, see `limoe.workdir.versions`
    init.json        of a run that began with another's parameters: which were taken
    rewound/         what came after a checkpoint to which the run was rewound
    summary.json     written last: the run is finished when it is there
    .lock            held by the run that uses the folder, freed by the system however that run ends

A run accepts a folder that is empty or has a config.json; it refuses one that holds only other files.
"""

import contextlib
import fcntl
import fnmatch
import os
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from limoe.config.schema import Config, ConfigError
from limoe.config.settings import both_values, differences, from_json, is_of_first_format, to_json, value_of
from limoe.data import files
from limoe.errors import LimoeError
from limoe.workdir.checkpoint import Checkpoints

_CONFIG = "config.json"
_METRICS = "metrics.jsonl"
_SUMMARY = "summary.json"
_TOKENIZER = "tokenizer.model"
_DATA = "data.json"
_INIT = "init.json"
_VERSIONS = "versions.json"
_LOCK = ".lock"
# Patterns of settings that affect neither the result nor a checkpoint's content: they may change during a run.
_MAY_CHANGE = (
    *("mesh.*", "data.threads", "data.cache_dir", "data.max_bad_share", "train.checkpoint_every"),
    *("train.checkpoints_kept", "train.log_every", "train.routing_every", "train.evaluate_every"),
    # Every step so far was finite, or left out as it would be again.
    *("train.non_finite", "train.max_skipped"),
)
# Data may have been moved to another folder.
_FOLDERS = ("data.shards", "data.sources", "data.eval_shards")
# What the run itself writes into config.json. A command that leaves it out goes on with what stands there.
_RECORDED = ("init.digest", "data.rewound_at")
# Files that a killed `files.atomic_writer` leaves.
_LEFTOVERS = tuple(f".{name}.*.tmp" for name in (_CONFIG, _METRICS, _SUMMARY, _TOKENIZER, _DATA, _INIT, _VERSIONS))


class WorkdirError(LimoeError, RuntimeError):
    """The work folder cannot be used. The message says why, and what to do."""


class Workdir:
    """A work folder whose config.json is `config`; made by `Workdir.open` or `Workdir.existing`.

    >>> import tempfile
    >>> from limoe.config.presets import preset
    >>> with tempfile.TemporaryDirectory() as folder, Workdir.open(folder, preset("tiny")) as workdir:
    ...     workdir.finished, workdir.config.preset, workdir.checkpoints.name
    (False, 'tiny', 'checkpoints')
    """

    def __init__(self, path: Path, config: Config, lock: BinaryIO | None) -> None:
        self.path, self.config, self._lock = path, config, lock
        self.changes: tuple[str, ...] = ()  # settings that changed since the run began, in words
        self.checkpoints, self.figures = path / "checkpoints", path / "figures"
        self.tokenizer, self.metrics, self.summary = path / _TOKENIZER, path / _METRICS, path / _SUMMARY
        self.data, self.init, self.versions = path / _DATA, path / _INIT, path / _VERSIONS

    @classmethod
    def open(cls, path: str | Path, config: Config) -> "Workdir":
        """Opens a folder for a run with these settings: makes a new one, or continues one with the same settings.

        Settings that do not affect the result may differ from the folder's; the new values are written to it and listed
        in `changes`. The folder stays locked until `close`, the end of a `with` block, or the end of the process.

        Raises:
          WorkdirError: the folder is in a bucket, holds something else, was made with other settings or by limoe 0.1.0,
            or another run is using it.
          limoe.data.files.StorageError: the folder cannot be written (full disk, permissions).
        """
        if "://" in os.fspath(path):
            raise WorkdirError(
                f"{path} is not in a file system, which the lock and the log of a run need; give a local or mounted "
                "folder with --workdir=DIR"
            )
        folder = Path(path).absolute()
        _refuse_foreign(folder)
        files.make_folder(folder)
        workdir = cls(folder, config, _take_lock(folder))
        try:
            if files.exists(folder / _CONFIG):
                there = _read_config(folder)
                workdir._refuse_first_format()
                workdir.config = _with_recorded(config, there)
                workdir.changes = workdir._accept_changes(there)
            if not files.exists(folder / _CONFIG) or workdir.changes:
                workdir.record(workdir.config)
            for pattern in (*_LEFTOVERS, f"{workdir.figures.name}/.*.tmp"):
                for leftover in folder.glob(pattern):
                    leftover.unlink()
            files.make_folder(workdir.figures)
        except BaseException:
            workdir.close()
            raise
        return workdir

    @classmethod
    def existing(cls, path: str | Path) -> "Workdir":
        """Opens the folder of a run to read it. The run may be going on: nothing is created, changed or locked.

        Raises:
          WorkdirError: there is no work folder, or its config.json cannot be used.
        """
        folder = Path(path).absolute()
        if not files.exists(folder / _CONFIG):
            raise WorkdirError(f"{folder} is not a work folder: it has no {_CONFIG}; give the folder of a training run")
        return cls(folder, _read_config(folder), None)

    @property
    def finished(self) -> bool:
        """Whether the run in this folder has finished: it has a summary."""
        return files.exists(self.summary)

    def record(self, config: Config) -> None:
        """Writes config.json: the settings, with what the run itself adds to them."""
        self.config = config
        files.write_bytes(self.path / _CONFIG, to_json(config).encode())

    def discard_unstarted(self) -> bool:
        """Removes the files of a run that ended before its first step, to free the folder for other settings.

        Returns False, and removes nothing, if the run has logged a step or saved a checkpoint.
        """
        started = files.exists(self.metrics) and self.metrics.stat().st_size
        if started or (self.checkpoints.is_dir() and any(self.checkpoints.iterdir())):
            return False
        for path in (self.path / _CONFIG, self.tokenizer, self.metrics, self.data, self.init, self.versions):
            path.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.figures):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        return True

    def _accept_changes(self, there: Config) -> tuple[str, ...]:
        """Describe how settings differ from the folder's. Raises WorkdirError if that would change the result."""
        here = self.config
        names = differences(there, here)
        moved = [name for name in _FOLDERS if name in names and value_of(there, name) and value_of(here, name)]
        longer = ["train.steps"] * self._may_grow(there)
        free = (*_MAY_CHANGE, *moved, *longer)
        if refused := [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in free)]:
            advice = "; train.steps may grow only while the newest checkpoint is from before the cool-down"
            raise WorkdirError(
                f"{self.path} was made with other settings: {both_values(refused, there, here, 'there', 'now')}"
                f"{advice * ('train.steps' in refused)}; continue it with its own settings, or start a new run with "
                "--workdir=DIR"
            )
        if self.finished or not names:
            return ()
        unchecked = "; nothing checks that data.eval_shards hold the same examples" * ("data.eval_shards" in moved)
        return (f"changed settings: {both_values(names, there, here, 'before', 'now')}{unchecked}",)

    def _may_grow(self, there: Config) -> bool:
        """Say whether a longer run would have taken the same steps so far: no learning rate was in the cool-down."""
        saved = Checkpoints(self.checkpoints, read_only=True).steps()
        # Update n has its full rate up to n = N + 1 - Q, see `limoe.train.optim.make_schedule`.
        done, full = saved[-1] if saved else 0, there.train.steps + 1 - there.optimizer.cooldown_steps
        return not self.finished and self.config.train.steps > there.train.steps and done <= full

    def _refuse_first_format(self) -> None:
        if not self.finished and is_of_first_format(files.read_text(self.path / _CONFIG)):
            raise WorkdirError(
                f"{self.path} was made by limoe 0.1.0, whose numbers this version does not continue; evaluate it with "
                "limoe eval, finish it with limoe 0.1.0, or start a new run with --workdir=DIR"
            )

    def close(self) -> None:
        """Unlocks the folder for another run. A second call does nothing."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _with_recorded(config: Config, there: Config) -> Config:
    """Take over what the run itself wrote into config.json, where the command does not say it."""
    left_out = [name for name in _RECORDED if not value_of(config, name)]
    if config.init.source == there.init.source and "init.digest" in left_out:
        config = replace(config, init=replace(config.init, digest=there.init.digest))
    if "data.rewound_at" in left_out:
        config = replace(config, data=replace(config.data, rewound_at=there.data.rewound_at))
    return config


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


def _take_lock(folder: Path) -> BinaryIO:
    """Lock the folder and write this process's number into the lock file. Closing the file frees the folder."""
    path = folder / _LOCK
    with contextlib.ExitStack() as stack, files.explained("write", path):
        file = stack.enter_context(open(path, "ab+", buffering=0))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read(32).decode(errors="replace").strip()
            raise WorkdirError(
                f"another run (process {holder or 'unknown'}) is using {folder}; "
                "wait until it ends, stop it, or give another folder with --workdir=DIR"
            ) from error
        except OSError as error:
            raise WorkdirError(f"{folder} cannot be locked ({error}); give a folder on a local disk") from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())
        stack.pop_all()
    return file


def _read_config(folder: Path) -> Config:
    path = folder / _CONFIG
    try:
        return from_json(files.read_text(path))
    except (ConfigError, files.DataError) as error:
        raise WorkdirError(
            f"{path} cannot be used: {error}; put the original back, or give another folder with --workdir=DIR"
        ) from error
