"""Layouts of data that people have, each read by itself or told apart by what is there, and mixtures of them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from limoe.config.presets import preset
from limoe.config.schema import ConfigError
from limoe.config.settings import override
from limoe.data import inputs
from limoe.data.batches import Batches
from limoe.data.classes import Classes
from limoe.data.files import DataError
from limoe.data.images import Preprocess
from limoe.data.inputs import DataFolders
from limoe.data.places import open_mixture, open_source
from limoe.data.source import Bad, Decoded, MixedSource, Mixture
from limoe.data.tokenizer import train_tokenizer
from limoe.evaluate.data import read_evaluation_data

SMALL = override(preset("tiny"), ["model.image_size=8", "model.patch_size=8"])
SQUARE = Preprocess(4)


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def coco(folder: Path) -> str:
    images = [{"id": 10 + number, "file_name": f"{number}.png"} for number in range(3)]
    notes = [{"image_id": 10 + n % 2, "caption": f"caption {n} of {n % 2}"} for n in range(10)]
    write(folder / "captions.json", json.dumps({"images": images, "annotations": notes}))
    for number in range(3):
        write(folder / "val" / f"{number}.png", png(number))
    return f"{folder / 'captions.json'}?images={folder / 'val'}"


def karpathy(folder: Path) -> str:
    images = [
        {"filepath": "val", "filename": f"{n}.png", "split": "test" if n < 2 else "train", "cocoid": 10 + n}
        | {"sentences": [{"raw": f"caption {n} {k}"} for k in range(5)]}
        for n in range(3)
    ]
    write(folder / "dataset_coco.json", json.dumps({"images": images}))
    for number in range(3):
        write(folder / "val" / f"{number}.png", png(number))
    return f"{folder / 'dataset_coco.json'}?split=test&images={folder}"


def table(folder: Path) -> str:
    lines = ["title\tfilepath", *(f"caption {n} {k}\tval/{n}.png" for n in range(2) for k in range(5))]
    write(folder / "pairs.tsv", "\ufeff" + "\n".join([*lines, "lost\tval/lost.png"]))
    for number in range(2):
        write(folder / "val" / f"{number}.png", png(number))
    return f"{folder / 'pairs.tsv'}?image=filepath&caption=title"


def clip_retrieval(folder: Path) -> str:
    members = {f"{n}.png": png(n) for n in range(2)}
    members |= {f"{n}.txt": "\n".join(f"caption {n} {k}" for k in range(5)).encode() for n in range(2)}
    write_tar(folder / "test" / "0.tar", {**members, "2.png": png(2)})
    write(folder / "dataset_type.txt", "retrieval\n")
    return str(folder)


@pytest.mark.parametrize("layout", [coco, karpathy, table, clip_retrieval])
def test_pictures_with_five_captions_each(tmp_path, layout):
    place = layout(tmp_path)
    source = open_source(place, preprocess=SQUARE)
    good = [example for example in map(source.__getitem__, range(len(source))) if isinstance(example, Decoded)]
    assert [example.image[0, 0, 0] for example in good] == [0, 1]
    assert all(len({example.caption, *example.more_captions}) == 5 for example in good)
    assert [text.partition(" ")[0] for text in source.captions(limit=9) if text != "lost"] == ["caption"] * 10
    data = read_evaluation_data(SMALL, inputs.evaluation_folders(SMALL, place))
    assert data.zero_shot is None and data.retrieval is not None
    assert data.retrieval.image_id.tolist() == [0] * 5 + [1] * 5 and len(data.retrieval.pairs.captions) == 10
    assert data.num_bad == (0 if layout is karpathy else 1), "a picture without captions, or none at all"


def class_folders(folder: Path) -> tuple[str, tuple[str, ...]]:
    for number, name in enumerate(["big_cat", "dog"]):
        for copy in range(2):
            write(folder / name / f"{copy}.PNG", png(number))
        write(folder / name / "Thumbs.db", b"?")
    return str(folder), ("big cat", "dog")


def clip_shards(folder: Path) -> tuple[str, tuple[str, ...]]:
    members = {
        f"{n}.{kind}": png(n // 2) if kind == "webp" else b"%d" % (n // 2) for n in range(4) for kind in ("webp", "cls")
    }
    write_tar(folder / "test" / "0.tar", members)
    write(folder / "classnames.txt", "one\ntwo\n")
    write(folder / "zeroshot_classification_templates.txt", "a {c}\n")
    return str(folder), ("one", "two")


def json_labels(folder: Path) -> tuple[str, tuple[str, ...]]:
    members = {f"{n}.json": json.dumps({"class": n // 2}).encode() for n in range(4)}
    write_tar(folder / "0.tar", {**members, **{f"{n}.png": png(n // 2) for n in range(4)}})
    write(folder / "classes.json", json.dumps({"templates": "simple", "classes": ["one", "two"]}))
    return str(folder), ("one", "two")


@pytest.mark.parametrize("layout", [class_folders, clip_shards, json_labels])
def test_labelled_pictures_need_no_captions(tmp_path, layout):
    place, names = layout(tmp_path)
    data = read_evaluation_data(SMALL, inputs.evaluation_folders(SMALL, place), place)
    assert data.zero_shot is not None and data.probe is not None and data.retrieval is None and data.num_bad == 0
    assert data.zero_shot.classes.names == names
    for found in (data.zero_shot, data.probe):
        assert found.pairs.labels.tolist() == [0, 0, 1, 1] == found.pairs.images[:][:, 0, 0, 0].tolist()
    # As captions for training: one of CLIP's seven sentences with the class.
    source = open_source(f"{place}?templates=simple", preprocess=SQUARE)
    example = source[3]
    assert (
        isinstance(example, Decoded) and example.caption == f"itap of a {names[1]}." and len(example.more_captions) == 6
    )
    bare = open_source(place, preprocess=SQUARE)[0]
    assert isinstance(bare, Bad) and "the caption is missing" in bare.reason


def test_captions_from_the_json_by_key(tmp_path):
    facts = [{"cap": ["a", "b"]}, {"cap": "c"}, {"cap": []}, {"cap": [1]}, {}]
    members = {f"{n}.json": json.dumps(one).encode() for n, one in enumerate(facts)}
    write_tar(tmp_path / "0.tar", {**members, **{f"{n}.png": png(n) for n in range(5)}})
    source = open_source(f"{tmp_path}?caption=cap", preprocess=SQUARE)
    found = [source[number] for number in range(5)]
    assert [(one.caption, one.more_captions) for one in found[:2]] == [("a", ("b",)), ("c", ())]
    assert all(isinstance(one, Bad) and "no caption 'cap'" in one.reason for one in found[2:])
    assert list(source.captions(limit=9)) == ["a", "b", "c"]


@pytest.mark.parametrize("layout", [coco, table])
def test_contents_change_with_the_size_of_a_picture(tmp_path, layout):
    found = []
    for folder, size in (("a", 16), ("b", 16), ("c", 17)):
        place = layout(tmp_path / folder)
        write(tmp_path / folder / "val" / "1.png", bytes(size))
        found.append(open_source(place, preprocess=SQUARE).contents)
    assert found[0] == found[1] != found[2]


def test_labelled_pictures_with_several_captions_are_each_one_image_of_both_evaluations(tmp_path):
    facts = [{"class": n, "cap": [f"{n} a", f"{n} b"]} for n in range(2)]
    members = {f"{n}.json": json.dumps(one).encode() for n, one in enumerate(facts)}
    write_tar(tmp_path / "0.tar", {**members, **{f"{n}.png": png(n) for n in range(2)}})
    write(tmp_path / "classes.json", json.dumps({"templates": "simple", "classes": ["one", "two"]}))
    data = read_evaluation_data(SMALL, inputs.evaluation_folders(SMALL, f"{tmp_path}?caption=cap"))
    assert data.zero_shot is not None and data.zero_shot.pairs.labels.tolist() == [0, 1]
    assert data.retrieval is not None and data.retrieval.image_id.tolist() == [0, 0, 1, 1]
    assert data.retrieval.pairs.captions == ("0 a", "0 b", "1 a", "1 b")


@pytest.mark.parametrize(
    ("name", "content", "place", "message"),
    [
        (
            "pairs.csv",
            "image,text\n",
            "{}",
            r"no column 'caption'; it has image, text; .*\?image=NAME&caption=NAME",
        ),
        ("pairs.csv", "", "{}", "has no column 'image'"),
        ("pairs.csv", "image,caption\na.png,a dog, running\n", "{}", "line 2: more fields than the 2 columns"),
        ("pairs.TSV", 'image\tcaption\na.png\t"quoted start\nb.png\ta dog\n', "{}", "unexpected end of data; double"),
        ("a.json", "{", "{}", "is not JSON"),
        ("a.json", "[]", "{}", 'no list "images"; give COCO'),
        ("a.json", '{"images": [{"id": 1}]}', "{}", "neither COCO's nor Karpathy's captions: KeyError 'annotations'"),
        (
            "a.json",
            '{"images": [{"split": "val", "sentences": []}]}',
            "{}",
            r"the splits val; choose one: .*\?split=val",
        ),
        ("a.x", "", "folders:{}", "has no folders with pictures"),
        ("a.json", "{}", "coco:{}?imgs=b", "the layout coco has no option 'imgs'; it has images, split"),
        ("pairs.parquet", "PAR1" * 200, "{}", "hold no examples that can be read.*a tar, or one of the layouts"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, name, content, place, message):
    write(tmp_path / name, content)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=message):
        open_source(place.format(tmp_path / name), preprocess=SQUARE)
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left beside it"


def test_folders_and_names_must_be_as_many(tmp_path):
    place, _ = class_folders(tmp_path)
    write(tmp_path / "classnames.txt", "one\n")
    with pytest.raises(DataError, match="2 folders and 1 classes"):
        open_source(place, preprocess=SQUARE)


def test_folders_have_the_number_of_their_name_in_the_list(tmp_path):
    place, _ = class_folders(tmp_path)
    names = [path.name.replace("_", " ") for path in sorted(tmp_path.iterdir()) if path.is_dir()]
    in_order = [source_classes(place)]
    write(tmp_path / "classnames.txt", "\n".join(reversed(names)))
    in_order.append(source_classes(place))
    assert in_order == [[0, 1], [1, 0]]


def source_classes(place):
    source = open_source(place, preprocess=SQUARE, metadata=True)
    read = [source[number] for number in range(len(source))]
    return list(dict.fromkeys(one.metadata["class"] for one in read if isinstance(one, Decoded)))


def test_one_odd_example_is_counted_and_ends_nothing(tmp_path):
    pictures = [{"id": 1, "file_name": "a\0.png"}, {"id": 2, "file_name": "gone.png"}, {"id": 3, "file_name": "b.png"}]
    notes = [{"image_id": 1, "caption": "a"}, {"image_id": 2, "caption": "b \ud83d"}, {"image_id": 3, "caption": None}]
    write(tmp_path / "a.json", json.dumps({"images": pictures, "annotations": notes}))
    source = open_source(str(tmp_path / "a.json"), preprocess=SQUARE)
    assert all(isinstance(source[number], Bad) for number in range(3))
    assert [*source.captions(limit=9)] == ["a", "b \ud83d"]
    train_tokenizer(source.captions(limit=9), vocab_size=300, length=8)


def test_several_sources_by_weight(tmp_path):
    labelled, _ = class_folders(tmp_path / "a")
    # An option may hold whatever a file name may.
    folder = tmp_path / "b&c=d?"
    coco(folder)
    listed = [{"path": str(folder / "captions.json"), "images": str(folder / "val")}]
    listed += [{"path": labelled, "layout": "folders", "templates": "simple", "weight": 3}]
    config = override(SMALL, [f"data.sources={json.dumps(listed)}", "data.max_bad_share=0.9"])
    source = inputs.training_source(config, DataFolders("", "", ""))
    assert source.notes[1] == f"folders:{labelled}?templates=simple: 4 examples, 75.0% of each batch"
    assert len(source) == 7 and any("caption 0 of 0" in text for text in source.captions(limit=20))
    encode = lambda captions: np.array([[len(text), "caption" in text] for text in captions], np.int32)  # noqa: E731
    batches = Batches(source, encode, batch_size=4, seed=0)
    for step in range(6):
        batch = batches.at(step)
        assert batch.tokens[:, 1].sum() == 1, "one of four rows, and its replacement is of its source"
        assert len({key for key in batch.keys if "/a/" in key}) == 3
    with pytest.raises(DataError, match=r"source 0 of data\.sources has 3 examples, fewer than the 4 of a batch"):
        Batches(source, encode, batch_size=16, seed=0)
    with pytest.raises(DataError, match="so small a weight"):
        Batches(MixedSource("ab", source.parts, (1.0, 99.0)), encode, batch_size=2, seed=0)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("{", "not JSON"),
        ("[]", "list of objects with a path"),
        ('[{"weight": 1}]', "list of objects with a path"),
        ('[{"path": "a", "weight": 0}]', "weight of a is 0"),
    ],
)
def test_sources_that_are_none_are_refused(sources, message):
    with pytest.raises(ConfigError, match=message):
        open_mixture(sources, preprocess=SQUARE)


def test_two_ways_to_name_the_data_are_refused():
    with pytest.raises(ConfigError, match=r"data\.sources=.*either this or data\.shards"):
        override(SMALL, ["data.shards=a", "data.sources=b"])


def test_rows_are_shared_by_weight():
    for batch_size in (8, 9, 10, 100):
        rows = Mixture((9, 9, 9), (1.0, 2.0, 0.5)).rows(batch_size)
        counts = np.bincount(rows, minlength=3)
        assert counts.sum() == batch_size and (abs(counts - batch_size * np.array([1, 2, 0.5]) / 3.5) < 1).all()


def test_classes_of_folders_are_their_names(tmp_path):
    place, names = class_folders(tmp_path)
    assert open_source(place, preprocess=SQUARE).classes == Classes(("a photo of a {}.",), names)
