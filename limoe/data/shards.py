"""Image-text tar shards in the layout of img2dataset, and an index that gives random access to them.

An example consists of the members `key.jpg` (or .jpeg, .png, .webp, .bmp, .gif), `key.txt` and optionally `key.json`
or `key.cls`, in any order in one tar. Member names are compared, never used as file paths. What is no member of an
example is counted.
"""

import glob
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from limoe.data import files, tars
from limoe.data.files import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif")
INDEX_SUFFIX = ".index"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_INDEX_VERSION = 2
_DIGEST_SIZE = hashlib.sha256().digest_size
NO_TAR = "the tar is not a tar"
# Kinds of ignored members that an index tells apart.
_MAX_IGNORED = 16


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


class ShardIndex(NamedTuple):
    """Positions of the members of each of N examples in one tar, in the order in which their keys first appear.

    `image`, `caption`, `metadata` and `label` are int64 [N, 2]: offset and size in bytes, with offset -1 for a missing
    member. If a span ends beyond the end of the tar, the tar was cut inside this member. `damage` describes a damage of
    the whole tar, "" without one. If the name of a lost member is unknown, there is one more key, "after <the last
    key>", without members, so that the loss is counted. `bad` gives the reason by key why an example cannot be used
    whatever is in its members; `ignored` the number, and the first name, of members of each kind that are not read.
    """

    stamp: files.Stamp
    keys: list[str]
    image: np.ndarray
    caption: np.ndarray
    metadata: np.ndarray
    label: np.ndarray
    damage: str
    bad: dict[str, str]
    ignored: dict[str, tuple[int, str]]


def load_index(path: files.Path, *, cache_dir: files.Path = "") -> ShardIndex:
    """Load the stored index of a tar if it fits the tar's size and modification time; else build and store one.

    It is stored beside the tar. If that folder cannot be written, it is stored in `cache_dir` (the user's cache folder
    if empty); if that cannot be written either, it is not stored. Raises the errors of `files.open_binary`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     number = write_shard(f"{folder}/00000.tar", [Example("000", b"the bytes of a JPEG", "a red ring")])
    ...     index = load_index(f"{folder}/00000.tar")
    >>> index.keys, index.image.tolist(), index.caption[:, 1].tolist(), index.damage
    (['000'], [[512, 19]], [10], '')
    """
    stamp = files.stamp(path)
    beside = os.fspath(path) + INDEX_SUFFIX
    absolute = os.path.abspath(path)
    digest = hashlib.sha256(os.fsencode(absolute)).hexdigest()[:16]
    cached = os.path.join(
        files.cache_folder(cache_dir), "index", f"{digest}-{os.path.basename(absolute)}{INDEX_SUFFIX}"
    )
    for place in (beside, cached):
        index = _stored_index(place, stamp)
        if index is not None:
            return index
    index = build_index(path)
    if index.damage.startswith(NO_TAR):
        return index  # nothing is left beside a file of another kind
    for place in (beside, cached):
        try:
            _store_index(place, index)
            break
        except files.StorageError:
            continue
    return index


def build_index(path: files.Path) -> ShardIndex:
    """Index a tar from its headers, up to a damage if there is one. Raises the errors of `files.open_binary`."""
    stamp = files.stamp(path)
    spans: dict[str, dict[str, tuple[int, int]]] = {}
    names: dict[tuple[str, str], str] = {}
    bad: dict[str, str] = {}
    unread: dict[str, str] = {}
    ignored: dict[str, tuple[int, str]] = {}
    last_key = "the beginning"
    damage = ""
    with files.open_binary(path) as file:
        try:
            for name, offset, size, odd in tars.members(file, stamp.size):
                key, kind = ("", "") if odd else _key_and_kind(name)
                if kind:
                    if (first := names.setdefault((key, kind), name)) != name or kind in spans.get(key, {}):
                        what = f"{name} is there more than once"
                        bad[key] = (
                            what if first == name else f"there are two members for its {kind}: {first} and {name}"
                        )
                    spans.setdefault(key, {})[kind] = (offset, size)
                    last_key = key
                else:
                    unread.setdefault(key, name)
                    _count_ignored(ignored, odd or _extension(name), name)
                if offset + size > stamp.size and odd != tars.AFTER_THE_END:
                    damage = f"the tar is cut short inside {name}"
                    if not kind:
                        spans[f"after {last_key}"] = {}
                    break
        except tars.BrokenTar as error:
            damage = f"the tar {error}" + (f" after {last_key}" if spans else "")
            spans[f"after {last_key}"] = {}
    for key in spans.keys() & unread.keys():
        if "image" not in spans[key]:
            bad.setdefault(key, f"the image is missing: {unread[key]} is none of {', '.join(IMAGE_EXTENSIONS)}")
    arrays = {
        kind: np.array([members.get(kind, (-1, 0)) for members in spans.values()], np.int64).reshape(-1, 2)
        for kind in _KINDS
    }
    return ShardIndex(stamp=stamp, keys=list(spans), damage=damage, bad=bad, ignored=ignored, **arrays)


def digest_of(index: ShardIndex) -> str:
    """Compute a digest of what an index says of a tar, whenever that was written."""
    digest = hashlib.sha256(json.dumps([index.keys, index.damage, index.bad]).encode())
    for kind in _KINDS:
        digest.update(getattr(index, kind).tobytes())
    return digest.hexdigest()[:16]


def lost_index(path: files.Path, error: OSError) -> ShardIndex:
    """Make the index of a shard that cannot be read: one bad example, so that the loss is counted."""
    key, none = f"all of {os.path.basename(path)}", np.array([[-1, 0]], np.int64)
    reason = f"the shard cannot be read: {error}"
    return ShardIndex(files.Stamp(0, 0), [key], none, none, none, none, reason, {key: reason}, {})


def _extension(name: str) -> str:
    extension = os.path.basename(name).partition(".")[2].lower()
    return f"members *.{extension[:20]}" if extension else "members without an extension"


def _count_ignored(ignored: dict[str, tuple[int, str]], what: str, name: str) -> None:
    if what not in ignored and len(ignored) >= _MAX_IGNORED:
        what = "other members"
    count, first = ignored.get(what, (0, name))
    ignored[what] = (count + 1, first)


_KINDS = ("image", "caption", "metadata", "label")


def _key_and_kind(name: str) -> tuple[str, str]:
    """Split the name of a member into its key and kind: "image", "caption", "metadata", "label" or "".

    The key ends at the first dot of the last part of the name.

    >>> _key_and_kind("part/0001.JPG"), _key_and_kind("0001.seg.png"), _key_and_kind("notes")
    (('part/0001', 'image'), ('0001', ''), ('notes', ''))
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    kinds = dict.fromkeys(IMAGE_EXTENSIONS, "image") | {"txt": "caption", "json": "metadata", "cls": "label"}
    return folder + slash + stem, kinds.get(extension.lower(), "") if stem else ""


def _store_index(place: str, index: ShardIndex) -> None:
    payload = io.BytesIO()
    facts = {"version": _INDEX_VERSION, "stamp": index.stamp, "keys": index.keys, "damage": index.damage}
    facts |= {"bad": index.bad, "ignored": index.ignored}
    arrays = {kind: getattr(index, kind) for kind in _KINDS}
    np.savez(payload, facts=np.frombuffer(json.dumps(facts).encode("ascii"), np.uint8), **arrays)
    files.write_bytes(place, hashlib.sha256(payload.getbuffer()).digest() + payload.getbuffer())


def _stored_index(place: str, stamp: files.Stamp) -> ShardIndex | None:
    """Read a stored index; None if there is none, it is damaged, or the tar has changed since."""
    try:
        content = files.read_bytes(place)
    except OSError:
        return None
    digest, payload = content[:_DIGEST_SIZE], content[_DIGEST_SIZE:]
    if hashlib.sha256(payload).digest() != digest:
        return None
    with np.load(io.BytesIO(payload), allow_pickle=False) as stored:
        facts = json.loads(stored["facts"].tobytes())
        if (facts["version"], files.Stamp(*facts["stamp"])) != (_INDEX_VERSION, stamp):
            return None
        arrays = {kind: stored[kind] for kind in _KINDS}
        ignored = {what: (count, first) for what, (count, first) in facts["ignored"].items()}
        return ShardIndex(
            stamp=stamp, keys=facts["keys"], damage=facts["damage"], bad=facts["bad"], ignored=ignored, **arrays
        )
