"""Reading, listing and atomic writing of files: the only module of `limoe.data` that opens paths.

A path with a protocol, such as `gs://bucket/name`, is in a bucket: see `limoe.data.buckets`.
"""

import contextlib
import errno
import fcntl
import functools
import glob
import io
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, NamedTuple, TypeVar

from limoe.data import buckets
from limoe.data.recent import Recent
from limoe.errors import LimoeError

Path = str | os.PathLike[str]

T = TypeVar("T")

_STARTED = time.time()
# Seconds before a read is tried again, and the errors after which it is.
_PAUSES = (0.1, 1.0)
# A bucket refuses some requests in a hundred on a bad day, and no example may be lost for it.
_BUCKET_PAUSES = (0.1, 0.3, 1.0, 3.0, 10.0)
# A header and the small members around it.
_BUCKET_BUFFER = 2**14
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EREMOTEIO, errno.ECONNRESET)

_PIECE = 2**20

_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EACCES: "permission denied; change the permissions or choose another folder",
    errno.EPERM: "permission denied; change the permissions or choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
}


class DataError(LimoeError):
    """The data cannot be used. The message says what is wrong, where, and what to do."""


class StorageError(OSError):
    """The system refuses to read or write a file (full disk, permissions). `errno` has the system's number."""


class Stamp(NamedTuple):
    """Size in bytes and modification time in nanoseconds of a file; it has others after it is written again."""

    size: int
    modified_ns: int


@contextlib.contextmanager
def explained(action: str, path: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission inside the block into a `StorageError` that names the path.

    >>> with explained("write", "/data/a.tar"):
    ...     raise OSError(errno.ENOSPC, "No space left on device")
    Traceback (most recent call last):
    limoe.data.files.StorageError: cannot write /data/a.tar: the disk is full; free some space or choose another folder
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno not in _ADVICE:
            raise
        raise _refusal(action, path, _ADVICE[error.errno], error) from error


def _refusal(action: str, path: Path, reason: str, cause: OSError) -> StorageError:
    refusal = StorageError(f"cannot {action} {os.fspath(path)}: {reason}")
    refusal.errno = cause.errno
    return refusal


def open_binary(path: Path) -> BinaryIO:
    """Open a file to read bytes. Raises `StorageError` without permission, `FileNotFoundError` without the file."""
    if remote := _bucket_path(path):
        raw = buckets.RangeReader(remote, stamp(path).size, functools.partial(read_range, path))
        return io.BufferedReader(raw, _BUCKET_BUFFER)
    with explained("read", path):
        return open(_local(path), "rb")


def read_bytes(path: Path) -> bytes:
    """Read a whole file. Raises the errors of `open_binary`."""
    if _bucket_path(path):
        return read_range(path, 0, stamp(path).size)
    with open_binary(path) as file:
        return file.read()


def read_text(path: Path) -> str:
    """Read a whole file as UTF-8 text. Raises the errors of `open_binary`, and `DataError` if it is not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{os.fspath(path)} is not UTF-8 text ({error}); save it as UTF-8") from error


def read_range(path: Path, offset: int, size: int) -> bytes:
    """Read `size` bytes from `offset`, fewer if the file ends before. Raises the errors of `open_binary`.

    What a network file system may get over (input/output error, stale handle, time out) is tried three times, and all
    that may go wrong with a bucket six times.
    """
    if remote := _bucket_path(path):
        return _in_bucket("read", remote, lambda: buckets.read_range(remote, offset, size))

    def read() -> bytes:
        # Opened for each read, so that threads share no handle.
        with open_binary(path) as file:
            file.seek(offset)
            return file.read(size)

    return retried(read)


class Pieces:
    """Files read in pieces of 1 MiB, for neighbours that are asked for one by one; the last pieces are kept.

    They are as many as `num_bytes` in blocks of at least two pieces take, begun and ended ones included.
    """

    def __init__(self, num_bytes: int) -> None:
        self._pieces: Recent[bytes] = Recent(2 + 3 * num_bytes // (2 * _PIECE))

    def read_range(self, path: Path, offset: int, size: int) -> bytes:
        """Read as the function of this name does."""
        first, last = offset // _PIECE, max(offset, offset + size - 1) // _PIECE
        pieces = [
            self._pieces.get((os.fspath(path), number), functools.partial(read_range, path, number * _PIECE, _PIECE))
            for number in range(first, last + 1)
        ]
        start = offset - first * _PIECE
        return (pieces[0] if len(pieces) == 1 else b"".join(pieces))[start : start + size]


class Opened:
    """A file that stays open to be read by position, from any thread. Raises the errors of `open_binary`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with explained("read", path):
            self._descriptor = os.open(_local(path), os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Read as `read_range` does."""
        return retried(lambda: os.pread(self._descriptor, size, offset))


def retried(read: Callable[[], T], pauses: Sequence[float] | None = None) -> T:
    """Call a function that reads, again after each pause if it raises an error of the kind that passes."""
    for pause in _PAUSES if pauses is None else pauses:
        try:
            return read()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            time.sleep(pause)
    return read()


def exists(path: Path) -> bool:
    """Say whether there is a file or folder of this name."""
    if remote := _bucket_path(path):
        return _in_bucket("read", remote, lambda: buckets.kind_of(remote)) != ""
    return os.path.exists(_local(path))


def is_folder(path: Path) -> bool:
    """Say whether there is a folder of this name."""
    if remote := _bucket_path(path):
        return _in_bucket("read", remote, lambda: buckets.kind_of(remote)) == "directory"
    return os.path.isdir(_local(path))


def stamp(path: Path) -> Stamp:
    """Read a file's size and modification time. Raises `FileNotFoundError` if there is no such file.

    In a bucket, the second is a number that is another after the file is written again.
    """
    if remote := _bucket_path(path):
        return Stamp(*_in_bucket("read", remote, lambda: buckets.facts(remote)))
    with explained("read", path):
        status = os.stat(_local(path))
    return Stamp(status.st_size, status.st_mtime_ns)


def list_files(pattern: Path) -> list[str]:
    """List the files that match a glob pattern (also `**`), sorted by name. Hidden files match only an explicit dot."""
    if remote := _bucket_path(pattern):
        return _in_bucket("read", remote, lambda: buckets.matching(remote))
    return sorted(path for path in glob.glob(_local(pattern), recursive=True) if os.path.isfile(path))


def names_in(folder: Path) -> list[str]:
    """List the names of all that is in a folder, sorted. Raises `StorageError` without permission."""
    if remote := _bucket_path(folder):
        return _in_bucket("read", remote, lambda: buckets.names_in(remote))
    with explained("read", folder):
        return sorted(os.listdir(_local(folder)))


def make_folder(path: Path) -> None:
    """Create a folder and its parents unless they exist. Raises `StorageError` if that is impossible."""
    action = "make the folder"
    with explained(action, path):
        try:
            os.makedirs(_local(path), exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            reason = "a file is in its place or above it; choose another folder"
            raise _refusal(action, path, reason, error) from error
        except FileNotFoundError as error:  # as below /proc
            raise _refusal(action, path, "the system makes no folders there; choose another folder", error) from error


def cache_folder(cache_dir: Path = "") -> str:
    """Name the folder for files that can be generated again. It may not exist yet.

    It is `cache_dir`, else the environment variable `LIMOE_CACHE`, else `limoe` in the user's cache folder.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.fspath(cache_dir) or os.environ.get("LIMOE_CACHE") or os.path.join(base, "limoe")


@contextlib.contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """Write a file that gets its name only when it is complete and on disk.

    The bytes are written to a hidden temporary file in the same folder (created if absent), synced, and renamed. A
    killed process leaves the old file or the new one, never half a file. An exception inside the block leaves the old
    file unchanged. Raises `StorageError` for a full disk or a missing permission.
    """
    target = _local(path)
    folder, name = os.path.split(os.path.abspath(target))
    make_folder(folder)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with explained("write", path):
        try:
            with open(temporary, "xb") as file:
                _lock(file)
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, target)  # still locked, so that `remove_leftovers` cannot take it
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        sync(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that a killed `atomic_writer` left in a folder before this process began.

    Files of other names stay, and so do files of a running writer, here or on another machine: it holds a lock, which
    the system frees when the writer ends. Files that may not be removed stay as well.
    """
    with contextlib.suppress(OSError), os.scandir(_local(folder)) as entries:
        for entry in entries:
            if re.fullmatch(r"\..+\.\d+-[0-9a-f]{8}\.tmp", entry.name) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError), open(entry.path, "r+b") as file:
                    # A new file may belong to a writer that has not locked it yet.
                    if os.fstat(file.fileno()).st_mtime < _STARTED and _lock(file):
                        os.unlink(entry.path)


def _lock(file: BinaryIO) -> bool:
    """Lock a file. Returns False if another process holds the lock or the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file with `atomic_writer`, or into a bucket, where a file is always whole."""
    if remote := _bucket_path(path):
        _in_bucket("write", remote, lambda: buckets.write(remote, content))
        return
    with atomic_writer(path) as file:
        file.write(content)


def append_line(path: Path, line: str) -> None:
    """Append a line to a file, in one write, and make the file and its folder unless they exist."""
    make_folder(os.path.dirname(os.path.abspath(_local(path))))
    with explained("write", path), open(_local(path), "ab", buffering=0) as file:
        file.write(f"{line}\n".encode())


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk. A renamed file survives a loss of power after a sync of its folder."""
    descriptor = os.open(_local(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _bucket_path(path: Path) -> str:
    """Give a path that is in a bucket; "" for any other."""
    text = os.fspath(path)
    return text if buckets.is_in_bucket(text) else ""


def _in_bucket(action: str, path: str, function: Callable[[], T]) -> T:
    """Call a function that asks a bucket, again after an error that passes. Raises StorageError without permission."""
    try:
        return retried(function, _BUCKET_PAUSES)
    except PermissionError as error:
        reason = "permission denied; give this machine the rights, in the way of the bucket's own library"
        raise _refusal(action, path, reason, error) from error
    except buckets.MissingPackage as error:
        raise DataError(str(error)) from error


def _local(path: Path) -> str:
    text = os.fspath(path)
    if buckets.is_in_bucket(text):
        raise DataError(f"{text!r} is not in a file system; give a local or mounted path")
    return text
