"""Random access to decoded examples over shards: an example or, where it cannot be used, the reason."""

import bisect
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from limoe.data import files, images, shards
from limoe.data.files import DataError

# Larger members are refused unread: they are no captions and no web images, but could fill the memory.
MAX_IMAGE_BYTES = 256 * 2**20
MAX_TEXT_BYTES = 2**20


class Decoded(NamedTuple):
    """An example ready for use: `image` uint8 [H, W, 3]; `metadata` from its .json, None if that is not read."""

    image: UInt8[np.ndarray, "H W 3"]
    caption: str
    key: str
    metadata: dict[str, Any] | None


class Bad(NamedTuple):
    """An example that cannot be used, and why."""

    key: str
    reason: str


@runtime_checkable
class Source(Protocol):
    """Examples by number: the same number always gives the same example, from any thread.

    A source of one's own is a class that inherits from this one, and a line that names it, `SOURCES["csv"] = Csv`. Then
    `csv:PATH` stands wherever a folder with shards can; `Csv(PATH, image_size=..., metadata=..., cache_dir=...)` reads
    it.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Decoded | Bad: ...

    @property
    def damages(self) -> list[str]:
        """What is wrong with the data as a whole, as "<path>: <damage>", for a message at the start of a run."""
        return []

    def captions(self, *, limit: int) -> Iterator[str]:
        """The usable captions of at most `limit` examples evenly spread over the data, in order."""
        for number in spread_evenly(len(self), limit):
            example = self[number]
            if isinstance(example, Decoded):
                yield example.caption


def spread_evenly(count: int, limit: int) -> range:
    """At most `limit` numbers below `count`, equally far apart.

    >>> list(spread_evenly(10, 5))
    [0, 2, 4, 6, 8]
    """
    return range(0, count, max(1, -(-count // limit)))


class _BadExample(Exception):
    """Carries the reason from where it is seen to where the key is known."""


class ShardSource(Source):
    """The examples of all shards that `find_shards(spec)` names, shard after shard; their number includes the bad ones.

    `metadata` asks for the content of key.json too; then an example whose .json is damaged is bad, and, unless
    `needs_metadata` is false, one that has none. Indexes are kept as
    `load_index` says. Raises `DataError` if no shards or no examples are found, and what `files.open_binary` raises.
    """

    def __init__(
        self,
        spec: files.Path,
        *,
        image_size: int,
        metadata: bool = False,
        needs_metadata: bool = True,
        cache_dir: files.Path = "",
    ) -> None:
        if image_size < 1:
            raise ValueError(f"image_size {image_size} must be at least 1 pixel")
        self._paths = shards.find_shards(spec)
        self._indexes = [shards.load_index(path, cache_dir=cache_dir) for path in self._paths]
        self._ends = list(itertools.accumulate(len(index.keys) for index in self._indexes))
        self._image_size = image_size
        self._metadata, self._needs_metadata = metadata, needs_metadata
        if not self._ends[-1]:
            raise DataError(
                f"the {len(self._paths)} shards of {spec} hold no examples; they need key.jpg and key.txt members"
            )

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> Decoded | Bad:
        path, index, row = self._locate(number)
        key = index.keys[row]
        try:
            caption = _caption(path, index, row)
            content = _member(path, index, index.image[row], "image", MAX_IMAGE_BYTES)
            image = images.decode(content, size=self._image_size)
            read = self._metadata and (self._needs_metadata or index.metadata[row][0] >= 0)
            return Decoded(image, caption, key, _metadata(path, index, row) if read else None)
        except (_BadExample, images.ImageError) as error:
            return Bad(key, str(error))

    @property
    def damages(self) -> list[str]:
        """What is wrong with whole shards."""
        return [
            f"{path}: {index.damage}" for path, index in zip(self._paths, self._indexes, strict=True) if index.damage
        ]

    def captions(self, *, limit: int) -> Iterator[str]:
        """As `Source` says; no image is read."""
        for number in spread_evenly(len(self), limit):
            try:
                yield _caption(*self._locate(number))
            except _BadExample:
                continue

    def _locate(self, number: int) -> tuple[str, shards.ShardIndex, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"example {number} of {len(self)}")
        shard = bisect.bisect_right(self._ends, number)
        index = self._indexes[shard]
        return self._paths[shard], index, number - self._ends[shard] + len(index.keys)


class CachedSource(Source):
    """The same examples, kept in memory once decoded as far as `max_bytes` allows: later epochs decode nothing."""

    def __init__(self, source: Source, *, max_bytes: int) -> None:
        self._source = source
        self._kept: dict[int, Decoded | Bad] = {}
        self._bytes_left = max_bytes
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, number: int) -> Decoded | Bad:
        if number in self._kept:
            return self._kept[number]
        example = self._source[number]
        # About 1 kB of Python objects hang on each example, whatever the image's size.
        num_bytes = 1024 + (example.image.nbytes if isinstance(example, Decoded) else 0)
        with self._lock:
            if num_bytes <= self._bytes_left and number not in self._kept:
                self._kept[number] = example
                self._bytes_left -= num_bytes
        return example


SOURCES: dict[str, Callable[..., Source]] = {"shards": ShardSource}
"""What reads `NAME:PATH`; a path without a name is one of shards."""


def open_source(
    place: files.Path,
    *,
    image_size: int,
    metadata: bool = False,
    needs_metadata: bool = True,
    cache_dir: files.Path = "",
) -> Source:
    """The examples at a place: a folder with shards, or `NAME:PATH`, which the source of that name in `SOURCES` reads.

    `metadata` asks for the metadata of each example too. Raises DataError for an unknown name, and what the source
    raises.

    >>> open_source("parquet:pairs", image_size=8)
    Traceback (most recent call last):
    limoe.data.files.DataError: there is no data source 'parquet' for parquet:pairs; there are: shards. Write
    ./parquet:pairs if that is the name of a folder
    """
    name, colon, path = str(place).partition(":")
    if not colon or path.startswith("//") or not re.fullmatch("[a-z][a-z0-9_]+", name):
        name, path = "shards", place
    if name not in SOURCES:
        raise DataError(
            f"there is no data source {name!r} for {place}; there are: {', '.join(SOURCES)}. "
            f"Write ./{place} if that is the name of a folder"
        )
    # Whether an example may lack metadata is a question where these are files of their own.
    options = {"needs_metadata": needs_metadata} if name == "shards" else {}
    return SOURCES[name](path, image_size=image_size, metadata=metadata, cache_dir=cache_dir, **options)


def _caption(path: str, index: shards.ShardIndex, row: int) -> str:
    content = _member(path, index, index.caption[row], "caption", MAX_TEXT_BYTES)
    try:
        caption = content.decode("utf-8")
    except UnicodeDecodeError:
        raise _BadExample("the caption is not UTF-8") from None
    if not caption.strip():
        raise _BadExample("the caption is empty")
    return caption


def _metadata(path: str, index: shards.ShardIndex, row: int) -> dict[str, Any]:
    content = _member(path, index, index.metadata[row], "metadata", MAX_TEXT_BYTES)
    try:
        metadata = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _BadExample(f"the metadata is not JSON: {error}") from None
    if not isinstance(metadata, dict):
        raise _BadExample("the metadata is not a JSON object")
    return metadata


def _member(path: str, index: shards.ShardIndex, span: np.ndarray, what: str, limit: int) -> bytes:
    offset, size = span.tolist()
    if offset < 0:
        raise _BadExample(f"the {what} is missing{index.damage and f' ({index.damage})'}")
    if offset + size > index.stamp.size:
        raise _BadExample(f"the {what} is incomplete ({index.damage})")
    if size > limit:
        raise _BadExample(f"the {what} is too large: {size} bytes, the limit is {limit}")
    content = files.read_range(path, offset, size)
    if len(content) < size:
        raise _BadExample(f"the {what} is incomplete: the tar became shorter since it was indexed")
    return content
