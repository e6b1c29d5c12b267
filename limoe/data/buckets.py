"""Files in buckets, through fsspec: `gs://`, `s3://` and what else it knows. `limoe.data.files` calls this alone.

Credentials are those that the libraries find by themselves. Whatever a request may fail with comes as an error that
`files.retried` tries again, and a body that ends too early is such an error.
"""

from __future__ import annotations

import errno
import fnmatch
import functools
import glob
import hashlib
import io
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
# What stands in the listing of a bucket and is another after a file is written again.
_VERSIONS = ("etag", "ETag", "md5Hash", "generation", "mtime", "LastModified", "last_modified", "updated", "created")


class MissingPackage(Exception):
    """The library for a kind of bucket is not installed."""


def is_in_bucket(path: str) -> bool:
    """Say whether a path has a protocol.

    >>> is_in_bucket("gs://bucket/a.tar"), is_in_bucket("data/a.tar")
    (True, False)
    """
    return "://" in path


@functools.lru_cache(maxsize=16)
def _filesystem(protocol: str) -> Any:
    try:
        import fsspec

        return fsspec.filesystem(protocol)
    except (ImportError, ValueError) as error:
        extra = _EXTRAS.get(protocol)
        advice = f"install its extra: pip install 'limoe-jax[{extra}]'" if extra else "fsspec does not know it"
        raise MissingPackage(f"{protocol}:// cannot be read: {advice} ({error})") from error


def call(path: str, function: Callable[[Any, str], T]) -> T:
    """Call a function of the file system and the name of a path in it.

    Raises FileNotFoundError, PermissionError, MissingPackage, and OSError of the kind that is tried again for all else.
    """
    protocol, _, name = path.partition("://")
    filesystem = _filesystem(protocol)
    try:
        return function(filesystem, name)
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        raise
    # The libraries raise a dozen types for what a network and a server do.
    except Exception as error:
        raise OSError(errno.EREMOTEIO, f"{type(error).__name__}: {error}", path) from error


def read_range(path: str, offset: int, size: int) -> bytes:
    """Read a part of a file, fewer bytes only if it ends before."""
    if size < 1:
        return b""
    content = call(path, lambda bucket, name: bucket.cat_file(name, start=offset, end=offset + size))
    if len(content) < size and offset + len(content) < (whole := facts(path)[0]):
        raise OSError(errno.EREMOTEIO, f"{len(content)} bytes came of {min(size, whole - offset)}", path)
    return content


def kind_of(path: str) -> str:
    """Say whether a path is a "file", a "directory", or nothing, ""."""
    # Not `exists` and `isdir` of fsspec, which take any failed request for "no".
    try:
        return str(call(path, lambda bucket, name: bucket.info(name))["type"])
    except FileNotFoundError:
        return ""


def facts(path: str) -> tuple[int, int]:
    """Give a file's size, and a number that is another after it is written again."""
    info = call(path, lambda bucket, name: bucket.info(name))
    if info.get("type") != "file":
        raise IsADirectoryError(errno.EISDIR, "this is a folder", path)
    version = repr([str(info[name]) for name in _VERSIONS if name in info])
    return int(info["size"]), int.from_bytes(hashlib.sha256(version.encode()).digest()[:7], "little")


def names_in(folder: str) -> list[str]:
    """List the names of all that is in a folder. The listing is kept by the libraries, so sizes cost no requests."""
    listed = call(folder, lambda bucket, name: bucket.ls(name, detail=False))
    return sorted({name.rstrip("/").rpartition("/")[2] for name in listed})


def matching(pattern: str) -> list[str]:
    """List the files of a folder whose names match a pattern such as `gs://bucket/folder/x-*.tar`."""
    folder, _, last = pattern.rpartition("/")
    if glob.has_magic(folder):
        raise OSError(errno.EINVAL, "only the last part of a path in a bucket may have *, ? or []", pattern)
    try:
        listed = call(folder, lambda bucket, name: bucket.ls(name, detail=True))
    except FileNotFoundError:
        return []
    names = [info["name"].rpartition("/")[2] for info in listed if info["type"] == "file"]
    visible = [name for name in names if not name.startswith(".") or last.startswith(".")]
    return sorted(f"{folder}/{name}" for name in fnmatch.filter(visible, last))


def write(path: str, content: bytes) -> None:
    """Write a whole file: it is there whole or not at all."""
    call(path, lambda bucket, name: bucket.pipe_file(name, content))


class RangeReader(io.RawIOBase):
    """A file in a bucket as a file object that reads only what is asked for; `read` reads a part."""

    mode = "rb"

    def __init__(self, name: str, size: int, read: Callable[[int, int], bytes]) -> None:
        self.name = name
        self._size, self._read, self._place = size, read, 0

    def readable(self) -> bool:
        """It can be read."""
        return True

    def seekable(self) -> bool:
        """It has places."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, as files do."""
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Read from here on, as files do."""
        view = memoryview(buffer).cast("B")
        content = self._read(self._place, min(len(view), max(0, self._size - self._place)))
        view[: len(content)] = content
        self._place += len(content)
        return len(content)
