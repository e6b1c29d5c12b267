"""Image-text tar shards in the layout of img2dataset: how they are written and found.

An example consists of the members `key.jpg` (or .jpeg, .png, .webp, .bmp, .gif), `key.txt` and optionally `key.json`
or `key.cls`, in any order in one tar. Member names are compared, never used as file paths.
"""

import glob
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable
from typing import Any, NamedTuple

from limoe.data import files
from limoe.data.files import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class Example(NamedTuple):
    """An example as it is stored: an encoded image, the caption as text, the metadata as a JSON object."""

    key: str
    image_bytes: bytes
    caption: str
    metadata: dict[str, Any] | None = None
    image_extension: str = "jpg"


def write_shard(path: files.Path, examples: Iterable[Example]) -> int:
    """Write the examples as one tar, atomically, and return their number. Equal examples give equal bytes.

    Raises `ValueError` for a key with a dot or slash, or an unknown image extension; `StorageError` if the file cannot
    be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_shard(f"{folder}/00000.tar", [Example("000", b"the bytes of a JPEG", "a red ring")])
    ...     [os.path.basename(path) for path in find_shards(folder)]
    1
    ['00000.tar']
    """
    count = 0
    with files.atomic_writer(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for example in examples:
            if not re.fullmatch(r"[^./\x00]+", example.key):
                raise ValueError(
                    f"the key {example.key!r} must not be empty or hold a dot or a slash; use digits, letters, - and _"
                )
            if example.image_extension not in IMAGE_EXTENSIONS:
                raise ValueError(f"the image extension {example.image_extension!r} is not one of {IMAGE_EXTENSIONS}")
            _add(tar, f"{example.key}.{example.image_extension}", example.image_bytes)
            _add(tar, f"{example.key}.txt", example.caption.encode("utf-8"))
            if example.metadata is not None:
                metadata = json.dumps(example.metadata, sort_keys=True, ensure_ascii=False)
                _add(tar, f"{example.key}.json", metadata.encode("utf-8"))
            count += 1
    return count


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # owner, group and time stay zero, so equal contents give equal bytes
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def find_shards(spec: files.Path) -> list[str]:
    """Find the tar files of a folder, a file, a glob or a brace list; sorted, each once.

    A brace list is `{a,b}` or `{000..127}` (leading zeros are kept). Raises `DataError`, which says what was looked
    for, if nothing is found or a file of a brace list is missing.

    >>> expand_braces("train-{08..10}.tar")
    ['train-08.tar', 'train-09.tar', 'train-10.tar']
    """
    text = os.fspath(spec)
    if not text:
        raise DataError(
            "no shards are named; give a folder of .tar files, a glob or a brace list such as 'data/{00000..00099}.tar'"
        )
    found: set[str] = set()
    for pattern in expand_braces(text):
        if files.is_folder(pattern):
            looked_for = os.path.join(pattern, "*.tar")
            # Links that lead nowhere too: each is a shard that is lost. Compressed ones are refused below.
            names = [
                name for name in files.names_in(pattern) if name.endswith((".tar", *COMPRESSED)) and name[0] != "."
            ]
            paths = [os.path.join(pattern, name) for name in names]
            matches = [path for path in paths if not files.is_folder(path)]
        else:
            looked_for = pattern
            matches = [pattern] if files.exists(pattern) else files.list_files(pattern)
        if packed := [path for path in matches if path.endswith(COMPRESSED)]:
            raise DataError(
                f"{packed[0]} is compressed, and random access needs a plain tar; unpack it: gunzip {packed[0]}"
            )
        if not matches:
            named = "" if pattern == text else f" (one of {text})"
            absent = looked_for == pattern and not glob.has_magic(os.path.basename(pattern))
            what = f"there is no file or folder {pattern}" if absent else f"looked for {looked_for}"
            raise DataError(
                f"no shards found: {what}{named}, seen from the folder {os.getcwd()}; "
                "give a folder of .tar files, a glob or a brace list"
            )
        found.update(matches)
    return sorted(found)


def expand_braces(text: str) -> list[str]:
    """Expand `{a,b}` and `{00..12}` to all texts, in order. A text without braces is the only result.

    >>> expand_braces("{a,b}-{0..1}")
    ['a-0', 'a-1', 'b-0', 'b-1']
    """
    match = re.search(r"\{([^{}]*)\}", text)
    if match is None:
        return [text]
    head, inside, tail = text[: match.start()], match.group(1), text[match.end() :]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if span:
        first, last = span.groups()
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        choices = inside.split(",")
    return [head + choice + rest for choice in choices for rest in expand_braces(tail)]
