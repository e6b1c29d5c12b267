"""The stored index: the same entries as a built one, on demand; healed, moved, and opened in the same time."""

import os
import tarfile

import numpy as np
import pytest

from benchmarks.index_size import synthetic_index
from limoe.data import files, index_file
from limoe.data.files import DataError
from limoe.data.images import Preprocess
from limoe.data.index import KINDS, ShardIndex, build_index, digest_of
from limoe.data.index_file import INDEX_SUFFIX, Members, encoded, in_memory, open_index, stored_index
from limoe.data.shards import Example, write_shard
from limoe.data.source import ShardSource


@pytest.fixture
def tar(tmp_path):
    path = tmp_path / "a.tar"
    write_shard(path, [Example(f"{n:03}", b"i" * n, f"{n}", {"n": n} if n % 3 else None) for n in range(150)])
    return path


def forget():
    for recent in (index_file._OPEN, index_file._BLOCKS):
        recent.clear()


def entries(index):
    return [index.entry(row) for row in range(len(index))]


def expected(index):
    """The entries of a built index."""
    spans = [[tuple(span) for span in getattr(index, kind).tolist()] for kind in KINDS]
    return [Members(key, *members, index.bad.get(key, "")) for key, *members in zip(index.keys, *spans, strict=True)]


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 150])
def test_entries_are_those_of_the_built_index(tmp_path, count):
    path = tmp_path / "a.tar"
    write_shard(path, [Example(f"{n:03}", b"i" * n, f"{n}", {"n": n} if n % 3 else None) for n in range(count)])
    with tarfile.open(path, "a") as archive:
        for name in ("001.txt", "x.txt", "x.tiff", "notes", "y.cls", "größer.json")[: 2 * count]:
            archive.addfile(tarfile.TarInfo(name))
    built = build_index(path)
    for _ in range(2):  # built, then stored
        index = open_index(path)
        assert entries(index) == expected(built)
        assert (index.digest, index.damage, index.ignored) == (digest_of(built), built.damage, built.ignored)
        assert index.stamp == built.stamp and len(index) == len(built.keys)
    with pytest.raises(IndexError):
        index.entry(len(index))


def test_spans_of_any_size_come_back():
    spans = np.random.default_rng(0).integers(0, 2**61, (100, 2))
    missing = np.tile(np.array([[-1, 0]]), (100, 1))
    parts = {"image": missing, "caption": spans, "metadata": spans[::-1], "label": missing}
    index = ShardIndex(files.Stamp(1, 2), [f"\u3000{n}" for n in range(100)], damage="cut", bad={}, ignored={}, **parts)
    assert entries(in_memory("a.tar", encoded(index))) == expected(index)


def test_the_stored_index_is_used_until_the_tar_changes(tar, monkeypatch):
    first = open_index(tar)
    with monkeypatch.context() as patched:
        patched.setattr(index_file, "build_index", lambda path: pytest.fail("the stored index fits"))
        again = open_index(tar)
        assert entries(again) == entries(first)
    write_shard(tar, [Example("000", b"image", "caption")])
    assert [entry.key for entry in entries(open_index(tar))] == ["000"]


def test_a_changed_time_alone_makes_the_index_stale(tar):
    open_index(tar)
    os.utime(tar, ns=(0, 0))
    assert open_index(tar).stamp.modified_ns == 0


def test_a_damaged_index_is_built_again(tar):
    built = expected(build_index(tar))
    open_index(tar)
    place = str(tar) + INDEX_SUFFIX
    stored = files.read_bytes(place)
    damaged = [b"", stored[:10], stored[:-1], stored + b"x", b"\x80\x04garbage pickle."]
    damaged += [stored[:at] + bytes([stored[at] ^ 1]) + stored[at + 1 :] for at in range(0, len(stored), 29)]
    for content in damaged:
        files.write_bytes(place, content)
        forget()
        assert entries(open_index(tar)) == built
        assert files.read_bytes(place) == stored


def test_an_index_that_is_damaged_or_gone_after_it_was_opened_is_built_again(tar):
    open_index(tar)
    place = str(tar) + INDEX_SUFFIX
    stored, built = files.read_bytes(place), expected(build_index(tar))
    for content in (stored[:-1], b"other"):
        index = open_index(tar)
        files.write_bytes(place, content)
        forget()
        assert entries(index) == built and files.read_bytes(place) == stored
    index = open_index(tar)
    os.unlink(place)
    forget()
    assert entries(index) == built
    index = open_index(tar)
    write_shard(tar, [Example("000", b"image", "caption")])
    open_index(tar)
    forget()
    with pytest.raises(DataError, match=r"a\.tar is another tar than when it was opened"):
        index.entry(0)


def refuse(path):
    raise files.StorageError("read-only")


def test_where_the_folder_may_not_be_written_the_index_goes_to_the_cache(tar, tmp_path, monkeypatch):
    writer = files.atomic_writer
    beside = lambda path: os.path.dirname(path) == str(tmp_path)  # noqa: E731
    monkeypatch.setattr(files, "atomic_writer", lambda path: refuse(path) if beside(path) else writer(path))
    built = expected(build_index(tar))
    assert entries(open_index(tar, cache_dir=tmp_path / "cache")) == built
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "cache"]
    forget()
    monkeypatch.setattr(index_file, "build_index", lambda path: pytest.fail("the index in the cache fits"))
    assert entries(open_index(tar, cache_dir=tmp_path / "cache")) == built


def test_where_nothing_may_be_written_the_index_stays_in_memory(tar, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "atomic_writer", refuse)
    index = open_index(tar, cache_dir=tmp_path / "cache")
    forget()
    assert entries(index) == expected(build_index(tar))
    assert os.listdir(tmp_path) == ["a.tar"]


def test_the_digest_is_that_of_the_first_format(tar):
    source = ShardSource(tar, preprocess=Preprocess(8))
    size = os.path.getsize(tar)
    assert source.contents == {"a.tar": f"{size} bytes, index 1a4e1146e7c95be1"}, "a run that began before goes on"


def test_an_example_takes_less_than_24_bytes(tmp_path):
    small, large = encoded(synthetic_index(1_000)), encoded(synthetic_index(4_000))
    assert (len(large) - len(small)) / 3_000 < 24
    (tmp_path / "a.index").write_bytes(large)
    index = stored_index("a.tar", str(tmp_path / "a.index"), synthetic_index(4_000).stamp)
    assert index is not None and entries(index)[3_990:] == expected(synthetic_index(4_000))[3_990:]


def test_opening_reads_the_header_alone(tmp_path, monkeypatch):
    stamps = {}
    for count in (64, 2_000):
        (tmp_path / f"{count}.index").write_bytes(encoded(synthetic_index(count)))
        stamps[count] = synthetic_index(count).stamp
    read, read_range = [], files.read_range
    monkeypatch.setattr(files, "read_range", lambda *where: read.append(where[1:]) or read_range(*where))
    for count, stamp in stamps.items():
        index = stored_index("a.tar", str(tmp_path / f"{count}.index"), stamp)
        assert index is not None and len(index) == count
    assert len(read) == 2 and read[0] == read[1]
