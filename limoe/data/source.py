"""Data sources: random access to decoded examples; for an example that cannot be used, the reason."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from limoe.data import files, images, index_file, shards
from limoe.data.classes import Classes, has_classes, read_classes
from limoe.data.files import DataError
from limoe.data.index import NO_TAR, lost_index
from limoe.data.index_file import Index, Members
from limoe.data.templates import templates_of

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


class Mixture(NamedTuple):
    """Several sources, numbered one after another: their sizes, and how often each is drawn."""

    sizes: tuple[int, ...]
    weights: tuple[float, ...]

    def rows(self, batch_size: int) -> list[int]:
        """Say of which source each row of a batch is: shares by weight, to the nearest row, spread over the batch.

        >>> Mixture((90, 10), (3.0, 1.0)).rows(8)
        [0, 0, 1, 0, 0, 0, 1, 0]
        """
        exact = [batch_size * weight / sum(self.weights) for weight in self.weights]
        counts = [int(share) for share in exact]
        for number in sorted(range(len(exact)), key=lambda one: counts[one] - exact[one])[: batch_size - sum(counts)]:
            counts[number] += 1
        places = [((rank + 0.5) / count, number) for number, count in enumerate(counts) for rank in range(count)]
        return [number for _, number in sorted(places)]


@runtime_checkable
class Source(Protocol):
    """Examples by number. A number always gives the same example, from any thread.

    To add a source, inherit from this class and register the class, as in `SOURCES["lines"] = Lines`. Then `lines:PATH`
    is allowed instead of a folder with shards; `Lines(PATH, preprocess=..., metadata=..., cache_dir=...)` reads it.
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

    @property
    def classes(self) -> Classes | None:
        """The classes that the labels of the examples count in; None without labels."""
        return None

    @property
    def mixture(self) -> Mixture | None:
        """The sources that this one is made of, if there are several."""
        return None

    @property
    def contents(self) -> dict[str, str]:
        """What the data are made of, by name, in words that change with the content but not with the folder's place."""
        return {"examples": str(len(self))}

    def keep_blocks(self, num_examples: int) -> None:
        """Read long pieces, and keep those of the last `num_examples` examples: neighbours will be asked for."""

    def captions(self, *, limit: int) -> Iterator[str]:
        """Yield the usable captions, in order, of at most `limit` examples that are evenly spread over the data."""
        for number in spread_evenly(len(self), limit):
            example = self[number]
            if isinstance(example, Decoded):
                yield from (example.caption, *example.more_captions)


def spread_evenly(count: int, limit: int) -> range:
    """Choose at most `limit` numbers below `count`, equally far apart.

    >>> list(spread_evenly(10, 5))
    [0, 2, 4, 6, 8]
    """
    return range(0, count, max(1, -(-count // limit)))


class _BadExample(Exception):
    """The reason why an example is bad, raised where the example's key is not known."""


class _Shard(NamedTuple):
    path: str
    members: Index
    read: Callable[[str, int, int], bytes]


class ShardSource(Source):
    """The examples of all shards that `find_shards(spec)` names, shard after shard, bad examples included.

    `metadata` asks for the content of key.json and key.cls too; then an example with a damaged one is bad, and one with
    a class needs no caption. Captions are key.txt, with `lines` one a line; or the text or list of that name in
    key.json, with `caption`; or sentences with the class, by the name of a set of `templates`. `open_index` says
    where indexes are stored. Raises `DataError` if there are no shards or no examples, and the errors of
    `files.open_binary`.
    """

    def __init__(
        self,
        spec: files.Path,
        *,
        preprocess: images.Preprocess,
        metadata: bool = False,
        cache_dir: files.Path = "",
        classes: Classes | None = None,
        templates: str = "",
        lines: bool = False,
        caption: str = "",
    ) -> None:
        self._paths = shards.find_shards(spec)
        self._indexes = [index_of(path, cache_dir) for path in self._paths]
        self._ends = list(itertools.accumulate(map(len, self._indexes)))
        self._preprocess, self._metadata, self._lines, self._caption_name = preprocess, metadata, lines, caption
        self._classes = read_classes(spec) if classes is None and has_classes(spec) else classes
        self._read = files.read_range
        self._sentences = templates_of(templates) if templates else ()
        if templates and self._classes is None:
            raise DataError(
                f"{spec} has no classes.json or classnames.txt, so templates={templates} has no names to take"
            )
        if all(index.damage.startswith(NO_TAR) for index in self._indexes):
            raise DataError(
                f"the shards of {spec} hold no examples that can be read ({self._paths[0]}: "
                f"{self._indexes[0].damage}); give a tar, or one of the layouts {', '.join(SOURCES)} as LAYOUT:PATH"
            )
        if not self._ends[-1]:
            raise DataError(
                f"the {len(self._paths)} shards of {spec} hold no examples; they need key.jpg and key.txt members"
                + "".join(f"; {note}" for note in self.notes)
            )

    @property
    def contents(self) -> dict[str, str]:
        """Size and digest of the index of each shard, by its name from the folder that all shards have in common."""
        common = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in self._paths])
        found = {
            os.path.relpath(os.path.abspath(path), common): f"{index.stamp.size} bytes, index {index.digest}"
            for path, index in zip(self._paths, self._indexes, strict=True)
        }
        if self._caption_name or self._sentences or self._lines:
            names = self._classes.names if self._sentences and self._classes else ()
            how = json.dumps([self._caption_name, self._lines, self._sentences, names])
            found["captions"] = f"chosen {hashlib.sha256(how.encode()).hexdigest()[:16]}"
        return found

    @property
    def classes(self) -> Classes | None:
        """The classes of the `classes.json` or `classnames.txt` beside the shards."""
        return self._classes

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> Decoded | Bad:
        shard, row = self._locate(number)
        try:
            entry = shard.members.entry(row)
        except OSError as error:
            return Bad(f"example {row} of {shard.path}", f"its index cannot be read: {error}")
        try:
            captions, facts = self._described(shard, entry)
            content = _member(shard, entry.image, "image", MAX_IMAGE_BYTES)
            image = images.decode(content, self._preprocess)
            return Decoded(image, captions[0], entry.key, facts if self._metadata else None, captions[1:])
        except (_BadExample, images.ImageError) as error:
            return Bad(entry.key, str(error))

    def _described(self, shard: _Shard, entry: Members) -> tuple[tuple[str, ...], dict[str, Any] | None]:
        """Read the captions of an example, at least one, and its metadata if that is asked for."""
        if entry.bad:
            raise _BadExample(entry.bad)
        needed = self._metadata or self._sentences or self._caption_name
        facts = _facts(shard, entry) if needed else None
        if self._sentences:
            assert self._classes is not None
            label, count = (facts or {}).get("class"), len(self._classes.names)
            if type(label) is not int or not 0 <= label < count:
                raise _BadExample(f"the class must be a number below {count}, not {label!r:.20}")
            return described_by(label, self._classes, self._sentences), facts
        if self._caption_name:
            given = (facts or {}).get(self._caption_name)
            found: tuple[Any, ...] = tuple(given) if isinstance(given, list) else (given,)
            if not found or not all(isinstance(text, str) and text.strip() for text in found):
                raise _BadExample(f"the metadata has no caption {self._caption_name!r}: {given!r:.40}")
            return found, facts
        if entry.caption[0] < 0 and self._metadata and "class" in (facts or {}):
            return ("",), facts
        text = _caption(shard, entry)
        lines = tuple(line for line in text.splitlines() if line.strip()) if self._lines else (text,)
        return lines, facts

    def keep_blocks(self, num_examples: int) -> None:
        """Read the tars in pieces of 1 MiB from now on."""
        num_bytes = sum(index.stamp.size for index in self._indexes) / len(self) * num_examples
        self._read = files.Pieces(int(num_bytes)).read_range

    def numbers_of(self, path: str) -> range:
        """Give the numbers of a shard's examples."""
        shard = self._paths.index(path)
        return range(self._ends[shard] - len(self._indexes[shard]), self._ends[shard])

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
            shard, row = self._locate(number)
            try:
                yield from self._described(shard, shard.members.entry(row))[0]
            except (_BadExample, OSError):
                continue

    def _locate(self, number: int) -> tuple[_Shard, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"example {number} of {len(self)}")
        shard = bisect.bisect_right(self._ends, number)
        index = self._indexes[shard]
        return _Shard(self._paths[shard], index, self._read), number - self._ends[shard] + len(index)


class CachedSource(Source):
    """The examples of another source; decoded ones stay in memory, up to `max_bytes`, so later epochs are faster."""

    def __init__(self, source: Source, *, max_bytes: int) -> None:
        self._source = source
        self._kept: dict[int, Decoded | Bad] = {}
        self._bytes_left = max_bytes
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._source)

    def keep_blocks(self, num_examples: int) -> None:
        """Do so in the other source."""
        self._source.keep_blocks(num_examples)

    @property
    def mixture(self) -> Mixture | None:
        """Those of the other source."""
        return self._source.mixture

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


class MixedSource(Source):
    """The examples of several sources, one source after another, and how often each is drawn."""

    def __init__(self, names: Sequence[str], parts: Sequence[Source], weights: Sequence[float]) -> None:
        self.names, self.parts, self.weights = tuple(names), tuple(parts), tuple(weights)
        self._ends = list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def keep_blocks(self, num_examples: int) -> None:
        """Do so in all sources: each has windows for as many examples."""
        for part in self.parts:
            part.keep_blocks(num_examples)

    @property
    def mixture(self) -> Mixture:
        """The sizes and weights of the sources."""
        return Mixture(tuple(map(len, self.parts)), self.weights)

    def __getitem__(self, number: int) -> Decoded | Bad:
        part = bisect.bisect_right(self._ends, number)
        return self.parts[part][number - self._ends[part] + len(self.parts[part])]

    @property
    def damages(self) -> list[str]:
        """The damages of all sources."""
        return [damage for part in self.parts for damage in part.damages]

    @property
    def contents(self) -> dict[str, str]:
        """The contents of all sources, each after the number of its source, and the weights."""
        found = {f"weight {number}": str(weight) for number, weight in enumerate(self.weights)}
        for number, part in enumerate(self.parts):
            found |= {f"{number}: {name}": what for name, what in part.contents.items()}
        return found

    @property
    def notes(self) -> list[str]:
        """What each source has of a batch, and the notes of all sources."""
        shares = [
            f"{name}: {len(part):,} examples, {weight / sum(self.weights):.1%} of each batch"
            for name, part, weight in zip(self.names, self.parts, self.weights, strict=True)
        ]
        notes = [f"{name}: {note}" for name, part in zip(self.names, self.parts, strict=True) for note in part.notes]
        return [*shares, *notes]

    def captions(self, *, limit: int) -> Iterator[str]:
        """Yield captions as `Source` does, from each source as many as its weight says."""
        for part, weight in zip(self.parts, self.weights, strict=True):
            yield from part.captions(limit=max(1, int(limit * weight / sum(self.weights))))


SOURCES: dict[str, Callable[..., Source]] = {"shards": ShardSource}
"""The source that reads `NAME:PATH`, by name. A path without a name means shards."""


def described_by(label: int, classes: Classes, templates: Sequence[str]) -> tuple[str, ...]:
    """Make the captions of a labelled picture: each template with the name of its class (the paper's JFT pairs).

    >>> described_by(1, Classes((), ("cat", "dog")), ("a {}", "one {}"))
    ('a dog', 'one dog')
    """
    return tuple(template.replace("{}", classes.names[label]) for template in templates)


def index_of(path: str, cache_dir: files.Path) -> Index:
    """Load an index. A shard that is gone or unreadable is one bad example; a missing permission ends the run."""
    try:
        return files.retried(lambda: index_file.open_index(path, cache_dir=cache_dir))
    except files.StorageError:
        raise
    except OSError as error:
        return index_file.in_memory(path, index_file.encoded(lost_index(path, error)))


def _caption(shard: _Shard, entry: Members) -> str:
    content = _member(shard, entry.caption, "caption", MAX_TEXT_BYTES)
    try:
        caption = content.decode("utf-8")
    except UnicodeDecodeError:
        raise _BadExample("the caption is not UTF-8") from None
    if not caption.strip():
        raise _BadExample("the caption is empty")
    return caption


def _facts(shard: _Shard, entry: Members) -> dict[str, Any] | None:
    """Read key.json and key.cls of an example; None if it has neither."""
    facts = None
    if entry.metadata[0] >= 0:
        content = _member(shard, entry.metadata, "metadata", MAX_TEXT_BYTES)
        try:
            facts = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise _BadExample(f"the metadata is not JSON: {error}") from None
        if not isinstance(facts, dict):
            raise _BadExample("the metadata is not a JSON object")
    if entry.label[0] >= 0:
        content = _member(shard, entry.label, "class", MAX_TEXT_BYTES)
        if not re.fullmatch(rb"\s*\d{1,18}\s*", content):
            raise _BadExample(f"the class is no number of at most 18 digits: {content[:20]!r}")
        facts = {**(facts or {}), "class": int(content)}
    return facts


def _member(shard: _Shard, span: tuple[int, int], what: str, limit: int) -> bytes:
    (path, index, read), (offset, size) = shard, span
    if offset < 0:
        raise _BadExample(f"the {what} is missing{index.damage and f' ({index.damage})'}")
    if offset + size > index.stamp.size:
        raise _BadExample(f"the {what} is incomplete ({index.damage})")
    if size > limit:
        raise _BadExample(f"the {what} is too large: {size} bytes, the limit is {limit}")
    try:
        content = read(path, offset, size)
    except OSError as error:
        raise _BadExample(f"the shard cannot be read: {error}") from None
    if len(content) < size:
        raise _BadExample(f"the {what} is incomplete: the tar became shorter since it was indexed")
    return content
