"""The source: an example or the reason why not, for every kind of bad input; captions; the cache."""

import errno
import io
import os
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from limoe.data import files, index_file
from limoe.data.files import DataError
from limoe.data.images import Preprocess
from limoe.data.shards import Example, write_shard
from limoe.data.source import Bad, CachedSource, Decoded, ShardSource, Source


def png(colour, side=8):
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue()


def huge_png():
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [header, b"IDATabcd"]
    framed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def write_members(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_examples_come_shard_after_shard(tmp_path):
    for shard in range(2):
        examples = [
            Example(f"{shard}{n}", png((shard, n, 0)), f"caption {shard} {n}", {"n": n}, "png") for n in range(3)
        ]
        write_shard(tmp_path / f"{shard}.tar", examples)
    source = ShardSource(tmp_path, preprocess=Preprocess(8), metadata=True)
    assert len(source) == 6
    for number in range(6):
        example = source[number]
        assert isinstance(example, Decoded)
        shard, n = divmod(number, 3)
        assert (example.key, example.caption, example.metadata) == (f"{shard}{n}", f"caption {shard} {n}", {"n": n})
        np.testing.assert_array_equal(example.image, np.broadcast_to(np.array([shard, n, 0], np.uint8), (8, 8, 3)))
    with pytest.raises(IndexError):
        source[6]


BAD = {
    "caption missing": ({"k.png": png("red")}, "the caption is missing"),
    "caption empty": ({"k.png": png("red"), "k.txt": b""}, "the caption is empty"),
    "caption blank": ({"k.png": png("red"), "k.txt": " \n\u3000".encode()}, "the caption is empty"),
    "caption not UTF-8": ({"k.png": png("red"), "k.txt": b"caf\xe9"}, "the caption is not UTF-8"),
    "caption too long": ({"k.png": png("red"), "k.txt": b"a" * (2**20 + 1)}, "the caption is too large"),
    "image missing": ({"k.txt": b"caption"}, "the image is missing"),
    "image empty": ({"k.png": b"", "k.txt": b"caption"}, "the image does not decode"),
    "image undecodable": ({"k.png": png("red")[:50], "k.txt": b"caption"}, "the image does not decode"),
    "image absurd": ({"k.png": huge_png(), "k.txt": b"caption"}, "the image is too large"),
    "metadata not JSON": ({"k.png": png("red"), "k.txt": b"a", "k.json": b"{"}, "the metadata is not JSON"),
    "metadata too deep": ({"k.png": png("red"), "k.txt": b"a", "k.json": b"[" * 10**5}, "the metadata is not JSON"),
    "metadata no object": ({"k.png": png("red"), "k.txt": b"a", "k.json": b"[1]"}, "the metadata is not a JSON object"),
}


@pytest.mark.parametrize(("members", "reason"), BAD.values(), ids=BAD.keys())
def test_a_bad_example_gives_its_key_and_the_reason(tmp_path, members, reason):
    write_members(tmp_path / "a.tar", members)
    bad = ShardSource(tmp_path, preprocess=Preprocess(8), metadata=True)[0]
    assert isinstance(bad, Bad)
    assert bad.key == "k"
    assert bad.reason.startswith(reason)


def tar_of(*members):
    """The bytes of a tar; a member is a name and content, or a TarInfo."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for member in members:
            info, content = (
                (member, b"") if isinstance(member, tarfile.TarInfo) else (tarfile.TarInfo(member[0]), member[1])
            )
            info.size = info.size or len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def odd(name, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "a.png"
    return info


def pair(key):
    return [(f"{key}.png", png("red")), (f"{key}.txt", key.encode())]


AVIF = b"\0\0\0\x20ftypavif" + bytes(20)
# What is in the tar; keys of good examples; reasons of bad ones; what is said to be ignored.
STRANGE = {
    "a repeated member": (
        tar_of(*pair("a"), *pair("b"), ("a.png", png("blue"))),
        ["b"],
        {"a": "a.png is there more than once"},
        [],
    ),
    "thirty pairs under ten keys": (
        tar_of(*(member for _ in range(3) for key in "abcdefghij" for member in pair(key))),
        [],
        {key: f"{key}.txt is there more than once" for key in "abcdefghij"},
        [],
    ),
    "two pictures": (
        tar_of(*pair("a"), ("a.jpg", png("blue")), *pair("b")),
        ["b"],
        {"a": "there are two members for its image: a.png and a.jpg"},
        [],
    ),
    "a dot in the key": (
        tar_of(*pair("a"), *pair("b.c"), *pair("d.e")),
        ["a"],
        {},
        ["ignored 1 members *.c.png, the first is b.c.png", "ignored 1 members *.e.txt, the first is d.e.txt"],
    ),
    "other extensions": (
        tar_of(*pair("a"), ("a.npy", b"?"), ("b.npy", b"?"), ("README", b"?"), ("c.tiff", b"?"), ("c.txt", b"c")),
        ["a"],
        {"c": "the image is missing: c.tiff is none of jpg, jpeg, png, webp, bmp, gif"},
        ["ignored 2 members *.npy, the first is a.npy", "ignored 1 members without an extension, the first is README"],
    ),
    "two tars put together": (tar_of(*pair("a")) + tar_of(*pair("b")), ["a", "b"], {}, []),
    "the same key in both": (tar_of(*pair("a")) * 2, [], {"a": "a.txt is there more than once"}, []),
    "bytes after the end": (
        tar_of(*pair("a")) + b"garbage" * 100,
        ["a"],
        {},
        ["ignored 1 parts after the end of the tar, the first is 700 bytes"],
    ),
    "less than a header after the end": (
        tar_of(*pair("a")) + b"garbage",
        ["a"],
        {},
        ["ignored 1 parts after the end of the tar, the first is 7 bytes"],
    ),
    "links and folders": (
        tar_of(*pair("a"), odd("h.png", tarfile.LNKTYPE), odd("s.png", tarfile.SYMTYPE), odd("d", tarfile.DIRTYPE)),
        ["a"],
        {},
        ["ignored 1 hard links, the first is h.png", "ignored 1 symbolic links, the first is s.png"],
    ),
    "other formats under a known name": (
        tar_of(("a.jpg", AVIF), ("a.txt", b"a"), *pair("b")),
        ["b"],
        {"a": "the image does not decode: it is AVIF, and only JPEG, PNG, WEBP, BMP, GIF are read"},
        [],
    ),
}


@pytest.mark.parametrize(("content", "good", "bad", "notes"), STRANGE.values(), ids=STRANGE.keys())
def test_nothing_in_a_strange_tar_disappears_quietly(tmp_path, content, good, bad, notes):
    (tmp_path / "a.tar").write_bytes(content)
    for _ in range(2):  # built, then stored
        source = ShardSource(tmp_path, preprocess=Preprocess(8))
        found = [source[number] for number in range(len(source))]
        assert [example.key for example in found if isinstance(example, Decoded)] == good
        assert {example.key: example.reason for example in found if isinstance(example, Bad)} == bad
        assert source.damages == [] and set(notes) <= set(source.notes) and (notes == []) == (source.notes == [])
        whatever_is_in_it = {key for key, reason in bad.items() if "decode" not in reason}
        assert not set(source.captions(limit=99)) & whatever_is_in_it


def test_a_compressed_tar_is_refused_by_name(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.tar\.gz is compressed.*gunzip"):
        ShardSource(tmp_path / "a.tar.gz", preprocess=Preprocess(8))
    (tmp_path / "b.tar").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"a\.tar\.gz is compressed"):
        ShardSource(tmp_path, preprocess=Preprocess(8))
    (tmp_path / "a.tar.gz").unlink()
    lost = ShardSource(tmp_path, preprocess=Preprocess(8))[0]
    assert isinstance(lost, Bad) and "the shard cannot be read" in lost.reason


@pytest.fixture
def two_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PAUSES", (0.0, 0.0))
    for name in "ab":
        (tmp_path / f"{name}.tar").write_bytes(tar_of(*pair(name)))
    return tmp_path


def test_a_read_error_is_tried_again_and_then_counted(two_shards, monkeypatch):
    source = ShardSource(two_shards, preprocess=Preprocess(8))
    opened, failures = files.open_binary, []

    def fail(path):
        if path.endswith("a.tar") and len(failures) < limit:
            failures.append(path)
            raise OSError(errno.EIO, "Input/output error")
        return opened(path)

    monkeypatch.setattr(files, "open_binary", fail)
    limit = 2
    assert isinstance(source[0], Decoded) and len(failures) == 2
    limit = 100
    lost = source[0]
    assert isinstance(lost, Bad) and "the shard cannot be read" in lost.reason and isinstance(source[1], Decoded)
    os.remove(two_shards / "a.tar")
    monkeypatch.undo()
    assert isinstance(source[0], Bad) and isinstance(source[1], Decoded)


def test_a_shard_that_is_lost_at_the_start_is_one_bad_example(two_shards, monkeypatch):
    opened = index_file.open_index

    def fail(path, **options):
        if path.endswith("a.tar"):
            raise OSError(errno.EIO, "Input/output error")
        return opened(path, **options)

    monkeypatch.setattr(index_file, "open_index", fail)
    source = ShardSource(two_shards, preprocess=Preprocess(8))
    assert len(source) == 2 and isinstance(source[1], Decoded)
    assert source[0] == Bad("all of a.tar", "the shard cannot be read: [Errno 5] Input/output error")
    assert source.damages == [f"{two_shards / 'a.tar'}: the shard cannot be read: [Errno 5] Input/output error"]


def test_metadata_is_not_read_unless_asked_for_and_there(tmp_path):
    write_members(tmp_path / "a.tar", {"k.png": png("red"), "k.txt": b"a", "k.json": b"{"})
    write_members(tmp_path / "b.tar", {"k.png": png("red"), "k.txt": b"a"})
    for shard, asked_for in (("a.tar", False), ("b.tar", True)):
        example = ShardSource(tmp_path / shard, preprocess=Preprocess(8), metadata=asked_for)[0]
        assert isinstance(example, Decoded) and example.metadata is None


def test_a_cut_tar_gives_what_is_whole_and_names_the_cut_member(tmp_path):
    path = tmp_path / "a.tar"
    write_shard(path, [Example(f"{n}", png("red"), "caption", None, "png") for n in range(3)])
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"2.png") + 512 + 20])
    source = ShardSource(path, preprocess=Preprocess(8))
    assert [isinstance(source[n], Decoded) for n in range(3)] == [True, True, False]
    assert source[2] == Bad("2", "the caption is missing (the tar is cut short inside 2.png)")
    assert source.damages == [f"{path}: the tar is cut short inside 2.png"]


def test_a_tar_cut_after_it_was_indexed_gives_bad_examples(tmp_path):
    path = tmp_path / "a.tar"
    write_shard(path, [Example("k", png("red"), "caption", None, "png")])
    source = ShardSource(path, preprocess=Preprocess(8))
    with open(path, "r+b") as file:
        file.truncate(600)
    assert source[0] == Bad("k", "the caption is incomplete: the tar became shorter since it was indexed")


def test_shards_without_examples_are_refused(tmp_path):
    write_shard(tmp_path / "a.tar", [])
    with pytest.raises(DataError, match="hold no examples"):
        ShardSource(tmp_path, preprocess=Preprocess(8))


def test_captions_are_in_order_evenly_spread_and_without_the_bad_ones(tmp_path):
    members = {f"{n:02}.txt": f"caption {n}".encode() for n in range(10)} | {"04.txt": b"\xff"}
    write_members(tmp_path / "a.tar", members)
    source = ShardSource(tmp_path, preprocess=Preprocess(8))
    assert list(source.captions(limit=100)) == [f"caption {n}" for n in range(10) if n != 4]
    assert list(source.captions(limit=5)) == [f"caption {n}" for n in (0, 2, 6, 8)]


class CountingSource(Source):
    def __init__(self):
        self.num_decoded = 0

    def __len__(self):
        return 4

    def __getitem__(self, number):
        self.num_decoded += 1
        if number == 3:
            return Bad("3", "bad")
        return Decoded(np.full((8, 8, 3), number, np.uint8), f"{number}", f"{number}", None)


def test_the_cache_decodes_once_while_there_is_room():
    counting = CountingSource()
    cached = CachedSource(counting, max_bytes=10_000)
    for _ in range(3):
        for number in range(4):
            first, again = CountingSource()[number], cached[number]
            assert first.key == again.key
            if isinstance(first, Decoded) and isinstance(again, Decoded):
                np.testing.assert_array_equal(first.image, again.image)
    assert counting.num_decoded == 4
    assert len(cached) == 4


def test_a_full_cache_decodes_the_rest_each_time():
    counting = CountingSource()
    cached = CachedSource(counting, max_bytes=2 * (1024 + 192))
    for _ in range(3):
        for number in range(4):
            assert cached[number].key == f"{number}"
    assert counting.num_decoded == 2 + 3 * 2
