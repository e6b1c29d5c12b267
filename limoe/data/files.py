"""The only place that opens paths: reading, listing and atomic writing.

Everything else in `limoe.data` names a file and asks here for its bytes, so that object storage can follow by changing
this file alone.
"""

import contextlib
import errno
import fcntl
import glob
import os
import re
import secrets
import time
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from limoe.errors import LimoeError

Path = str | os.PathLike[str]

_STARTED = time.time()

_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EACCES: "permission denied; change the permissions or choose another folder",
    errno.EPERM: "permission denied; change the permissions or choose another folder",
    errno.EROFS: "it lies on a read-only file system; choose another folder",
}


class DataError(LimoeError):
    """The data cannot be used as asked; the message says what, where, and what to do."""


class StorageError(OSError):
    """The system refuses to read or write a file (full disk, permissions); `errno` keeps the cause."""


class Stamp(NamedTuple):
    """What changes when a file is written anew: its size in bytes and its modification time in nanoseconds."""

    size: int
    modified_ns: int


@contextlib.contextmanager
def explained(action: str, path: Path) -> Iterator[None]:
    """Turns a full disk or a missing permission inside the block into a `StorageError` that names the path.

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
    """Opens a file for reading bytes; `StorageError` if it may not be read, `FileNotFoundError` if it is not there."""
    with explained("read", path):
        return open(_local(path), "rb")


def read_bytes(path: Path) -> bytes:
    """The whole file as bytes; raises like `open_binary`."""
    with explained("read", path), open_binary(path) as file:
        return file.read()


def read_text(path: Path) -> str:
    """The whole file as UTF-8 text; raises like `open_binary`, and `DataError` if it is not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{os.fspath(path)} is not UTF-8 text ({error}); save it as UTF-8") from error


def read_range(path: Path, offset: int, size: int) -> bytes:
    """The `size` bytes of the file from `offset` on, fewer where it ends before; raises like `open_binary`."""
    # Unbuffered and opened for each read: 10 us, no handles to keep or to share between threads.
    with explained("read", path), open(_local(path), "rb", buffering=0) as file:
        file.seek(offset)
        parts = [file.read(size)]
        while parts[-1] and sum(map(len, parts)) < size:
            parts.append(file.read(size - sum(map(len, parts))))
    return b"".join(parts)


def exists(path: Path) -> bool:
    """Whether a file or folder of this name is there."""
    return os.path.exists(_local(path))


def is_folder(path: Path) -> bool:
    """Whether a folder of this name is there."""
    return os.path.isdir(_local(path))


def stamp(path: Path) -> Stamp:
    """The file's size and modification time; `FileNotFoundError` if it is not there."""
    with explained("read", path):
        status = os.stat(_local(path))
    return Stamp(status.st_size, status.st_mtime_ns)


def list_files(pattern: Path) -> list[str]:
    """The files that match a glob pattern (`**` too), sorted by name; hidden files only where the pattern says so."""
    return sorted(path for path in glob.glob(_local(pattern), recursive=True) if os.path.isfile(path))


def make_folder(path: Path) -> None:
    """Makes the folder and those above it unless they are there; `StorageError` if it cannot be made."""
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
    """Where to keep what can be made again, not yet made.

    That is `cache_dir`, else the environment's `LIMOE_CACHE`, else `limoe` in the user's cache folder.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.fspath(cache_dir) or os.environ.get("LIMOE_CACHE") or os.path.join(base, "limoe")


@contextlib.contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """Writes a file that appears under its name only once it is whole and on the disk.

    The bytes go to a hidden temporary name in the same folder (made if absent), are synced, and are then renamed: a run
    killed at any moment leaves the old file or the new one, never half of one. An exception inside the block leaves the
    old file as it was. Raises `StorageError` on a full disk or a missing permission.
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
                os.replace(temporary, target)  # under the lock: until then the file is for nobody else to remove
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _sync_folder(folder)


def remove_leftovers(folder: Path) -> None:
    """Removes what `atomic_writer` has left in a folder where it was killed, if that was before this process began.

    A file of any other name stays, and so does one that a living writer holds, here or on another machine: the system
    frees a writer's lock when it ends, however it does. What may not be removed stays as well.
    """
    with contextlib.suppress(OSError), os.scandir(_local(folder)) as entries:
        for entry in entries:
            if re.fullmatch(r"\..+\.\d+-[0-9a-f]{8}\.tmp", entry.name) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError), open(entry.path, "r+b") as file:
                    # The age too: a writer that has only just opened its file has not locked it yet.
                    if os.fstat(file.fileno()).st_mtime < _STARTED and _lock(file):
                        os.unlink(entry.path)


def _lock(file: BinaryIO) -> bool:
    """Whether the file is now locked by this process; false where another has it or the file system knows no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def write_bytes(path: Path, content: bytes) -> None:
    """Writes the whole file through `atomic_writer`."""
    with atomic_writer(path) as file:
        file.write(content)


def _sync_folder(folder: str) -> None:
    """Makes the rename itself survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _local(path: Path) -> str:
    text = os.fspath(path)
    if "://" in text:
        raise DataError(f"{text!r} is not a local path; copy the files to a local or mounted folder and give that")
    return text
