"""Checkpoints of a training run: written in the background, sealed by digests, committed by one rename.

A committed checkpoint is a folder `step_00001234` that holds

    state/           the arrays, written by Orbax under their names in the tree
    contents.json    the step, and name, shape and dtype of every array
    digests.json     size and SHA-256 of every other file

It is written under another name (`.partial-...`), every file and folder in it is synced to the disk, and then it is
renamed: a folder with the final name is complete, whenever the process or the machine stopped. The digests are there
because Orbax restores a flipped bit without a word; they are compared before Orbax reads anything.

With several processes (one folder that all of them reach) every one writes and reads its own parts of the arrays, all
at once and before `save` returns; names, seal, commit and fall-back are the business of the first one. An array is
stored whole, so it can be read into any other split over devices.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from limoe.errors import LimoeError
from limoe.parallel.processes import from_first, is_first, wait_for_all

_STATE = "state"
_CONTENTS = "contents.json"
_DIGESTS = "digests.json"
_PARTIAL = ".partial-"
_DAMAGED = ".damaged"
_NONE = -1
_STEP_NAME = re.compile(r"step_(\d{8,})")


class CheckpointError(LimoeError, RuntimeError):
    """A checkpoint could not be written, or none that can be trusted could be read."""


class Restored(NamedTuple):
    """What `Checkpoints.restore` found: the step, the state, and one message for each damaged checkpoint skipped."""

    step: int
    state: Any
    skipped: tuple[str, ...]


class _LeafFacts(NamedTuple):
    shape: tuple[int, ...]
    dtype: str


def _is_not_orbax_chatter(record: logging.LogRecord) -> bool:
    # Orbax logs some twenty INFO lines a save, and with each failure a traceback of what it raises anyway.
    return record.levelno == logging.WARNING or f"{os.sep}orbax{os.sep}" not in record.pathname


absl_logging.get_absl_logger().addFilter(_is_not_orbax_chatter)


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Args:
      folder: where they lie; created if absent, left-overs of killed runs in it are removed.
      keep: how many committed checkpoints stay; an older one is removed only after a newer one is committed.
      read_only: for looking at a run that may still be going on: nothing is created, removed or renamed.

    Only one process may have a folder open for writing; `limoe.workdir.folder.Workdir` holds the lock.

    Raises:
      ValueError: `keep` is below 1.
      CheckpointError: the folder cannot be created or cleaned.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> state = {"kernel": jnp.ones((2, 3)), "step": jnp.int32(7)}
    >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
    ...     checkpoints.save(7, state)
    ...     restored = checkpoints.restore(jax.eval_shape(lambda: state))
    >>> restored.step, restored.state["kernel"].shape, restored.skipped
    (7, (2, 3), ())
    """

    def __init__(self, folder: str | Path, keep: int = 2, *, read_only: bool = False) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: at least one checkpoint has to stay; use 1 or more")
        self.folder = Path(folder).absolute()
        self._keep = keep
        self._read_only = read_only
        self._newest: int | None = None  # the step that this object saved or restored last
        self._writer: threading.Thread | None = None
        self._failure: Exception | None = None
        if read_only or not is_first():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(f"{_PARTIAL}*"):
                shutil.rmtree(leftover)
        except OSError as error:
            raise CheckpointError(
                f"cannot prepare the checkpoint folder {self.folder}: {error}; check its permissions and the disk"
            ) from error

    def steps(self) -> tuple[int, ...]:
        """The steps of the committed checkpoints, oldest first; whether they are sound only `restore` knows."""
        if not self.folder.is_dir():
            return ()
        names = (_STEP_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return tuple(sorted(int(name[1]) for name in names if name))

    def save(self, step: int, state: object) -> None:
        """Copies the state to the host and starts to write it; the arrays may be donated as soon as this returns.

        Waits for the write before it. Saving the step that was saved or restored last does nothing.

        Args:
          step: the number of steps that led to this state.
          state: a pytree of JAX arrays of any shape and any dtype but PRNG keys (`jax.random.key_data` makes arrays).

        Raises:
          ValueError: a negative step, or a leaf that would not come back as it is.
          CheckpointError: the write before this one failed, or the folder holds this step or a later one.
        """
        if self._read_only:
            raise ValueError(f"{self.folder} was opened with read_only=True; open it without to save")
        if step < 0:
            raise ValueError(f"step={step}: the number of a step is not negative")
        leaves = _named_leaves(state)
        for name, leaf in leaves.items():
            _check_leaf(name, leaf)
        self.wait()
        if step == self._newest:
            return
        present = self.steps()
        if present and present[-1] >= step:
            raise CheckpointError(
                f"{self.folder} already holds step {present[-1]}, so step {step} cannot be saved in it; "
                "restore that checkpoint first, or use another folder"
            )
        if jax.process_count() > 1:
            self._write_together(step, leaves)
            return
        # Copies, because on a CPU `device_get` returns views, and an array that is viewed cannot be donated.
        host = {name: np.array(leaf) for name, leaf in jax.device_get(leaves).items()}
        # Not a daemon, because stopped inside native code it could crash the end of the program.
        self._writer = threading.Thread(target=self._write_in_background, args=(step, host, present))
        self._writer.start()

    def wait(self) -> None:
        """Waits until the last save is on the disk; the end of a `with` block does too.

        A program that ends without it may lose that save (Python starts no threads while it ends), and only that one.

        Raises:
          CheckpointError: that save failed; the checkpoints before it are as they were.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def restore(self, abstract_state: Any) -> Restored | None:
        """Reads the newest sound checkpoint, or returns None if there has never been one.

        A checkpoint with a missing, cut or changed file is skipped and, once an older one has been read, renamed to
        `step_....damaged`, so that its step can be saved again; nothing is deleted.

        Args:
          abstract_state: the tree to restore into, of `jax.ShapeDtypeStruct` (or arrays); its shardings are used.

        Raises:
          CheckpointError: there are checkpoints but all are damaged, or the sound one has other arrays.
        """
        self.wait()
        skipped: list[tuple[Path, str]] = []
        sound = self._newest_sound(skipped) if is_first() else None
        step = from_first(_NONE if sound is None else sound)
        if step != _NONE:
            state = _read(self._path(step), step, abstract_state)
            if not self._read_only:
                _set_aside([path for path, _ in skipped])
            self._newest = step
            return Restored(step, state, tuple(f"skipped checkpoint {path}: {why}" for path, why in skipped))
        if self.folder.is_dir():
            skipped += [(path, "set aside before") for path in sorted(self.folder.glob(f"*{_DAMAGED}*"))]
        if skipped:
            listed = "; ".join(f"{path}: {why}" for path, why in skipped)
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be trusted ({listed}); put a copy of one back, "
                "or move this folder away or choose another work folder to train from the start"
            )
        return None

    def _newest_sound(self, skipped: list[tuple[Path, str]]) -> int | None:
        """The newest checkpoint whose files are as they were written; newer ones are added to `skipped`."""
        for step in reversed(self.steps()):
            damage = _damage(self._path(step))
            if damage is None:
                return step
            skipped.append((self._path(step), damage))
        return None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # what ended the block is the news

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def _write_in_background(self, step: int, host: Mapping[str, np.ndarray], before: tuple[int, ...]) -> None:
        try:
            self._write(step, host)
            self._newest = step
        except Exception as error:
            # Whatever went wrong (Orbax has many types for a full disk) must reach the caller of save or wait.
            shutil.rmtree(self._partial_path(step), ignore_errors=True)
            intact = f"step {before[-1]} before it is intact" if before else "there is none before it"
            self._failure = CheckpointError(
                f"could not write checkpoint {self._path(step)}: {error}; {intact}. It needs "
                f"{sum(array.nbytes for array in host.values()) / 1e6:.1f} MB: free space on that disk, "
                "check the folder's permissions, and start the run again"
            )
            self._failure.__cause__ = error
            return
        try:
            self._remove_old()
        except OSError as error:
            self._failure = CheckpointError(
                f"checkpoint {self._path(step)} is written, but an older one in {self.folder} could not be removed: "
                f"{error}; check the folder's permissions"
            )
            self._failure.__cause__ = error

    def _write_together(self, step: int, leaves: Mapping[str, jax.Array]) -> None:
        """Save in step with the other processes: each writes its parts, the first one seals and commits."""
        partial = self._partial_path(step)
        if is_first():
            partial.mkdir()
        wait_for_all(f"{partial.name} is there")
        _save_arrays(partial, leaves)
        wait_for_all(f"{partial.name} is written")
        if is_first():
            self._commit(step, {name: _LeafFacts(leaf.shape, str(leaf.dtype)) for name, leaf in leaves.items()})
            self._remove_old()
        self._newest = step
        wait_for_all(f"{partial.name} is committed")

    def _partial_path(self, step: int) -> Path:
        return self.folder / f"{_PARTIAL}{self._path(step).name}"

    def _remove_old(self) -> None:
        for old in self.steps()[: -self._keep]:
            # Renamed first: killed in the middle of a removal, it would look like a damaged checkpoint.
            self._path(old).rename(self._partial_path(old))
            shutil.rmtree(self._partial_path(old))

    def _write(self, step: int, host: Mapping[str, np.ndarray]) -> None:
        partial = self._partial_path(step)
        partial.mkdir()
        _save_arrays(partial, host)
        self._commit(step, {name: _LeafFacts(array.shape, str(array.dtype)) for name, array in host.items()})

    def _commit(self, step: int, facts: Mapping[str, _LeafFacts]) -> None:
        """Seal what was written and give it its name."""
        partial = self._partial_path(step)
        arrays = {name: leaf._asdict() for name, leaf in facts.items()}
        (partial / _CONTENTS).write_text(json.dumps({"step": step, "arrays": arrays}, indent=1))
        (partial / _DIGESTS).write_text(json.dumps(_digests(partial), indent=1))
        for path in (partial, *partial.rglob("*")):
            _sync(path)
        partial.rename(self._path(step))
        _sync(self.folder)


def _save_arrays(partial: Path, arrays: Mapping[str, Any]) -> None:
    some = {name: array for name, array in arrays.items() if array.size}  # Orbax refuses arrays without elements
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(partial / _STATE, ocp.args.PyTreeSave(some))


def _named_leaves(tree: object) -> dict[str, Any]:
    """The leaves under their paths, such as `params/blocks/0/kernel`."""
    paths = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    leaves = dict(paths)
    if not leaves or len(leaves) < len(paths):
        raise ValueError(
            f"a checkpoint needs at least one array and a name of its own for each, but the tree has {len(paths)} "
            f"leaves with {len(leaves)} names; avoid dictionary keys with '/'"
        )
    return leaves


def _check_leaf(name: str, leaf: object) -> None:
    if not isinstance(leaf, jax.Array):
        raise ValueError(f"{name!r} in the state is a {type(leaf).__name__}; make it a JAX array")
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise ValueError(f"{name!r} in the state is a PRNG key; save jax.random.key_data of it")
    if leaf.weak_type:
        # It would come back strongly typed: other promotions, another compiled step, other bits than without a stop.
        raise ValueError(
            f"{name!r} in the state is weakly typed; give its dtype where it is made, as in jnp.float32(1)"
        )


def _digests(folder: Path) -> dict[str, dict[str, int | str]]:
    """Size in bytes and SHA-256 of every file under the folder but the one that holds the digests."""
    digests: dict[str, dict[str, int | str]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != _DIGESTS:
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            digests[name] = {"bytes": path.stat().st_size, "sha256": sha256}
    return digests


def _damage(folder: Path) -> str | None:
    """Why a committed checkpoint cannot be trusted, or None if every file in it is what was written."""
    try:
        recorded = (folder / _DIGESTS).read_bytes()
        found = _digests(folder)
    except PermissionError as error:
        raise CheckpointError(f"cannot read checkpoint {folder}: {error}; check its permissions") from error
    except FileNotFoundError:
        return f"{_DIGESTS} is missing"
    except OSError as error:
        return f"it cannot be read ({error})"
    # Byte for byte, so that a flipped bit in the file of digests itself is seen as well.
    if recorded == json.dumps(found, indent=1).encode():
        return None
    try:
        wanted = dict(json.loads(recorded))
    except (ValueError, TypeError):
        return f"{_DIGESTS} is damaged"
    differing = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
    if not differing:
        return f"{_DIGESTS} is damaged"
    name = differing[0]
    state = "is missing" if name not in found else "was not written by us" if name not in wanted else "has changed"
    others = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
    return f"{name} {state}{others}"


def _read(folder: Path, step: int, abstract_state: Any) -> Any:
    """The state in a checkpoint whose digests are right."""
    contents = json.loads((folder / _CONTENTS).read_text())
    if contents["step"] != step:
        raise CheckpointError(f"{folder} holds step {contents['step']}; give the folder its own name again")
    stored = {name: _LeafFacts(tuple(facts["shape"]), facts["dtype"]) for name, facts in contents["arrays"].items()}
    abstract = _named_leaves(abstract_state)
    wanted = {name: _LeafFacts(tuple(leaf.shape), str(leaf.dtype)) for name, leaf in abstract.items()}
    if stored != wanted:
        _refuse_other_arrays(folder, stored, wanted)
    restore_args = {name: _how_to_read(leaf) for name, leaf in abstract.items() if leaf.size}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            arrays = checkpointer.restore(
                folder / _STATE, ocp.args.PyTreeRestore(item=dict.fromkeys(restore_args, 0), restore_args=restore_args)
            )
        except Exception as error:
            raise CheckpointError(
                f"the files of checkpoint {folder} are as they were written, but Orbax {ocp.__version__} cannot read "
                f"them: {error}; use the version that wrote them"
            ) from error
    leaves = []
    for name, leaf in abstract.items():
        if name in arrays and isinstance(arrays[name], jax.Array):
            leaves.append(arrays[name])
            continue
        array = arrays[name] if leaf.size else np.zeros(leaf.shape, leaf.dtype)
        assert (array.shape, array.dtype) == (leaf.shape, leaf.dtype), name
        leaves.append(jax.device_put(array, leaf.sharding, may_alias=False))
    return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)


def _how_to_read(leaf: Any) -> ocp.RestoreArgs:
    """Whole into memory; with several processes each its own parts."""
    if jax.process_count() == 1:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(
        restore_type=jax.Array, sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype
    )


def _refuse_other_arrays(folder: Path, stored: Mapping[str, _LeafFacts], wanted: Mapping[str, _LeafFacts]) -> NoReturn:
    differing = [name for name in {**wanted, **stored} if stored.get(name) != wanted.get(name)]
    listed = "; ".join(
        f"{name}: {_described(stored.get(name))} in the checkpoint, {_described(wanted.get(name))} in the model"
        for name in differing[:5]
    )
    others = f"; and {len(differing) - 5} more" if len(differing) > 5 else ""
    raise CheckpointError(
        f"checkpoint {folder} was written by another model or optimiser ({listed}{others}); "
        "use the settings it was written with, or another work folder"
    )


def _described(facts: _LeafFacts | None) -> str:
    return f"{facts.dtype}{list(facts.shape)}" if facts else "absent"


def _set_aside(damaged: list[Path]) -> None:
    for path in damaged:
        target = path.with_name(path.name + _DAMAGED)
        number = 1
        while target.exists():
            number += 1
            target = path.with_name(f"{path.name}{_DAMAGED}-{number}")
        try:
            path.rename(target)
        except OSError as error:
            raise CheckpointError(f"cannot rename the damaged checkpoint {path}: {error}; move it away") from error


def _sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
