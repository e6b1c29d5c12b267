"""The stored index of a tar: its header is read when it is opened, and a block of examples when one of them is read.

A file has a header with its own digest (JSON: count, size and time of the tar, digest, damage), the offsets of its
blocks, and the blocks: 64 examples each, compressed, with a checksum. So opening costs the same for any number of
examples, and memory holds what was read last. Blocks are read by position and are not mapped: a map counts as the
process's memory, and a network file system that fails inside one kills the process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from limoe.data import buckets, files
from limoe.data.files import DataError
from limoe.data.index import KINDS, NO_TAR, ShardIndex, build_index, digest_of
from limoe.data.recent import Recent

INDEX_SUFFIX = ".index"
_MAGIC = b"limoe index 3\n\0\0"
_START = struct.Struct(f"<{len(_MAGIC)}s32sI")  # magic, digest of the header, length of the header
_FIRST_READ = 2048
_BLOCK_ROWS = 64


class Members(NamedTuple):
    """An example of an index: its key, (offset, size) of its members (offset -1: missing), why it is bad or ""."""

    key: str
    image: tuple[int, int]
    caption: tuple[int, int]
    metadata: tuple[int, int]
    label: tuple[int, int]
    bad: str


class _Block(NamedTuple):
    """Examples that are stored together: keys, spans [rows, kind, 2], and why some are bad, by row in digits."""

    keys: list[str]
    spans: np.ndarray
    bad: dict[str, str]


class _Damaged(Exception):
    """A stored index is not what was written."""


# A system allows 1,024 open files or more.
_OPEN: Recent[files.Opened] = Recent(128)
# The examples of the windows of data.order=blocks: about 10 MB.
_BLOCKS: Recent[_Block] = Recent(1024)


class Index:
    """The index of one tar, of which only the header is in memory. `digest` is that of `digest_of`.

    Its content is a file at `place`, or, where none could be written, bytes.
    """

    __slots__ = ("_content", "_path", "_place", "_size", "_start", "count", "damage", "digest", "ignored", "stamp")

    def __init__(self, path: files.Path, header: dict[str, Any], start: bytes, *, place: str, content: bytes) -> None:
        self._path, self._place, self._content, self._start = os.fspath(path), place, content, start
        self.stamp = files.Stamp(*header["stamp"])
        self.count: int = header["count"]
        self._size: int = header["size"]
        self.damage: str = header["damage"]
        self.digest: str = header["digest"]
        self.ignored: dict[str, tuple[int, str]] = {
            what: (count, first) for what, (count, first) in header["ignored"].items()
        }

    def __len__(self) -> int:
        return self.count

    @property
    def stored(self) -> bool:
        """Say whether it is in a file, so that the next start finds it."""
        return bool(self._place)

    def entry(self, row: int) -> Members:
        """Read where the members of an example are. Raises DataError if the index was lost and the tar is another."""
        if not 0 <= row < self.count:
            raise IndexError(f"example {row} of {self.count} of {self._path}")
        number, place = divmod(row, _BLOCK_ROWS)
        block = _BLOCKS.get((self._path, self._start, number), lambda: self._block(number))
        image, caption, metadata, label = map(tuple, block.spans[place].tolist())
        return Members(block.keys[place], image, caption, metadata, label, block.bad.get(str(place), ""))

    def _block(self, number: int) -> _Block:
        if not self._content:
            try:
                opened = _OPEN.get((self._place, self._start), self._opened)
                return self._read_block(opened.read, number)
            except (_Damaged, FileNotFoundError):
                self._repair()
        return self._read_block(lambda at, size: self._content[at : at + size], number)

    def _read_block(self, read: Callable[[int, int], bytes], number: int) -> _Block:
        count = min(_BLOCK_ROWS, self.count - number * _BLOCK_ROWS)
        return _decoded_block(read, _length_of(self._start) + 8 * number, self._size, count)

    def _opened(self) -> files.Opened:
        opened = files.Opened(self._place)
        if opened.read(0, len(self._start)) != self._start:
            raise _Damaged
        return opened

    def _repair(self) -> None:
        """Index the tar again, into memory, and store that if it can be."""
        index = build_index(self._path)
        if digest_of(index) != self.digest:
            raise DataError(f"{self._path} is another tar than when it was opened; start again with files that stay")
        content = encoded(index)
        with contextlib.suppress(files.StorageError):
            files.write_bytes(self._place, content)
        self._start, self._content = content[: _START.size], content


def open_index(path: files.Path, *, cache_dir: files.Path = "") -> Index:
    """Open the stored index of a tar if it fits the tar's size and modification time; else build and store one.

    It is stored beside the tar. If that folder cannot be written, or is in a bucket, it is stored in `cache_dir` (the
    user's cache folder if empty); if that cannot be written either, it stays in memory. Raises the errors of
    `files.open_binary`.

    >>> import tempfile
    >>> from limoe.data.shards import Example, write_shard
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     number = write_shard(f"{folder}/00000.tar", [Example("000", b"the bytes of a JPEG", "a red ring")])
    ...     index = open_index(f"{folder}/00000.tar")
    ...     entry = index.entry(0)
    >>> len(index), entry.key, entry.image, entry.caption, entry.metadata, index.damage
    (1, '000', (512, 19), (1536, 10), (-1, 0), '')
    """
    stamp = files.stamp(path)
    beside = os.fspath(path) + INDEX_SUFFIX
    if not buckets.is_in_bucket(beside) and (stored := stored_index(path, beside, stamp)) is not None:
        return stored
    cached = _cached(path, cache_dir)
    if (stored := stored_index(path, cached, stamp)) is not None:
        return stored
    if buckets.is_in_bucket(beside):
        return _copied_index(path, stamp, beside, cached)
    index = build_index(path)
    content = encoded(index)
    if not index.damage.startswith(NO_TAR):  # nothing is left beside a file of another kind
        for place in (beside, cached):
            try:
                files.write_bytes(place, content)
                return in_memory(path, content, place=place)
            except files.StorageError:
                continue
    return in_memory(path, content)


def _copied_index(path: files.Path, stamp: files.Stamp, beside: str, cached: str) -> Index:
    """Copy the index beside a tar in a bucket to the cache folder, where lookups cost no requests; build it if need be.

    Where the cache folder cannot be written, it stays in memory.
    """
    try:
        content = files.read_bytes(beside)
        header = _header(content)
        fits = files.Stamp(*header["stamp"]) == stamp and header["size"] == len(content)
    except (FileNotFoundError, _Damaged):
        content, fits = b"", False
    if not fits:
        index = build_index(path)
        content = encoded(index)
        if index.damage.startswith(NO_TAR):
            return in_memory(path, content)
        with contextlib.suppress(OSError):  # a bucket of others is read alone
            files.write_bytes(beside, content)
    with contextlib.suppress(files.StorageError):
        files.write_bytes(cached, content)
        return in_memory(path, content, place=cached)
    return in_memory(path, content)


def _cached(path: files.Path, cache_dir: files.Path) -> str:
    text = os.fspath(path)
    absolute = text if buckets.is_in_bucket(text) else os.path.abspath(text)
    digest = hashlib.sha256(os.fsencode(absolute)).hexdigest()[:16]
    return os.path.join(files.cache_folder(cache_dir), "index", f"{digest}-{os.path.basename(absolute)}{INDEX_SUFFIX}")


def stored_index(path: files.Path, place: str, stamp: files.Stamp) -> Index | None:
    """Open the index that is stored at a place; None if there is none, it is damaged, or the tar has changed since."""
    try:
        start = files.read_range(place, 0, _FIRST_READ)
        if len(start) >= _START.size and (needed := _length_of(start)) > len(start):
            start += files.read_range(place, len(start), needed - len(start))
        header = _header(start)
        if files.Stamp(*header["stamp"]) != stamp or files.stamp(place).size != header["size"]:
            return None
    except (OSError, _Damaged):
        return None
    return Index(path, header, start[: _START.size], place=place, content=b"")


def in_memory(path: files.Path, content: bytes, *, place: str = "") -> Index:
    """Open what `encoded` made; with a place, where that was stored, it is read there."""
    return Index(path, _header(content), content[: _START.size], place=place, content=b"" if place else content)


def encoded(index: ShardIndex) -> bytes:
    """Encode a whole index as the content of its file."""
    blocks = [
        _encoded_block(index, first, min(first + _BLOCK_ROWS, len(index.keys)))
        for first in range(0, len(index.keys), _BLOCK_ROWS)
    ]
    header: dict[str, Any] = {"stamp": index.stamp, "count": len(index.keys), "digest": digest_of(index)}
    header |= {"damage": index.damage, "ignored": index.ignored, "size": 0}
    # The size of the whole stands in the header, which is padded, so that writing it there does not change it.
    length = -(-(len(json.dumps(header)) + 24) // 64) * 64
    first = _START.size + length + 8 * (len(blocks) + 1)
    offsets = first + np.cumsum([0, *map(len, blocks)], dtype=np.uint64)
    header["size"] = int(offsets[-1])
    text = json.dumps(header).encode("ascii").ljust(length)
    start = _START.pack(_MAGIC, hashlib.sha256(text).digest(), length)
    return b"".join([start, text, offsets.astype("<u8").tobytes(), *blocks])


def _length_of(start: bytes) -> int:
    """Give the number of bytes of the start and the header, which the start says."""
    return _START.size + _START.unpack_from(start)[2]


def _header(content: bytes) -> dict[str, Any]:
    if len(content) < _START.size:
        raise _Damaged
    magic, digest, length = _START.unpack_from(content)
    text = content[_START.size : _START.size + length]
    if magic != _MAGIC or len(text) < length or hashlib.sha256(text).digest() != digest:
        raise _Damaged
    return json.loads(text)


def _encoded_block(index: ShardIndex, first: int, end: int) -> bytes:
    spans = np.stack([getattr(index, kind)[first:end] for kind in KINDS], axis=1)
    offsets = spans[..., 0].copy()
    offsets[:, 1:] = np.where(offsets[:, 1:] < 0, 0, offsets[:, 1:] - offsets[:, :1])
    offsets[:, 0] = np.diff(offsets[:, 0], prepend=0)
    numbers = np.stack([offsets, spans[..., 1]]).reshape(-1).astype("<i8")
    # Bytes of equal weight lie together: most are zero, and they compress to 10 bytes an example.
    planes = numbers.view(np.uint8).reshape(-1, 8).T.tobytes()
    keys = index.keys[first:end]
    bad = {row: index.bad[key] for row, key in enumerate(keys) if key in index.bad} if index.bad else {}
    payload = zlib.compress(planes + json.dumps([keys, bad]).encode("ascii"))
    return struct.pack("<I", zlib.crc32(payload)) + payload


def _decoded_block(read: Callable[[int, int], bytes], place: int, file_size: int, count: int) -> _Block:
    """Read a block whose offset stands at a place, through a function of offset and size. Raises _Damaged."""
    places = read(place, 16)
    if len(places) < 16:
        raise _Damaged
    first, end = struct.unpack("<QQ", places)
    content = read(first, end - first) if first < end <= file_size else b""
    if len(content) < max(4, end - first) or zlib.crc32(content[4:]) != struct.unpack_from("<I", content)[0]:
        raise _Damaged
    payload = zlib.decompress(content[4:])
    size = 2 * len(KINDS) * 8 * count
    numbers = np.frombuffer(payload, np.uint8, size).reshape(8, -1).T.copy().view("<i8").reshape(2, count, len(KINDS))
    offsets = numbers[0]
    offsets[:, 0] = np.cumsum(offsets[:, 0])
    offsets[:, 1:] = np.where(offsets[:, 1:] == 0, -1, offsets[:, 1:] + offsets[:, :1])
    keys, bad = json.loads(payload[size:])
    return _Block(keys, np.stack([offsets, numbers[1]], axis=2), bad)
