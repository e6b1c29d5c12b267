"""Bad data, a full disk and wrong paths: a clear message, nothing lost, and the run goes on where it can."""

import errno
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from data_cases import RawExample, caption, classes_json, colour_examples, picture, write_raw
from run_cases import metrics, ran, result, settings, shared, summary

from limoe import cli
from limoe.data import files
from limoe.data.files import DataError, StorageError
from limoe.data.shards import write_shard

OWN = ("model.vocab_size=64", "train.steps=8")


def huge_png() -> bytes:
    """A few bytes that claim to be an image of 10^10 pixels."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"\0" * 1000))


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


GOOD = picture(0)
BAD: list[RawExample] = [
    ("half", GOOD[: len(GOOD) // 2], b"half a picture", None),
    ("text", b"<html>not found</html>", b"no picture", None),
    ("huge", huge_png(), b"a huge picture", None),
    ("nocaption", GOOD, None, None),
    ("empty", GOOD, b" \n", None),
    ("latin", GOOD, b"caf\xe9", None),
    ("noimage", None, b"only words", None),
]


def own_shards(folder: Path, bad: list[RawExample]) -> Path:
    """24 good examples, these bad ones, and a tar of 8 examples that lost the end of its last one."""
    folder.mkdir()
    write_shard(folder / "0.tar", colour_examples(24))
    write_raw(folder / "1.tar", [*bad, ("good", GOOD, b"a good picture", None)])
    write_raw(folder / "2.tar", [(f"cut{n}", picture(n), caption(n).encode(), None) for n in range(8)])
    with open(folder / "2.tar", "r+b") as tar:
        # The last member is a caption of one block, with two blocks of zeros and the padding of the record behind it.
        content = tar.read()
        tar.truncate(content.rindex(b"cut7.jpg") + 600)
    return folder


@pytest.mark.slow
def test_bad_examples_are_replaced_counted_and_shown(tmp_path: Path) -> None:
    shards = own_shards(tmp_path / "shards", BAD)
    run = ran(tmp_path / "run", *OWN, f"data.shards={shards}", f"data.eval_shards={shards}", "data.max_bad_share=0.5")
    lines = metrics(run.folder)
    assert [line["step"] for line in lines] == list(range(1, 9))
    seen = {text for line in lines for text in line["bad_first"]}
    reasons = {
        "half": "does not decode",
        "text": "does not decode",
        "huge": "too large",
        "nocaption": "caption is missing",
        "empty": "caption is empty",
        "latin": "not UTF-8",
        "noimage": "image is missing",
        "cut7": "cut short",
    }
    for key, reason in reasons.items():
        assert any(text.startswith(f"{key}: ") and reason in text for text in seen), (key, seen)
    # 128 examples are three epochs and a bit.
    count = sum(line["bad_examples"] for line in lines)
    assert 3 * len(reasons) <= count <= 5 * len(reasons)
    assert summary(run.folder)["training_bad_examples"] == count
    assert summary(run.folder)["evaluation_bad_examples"] == len(reasons)
    assert f"{count} bad examples were replaced; the first: {lines[0]['bad_first'][0]}" in run.said
    assert "bad example replaced by the next good one" in run.said
    assert f"damaged shard: {shards / '2.tar'}: the tar is cut short" in run.said
    assert f"{len(reasons)} bad examples of the evaluation data are left out" in run.said


@pytest.mark.slow
def test_too_many_bad_examples_stop_the_run(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    write_shard(shards / "0.tar", colour_examples(60))
    write_raw(shards / "1.tar", [(f"{key}{n}", image, text, None) for n in range(6) for key, image, text, _ in BAD])
    with pytest.raises(
        DataError, match=r"examples examined \(\d+\.\d%\) are bad, more than max_bad_share=0\.05 allows"
    ):
        ran(tmp_path / "run", *OWN, f"data.shards={shards}")
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
def test_own_shards_with_classes(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    examples = [(f"{n:04d}", picture(n), caption(n).encode(), {"class": n % 3}) for n in range(48)]
    write_raw(shards / "0.tar", examples)
    classes_json(shards)
    run = ran(tmp_path / "run", *OWN, f"data.shards={shards}", f"data.eval_shards={shards}")
    content = summary(run.folder)
    assert content["zero_shot_chance"] == pytest.approx(1 / 3) and content["zero_shot_images"] == 48
    assert content["training_bad_examples"] == 0 and "bad example" not in run.said


@pytest.mark.slow
def test_own_shards_without_evaluation(tmp_path: Path) -> None:
    write_shard(tmp_path / "shards" / "0.tar", colour_examples(40))
    run = ran(tmp_path / "run", *OWN, f"data.shards={tmp_path / 'shards'}", rendered=True)
    content = summary(run.folder)
    assert content["zero_shot_top1"] is None and content["image_to_text_r1"] is None
    assert 0 < content["success_rate_image"] <= 1
    assert {path.name for path in (run.folder / "figures").iterdir()} == {"training.png", "expert_shares.png"}


def run_command(tmp_path: Path, *more: str) -> int:
    with shared():
        return cli.main(["train", f"--workdir={tmp_path / 'run'}", "--set", *settings(*more)])


@pytest.mark.parametrize("name", ["data.shards", "data.eval_shards"])
def test_no_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / "empty").mkdir()
    assert run_command(tmp_path, f"{name}={tmp_path / 'empty'}") == 1
    error = capsys.readouterr().err
    assert error.startswith("limoe: no shards found: looked for") and str(tmp_path / "empty" / "*.tar") in error
    assert not (tmp_path / "run" / "config.json").exists()  # the right path may be given with the same work folder


def test_a_file_that_is_no_tar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "0.tar").write_bytes(b"not a tar at all" * 100)
    assert run_command(tmp_path, f"data.shards={tmp_path / '0.tar'}") == 1
    error = capsys.readouterr().err
    assert "hold no examples that can be read" in error and "0.tar: the tar is not a tar (compressed?)" in error
    assert "one of the layouts shards, folders, coco, csv, clip_benchmark as LAYOUT:PATH" in error
    assert [path.name for path in tmp_path.glob("0.tar*")] == ["0.tar"]


@pytest.mark.parametrize("place", ["file", "below a file"])
def test_a_cache_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str) -> None:
    (tmp_path / "file").write_text("kept")
    cache = tmp_path / "file" / ("below" if place == "below a file" else "")
    assert run_command(tmp_path, f"data.cache_dir={cache}") == 1
    error = capsys.readouterr().err
    assert re.search(r"needs about \d+ MB in its cache folder", error) and "data.cache_dir" in error
    assert (tmp_path / "file").read_text() == "kept"


def test_a_work_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("kept")
    assert cli.main(["train", f"--workdir={tmp_path / 'file' / 'run'}"]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_a_folder_with_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("kept")
    assert run_command(tmp_path) == 1
    assert "holds other files (thesis.tex)" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


class FullDisk:
    """`os.fsync` fails with a full disk for files whose path has this text in it."""

    def __init__(self, text: str) -> None:
        self.text, self.fsync = text, os.fsync

    def __call__(self, descriptor: int) -> None:
        if self.text in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.fsync(descriptor)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config.json", "the disk is full"),
        ("tokenizer.model", "the disk is full"),
        ("metrics.jsonl", "the disk is full"),
        ("step_00000008", "could not write checkpoint .*step_00000008.*step 4 before it is intact"),
        ("training.png", "the disk is full"),
        ("summary.json", "the disk is full"),
    ],
)
def test_a_full_disk_anywhere(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    expected: dict[str, Any],
    text: str,
    message: str,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", FullDisk(text))
        assert run_command(tmp_path) == 1
    error = capsys.readouterr().err
    assert "limoe: " in error and "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("limoe: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert not (tmp_path / "run" / "summary.json").exists()
    assert run_command(tmp_path) == 0  # with space again
    assert result(tmp_path / "run") == expected


def test_a_full_disk_while_the_world_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "fsync", FullDisk(".tar."))
    assert run_command(tmp_path, f"data.cache_dir={tmp_path / 'cache'}") == 1
    error = capsys.readouterr().err
    assert "the disk is full" in error and "LIMOE_CACHE" in error and " MB" in error
    assert not list((tmp_path / "cache").rglob("*.tar"))


def test_the_full_disk_of_these_tests_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", FullDisk("a.txt"))
    files.write_bytes(tmp_path / "b.txt", b"x")
    with pytest.raises(StorageError, match="the disk is full"):
        files.write_bytes(tmp_path / "a.txt", b"x")
