"""The source: an example or the reason why not, for every kind of bad input; captions; the cache."""

import io
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

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
