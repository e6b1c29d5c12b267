"""A trained model as a folder in the layout that others know, and its two encoders as programs without limoe.

model.safetensors     parameters in float32, named by their path in the model, such as `segments.0.blocks.1.moe.w1`
config.json           the settings of the run
tokenizer.model       the SentencePiece model
preprocess.json       what becomes of a picture before the model
README.md             a model card
programs/*.jaxexport  `image_1`, `image_64`, `text_1` and `text_64`: `jax.export` programs for batches of that size
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from limoe.config.schema import Config
from limoe.config.settings import from_json, to_json
from limoe.data import files
from limoe.data.images import preprocess_of
from limoe.data.tokenizer import load_tokenizer
from limoe.errors import LimoeError
from limoe.evaluate.encode import PROGRAMS, Encoder
from limoe.evaluate.restore import RestoredModel, finite, model_to_read
from limoe.model.build import Parameters, abstract_model
from limoe.use.card import model_card
from limoe.workdir.folder import Workdir

WEIGHTS = "model.safetensors"
_VERSION = "1"
_BATCHES = (1, 64)
_PLATFORMS = ("cpu", "tpu", "cuda")


class ExportError(LimoeError, RuntimeError):
    """An export cannot be written or read; the message says why, and what to do."""


def is_export(folder: str | os.PathLike[str]) -> bool:
    """Say whether a folder holds an export.

    >>> is_export("no/such/folder")
    False
    """
    return (Path(folder) / WEIGHTS).is_file()


def write_export(restored: RestoredModel, run: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Write a model of the work folder `run` into the folder `out`, which must be empty or new.

    Raises ExportError if `out` holds files, and StorageError if it cannot be written.
    """
    folder, workdir, config = Path(out), Workdir.existing(os.fspath(run)), restored.config
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} is there already and not empty; give a new folder with --out=DIR")
    files.make_folder(folder / "programs")
    summary = json.loads(files.read_text(workdir.summary)) if workdir.finished else {}
    texts = {
        "config.json": to_json(config),
        "preprocess.json": json.dumps(preprocess_of(config).described(), indent=2) + "\n",
        "README.md": model_card(config, restored.step, summary),
    }
    for name, text in texts.items():
        files.write_bytes(folder / name, text.encode())
    files.write_bytes(folder / "tokenizer.model", files.read_bytes(workdir.tokenizer))
    for name, program in _programs(config).items():
        files.write_bytes(folder / "programs" / f"{name}.jaxexport", program)
    # Last, because a folder with weights is an export.
    tensors = {name: np.asarray(leaf) for name, leaf in by_name(restored.encoder.parameters).items()}
    metadata = {"format": "limoe", "version": _VERSION, "step": str(restored.step)}
    with files.explained("write", folder / WEIGHTS):
        save_file(tensors, folder / WEIGHTS, metadata=metadata)
        shutil.copymode(folder / "config.json", folder / WEIGHTS)  # safetensors lets only the owner read


def read_export(folder: str | os.PathLike[str], *, batch_sizes: Sequence[int]) -> RestoredModel:
    """Read an export onto the devices of this machine.

    Raises ExportError for one of another version, or whose arrays are not those of its configuration.
    """
    path = Path(folder)
    config = from_json(files.read_text(path / "config.json"))
    graph, parameters, placement = model_to_read(config)
    try:
        with safe_open(path / WEIGHTS, framework="numpy") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("version") != _VERSION or metadata.get("format") != "limoe":
                raise ExportError(
                    f"{path / WEIGHTS} has format {metadata.get('format')} version {metadata.get('version')}; this "
                    f"version of limoe reads limoe version {_VERSION}; export the run again"
                )
            parameters = _placed(path, parameters, {name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
    except SafetensorError as error:
        raise ExportError(f"{path / WEIGHTS} cannot be read: {error}; copy the export again") from error
    tokenizer = load_tokenizer(path / "tokenizer.model", length=config.model.text_length)
    parameters = finite(parameters, str(path))
    encoder = Encoder(graph, parameters, config, tokenizer, placement=placement, batch_sizes=batch_sizes)
    return RestoredModel(config, int(metadata["step"]), encoder, ())


def by_name(parameters: Parameters) -> dict[str, Any]:
    """Flatten parameters into names and arrays.

    >>> by_name({"norm": {"scale": 1}})
    {'norm.scale': 1}
    """
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _placed(path: Path, abstract: Parameters, stored: Mapping[str, np.ndarray]) -> Parameters:
    wanted = by_name(abstract)
    different = [
        name
        for name in sorted(wanted.keys() | stored.keys())
        if name not in wanted or name not in stored or wanted[name].shape != stored[name].shape
    ]
    if different:
        raise ExportError(
            f"{path / WEIGHTS} is not of the model in config.json: {', '.join(different[:3])} differ; copy the whole "
            "export again"
        )
    arrays = [jax.device_put(stored[name].astype(leaf.dtype), leaf.sharding) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), arrays)


def _programs(config: Config) -> dict[str, bytes]:
    """Trace both encoders for every platform: plain XLA in float32, of parameters by name and a batch."""
    model = dataclasses.replace(config.model, attention="xla", compute_dtype="float32")
    size, length = model.image_size, model.text_length
    inputs = {"image": ((size, size, 3), jnp.uint8), "text": ((length,), jnp.int32)}
    # What is traced for a CPU takes no kernels of the machine that exports.
    with jax.default_device(jax.devices("cpu")[0]):
        graph, parameters = abstract_model(dataclasses.replace(config, model=model))
        structure, named = jax.tree.structure(parameters), by_name(parameters)

        def exported(kind: str, batch: int) -> bytes:
            def run(parameters: dict[str, jax.Array], given: jax.Array) -> jax.Array:
                whole = jax.tree.unflatten(structure, [parameters[name] for name in named])
                return PROGRAMS[kind](nnx.merge(graph, whole), given)

            shape, dtype = inputs[kind]
            given = jax.ShapeDtypeStruct((batch, *shape), dtype)
            return _exported(run, named, given)

        return {f"{kind}_{batch}": exported(kind, batch) for kind in inputs for batch in _BATCHES}


def _exported(run: Callable[..., jax.Array], *arguments: Any) -> bytes:
    return bytes(jax.export.export(jax.jit(run), platforms=_PLATFORMS)(*arguments).serialize())
