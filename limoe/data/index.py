"""The index of a tar: where the members of each example are. What is no member of an example is counted."""

import hashlib
import json
import os
from typing import NamedTuple

import numpy as np

from limoe.data import files, tars
from limoe.data.shards import IMAGE_EXTENSIONS

NO_TAR = "the tar is not a tar"
KINDS = ("image", "caption", "metadata", "label")
# Kinds of ignored members that an index tells apart.
_MAX_IGNORED = 16
_KIND_OF = dict.fromkeys(IMAGE_EXTENSIONS, "image") | {"txt": "caption", "json": "metadata", "cls": "label"}
_NUMBER_OF = {kind: number for number, kind in enumerate(KINDS)}
_NO_MEMBERS = [-1, 0] * len(KINDS)


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


def build_index(path: files.Path) -> ShardIndex:
    """Index a tar from its headers, up to a damage if there is one. Raises the errors of `files.open_binary`."""
    stamp = files.stamp(path)
    spans: dict[str, list[int]] = {}
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
                    if (first := names.setdefault((key, kind), name)) is not name:
                        what = f"{name} is there more than once"
                        bad[key] = (
                            what if first == name else f"there are two members for its {kind}: {first} and {name}"
                        )
                    row = spans.get(key)
                    if row is None:
                        row = spans[key] = _NO_MEMBERS.copy()
                    place = 2 * _NUMBER_OF[kind]
                    row[place : place + 2] = offset, size
                    last_key = key
                else:
                    unread.setdefault(key, name)
                    _count_ignored(ignored, odd or _extension(name), name)
                if offset + size > stamp.size and odd != tars.AFTER_THE_END:
                    damage = f"the tar is cut short inside {name}"
                    if not kind:
                        spans[f"after {last_key}"] = _NO_MEMBERS
                    break
        except tars.BrokenTar as error:
            damage = f"the tar {error}" + (f" after {last_key}" if spans else "")
            spans[f"after {last_key}"] = _NO_MEMBERS
    for key, name in unread.items():
        if key in spans and spans[key][0] < 0:
            bad.setdefault(key, f"the image is missing: {name} is none of {', '.join(IMAGE_EXTENSIONS)}")
    arrays = np.array(list(spans.values()), np.int64).reshape(-1, len(KINDS), 2)
    by_kind = {kind: np.ascontiguousarray(arrays[:, number]) for kind, number in _NUMBER_OF.items()}
    return ShardIndex(stamp=stamp, keys=list(spans), damage=damage, bad=bad, ignored=ignored, **by_kind)


def digest_of(index: ShardIndex) -> str:
    """Compute a digest of what an index says of a tar, whenever that was written."""
    digest = hashlib.sha256(json.dumps([index.keys, index.damage, index.bad]).encode())
    for kind in KINDS:
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


def _key_and_kind(name: str) -> tuple[str, str]:
    """Split the name of a member into its key and kind: "image", "caption", "metadata", "label" or "".

    The key ends at the first dot of the last part of the name.

    >>> _key_and_kind("part/0001.JPG"), _key_and_kind("0001.seg.png"), _key_and_kind("notes")
    (('part/0001', 'image'), ('0001', ''), ('notes', ''))
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, _KIND_OF.get(extension.lower(), "") if stem else ""
