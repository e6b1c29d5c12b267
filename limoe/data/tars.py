"""The members of a tar from its headers, so that nothing of it disappears quietly.

`tarfile` has such a loop, but it ends at a damaged header, and at the end mark of the first of two tars that were put
together, without an error, as if there was nothing more.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

_BLOCK = 512
_REGULAR, _ENDS, _OCTAL = tarfile.REGTYPE[0], b"\0 ", re.compile(b"[0-7]+").fullmatch
# A larger long name or pax header is taken for damage.
_MAX_EXTENDED_HEADER = 1 << 20
AFTER_THE_END = "parts after the end of the tar"
_ODD = {
    tarfile.SYMTYPE: "symbolic links",
    tarfile.LNKTYPE: "hard links",
    tarfile.GNUTYPE_SPARSE: "sparse files",
    tarfile.CHRTYPE: "devices",
    tarfile.BLKTYPE: "devices",
    tarfile.FIFOTYPE: "devices",
}


class BrokenTar(Exception):
    """No header can be read after this point. The message completes the sentence "the tar ..."."""


class Member(NamedTuple):
    """A member's name, and where its content is; `odd` says what it is if it is no regular file."""

    name: str
    offset: int
    size: int
    odd: str


def members(file: BinaryIO, end: int) -> Iterator[Member]:
    """Read all members but folders from the headers of a tar of `end` bytes, or of several that were put together.

    Bytes after the last end mark that are no tar come as one odd member. Raises BrokenTar at a damaged header.
    """
    position = 0
    extended: dict[str, str] = {}
    while True:
        file.seek(position)
        block = file.read(_BLOCK)
        if len(block) < _BLOCK:
            raise BrokenTar("is cut short" if position else "is empty or cut short")
        ended = not any(block)
        if ended:
            position = _next_used(file, position)
            if position == end:
                return
            file.seek(position)
            block = file.read(_BLOCK)
        if not extended and (plain := _plain_file(block)) is not None:
            name, size = plain
            offset = position + _BLOCK
            position = offset + -(-size // _BLOCK) * _BLOCK
            yield Member(name, offset, size, "")
            continue
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        except tarfile.HeaderError as error:
            if ended:
                yield Member(f"{end - position} bytes", position, end - position, AFTER_THE_END)
                return
            raise BrokenTar(
                f"has a damaged header at byte {position}" if position else "is not a tar (compressed?)"
            ) from error
        size = int(extended.get("size", header.size)) if extended.get("size", "0").isdecimal() else -1
        if header.type in (tarfile.LNKTYPE, tarfile.SYMTYPE):
            size = 0  # it may have that of its target, but has no content
        if not 0 <= size < 1 << 62:
            raise BrokenTar(f"has a damaged header at byte {position}")
        offset = position + _BLOCK
        position = offset + -(-size // _BLOCK) * _BLOCK
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            if size > _MAX_EXTENDED_HEADER or offset + size > end:
                raise BrokenTar("is cut short or damaged inside a header")
            extended |= _extended_header(header.type, file.read(size))
        elif header.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            odd = (
                "sparse files" if header.issparse() else _ODD.get(header.type, "" if header.isreg() else "odd members")
            )
            if not header.isdir():
                yield Member(extended.get("path", header.name), offset, size, odd)
            extended = {}


def _plain_file(block: bytes) -> tuple[str, int] | None:
    """Read name and size from the header of a regular file; None for any header that is not the most usual kind.

    `tarfile` takes 16 us for a header; this takes 4.
    """
    if len(block) < _BLOCK:
        return None
    size, checksum, name = block[124:135], block[148:154], block[:100].partition(b"\0")[0]
    usual = block[156] == _REGULAR and not block[345] and block[135] in _ENDS and block[154] in _ENDS
    if not (usual and _OCTAL(size) and _OCTAL(checksum) and name.isascii()):
        return None
    # The sum is that of all bytes with its own eight as spaces, which are 32 each.
    if sum(block) - sum(block[148:156]) + 256 != int(checksum, 8):
        return None
    return name.decode("ascii"), int(size, 8)


def _next_used(file: BinaryIO, position: int) -> int:
    """Find the first block from `position` on that is not all zeros; the end of the file if there is none."""
    file.seek(position)
    while chunk := file.read(2**20):
        rest = chunk.lstrip(b"\0")
        if rest:
            return position + (len(chunk) - len(rest)) // _BLOCK * _BLOCK
        position += len(chunk)
    return position


def _extended_header(kind: bytes, content: bytes) -> dict[str, str]:
    """Read the path and size that a GNU long name or a pax header gives to the next member."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.rstrip(b"\0").decode("utf-8", "backslashreplace")}
    records = {}
    while match := re.match(rb"(\d{1,7}) ", content):
        record, content = content[match.end() : int(match.group(1)) - 1], content[max(int(match.group(1)), 1) :]
        name, _, value = record.partition(b"=")
        records[name.decode("utf-8", "replace")] = value.decode("utf-8", "backslashreplace")
    return {name: value for name, value in records.items() if name in ("path", "size")}
