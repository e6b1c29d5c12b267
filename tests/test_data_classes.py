"""The list of classes beside labelled images: what it may hold, and what is said where it does not fit."""

import json

import pytest

from limoe.data.classes import Classes, read_classes
from limoe.data.files import DataError


def test_read_classes(tmp_path):
    content = {"templates": ["a photo of a {}"], "classes": ["red square", "blé"], "source": "any other key"}
    (tmp_path / "classes.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    assert read_classes(tmp_path) == Classes(("a photo of a {}",), ("red square", "blé"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b"\xff\xfe", "UTF-8"),
        (b"[]", "must hold an object"),
        (b'{"classes": ["a"]}', 'no "templates"'),
        (b'{"templates": "a {}", "classes": ["a"]}', "must be a list"),
        (b'{"templates": ["a {}"], "classes": []}', "an empty list"),
        (b'{"templates": ["a {}"], "classes": ["a", 3]}', "entry 1"),
        (b'{"templates": ["a {}"], "classes": ["a", "  "]}', "entry 1"),
        (b'{"templates": ["a photo"], "classes": ["a"]}', "exactly once"),
        (b'{"templates": ["{} {}"], "classes": ["a"]}', "exactly once"),
    ],
)
def test_bad_classes_files_say_what_is_wrong(tmp_path, content, message):
    (tmp_path / "classes.json").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_classes(tmp_path)
    assert "classes.json" in str(error.value)


def test_templates_by_name_with_c_and_classes_as_lines(tmp_path):
    (tmp_path / "classes.json").write_text('{"templates": "imagenet80", "classes": ["a", "b", "A"]}')
    assert len(read_classes(tmp_path).templates) == 80 and read_classes(tmp_path).names == ("a", "b", "A")
    (tmp_path / "classes.json").write_text('{"templates": ["one {c}"], "classes": ["a"]}')
    assert read_classes(tmp_path) == Classes(("one {}",), ("a",))
    (tmp_path / "classes.json").unlink()
    (tmp_path / "classnames.txt").write_text("red square\nbl\u00e9\n", encoding="utf-8")
    assert read_classes(tmp_path) == Classes(("a photo of a {}.",), ("red square", "bl\u00e9"))
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c}\n")
    assert read_classes(tmp_path).templates == ("a {}", "the {}")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a\n")
    with pytest.raises(DataError, match="exactly once"):
        read_classes(tmp_path)
    (tmp_path / "classnames.txt").write_text("\n")
    with pytest.raises(DataError, match=r"templates\.txt|classnames\.txt is empty"):
        read_classes(tmp_path)


def test_a_missing_classes_file_says_what_it_must_hold(tmp_path):
    with pytest.raises(DataError, match=r'does not exist.*"templates"'):
        read_classes(tmp_path)
