"""The parameters of a trained model by name, from a checkpoint of a run or from an export."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from safetensors import SafetensorError, safe_open

from limoe.config.schema import Config
from limoe.config.settings import from_json
from limoe.data import files
from limoe.errors import LimoeError
from limoe.workdir.checkpoint import CheckpointError, Checkpoints
from limoe.workdir.folder import Workdir

WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer.model"
VERSION = "1"
"""The version of an export, in the metadata of its weights."""


class ExportError(LimoeError, RuntimeError):
    """An export cannot be written or read; the message says why, and what to do."""


class Weights(NamedTuple):
    """Parameters of a trained model by name, and where they come from."""

    arrays: dict[str, jax.Array]
    step: int
    digest: str
    """SHA-256: of a checkpoint's seal, or of an export's file of weights."""
    skipped: tuple[str, ...]
    """A message for each damaged checkpoint that was skipped."""


def is_export(folder: str | os.PathLike[str]) -> bool:
    """Say whether a folder holds an export.

    >>> is_export("no/such/folder")
    False
    """
    return (Path(folder) / WEIGHTS).is_file()


def config_of(folder: str | os.PathLike[str]) -> Config:
    """Read the settings of a run or of an export. Raises WorkdirError if the folder is neither."""
    if is_export(folder):
        return from_json(files.read_text(Path(folder) / "config.json"))
    return Workdir.existing(os.fspath(folder)).config


def read_weights(folder: str | os.PathLike[str], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Weights:
    """Read some parameters of a run's newest good checkpoint, or of an export, each with its sharding.

    The folder is not changed. Raises the errors of `Checkpoints.restore` and `read_tensors`, and CheckpointError
    without a checkpoint.
    """
    if is_export(folder):
        step, arrays = read_tensors(folder, wanted, part=True)
        with open(Path(folder) / WEIGHTS, "rb") as file:
            return Weights(arrays, step, hashlib.file_digest(file, "sha256").hexdigest(), ())
    checkpoints = Checkpoints(Workdir.existing(os.fspath(folder)).checkpoints, read_only=True)
    stored_as = {name: f"parameters/{name.replace('.', '/')}" for name in wanted}
    restored = checkpoints.restore({stored_as[name]: leaf for name, leaf in wanted.items()}, part=True)
    if restored is None:
        raise CheckpointError(f"{checkpoints.folder} holds no checkpoint yet; train first")
    arrays = {name: restored.state[stored_as[name]] for name in wanted}
    return Weights(arrays, restored.step, restored.digest, restored.skipped)


def read_tensors(
    folder: str | os.PathLike[str], wanted: Mapping[str, jax.ShapeDtypeStruct], *, part: bool = False
) -> tuple[int, dict[str, jax.Array]]:
    """Read the step and the parameters of an export, each with its sharding; with `part`, there may be others.

    Raises ExportError for an export of another version, or with other parameters than `wanted`.
    """
    path = Path(folder) / WEIGHTS
    try:
        with safe_open(path, framework="numpy") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("version") != VERSION or metadata.get("format") != "limoe":
                raise ExportError(
                    f"{path} has format {metadata.get('format')} version {metadata.get('version')}; this "
                    f"version of limoe reads limoe version {VERSION}; export the run again"
                )
            there = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
            looked_at = wanted if part else wanted.keys() | there.keys()
            different = [
                name
                for name in sorted(looked_at)
                if name not in there or name not in wanted or wanted[name].shape != there[name]
            ]
            if different:
                raise ExportError(
                    f"{path} is not of the model in config.json: {', '.join(different[:3])} differ; copy the whole "
                    "export again"
                )
            arrays = {
                name: jax.device_put(stored.get_tensor(name).astype(leaf.dtype), leaf.sharding)
                for name, leaf in wanted.items()
            }
            return int(metadata["step"]), arrays
    except SafetensorError as error:
        raise ExportError(f"{path} cannot be read: {error}; copy the export again") from error


def by_name(parameters: Any) -> dict[str, Any]:
    """Flatten parameters into names and arrays.

    >>> by_name({"norm": {"scale": 1}})
    {'norm.scale': 1}
    """
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
