"""limoe index: parts, processes, going on where it was stopped, and the report of what is bad."""

import json
import os

import pytest
from test_data_source import png

from limoe import cli
from limoe.data import files, indexing
from limoe.data.index_file import INDEX_SUFFIX
from limoe.data.indexing import Work, index_shards, report_of
from limoe.data.shards import Example, write_shard


@pytest.fixture
def folder(tmp_path):
    for shard in range(5):
        examples = [Example(f"{shard}{n}", png("red"), "a ring", None, "png") for n in range(4)]
        examples[1] = examples[1]._replace(caption=" ")
        if shard == 2:
            examples[3] = examples[3]._replace(image_bytes=b"\0\0\0\x20ftypavif" + bytes(20))
        write_shard(tmp_path / "data" / f"{shard}.tar", examples)
    whole = files.read_bytes(tmp_path / "data" / "4.tar")
    files.write_bytes(tmp_path / "data" / "4.tar", whole[: whole.index(b"43.png") + 520])
    return tmp_path / "data"


def indexes(folder):
    return [name for name in sorted(os.listdir(folder)) if name.endswith(INDEX_SUFFIX)]


def test_parts_together_are_all_shards_each_once(folder):
    done = []
    for part in ((2, 3), (1, 3), (3, 3)):
        found = index_shards(Work(str(folder), part))
        done += [facts.shard for facts in found]
        assert len(indexes(folder)) == len(done)
    assert sorted(done) == [str(folder / f"{shard}.tar") for shard in range(5)]


REASONS = {
    "the caption is empty": {"examples": 5, "first": ["{}/0.tar: 01", "{}/1.tar: 11", "{}/2.tar: 21"]},
    "the image does not decode: it is AVIF, and only JPEG, PNG, WEBP, BMP, GIF are read": {
        "examples": 1,
        "first": ["{}/2.tar: 23"],
    },
    "the caption is missing (the tar is cut short inside KEY.png)": {"examples": 1, "first": ["{}/4.tar: 43"]},
}


def test_a_check_counts_every_bad_example_by_reason(folder, tmp_path, capsys):
    report = tmp_path / "out" / "report.json"
    words = ["index", f"--data={folder}", "--check", f"--out={report}", "--jobs=2"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("5 shards, 20 examples, 7 of them bad\n  5 x the caption is empty\n")
    found = json.loads(report.read_text())
    assert (found["shards"], found["examples"], found["bad"]) == (5, 20, 7)
    assert found["reasons"].keys() == REASONS.keys()
    for reason, expected in REASONS.items():
        assert found["reasons"][reason]["examples"] == expected["examples"]
        first = [key.format(folder) for key in expected["first"]]
        assert found["reasons"][reason]["first"][: len(first)] == first
    assert found["damaged shards"] == {f"{folder}/4.tar": "the tar is cut short inside 43.png"}
    assert cli.main([*words, "--json"]) == 0 and json.loads(capsys.readouterr().out) == found


def test_a_stopped_check_goes_on_and_a_changed_shard_is_checked_again(folder, tmp_path, monkeypatch):
    work = Work(str(folder), report=str(tmp_path / "report.json"))
    whole, checked = report_of(index_shards(work)), []
    files.write_bytes(f"{work.report}.shards", b"")

    def stop(path, work, indexed=indexing._indexed):
        checked.append(os.path.basename(path))
        if len(checked) == 3:
            raise KeyboardInterrupt
        return indexed(path, work)

    monkeypatch.setattr(indexing, "_indexed", stop)
    with pytest.raises(KeyboardInterrupt):
        index_shards(work)
    with open(f"{work.report}.shards", "a") as lines:
        lines.write('["torn')
    assert report_of(index_shards(work)) == whole
    assert checked == ["0.tar", "1.tar", "2.tar", "2.tar", "3.tar", "4.tar"]
    write_shard(folder / "3.tar", [Example("0", png("red"), "a ring", None, "png")])
    found = report_of(index_shards(work))
    assert (checked[6:], found["examples"], found["bad"]) == (["3.tar"], 17, 6)


def test_indexes_that_cannot_be_stored_are_a_failure(folder, monkeypatch, capsys):
    def refuse(path):
        raise files.StorageError("read-only")

    monkeypatch.setattr(files, "atomic_writer", refuse)
    assert cli.main(["index", f"--data={folder}", "--jobs=1"]) == 1
    assert f"5 indexes could not be stored, the first is that of {folder}/0.tar" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([], 2, "index needs --data=SHARDS"),
        (["--data={}", "--out=x.json"], 2, "--out=FILE.json only with --check"),
        (["--data={}", "--part=0/3"], 1, "--part=0/3 is no part"),
        (["--data={}", "--part=4/3"], 1, "--part=4/3 is no part"),
        (["--data=pairs.csv"], 1, "is of the layout csv, which has no index"),
        (["--data=nowhere"], 1, "no shards found"),
    ],
)
def test_wrong_words_are_refused(tmp_path, capsys, words, status, message):
    assert cli.main(["index", *(word.format(tmp_path) for word in words)]) == status
    assert message in capsys.readouterr().err
