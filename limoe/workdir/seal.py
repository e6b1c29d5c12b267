"""The seal of a checkpoint: size and SHA-256 of every file in it, checked before it is read.

Orbax restores a flipped bit without an error, so digests are compared before it reads anything. Threads compute the
digests. With several processes, each digests its own files when it writes, and an equal share of all files when it
reads.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from limoe.data import files
from limoe.errors import LimoeError
from limoe.parallel.processes import texts_of_all

CONTENTS = "contents.json"
_DIGESTS = "digests.json"
# Names of the files that process p writes in Orbax, such as `ocdbt.process_3/d/0123` and `array_metadatas/process_3`.
_OF_PROCESS = re.compile(r"state/(?:.*[./])?process_(\d+)(?:/.*)?")


Digests = dict[str, dict[str, Any]]
"""The size ("bytes") and "sha256" of each file, by its path inside the checkpoint."""


class CheckpointError(LimoeError, RuntimeError):
    """A checkpoint could not be written, or no trustworthy one could be read."""


def digests_of_own_files(folder: Path) -> Digests:
    """Sync and digest the files that this process wrote. The first process also takes the common files."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    matches = {name: _OF_PROCESS.fullmatch(name) for name in names}
    owner = {name: int(match[1]) if match else 0 for name, match in matches.items()}
    own = [name for name in names if owner[name] == jax.process_index()]
    digests = _digests(folder, own)
    for name in own:
        files.sync(folder / name)
    return digests


def digest_of(folder: Path) -> str:
    """Compute the SHA-256 of a checkpoint's seal, which stands for all files of the checkpoint."""
    return hashlib.sha256((folder / _DIGESTS).read_bytes()).hexdigest()


def write_seal(folder: Path, digests: Digests) -> None:
    """Write the digests of all files, and wait until they and all folders are on disk."""
    (folder / _DIGESTS).write_bytes(_as_bytes(dict(sorted(digests.items()))))
    files.sync(folder / _DIGESTS)
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            files.sync(path)


def damage_of(folder: Path) -> str:
    """Say why a committed checkpoint cannot be trusted; "" if every file is what was written.

    All processes must call this. Files that the seal does not name are ignored. Raises CheckpointError for a missing
    permission.
    """
    try:
        own = _damage_of_own_share(folder)
    except PermissionError as error:
        raise CheckpointError(f"cannot read checkpoint {folder}: {error}; check its permissions") from error
    except OSError as error:
        own = f"it cannot be read ({error})"
    return next((damage for damage in texts_of_all(own) if damage), "")


def _damage_of_own_share(folder: Path) -> str:
    if not (folder / _DIGESTS).exists():
        return f"{_DIGESTS} is missing"
    wanted = _parsed((folder / _DIGESTS).read_bytes())
    if wanted is None:
        return f"{_DIGESTS} is damaged"
    names = sorted(wanted)[jax.process_index() :: jax.process_count()]
    found = _digests(folder, [name for name in names if (folder / name).is_file()])
    differing = [name for name in names if found.get(name) != wanted[name]]
    if not differing:
        return ""
    others = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
    return f"{differing[0]} {'has changed' if differing[0] in found else 'is missing'}{others}"


def _parsed(recorded: bytes) -> Digests | None:
    """Parse the digests of a seal; None if its bytes are not exactly what was written."""
    try:
        digests = dict(json.loads(recorded))
    except (ValueError, TypeError):
        return None
    return digests if CONTENTS in digests and _as_bytes(digests) == recorded else None


def _as_bytes(digests: Digests) -> bytes:
    return json.dumps(digests, indent=1).encode()


def _digests(folder: Path, names: Iterable[str]) -> Digests:
    def digest(name: str) -> tuple[str, dict[str, Any]]:
        with (folder / name).open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return name, {"bytes": (folder / name).stat().st_size, "sha256": sha256}

    with ThreadPoolExecutor() as threads:
        return dict(threads.map(digest, names))
