"""Shards: what is written, how shards are found, and what is indexed of whole, cut, damaged and odd tars."""

import io
import os
import tarfile

import pytest

from limoe.data import files, tars
from limoe.data.files import DataError
from limoe.data.index import build_index
from limoe.data.shards import Example, find_shards, write_shard

EXAMPLES = [
    Example("000", b"first image", "a red ring", {"class": 3}),
    Example("001", b"second", "größer 日本", None, "png"),
    Example("002", b"x" * 1500, "third caption"),
]


def member(path, span):
    offset, size = span.tolist()
    return files.read_range(path, offset, size)


def write_tar(path, members, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def tar(tmp_path):
    path = tmp_path / "a.tar"
    assert write_shard(path, EXAMPLES) == 3
    return path


def test_what_was_written_is_found_again(tar):
    index = build_index(tar)
    assert index.keys == ["000", "001", "002"]
    assert [member(tar, span) for span in index.image] == [example.image_bytes for example in EXAMPLES]
    assert [member(tar, span).decode() for span in index.caption] == [example.caption for example in EXAMPLES]
    assert member(tar, index.metadata[0]) == b'{"class": 3}'
    assert index.metadata[1].tolist() == [-1, 0]
    assert index.damage == ""


def test_the_same_examples_give_the_same_bytes(tar, tmp_path):
    write_shard(tmp_path / "b.tar", iter(EXAMPLES))
    assert files.read_bytes(tar) == files.read_bytes(tmp_path / "b.tar")


def test_tarfile_reads_our_shards(tar):
    with tarfile.open(tar) as opened:
        assert opened.getnames() == ["000.jpg", "000.txt", "000.json", "001.png", "001.txt", "002.jpg", "002.txt"]


@pytest.mark.parametrize("key", ["", "a.b", "../a", "a/b"])
def test_a_key_that_cannot_be_read_back_is_refused(tmp_path, key):
    with pytest.raises(ValueError, match="key"):
        write_shard(tmp_path / "a.tar", [Example(key, b"", "caption")])
    assert os.listdir(tmp_path) == []


def test_an_unknown_image_extension_is_refused(tmp_path):
    with pytest.raises(ValueError, match="avif"):
        write_shard(tmp_path / "a.tar", [Example("a", b"", "caption", None, "avif")])


def test_members_may_come_in_any_order_and_other_members_are_left_out(tmp_path):
    path = tmp_path / "a.tar"
    members = [("1.txt", b"one"), ("2.JPEG", b"image 2"), ("notes", b"?"), ("1.seg.png", b"?"), ("1.jpg", b"image 1")]
    write_tar(path, [*members, ("._1.jpg", b"?"), ("2.txt", b"two"), ("../../evil.txt", b"name only")])
    index = build_index(path)
    assert index.keys == ["1", "2", "../../evil"]
    assert [member(path, span) for span in index.image[:2]] == [b"image 1", b"image 2"]
    assert [member(path, span) for span in index.caption[:2]] == [b"one", b"two"]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_every_tar_format_are_read(tmp_path, tar_format):
    path = tmp_path / "a.tar"
    name = "folder/" * 18 + "key"
    write_tar(path, [(name + ".jpg", b"image"), (name + ".txt", b"caption"), ("ü.txt", b"umlaut")], format=tar_format)
    index = build_index(path)
    assert index.keys == [name, "ü"]
    assert member(path, index.image[0]) == b"image"
    assert index.damage == ""


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_quick_reader_of_headers_agrees_with_tarfile(tmp_path, tar_format, monkeypatch):
    path = tmp_path / "a.tar"
    names = ["a.jpg", "ä.txt", "x/" * 60 + "b.jpg", "y" * 99 + "/c.txt", "d/", "e" * 100]
    write_tar(path, [(name, bytes(number * 300)) for number, name in enumerate(names)], format=tar_format)
    whole = path.read_bytes()
    for at in (None, 0, 124, 130, 135, 148, 154, 156, 345):  # one byte of the first header is another
        path.write_bytes(whole if at is None else whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        quick, slow = read_members(path), None
        with monkeypatch.context() as patched:
            patched.setattr(tars, "_plain_file", lambda block: None)
            slow = read_members(path)
        assert quick == slow and (at is not None or len(quick) == 6)


def read_members(path):
    found = []
    with open(path, "rb") as file:
        try:
            found.extend(tars.members(file, path.stat().st_size))
        except tars.BrokenTar as error:
            found.append(str(error))
    return found


def test_every_cut_keeps_what_is_whole_and_counts_the_rest(tar, tmp_path):
    whole = files.read_bytes(tar)
    full = build_index(tar)
    ends = [max(sum(spans[row].tolist()) for spans in (full.image, full.caption, full.metadata)) for row in range(3)]
    archive_end = -(-ends[-1] // 512) * 512
    cut = tmp_path / "cut.tar"
    for length in range(0, archive_end + 1, 64):
        cut.write_bytes(whole[:length])
        index = build_index(cut)
        num_whole = sum(end <= length for end in ends)
        usable = [
            key
            for key, *spans in zip(index.keys, index.image, index.caption, index.metadata, strict=True)
            if spans[0][0] >= 0 and spans[1][0] >= 0 and max(span.sum() for span in spans) <= length
        ]
        # A cut .json alone (the last member of 000) leaves an example without it, so usable may hold one more.
        assert usable[:num_whole] == full.keys[:num_whole]
        assert len(index.keys) > num_whole, "at least one example more, which is bad, so that the loss is counted"
        assert "cut short" in index.damage


def test_a_cut_member_is_named(tar):
    index = build_index(tar)
    offset = int(index.image[2][0])
    with open(tar, "r+b") as file:
        file.truncate(offset + 100)
    index = build_index(tar)
    assert index.keys == ["000", "001", "002"]
    assert index.damage == "the tar is cut short inside 002.jpg"


def test_a_damaged_header_ends_the_index_there(tar):
    header = int(build_index(tar).image[1][0]) - 512
    with open(tar, "r+b") as file:
        file.seek(header)
        file.write(b"garbage")
    index = build_index(tar)
    assert index.keys == ["000", "after 000"]
    assert index.damage == f"the tar has a damaged header at byte {header} after 000"


@pytest.mark.parametrize("content", [b"no tar at all " * 100, b"\x1f\x8b" + bytes(range(256)) * 4])
def test_what_is_no_tar_is_one_bad_example(tmp_path, content):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    index = build_index(path)
    assert index.keys == ["after the beginning"]
    assert "is not a tar" in index.damage


def test_a_giant_size_is_damage(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, [("a.jpg", b"image")], pax_headers={})
    info = tarfile.TarInfo("folder")
    info.type = tarfile.DIRTYPE
    info.pax_headers = {"size": "9" * 40}
    path.write_bytes(info.tobuf(tarfile.PAX_FORMAT) + files.read_bytes(path))
    assert "damaged" in build_index(path).damage


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data[1]"
    for name in ("x-08.tar", "x-09.tar", "x-10.tar", "y.tar", "notes.txt"):
        files.write_bytes(folder / name, b"")
    return folder


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("", "x-08 x-09 x-10 y"),
        ("/y.tar", "y"),
        ("/x-{08..10}.tar", "x-08 x-09 x-10"),
        ("/{y,x-09}.tar", "x-09 y"),
        ("/{y,y,x-09}.tar", "x-09 y"),
    ],
)
def test_shards_are_found(folder, spec, names):
    assert find_shards(f"{folder}{spec}") == [str(folder / f"{name}.tar") for name in names.split()]


def test_shards_are_found_by_glob(folder):
    plain = folder.rename(folder.parent / "plain")
    assert find_shards(plain / "x-*.tar") == [str(plain / f"x-{number}.tar") for number in ("08", "09", "10")]


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("/none", "there is no file or folder {}/none, seen from"),
        ("/x-{09..11}.tar", "there is no file or folder {}/x-11.tar (one of"),
        ("/z*.tar", "looked for {}/z*.tar, seen from"),
        ("/empty", "looked for {}/empty/*.tar, seen from"),
    ],
)
def test_shards_that_are_not_there_are_named(folder, spec, named):
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="no shards found") as caught:
        find_shards(f"{folder}{spec}")
    assert named.format(folder) in str(caught.value)


def test_no_spec_at_all_is_refused():
    with pytest.raises(DataError, match="no shards are named"):
        find_shards("")
