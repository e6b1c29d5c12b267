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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from limoe.config.schema import Config
from limoe.config.settings import to_json
from limoe.data import files
from limoe.data.images import preprocess_of
from limoe.data.tokenizer import load_tokenizer
from limoe.evaluate.encode import PROGRAMS, Encoder
from limoe.evaluate.restore import RestoredModel, finite, model_to_read
from limoe.model.build import abstract_model
from limoe.use.card import model_card
from limoe.workdir.folder import Workdir
from limoe.workdir.weights import TOKENIZER, VERSION, WEIGHTS, ExportError, by_name, config_of, read_tensors

_BATCHES = (1, 64)
_PLATFORMS = ("cpu", "tpu", "cuda")


def write_export(restored: RestoredModel, run: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Write a model of the work folder `run` into the folder `out`, which must be empty or new.

    Raises ExportError if `out` holds files or is in a bucket, and StorageError if it cannot be written.
    """
    if "://" in os.fspath(out):
        raise ExportError(
            f"{out} is not in a file system; export into a local folder with --out=DIR, then copy it there"
        )
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
    files.write_bytes(folder / TOKENIZER, files.read_bytes(workdir.tokenizer))
    for name, program in _programs(config).items():
        files.write_bytes(folder / "programs" / f"{name}.jaxexport", program)
    # Last, because a folder with weights is an export.
    tensors = {name: np.asarray(leaf) for name, leaf in by_name(restored.encoder.parameters).items()}
    metadata = {"format": "limoe", "version": VERSION, "step": str(restored.step)}
    with files.explained("write", folder / WEIGHTS):
        save_file(tensors, folder / WEIGHTS, metadata=metadata)
        shutil.copymode(folder / "config.json", folder / WEIGHTS)  # safetensors lets only the owner read


def read_export(folder: str | os.PathLike[str], *, batch_sizes: Sequence[int]) -> RestoredModel:
    """Read an export onto the devices of this machine.

    Raises ExportError for one of another version, or whose arrays are not those of its configuration.
    """
    path, config = Path(folder), config_of(folder)
    graph, parameters, placement = model_to_read(config)
    step, arrays = read_tensors(folder, by_name(parameters))
    parameters = jax.tree.unflatten(jax.tree.structure(parameters), list(arrays.values()))
    tokenizer = load_tokenizer(path / TOKENIZER, length=config.model.text_length)
    parameters = finite(parameters, str(path))
    encoder = Encoder(graph, parameters, config, tokenizer, placement=placement, batch_sizes=batch_sizes)
    return RestoredModel(config, step, encoder, ())


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
