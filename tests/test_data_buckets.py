"""Buckets: a memory that fails as networks and servers do gives the bits of a local folder, or a clear refusal."""

import itertools
import os

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from test_data_batches import assert_same, batches_of
from test_data_source import png

from limoe.data import buckets, files, index_file
from limoe.data.files import DataError, StorageError
from limoe.data.images import Preprocess
from limoe.data.index import build_index
from limoe.data.index_file import INDEX_SUFFIX, open_index
from limoe.data.order import BlockOrder, Order
from limoe.data.places import open_source
from limoe.data.shards import Example, find_shards, write_shard
from limoe.data.tokenizer import load_tokenizer, train_tokenizer


class FlakyFileSystem(MemoryFileSystem):
    """A bucket in memory. `faults` are drawn in turn: an error to raise, "cut" for half a body, None for none."""

    protocol = "flaky"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs: list = [""]  # noqa: RUF012
    faults = itertools.repeat(None)
    requests: list = []  # noqa: RUF012
    read_only = False

    def _fault(self, name, *arguments):
        self.requests.append((name, *arguments))
        fault = next(type(self).faults)
        if isinstance(fault, Exception):
            raise fault
        return fault

    def cat_file(self, path, start=None, end=None, **options):
        fault = self._fault("cat", path, start, end)
        content = super().cat_file(path, start=start, end=end, **options)
        return content[: len(content) // 2] if fault == "cut" else content

    def info(self, path, **options):
        self._fault("info", path)
        return super().info(path, **options)

    def ls(self, path, detail=True, **options):
        self._fault("ls", path)
        return super().ls(path, detail=detail, **options)

    def pipe_file(self, path, value, mode="overwrite", **options):
        if self.read_only:
            raise PermissionError("no rights")
        self._fault("pipe", path)
        return super().pipe_file(path, value, mode=mode, **options)


FAULTS = (
    TimeoutError("timed out"),
    ConnectionResetError("died"),
    RuntimeError("503 slow down"),
    "cut",
    OSError("reset"),
)


@pytest.fixture
def bucket(monkeypatch):
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    monkeypatch.setattr(files, "_BUCKET_PAUSES", (0.0,) * 5)
    monkeypatch.setattr(FlakyFileSystem, "store", {})
    monkeypatch.setattr(FlakyFileSystem, "requests", [])
    return "flaky://bucket/data"


@pytest.fixture
def local(tmp_path, bucket):
    """A folder of three shards, which are in the bucket too."""
    for shard in range(3):
        examples = [Example(f"{shard}{n:02}", png((shard, n, 9), side=60), f"{n}", None, "png") for n in range(40)]
        examples[7] = examples[7]._replace(caption="")
        write_shard(tmp_path / "data" / f"{shard}.tar", examples)
        files.write_bytes(f"{bucket}/{shard}.tar", (tmp_path / "data" / f"{shard}.tar").read_bytes())
    FlakyFileSystem.requests.clear()
    return str(tmp_path / "data")


def opened(place, cache):
    return open_source(place, preprocess=Preprocess(8), cache_dir=cache)


@pytest.mark.parametrize("order", [Order(0), Order(0, (), BlockOrder(8, 32))], ids=["examples", "blocks"])
def test_with_one_request_in_seven_failing_the_batches_are_those_of_a_folder(
    local, bucket, tmp_path, monkeypatch, order
):
    draws = np.random.default_rng(0)
    faults = (FAULTS[draws.integers(5)] if draws.random() < 1 / 7 else None for _ in itertools.count())
    monkeypatch.setattr(FlakyFileSystem, "faults", faults)
    sources = opened(local, tmp_path / "a"), opened(bucket, tmp_path / "b")
    if order.blocks:
        sources[1].keep_blocks(32)
    there, here = (batches_of(source, seed=order, max_bad_share=0.5) for source in sources)
    for step in (0, 3, 14, 20):
        assert_same(there.at(step), here.at(step))
    assert sum(name == "cat" for name, *_ in FlakyFileSystem.requests) > 20


def test_a_bucket_that_stays_away_is_a_bad_example_and_not_the_end(local, bucket, tmp_path, monkeypatch):
    source = opened(bucket, tmp_path / "cache")
    monkeypatch.setattr(FlakyFileSystem, "faults", itertools.repeat(TimeoutError("timed out")))
    assert "the shard cannot be read" in source[0].reason and "TimeoutError: timed out" in source[0].reason
    lost = opened(local, tmp_path / "cache")
    assert source[7].key == lost[7].key


def test_a_body_that_always_ends_early_is_not_taken_for_the_end_of_the_file(local, bucket, monkeypatch):
    monkeypatch.setattr(FlakyFileSystem, "faults", itertools.repeat("cut"))
    with pytest.raises(OSError, match="50 bytes came of 100"):
        files.read_range(f"{bucket}/0.tar", 0, 100)
    monkeypatch.setattr(FlakyFileSystem, "faults", itertools.repeat(None))
    size = files.stamp(f"{bucket}/0.tar").size
    assert len(files.read_range(f"{bucket}/0.tar", size - 10, 100)) == 10
    assert files.read_range(f"{bucket}/0.tar", size + 10, 100) == b""


def test_an_index_is_made_from_ranges_and_found_by_other_hosts(bucket, tmp_path, monkeypatch):
    path = f"{bucket}/large.tar"
    write_shard(tmp_path / "large.tar", [Example(f"{n}", bytes(200_000), "a ring") for n in range(20)])
    files.write_bytes(path, (tmp_path / "large.tar").read_bytes())
    FlakyFileSystem.requests.clear()
    index = open_index(path, cache_dir=tmp_path / "a")
    read = sum(end - start for name, *rest in FlakyFileSystem.requests if name == "cat" for _, start, end in [rest])
    assert read < files.stamp(path).size / 5, "headers, not pictures"
    monkeypatch.setattr(index_file, "build_index", lambda path: pytest.fail("the index beside the tar fits"))
    assert open_index(path, cache_dir=tmp_path / "b").entry(19) == index.entry(19)
    files.write_bytes(f"{path}{INDEX_SUFFIX}", b"other")
    FlakyFileSystem.requests.clear()
    again = open_index(path, cache_dir=tmp_path / "b")
    assert again.entry(3) == index.entry(3) and not any(name == "cat" for name, *_ in FlakyFileSystem.requests)
    assert build_index(path).keys == build_index(tmp_path / "large.tar").keys


def test_a_tar_that_was_written_again_is_indexed_again(local, bucket, tmp_path):
    cache = tmp_path / "cache"
    assert len(open_index(f"{bucket}/0.tar", cache_dir=cache)) == 40
    write_shard(tmp_path / "new.tar", [Example("0", b"image", "caption")])
    files.write_bytes(f"{bucket}/0.tar", (tmp_path / "new.tar").read_bytes())
    assert len(open_index(f"{bucket}/0.tar", cache_dir=cache)) == 1


def test_a_bucket_that_may_not_be_written_is_read(local, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(FlakyFileSystem, "read_only", True)
    assert opened(bucket, tmp_path / "cache")[0].key == "000"
    assert files.names_in(bucket) == ["0.tar", "1.tar", "2.tar"]
    with pytest.raises(StorageError, match="cannot write flaky://bucket/x: permission denied; give this machine"):
        files.write_bytes("flaky://bucket/x", b"")


@pytest.mark.parametrize("spec", ["", "/*.tar", "/{0..2}.tar", "/{0,2,1}.tar"])
def test_shards_in_a_bucket_are_found(local, bucket, spec):
    assert find_shards(f"{bucket}{spec}") == [f"{bucket}/{shard}.tar" for shard in range(3)]


def test_shards_that_are_not_there_are_named(local, bucket):
    for spec in ("/none", "/*.zip", "/{0..3}.tar"):
        with pytest.raises(DataError, match=r"no shards found.*flaky://bucket"):
            find_shards(f"{bucket}{spec}")


def test_a_moved_folder_has_the_same_contents(local, bucket, tmp_path):
    assert opened(local, tmp_path / "a").contents == opened(bucket, tmp_path / "b").contents


def test_a_tokenizer_may_be_in_a_bucket(bucket):
    tokenizer = train_tokenizer([f"number {number}" for number in range(99)], vocab_size=64, length=8)
    tokenizer.save(f"{bucket}/tokenizer.model")
    assert load_tokenizer(f"{bucket}/tokenizer.model", length=8).model == tokenizer.model


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gs://bucket/a", r"gs:// cannot be read: install its extra: pip install 'limoe-jax\[gcs\]'"),
        ("s3://bucket/a", r"s3:// cannot be read: install its extra: pip install 'limoe-jax\[s3\]'"),
        ("nowhere://a", "nowhere:// cannot be read: fsspec does not know it"),
    ],
)
def test_a_missing_library_is_named(path, message, monkeypatch):
    def missing(protocol):
        raise (ValueError if protocol == "nowhere" else ImportError)("no such library")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    buckets._filesystem.cache_clear()
    with pytest.raises(DataError, match=message):
        files.read_bytes(path)


def test_what_needs_a_file_system_refuses_a_bucket(bucket):
    for function in (files.make_folder, files.sync, lambda path: files.append_line(path, "")):
        with pytest.raises(DataError, match="is not in a file system; give a local or mounted path"):
            function(bucket)
    assert not os.path.exists("flaky:")
