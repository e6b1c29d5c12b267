"""Shards of plain pictures, and shards whose members are whatever a test wants."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from limoe.data.shards import Example

COLOURS = ("red", "green", "blue")

# Key, image, caption, metadata; None for a member that is not there.
RawExample = tuple[str, bytes | None, bytes | None, dict[str, Any] | None]


def picture(number: int, size: tuple[int, int] = (20, 20)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, COLOURS[number % 3]).save(file, "JPEG")
    return file.getvalue()


def caption(number: int) -> str:
    return f"a picture in {COLOURS[number % 3]}"


def colour_examples(count: int, first: int = 0) -> list[Example]:
    return [Example(f"{number:05d}", picture(number), caption(number)) for number in range(first, first + count)]


def write_raw(path: Path, examples: Sequence[RawExample]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, image, text, metadata in examples:
            content = None if metadata is None else json.dumps(metadata).encode()
            for extension, member in (("jpg", image), ("txt", text), ("json", content)):
                if member is not None:
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(member)
                    tar.addfile(info, io.BytesIO(member))


def classes_json(folder: Path) -> None:
    content = {"templates": ["a picture in {}"], "classes": list(COLOURS)}
    (folder / "classes.json").write_text(json.dumps(content))
