"""The embedded world: the same bytes every time, held-out triples that stay out, and files that any reader takes."""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from limoe.data import files
from limoe.data import world as world_module
from limoe.data.index_file import INDEX_SUFFIX
from limoe.data.world import (
    HELD_OUT,
    SPLITS,
    TEMPLATES,
    TRAINING,
    Triple,
    World,
    caption,
    render,
    scene,
    write_world,
)
from limoe.data.world_captions import _SHAPE_WORDS
from limoe.data.world_render import COLOURS, SHAPES, TEXTURES

SMALL = World(num_pairs=120, pairs_per_shard=50, images_per_class=2, num_retrieval_pairs=30)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_world(SMALL, tmp_path_factory.mktemp("cache"))


def tree(folder):
    """The bytes of every file but the indexes, which hold modification times."""
    root = Path(folder)
    paths = sorted(path for path in root.rglob("*") if path.is_file() and not path.name.endswith(INDEX_SUFFIX))
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def triples(split, world):
    scenes = (scene(world, split, index) for index in range(world.num_examples(split)))
    return {Triple(thing.shape, thing.colour, thing.texture) for one in scenes for thing in one.things}


def members(folder):
    found = {}
    for shard in sorted(Path(folder).glob("*.tar")):
        with tarfile.open(shard) as tar:
            found.update({member.name: tar.extractfile(member).read() for member in tar})
    return found


def test_a_scene_its_picture_and_its_caption_are_functions_of_seed_split_and_index():
    for split in SPLITS:
        first, again = scene(SMALL, split, 7), scene(SMALL, split, 7)
        assert first == again and caption(first) == caption(again)
        np.testing.assert_array_equal(render(first, image_size=64), render(again, image_size=64))
    longer = dataclasses.replace(SMALL, num_pairs=100_000)
    assert scene(longer, "train", 7) == scene(SMALL, "train", 7)
    others = [scene(SMALL, "train", 8), scene(SMALL, "retrieval", 7), scene(World(seed=1), "train", 7)]
    assert all(other != scene(SMALL, "train", 7) for other in others)


def test_captions_stay_the_same_while_the_generator_version_does():
    text = "\n".join(caption(scene(SMALL, split, index)) for split in SPLITS for index in range(20))
    seen = (world_module.GENERATOR_VERSION, hashlib.sha256(text.encode()).hexdigest()[:16])
    assert seen == (1, "6b76825171574b50"), "raise GENERATOR_VERSION: worlds already in a cache are others now"


def test_no_scene_of_training_or_retrieval_shows_a_held_out_triple():
    world = World(num_pairs=2000)
    held_out = set(HELD_OUT)
    assert triples("train", world) == set(TRAINING), "2000 pairs show every triple of training"
    assert not triples("retrieval", world) & held_out
    assert triples("heldout", world) == held_out


def test_held_out_classes_share_no_pair_of_attributes_and_training_shows_every_pair():
    assert len(set(HELD_OUT)) == 24 and len(TRAINING) == len(SHAPES) * len(COLOURS) * len(TEXTURES) - 24
    for first, second in itertools.combinations(range(3), 2):
        values = (SHAPES, tuple(COLOURS), TEXTURES)
        pairs = set(itertools.product(values[first], values[second]))
        assert {(triple[first], triple[second]) for triple in TRAINING} == pairs
        assert len({(triple[first], triple[second]) for triple in HELD_OUT}) == 24
    per_colour = [sum(triple.colour == colour for triple in HELD_OUT) for colour in COLOURS]
    assert per_colour == [3] * 8, "a classifier that sees colour alone is right one time in three"


def test_held_out_and_retrieval_captions_leave_nothing_out():
    shapeless = {
        split: sum(
            not {"shape", "thing", "object"}.isdisjoint(caption(scene(World(), split, index)).split())
            for index in range(400)
        )
        for split in SPLITS
    }
    assert shapeless["heldout"] == shapeless["retrieval"] == 0
    # One description in ten leaves something out, and one in three of those the shape.
    assert 4 <= shapeless["train"] <= 30


def test_captions_of_two_things_tell_the_relation_as_it_is():
    phrases = {"left": (" to the left of ", " left of "), "right": (" to the right of ", " right of ")}
    phrases |= {"above": (" above ", " over "), "below": (" below ", " under ", " beneath ")}
    told = dict.fromkeys(phrases, 0)
    for index in range(300):
        one = scene(World(), "retrieval", index)
        if len({thing.shape for thing in one.things}) == 2:
            text = caption(one)
            said, phrase = next((said, phrase) for said in phrases for phrase in phrases[said] if phrase in text)
            words = text.partition(phrase)[0].split()
            first, second = one.things
            if not set(words) & set(_SHAPE_WORDS[first.shape]):
                first, second = second, first
            assert set(words) & set(_SHAPE_WORDS[first.shape])
            across, down = first.x - second.x, first.y - second.y
            assert {"left": across < -0.4, "right": across > 0.4, "above": down < -0.4, "below": down > 0.4}[said], text
            told[said] += 1
    assert min(told.values()) > 5


def test_a_textured_thing_has_two_tones_and_a_solid_one_has_one():
    spread = {texture: [] for texture in TEXTURES}
    for index in range(60):
        one = scene(World(images_per_class=20), "heldout", index)
        thing = one.things[0]
        if thing.shape in ("circle", "square", "heart"):
            image = render(one, image_size=64).astype(np.float64)
            row, column = int(thing.y * 64), int(thing.x * 64)
            patch = image[row - 5 : row + 6, column - 5 : column + 6]
            spread[thing.texture].append(patch.std(axis=(0, 1)).max())
    assert max(spread["solid"]) < 10 < 25 < min(min(spread[name]) for name in TEXTURES if name != "solid")


@pytest.mark.parametrize("image_size", [16, 48, 65, 224])
def test_pictures_come_in_any_size_and_small_ones_are_refused(image_size):
    image = render(scene(SMALL, "train", 0), image_size=image_size)
    assert image.shape == (image_size, image_size, 3) and image.dtype == np.uint8
    with pytest.raises(ValueError, match="image_size is 15"):
        render(scene(SMALL, "train", 0), image_size=15)


def test_the_files_are_pairs_in_the_layout_of_img2dataset(written):
    content = members(written.train)
    assert len(content) == 3 * 120 and len(list(Path(written.train).glob("*.tar"))) == 3
    for name, value in content.items():
        if name.endswith(".jpg"):
            with Image.open(io.BytesIO(value)) as image:
                assert image.format == "JPEG" and image.size == (64, 64)
    texts = [value.decode("utf-8") for name, value in sorted(content.items()) if name.endswith(".txt")]
    assert texts == [caption(scene(SMALL, "train", index)) for index in range(120)]


def test_the_evaluation_folder_names_its_classes(written):
    facts = json.loads((Path(written.zero_shot) / "classes.json").read_text(encoding="utf-8"))
    assert facts == {"templates": list(TEMPLATES), "classes": [triple.name for triple in HELD_OUT]}
    assert all(template.count("{}") == 1 for template in facts["templates"])
    metadata = [json.loads(value) for name, value in members(written.zero_shot).items() if name.endswith(".json")]
    assert sorted(one["class"] for one in metadata) == sorted(list(range(24)) * 2)
    assert all(Triple(*one["things"][0]).name == facts["classes"][one["class"]] for one in metadata)
    training = [json.loads(value) for name, value in members(written.train).items() if name.endswith(".json")]
    assert not {Triple(*thing) for one in training for thing in one["things"]} & set(HELD_OUT)
    assert json.loads((Path(written.train).parent / "world.json").read_text(encoding="utf-8"))["num_pairs"] == 120


def test_a_world_that_is_whole_is_left_alone_and_damage_is_mended(written, monkeypatch, tmp_path):
    folders = write_world(SMALL, tmp_path)
    root = Path(folders.train).parent
    assert tree(root) == tree(Path(written.train).parent)
    before = tree(root)
    shards = []
    original = world_module.write_shard
    monkeypatch.setattr(world_module, "write_shard", lambda path, pairs: (shards.append(path), original(path, pairs)))
    write_world(SMALL, tmp_path)
    assert shards == []
    damaged = Path(folders.train) / "00001.tar"
    damaged.write_bytes(damaged.read_bytes()[: 60 * 512])
    (Path(folders.zero_shot) / "00000.tar").unlink()
    (root / "world.json").unlink()
    write_world(SMALL, tmp_path)
    assert [Path(path).name for path in shards] == ["00001.tar", "00000.tar"]
    assert tree(root) == before


@pytest.mark.parametrize("pair", [0, 70, 180])
def test_killed_while_writing_and_started_again_gives_the_same_bytes(written, monkeypatch, tmp_path, pair):
    class Killed(BaseException):
        pass

    original, rendered = world_module.render, itertools.count()

    def die_in_the_middle(one, *, image_size):
        if next(rendered) == pair:
            raise Killed
        return original(one, image_size=image_size)

    monkeypatch.setattr(world_module, "render", die_in_the_middle)
    with pytest.raises(Killed):
        write_world(SMALL, tmp_path)
    monkeypatch.setattr(world_module, "render", original)
    assert not list(tmp_path.rglob("world.json"))
    assert tree(Path(write_world(SMALL, tmp_path).train).parent) == tree(Path(written.train).parent)


def test_sigkill_while_writing_and_a_new_start_give_the_same_bytes(written, tmp_path):
    program = (
        "import os, signal, sys\n"
        "from limoe.data.world import World, write_world\n"
        f"write_world({SMALL!r}, sys.argv[1], lambda done, total: done > 99 and os.kill(os.getpid(), signal.SIGKILL))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, check=False)
    assert killed.returncode == -9 and len(list(tmp_path.rglob("*.tar"))) == 2
    assert tree(Path(write_world(SMALL, tmp_path).train).parent) == tree(Path(written.train).parent)


def test_other_parameters_get_another_folder(monkeypatch):
    digests = {world.digest for world in (SMALL, dataclasses.replace(SMALL, seed=1), World(), World(image_size=48))}
    assert len(digests) == 4
    monkeypatch.setattr(world_module, "GENERATOR_VERSION", world_module.GENERATOR_VERSION + 1)
    assert SMALL.digest not in digests


@pytest.mark.parametrize(
    ("setting", "value"), [("num_pairs", 0), ("seed", -1), ("image_size", 8), ("two_things_share", 1.5)]
)
def test_impossible_worlds_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"{setting} of the embedded world is {value}"):
        World(**{setting: value})
    with pytest.raises(IndexError, match="has 120 examples, no number 120"):
        scene(SMALL, "train", 120)


def test_a_full_disk_is_explained(monkeypatch, tmp_path):
    def full(path, pairs):
        raise files.StorageError(f"cannot write {path}: the disk is full")

    monkeypatch.setattr(world_module, "write_shard", full)
    with pytest.raises(
        files.StorageError, match=r"the disk is full; the embedded world needs about \d+ MB.*LIMOE_CACHE"
    ):
        write_world(SMALL, tmp_path)


def test_a_cache_that_cannot_be_a_folder_is_explained(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(files.StorageError, match=r"file.*; the embedded world needs about \d+ MB.*LIMOE_CACHE"):
        write_world(SMALL, tmp_path / "file")


def test_progress_counts_all_pairs(tmp_path):
    seen = []
    write_world(SMALL, tmp_path, lambda done, total: seen.append((done, total)))
    assert seen == [(50, 198), (100, 198), (120, 198), (168, 198), (198, 198)]


def test_the_colour_control_runs_from_any_folder(written, tmp_path):
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "controls_colour.py", "--folder", Path(written.train).parent],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "whole image, from training images" in result.stdout, result.stderr
