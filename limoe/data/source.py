"""Data sources: random access to decoded examples; for an example that cannot be used, the reason."""

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

# Larger members are refused unread. They are no captions and no images of the web, and could fill the memory.
MAX_IMAGE_BYTES = 256 * 2**20
MAX_TEXT_BYTES = 2**20


class Decoded(NamedTuple):
    """A decoded example: `image` uint8 [H, W, 3]; `metadata` from its .json, None without one or if it is not read.

    A picture may have `more_captions`, each as good as the first.
    """

    image: UInt8[np.ndarray, "H W 3"]
    caption: str
    key: str
    metadata: dict[str, Any] | None
    more_captions: tuple[str, ...] = ()


class Bad(NamedTuple):
    """An example that cannot be used, and why."""

    key: str
    reason: str


class DataFolders(NamedTuple):
    """Folders of pairs: for training, for zero-shot classification and for retrieval; "" if there is none."""

    train: str
    zero_shot: str
    retrieval: str


@runtime_checkable
class Source(Protocol):
    """Examples by number. A number always gives the same example, from any thread.

    To add a source, inherit from this class and register the class, as in `SOURCES["csv"] = Csv`. Then `csv:PATH` is
    allowed instead of a folder with shards; `Csv(PATH, preprocess=..., metadata=..., cache_dir=...)` reads it.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Decoded | Bad: ...

    @property
    def damages(self) -> list[str]:
        """Damages of the data as a whole, as "<path>: <damage>". They are printed at the start of a run."""
        return []

    @property
    def notes(self) -> list[str]:
        """What of the data is not used, in sentences without a full stop. They are printed at the start of a run."""
        return []

    def captions(self, *, limit: int) -> Iterator[str]:
        """Yield the usable captions, in order, of at most `limit` examples that are evenly spread over the data."""
        for number in spread_evenly(len(self), limit):
            example = self[number]
            if isinstance(example, Decoded):
                yield example.caption


def spread_evenly(count: int, limit: int) -> range:
    """Choose at most `limit` numbers below `count`, equally far apart.

    >>> list(spread_evenly(10, 5))
    [0, 2, 4, 6, 8]
    """
    return range(0, count, max(1, -(-count // limit)))


class _BadExample(Exception):
    """The reason why an example is bad, raised where the example's key is not known."""


class ShardSource(Source):
    """The examples of all shards that `find_shards(spec)` names, shard after shard, bad examples included.

    `metadata` asks for the content of key.json too; then an example with a damaged .json is bad. `load_index` says
    where indexes are stored. Raises `DataError` if no shards or no examples are found, and the errors of
    `files.open_binary`.
    """

    def __init__(
        self,
        spec: files.Path,
        *,
        preprocess: images.Preprocess,
        metadata: bool = False,
        cache_dir: files.Path = "",
    ) -> None:
        self._paths = shards.find_shards(spec)
        self._indexes = [_index_of(path, cache_dir) for path in self._paths]
        self._ends = list(itertools.accumulate(len(index.keys) for index in self._indexes))
        self._preprocess, self._metadata = preprocess, metadata
        if not self._ends[-1]:
            raise DataError(
                f"the {len(self._paths)} shards of {spec} hold no examples; they need key.jpg and key.txt members"
                + "".join(f"; {note}" for note in self.notes)
            )

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> Decoded | Bad:
        path, index, row = self._locate(number)
        key = index.keys[row]
        try:
            if key in index.bad:
                raise _BadExample(index.bad[key])
            caption = _caption(path, index, row)
            content = _member(path, index, index.image[row], "image", MAX_IMAGE_BYTES)
            image = images.decode(content, self._preprocess)
            read = self._metadata and index.metadata[row][0] >= 0
            return Decoded(image, caption, key, _metadata(path, index, row) if read else None)
        except (_BadExample, images.ImageError) as error:
            return Bad(key, str(error))

    @property
    def damages(self) -> list[str]:
        """Damages of whole shards."""
        return [
            f"{path}: {index.damage}" for path, index in zip(self._paths, self._indexes, strict=True) if index.damage
        ]

    @property
    def notes(self) -> list[str]:
        """The members that are not read, added up over all shards."""
        total: dict[str, tuple[int, str]] = {}
        for index in self._indexes:
            for what, (count, first) in index.ignored.items():
                before, example = total.get(what, (0, first))
                total[what] = (before + count, example)
        return [f"ignored {count} {what}, the first is {first}" for what, (count, first) in total.items()]

    def captions(self, *, limit: int) -> Iterator[str]:
        """Yield captions as `Source` does, without reading images."""
        for number in spread_evenly(len(self), limit):
            path, index, row = self._locate(number)
            if index.keys[row] in index.bad:
                continue
            try:
                yield _caption(path, index, row)
            except _BadExample:
                continue

    def _locate(self, number: int) -> tuple[str, shards.ShardIndex, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"example {number} of {len(self)}")
        shard = bisect.bisect_right(self._ends, number)
        index = self._indexes[shard]
        return self._paths[shard], index, number - self._ends[shard] + len(index.keys)


class CachedSource(Source):
    """The examples of another source; decoded ones stay in memory, up to `max_bytes`, so later epochs are faster."""

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
        # Besides the image, an example has about 1 kB of Python objects.
        num_bytes = 1024 + (example.image.nbytes if isinstance(example, Decoded) else 0)
        with self._lock:
            if num_bytes <= self._bytes_left and number not in self._kept:
                self._kept[number] = example
                self._bytes_left -= num_bytes
        return example


SOURCES: dict[str, Callable[..., Source]] = {"shards": ShardSource}
"""The source that reads `NAME:PATH`, by name. A path without a name means shards."""


def open_source(
    place: files.Path,
    *,
    preprocess: images.Preprocess,
    metadata: bool = False,
    cache_dir: files.Path = "",
) -> Source:
    """Open the examples at a place: a folder with shards, or `NAME:PATH` for a source of that name in `SOURCES`.

    `metadata` asks for the metadata of each example too. Raises DataError for an unknown name, and the source's errors.

    >>> open_source("parquet:pairs", preprocess=images.Preprocess(8))
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
    return SOURCES[name](path, preprocess=preprocess, metadata=metadata, cache_dir=cache_dir)


def _index_of(path: str, cache_dir: files.Path) -> shards.ShardIndex:
    """Load an index. A shard that is gone or unreadable is one bad example; a missing permission ends the run."""
    try:
        return files.retried(lambda: shards.load_index(path, cache_dir=cache_dir))
    except files.StorageError:
        raise
    except OSError as error:
        return shards.lost_index(path, error)


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
    try:
        content = files.read_range(path, offset, size)
    except OSError as error:
        raise _BadExample(f"the shard cannot be read: {error}") from None
    if len(content) < size:
        raise _BadExample(f"the {what} is incomplete: the tar became shorter since it was indexed")
    return content
