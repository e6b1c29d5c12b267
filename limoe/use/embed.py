"""`limoe embed`: embeddings of a folder of pictures, of shards or of a file of texts, in memory that does not grow.

While it runs, `FILE.npz.partial/` holds what is done: `embeddings` (float32, row after row), `inputs.jsonl` (a line for
each input: its name, and why it was left out or null) and `job.json` (of which model and inputs). The same command goes
on from there. In the end both become one .npz file with `embeddings` [N, P] and `names` [N].
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32
from tqdm import tqdm

from limoe.data import files
from limoe.data.images import ImageError, Preprocess
from limoe.data.places import open_source
from limoe.data.source import Bad, Source
from limoe.errors import InputError
from limoe.use.model import Model, read_picture

# Inputs between two writes. Memory holds the pictures of one such batch.
BATCH = 64
_BAD_SHOWN = 5
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


class Read(NamedTuple):
    """An input that was read: its name, and a picture or text, or None and why it cannot be used."""

    name: str
    value: Any
    reason: str | None


class Embedded(NamedTuple):
    """How many inputs became rows of the file, how many were left out, and the first of these with the reason."""

    num_rows: int
    num_bad: int
    first_bad: tuple[str, ...]


def embed(
    model: Model, out: str | os.PathLike[str], *, images: str = "", texts: str = "", progress: bool = False
) -> Embedded:
    """Write the embeddings of `images` or of `texts` into the file `out`, and go on where the same call was stopped.

    `images` is a folder of JPEG, PNG, WebP, BMP and GIF files, with all folders in it, or shards; `texts` is a UTF-8
    file with a text a line. An input that cannot be used has no row; in shards, a picture needs a caption or a class.
    Raises InputError if there is no input, if `out` is there already, or if what stands beside it is of another model
    or of other inputs, and the errors of reading.
    """
    if files.exists(out):
        raise InputError(f"{os.fspath(out)} is there already; give another file with --out=FILE.npz, or remove it")
    inputs = pictures_at(images, model.preprocess) if images else texts_at(texts)
    first = next(inputs, None)  # says what is wrong with the place before anything is written
    if first is None:
        raise InputError(
            f"{images or texts} holds nothing to embed; give pictures, shards, or a file with a text a line"
        )
    inputs = itertools.chain([first], inputs)
    encode = model.encode_image if images else model.encode_text
    job = {"images": images, "texts": texts, "step": model.step, "model": _mark_of(model)}
    done = _Done(Path(f"{os.fspath(out)}.partial"), job, width=model.encode_text([]).shape[1])
    inputs = itertools.islice(inputs, done.num_rows + done.num_bad, None)
    with ThreadPoolExecutor() as pool, tqdm(initial=done.num_rows, disable=not progress, unit=" inputs") as bar:
        while batch := list(pool.map(lambda read: read(), itertools.islice(inputs, BATCH))):
            done.add(encode([one.value for one in batch if one.reason is None]), batch)
            bar.update(len(batch))
    done.finish(out)
    return Embedded(done.num_rows, done.num_bad, tuple(done.first_bad))


def pictures_at(place: str, preprocess: Preprocess) -> Iterator[Callable[[], Read]]:
    """List the pictures of a folder, folder after folder by name, or the examples of shards, to be read in a thread."""
    folder = Path(place)
    if not folder.is_dir() or any(folder.glob("*.tar")):
        source = open_source(place, preprocess=preprocess, metadata=True)
        for number in range(len(source)):
            yield functools.partial(_read_example, source, number)
        return
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for path in (Path(parent) / name for name in sorted(names)):
            if path.suffix.lower() in _SUFFIXES:
                yield functools.partial(_read, str(path.relative_to(folder)), read_picture, path, preprocess)


def texts_at(path: str) -> Iterator[Callable[[], Read]]:
    """List the lines of a file; their names are their numbers, from 1."""
    if not files.exists(path):
        raise InputError(f"there is no file {path}; give a UTF-8 file with a text a line")
    with files.open_binary(path) as file:
        for number, line in enumerate(file, 1):
            yield functools.partial(_read, str(number), _text, line)


def _read(name: str, read: Callable[..., Any], *given: Any) -> Read:
    try:
        return Read(name, read(*given), None)
    except (ImageError, ValueError, OSError) as error:
        return Read(name, None, str(error))


def _read_example(source: Source, number: int) -> Read:
    found = source[number]
    return Read(found.key, None, found.reason) if isinstance(found, Bad) else Read(found.key, found.image, None)


def _text(line: bytes) -> str:
    text = line.decode().strip()
    if not text:
        raise ValueError("the text is empty")
    return text


def _mark_of(model: Model) -> str:
    """Tell a model from others by what it makes of a text."""
    return hashlib.sha256(model.encode_text(["a photo"]).tobytes()).hexdigest()[:16]


class _Done:
    """What is embedded so far, in a folder."""

    def __init__(self, folder: Path, job: dict[str, Any], *, width: int) -> None:
        self._folder, self._width = folder, width
        self._embeddings, self._inputs = folder / "embeddings", folder / "inputs.jsonl"
        self.num_rows, self.num_bad, self._longest = 0, 0, 1
        self.first_bad: list[str] = []
        files.make_folder(folder)
        if not files.exists(folder / "job.json"):
            files.write_bytes(folder / "job.json", json.dumps(job).encode())
        elif (there := json.loads(files.read_text(folder / "job.json"))) != job:
            raise InputError(f"{folder} is of another model or of other inputs ({there}, now {job}); remove it")
        self._take_up()

    def _take_up(self) -> None:
        """Count what a stopped call has done, and cut off what it wrote by half."""
        self._embeddings.touch()
        self._inputs.touch()
        whole = 0
        with open(self._inputs, "rb+") as lines:
            for line in lines:
                if line.endswith(b"\n"):
                    self._count(*json.loads(line))
                    whole += len(line)
            lines.truncate(whole)
        wanted = 4 * self._width * self.num_rows
        if self._embeddings.stat().st_size < wanted:
            raise InputError(f"{self._embeddings} lost rows that {self._inputs} lists; remove {self._folder}")
        os.truncate(self._embeddings, wanted)

    def _count(self, name: str, reason: str | None) -> None:
        if reason is None:
            self.num_rows += 1
            self._longest = max(self._longest, len(name))
            return
        self.num_bad += 1
        if self.num_bad <= _BAD_SHOWN:
            self.first_bad.append(f"{name}: {reason}")

    def add(self, embeddings: Float32[np.ndarray, "N P"], batch: Sequence[Read]) -> None:
        """Add a batch: its rows first, so that a line always has its row."""
        listed = "".join(json.dumps([one.name, one.reason]) + "\n" for one in batch)
        for path, content in ((self._embeddings, embeddings.astype("<f4").tobytes()), (self._inputs, listed.encode())):
            with files.explained("write", path), open(path, "ab") as file:
                file.write(content)
        for one in batch:
            self._count(one.name, one.reason)

    def finish(self, out: str | os.PathLike[str]) -> None:
        """Make the file of what is in the folder, piece by piece, and remove the folder."""
        kind = f"<U{self._longest}"
        with files.atomic_writer(out) as file, zipfile.ZipFile(file, "w") as archive:
            with archive.open("embeddings.npy", "w", force_zip64=True) as member, open(self._embeddings, "rb") as rows:
                _write_header(member, "<f4", (self.num_rows, self._width))
                shutil.copyfileobj(rows, member)
            with archive.open("names.npy", "w", force_zip64=True) as member, open(self._inputs, "rb") as lines:
                _write_header(member, kind, (self.num_rows,))
                for name, reason in map(json.loads, lines):
                    if reason is None:
                        member.write(np.array(name, kind).tobytes())
        shutil.rmtree(self._folder)


def _write_header(member: Any, kind: str, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(member, {"descr": kind, "fortran_order": False, "shape": shape})
