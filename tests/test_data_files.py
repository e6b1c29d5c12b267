"""Files: reading parts, writing atomically, and messages for what the system refuses."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from limoe.data import files
from limoe.data.files import DataError, StorageError

ROOT = Path(__file__).resolve().parent.parent


def test_a_written_file_is_there_whole_and_nothing_else_is(tmp_path):
    path = tmp_path / "new" / "a.bin"
    with files.atomic_writer(path) as file:
        file.write(b"abc")
        assert not path.exists(), "the name appears only when the file is whole"
    assert files.read_bytes(path) == b"abc"
    assert os.listdir(path.parent) == ["a.bin"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    files.write_bytes(path, b"old")
    with pytest.raises(RuntimeError, match="stop"), files.atomic_writer(path) as file:
        file.write(b"new and longer")
        raise RuntimeError("stop")
    assert files.read_bytes(path) == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_only_what_dead_writers_left_is_removed(tmp_path):
    program = (
        "import os, signal, sys\n"
        "from limoe.data import files\n"
        "with files.atomic_writer(sys.argv[1]) as file:\n"
        "    file.write(b'half')\n"
        "    file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = tmp_path / "a.bin"
    killed = subprocess.run([sys.executable, "-c", program, str(path)], env={"PYTHONPATH": str(ROOT)}, check=False)
    assert killed.returncode == -9
    [left] = os.listdir(tmp_path)
    files.remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == [left], "written since this process began: its writer may not have locked it yet"
    kept = [".a.bin.1-abcdef0.tmp", "a.bin.1-abcdef01.tmp", ".a.bin.tmp", ".a.bin.x-abcdef01.tmp"]
    for name in kept:
        (tmp_path / name).write_bytes(b"the user's")
    (tmp_path / ".a.bin.1-abcdef01.tmp").mkdir()
    with files.atomic_writer(path) as file:
        file.write(b"whole")
        [living] = set(os.listdir(tmp_path)) - {left, *kept, ".a.bin.1-abcdef01.tmp"}
        for name in os.listdir(tmp_path):
            os.utime(tmp_path / name, (0, 0))
        files.remove_leftovers(tmp_path)
        assert set(os.listdir(tmp_path)) == {living, *kept, ".a.bin.1-abcdef01.tmp"}
    assert path.read_bytes() == b"whole"
    files.remove_leftovers(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "permission denied"),
        (errno.EROFS, "read-only"),
    ],
)
def test_what_the_system_refuses_is_explained_with_the_path(tmp_path, monkeypatch, number, advice):
    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    path = tmp_path / "a.bin"
    with pytest.raises(StorageError, match=advice) as caught:
        files.write_bytes(path, b"abc")
    assert str(path) in str(caught.value)
    assert caught.value.errno == number
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is a Linux device that is always full")
def test_a_really_full_disk_is_explained():
    with (
        pytest.raises(StorageError, match="/dev/full: the disk is full"),
        files.explained("write", "/dev/full"),
        open("/dev/full", "wb", buffering=0) as file,
    ):
        file.write(b"abc")


def test_other_errors_keep_their_type(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        files.read_bytes(tmp_path / "nothing-here")


def test_a_range_ends_with_the_file(tmp_path):
    path = tmp_path / "a.bin"
    files.write_bytes(path, bytes(range(10)))
    assert files.read_range(path, 2, 3) == bytes([2, 3, 4])
    assert files.read_range(path, 8, 5) == bytes([8, 9])
    assert files.read_range(path, 20, 5) == b""


def test_text_must_be_utf8(tmp_path):
    path = tmp_path / "a.txt"
    files.write_bytes(path, "größer".encode())
    assert files.read_text(path) == "größer"
    files.write_bytes(path, b"\xff\xfe")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8"):
        files.read_text(path)


def test_listing_is_sorted_and_leaves_out_folders_and_temporary_files(tmp_path):
    for name in ("b.tar", "a.tar", ".c.tar"):
        files.write_bytes(tmp_path / name, b"")
    (tmp_path / "d.tar").mkdir()
    assert files.list_files(tmp_path / "*.tar") == [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]


def test_the_stamp_changes_with_the_file(tmp_path):
    path = tmp_path / "a.bin"
    files.write_bytes(path, b"abc")
    before = files.stamp(path)
    os.utime(path, ns=(0, before.modified_ns + 1))
    assert files.stamp(path) == before._replace(modified_ns=before.modified_ns + 1)


def test_the_cache_folder_is_the_given_one_the_environments_or_the_users(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.delenv("LIMOE_CACHE", raising=False)
    assert files.cache_folder() == "/somewhere/limoe"
    monkeypatch.setenv("LIMOE_CACHE", "/theirs")
    assert files.cache_folder() == "/theirs"
    assert files.cache_folder("/mine") == "/mine"
