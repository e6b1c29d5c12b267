"""Checkpoints of a training run: written in the background, sealed by digests, committed by one rename.

A committed checkpoint is a folder `step_00001234` that holds

    state/           the arrays, written by Orbax under their names in the tree
    contents.json    the step, and name, shape and dtype of every array
    digests.json     size and SHA-256 of every other file

It is written under another name (`.partial-...`). Then every file and folder in it is synced to disk, and the folder is
renamed. So a folder with the final name is complete, even if the process or the machine stopped.

Orbax's AsyncCheckpointer copies the arrays to the host and writes them while training continues; each process writes
its own parts. Orbax's CheckpointManager does not fit: it renames a checkpoint before every process can digest what it
wrote, and it deletes checkpoints that it takes for broken; here a damaged one is skipped and kept. Arrays are stored
whole, so they can be read into any other sharding.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from limoe.data import files
from limoe.parallel.processes import from_first, is_first, told_to_all, wait_for_all
from limoe.workdir import seal
from limoe.workdir.seal import CheckpointError

_STATE = "state"
_PARTIAL = ".partial-"
_DAMAGED = ".damaged"
_NONE = -1
_STEP_NAME = re.compile(r"step_(\d{8,})")
_numbers_of_saves = itertools.count()  # the same in every process


class Restored(NamedTuple):
    """What `Checkpoints.restore` found: the step, the state, a message for each damaged checkpoint, and the SHA-256 of
    the seal."""

    step: int
    state: Any
    skipped: tuple[str, ...]
    digest: str


def _is_not_orbax_chatter(record: logging.LogRecord) -> bool:
    # Orbax logs some twenty INFO lines at each save, and tracebacks of errors that it raises anyway.
    return record.levelno == logging.WARNING or f"{os.sep}orbax{os.sep}" not in record.pathname


absl_logging.get_absl_logger().addFilter(_is_not_orbax_chatter)


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Args:
      folder: the folder; created if absent. What killed runs left half-written in it is removed.
      keep: number of committed checkpoints to keep; an older one is removed only after a newer one is committed.
      read_only: for reading a run that may still be going on; nothing is created, removed or renamed.

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
            raise ValueError(f"keep={keep}: at least one checkpoint must be kept; use 1 or more")
        self.folder = Path(folder).absolute()
        self._keep = keep
        self._read_only = read_only
        self._newest: int | None = None  # the step that this object saved or restored last
        # Its thread is no daemon: one that is stopped inside native code could crash the end of the program.
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None
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
        """The steps of the committed checkpoints, oldest first. Only `restore` finds out which are undamaged."""
        if not self.folder.is_dir():
            return ()
        names = (_STEP_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return tuple(sorted(int(name[1]) for name in names if name))

    def save(self, step: int, state: object) -> None:
        """Copies the state to the host and starts to write it. The arrays may be donated as soon as this returns.

        Waits for the previous write. Saving the step that was saved or restored last does nothing.

        Args:
          step: the number of finished steps.
          state: a pytree of JAX arrays of any shape and dtype except PRNG keys (`jax.random.key_data` converts them).

        Raises:
          ValueError: a negative step, or a leaf that would not be restored as it is.
          CheckpointError: the previous write failed, or the folder holds this step or a later one.
        """
        if self._read_only:
            raise ValueError(f"{self.folder} was opened with read_only=True; open it without to save")
        if step < 0:
            raise ValueError(f"step={step}: a step must not be negative")
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
        partial = self._partial_path(step)
        try:
            if is_first():
                partial.mkdir()
            wait_for_all(f"{partial.name} is there")
            writing = _start_to_write(partial, leaves)
        except Exception as error:
            raise self._failed_write(step, leaves, error) from error
        shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
        self._writing = self._writer.submit(self._finish_in_background, step, shapes, writing)

    def wait(self) -> None:
        """Waits until the last save is on disk. The end of a `with` block waits too.

        A program that ends without waiting may lose the last save, because Python starts no threads while it ends.

        Raises:
          CheckpointError: that save failed; earlier checkpoints are unchanged.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def restore(self, abstract_state: Any, *, part: bool = False, step: int | None = None) -> Restored | None:
        """Reads the newest undamaged checkpoint; returns None if there has never been a checkpoint.

        A checkpoint with a missing, truncated or changed file is skipped. Once an older one has been read, the damaged
        one is renamed to `step_....damaged`, and its step can be saved again. Nothing is deleted.

        Args:
          abstract_state: the tree to restore into: `jax.ShapeDtypeStruct`s (or arrays) with their shardings.
          part: allow more arrays in the checkpoint, which are then not read; by default that is refused.
          step: the checkpoint to read, instead of the newest undamaged one.

        Raises:
          CheckpointError: all checkpoints are damaged, the undamaged one has other arrays, or there is none of `step`.
        """
        self.wait()
        if step is not None and step not in self.steps():
            there = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{self.folder} holds no checkpoint of step {step}; the steps that it has: {there}")
        skipped: list[tuple[Path, str]] = []
        for found in self._steps_from_newest() if step is None else [step]:
            if damage := seal.damage_of(self.path(found)):
                skipped.append((self.path(found), damage))
                continue
            state = _read(self.path(found), found, abstract_state, part=part)
            if is_first() and not self._read_only:
                _set_aside([path for path, _ in skipped])
            self._newest = found
            messages = tuple(f"skipped checkpoint {path}: {why}" for path, why in skipped)
            return Restored(found, state, messages, seal.digest_of(self.path(found)))
        if self.folder.is_dir():
            skipped += [(path, "set aside before") for path in sorted(self.folder.glob(f"*{_DAMAGED}*"))]
        if skipped:
            listed = "; ".join(f"{path}: {why}" for path, why in skipped)
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be trusted ({listed}); put a copy of one back, "
                "or move this folder away or choose another work folder to train from the start"
            )
        return None

    def _steps_from_newest(self) -> Iterator[int]:
        """List the committed steps, newest first, as the first process sees them."""
        steps = list(self.steps())
        while (step := from_first(steps.pop() if steps else _NONE)) != _NONE:
            yield step

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            self.wait()
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # the error that ended the block comes first

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of a step."""
        return self.folder / f"step_{step:08d}"

    def _partial_path(self, step: int) -> Path:
        return self.folder / f"{_PARTIAL}{self.path(step).name}"

    def _finish_in_background(self, step: int, shapes: dict[str, Any], writing: ocp.AsyncCheckpointer) -> None:
        """Wait for Orbax, seal, commit, and remove old checkpoints. The next `save` or `wait` raises its error."""
        try:
            self._commit(step, shapes, writing)
        except Exception as error:  # any: Orbax has many types for a full disk
            # Once more, because the first close ended at the error: Orbax may still write what is removed below.
            with contextlib.suppress(Exception):
                writing.close()
            raise self._failed_write(step, shapes, error) from error
        self._newest = step
        if is_first():
            self._remove_old()

    def _commit(self, step: int, shapes: dict[str, Any], writing: ocp.AsyncCheckpointer) -> None:
        partial = self._partial_path(step)
        writing.close()
        if is_first():
            arrays = {name: {"shape": leaf.shape, "dtype": str(leaf.dtype)} for name, leaf in shapes.items()}
            (partial / seal.CONTENTS).write_text(json.dumps({"step": step, "arrays": arrays}, indent=1))
        own = seal.digests_of_own_files(partial)
        told = told_to_all("digests", next(_numbers_of_saves), json.dumps(own))
        if is_first():
            seal.write_seal(partial, {name: digest for text in told for name, digest in json.loads(text).items()})
            partial.rename(self.path(step))
            files.sync(self.folder)

    def _failed_write(self, step: int, leaves: dict[str, Any], error: Exception) -> CheckpointError:
        """Remove the half-written checkpoint and make the error."""
        if is_first():
            shutil.rmtree(self._partial_path(step), ignore_errors=True)
        before = self.steps()
        intact = f"step {before[-1]} before it is intact" if before else "there is none before it"
        size = sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves.values())
        return CheckpointError(
            f"could not write checkpoint {self.path(step)}: {error}; {intact}. It needs {size / 1e6:.1f} MB: free "
            "space on that disk, check the folder's permissions, and start the run again"
        )

    def _remove_old(self) -> None:
        try:
            for old in self.steps()[: -self._keep]:
                # Rename it first: if the process is killed during the removal, the rest must not look like a damaged
                # checkpoint.
                self.path(old).rename(self._partial_path(old))
                shutil.rmtree(self._partial_path(old))
        except OSError as error:
            raise CheckpointError(
                f"a new checkpoint is written, but an older one in {self.folder} could not be removed: {error}; "
                "check the folder's permissions"
            ) from error


def _start_to_write(partial: Path, leaves: dict[str, jax.Array]) -> ocp.AsyncCheckpointer:
    """Copy the arrays to the host and start to write them. Closing the returned checkpointer finishes the write."""
    some = {name: leaf for name, leaf in leaves.items() if leaf.size}  # Orbax refuses arrays without elements
    if jax.default_backend() == "cpu":
        # On that platform the host's copy is a view, and an array with a view cannot be donated.
        some = jax.tree.map(jnp.copy, some)
    writing = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
    writing.save(partial / _STATE, ocp.args.PyTreeSave(some))
    return writing


def _named_leaves(tree: object) -> dict[str, Any]:
    """Map paths such as `params/blocks/0/kernel` to leaves."""
    paths = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    leaves = dict(paths)
    if not leaves or len(leaves) < len(paths):
        raise ValueError(
            f"a checkpoint needs at least one array and a different name for each, but the tree has {len(paths)} "
            f"leaves with {len(leaves)} names; avoid dictionary keys with '/'"
        )
    return leaves


def _check_leaf(name: str, leaf: object) -> None:
    if not isinstance(leaf, jax.Array):
        raise ValueError(f"{name!r} in the state is a {type(leaf).__name__}; make it a JAX array")
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise ValueError(f"{name!r} in the state is a PRNG key; save jax.random.key_data of it")
    if leaf.weak_type:
        # It would be restored with a strong type. Then promotions, the compiled step and the bits of the result would
        # change.
        raise ValueError(
            f"{name!r} in the state is weakly typed; give it a dtype where it is created, as in jnp.float32(1)"
        )


def _read(folder: Path, step: int, abstract_state: Any, *, part: bool) -> Any:
    """Read the state from a checkpoint whose digests match, each array with its sharding."""
    contents = json.loads((folder / seal.CONTENTS).read_text())
    if contents["step"] != step:
        raise CheckpointError(f"{folder} holds step {contents['step']}; give the folder its original name")
    stored = {name: f"{facts['dtype']}{facts['shape']}" for name, facts in contents["arrays"].items()}
    abstract = _named_leaves(abstract_state)
    wanted = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in abstract.items()}
    if part:
        stored = {name: array for name, array in stored.items() if name in wanted}
    if stored != wanted:
        _refuse_other_arrays(folder, stored, wanted)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    restore_args = {
        name: ocp.ArrayRestoreArgs(sharding=leaf.sharding or here, global_shape=leaf.shape, dtype=leaf.dtype)
        for name, leaf in abstract.items()
        if leaf.size
    }
    item = dict.fromkeys(restore_args, 0)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            arrays = checkpointer.restore(
                folder / _STATE, ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=part)
            )
        except Exception as error:
            raise CheckpointError(
                f"the files of checkpoint {folder} are as they were written, but Orbax {ocp.__version__} cannot read "
                f"them: {error}; use the version that wrote them"
            ) from error
    leaves = []
    for name, leaf in abstract.items():
        array = arrays[name] if leaf.size else jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
        assert (array.shape, array.dtype) == (leaf.shape, leaf.dtype), name
        leaves.append(array)
    return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)


def _refuse_other_arrays(folder: Path, stored: dict[str, str], wanted: dict[str, str]) -> NoReturn:
    differing = [name for name in {**wanted, **stored} if stored.get(name) != wanted.get(name)]
    listed = "; ".join(
        f"{name}: {stored.get(name, 'absent')} in the checkpoint, {wanted.get(name, 'absent')} in the model"
        for name in differing[:5]
    )
    others = f"; and {len(differing) - 5} more" if len(differing) > 5 else ""
    raise CheckpointError(
        f"checkpoint {folder} was written by another model or optimiser ({listed}{others}); "
        "use the settings that it was written with, or another work folder"
    )


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
