"""The embedded world: rendered scenes with captions, so that training needs no download.

A scene shows one or two things on a background. Each thing is a triple (shape, colour, texture) with a size, a place
and a tilt. Everything is a pure function of world, split and index. The triples of `HELD_OUT` are in no training or
retrieval scene, but every pair of their attributes is: a model that classifies them has learnt to combine attributes.
The world is written once, as ordinary shards, and then read like any other data.
"""

import hashlib
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from PIL import Image

from limoe.data import files
from limoe.data.index_file import open_index
from limoe.data.shards import Example, write_shard
from limoe.data.source import DataFolders
from limoe.data.world_captions import TEMPLATES, caption, pick
from limoe.data.world_render import (
    BACKGROUNDS,
    COLOURS,
    LIGHT_BACKGROUNDS,
    SHAPES,
    TEXTURES,
    Scene,
    Thing,
    render,
    rgb_of,
    turned,
)

# Part of the cache folder's name. Raise it with every change of a scene, a picture or a caption.
GENERATOR_VERSION = 1
SPLITS: tuple[str, ...] = ("train", "heldout", "retrieval")


class Triple(NamedTuple):
    """A class: one shape in one colour with one texture."""

    shape: str
    colour: str
    texture: str

    @property
    def name(self) -> str:
        """The triple in the most frequent word order of captions.

        >>> Triple("circle", "red", "striped").name
        'red striped circle'
        """
        return f"{self.colour} {self.texture} {self.shape}"


# Chosen like a Latin square: no two held-out triples share a pair of attributes, so training has every pair. Each
# colour and each shape is in exactly three classes.
HELD_OUT: tuple[Triple, ...] = tuple(
    Triple(SHAPES[shape], tuple(COLOURS)[(shape + shift) % len(COLOURS)], TEXTURES[(shape + turn) % len(TEXTURES)])
    for turn, shift in enumerate((0, 3, 5))
    for shape in range(len(SHAPES))
)
_CLASS_NAMES = tuple(triple.name for triple in HELD_OUT)
TRAINING: tuple[Triple, ...] = tuple(
    triple
    for triple in itertools.starmap(Triple, itertools.product(SHAPES, COLOURS, TEXTURES))
    if triple not in HELD_OUT
)

# Ranges of half sides, as shares of the image's side.
_SIZES: dict[str, tuple[float, float]] = {"small": (0.20, 0.235), "medium": (0.27, 0.31), "large": (0.35, 0.40)}
_HALF_SIDES_OF_TWO = (0.18, 0.215)
_MARGIN = 0.01
# Largest tilt of each shape in both directions, in radians. With more, it could look like another shape.
_TILTS: dict[str, float] = {
    "circle": 0,
    "square": 0.3,
    "triangle": 0.4,
    "star": 0.4,
    "cross": 0.35,
    "ring": 0,
    "heart": 0.4,
    "crescent": 0.5,
}
_PLACES: tuple[tuple[str, ...], ...] = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)
# Direction from the second thing to the first.
_DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}


class Pictured(NamedTuple):
    """An example before it is drawn: its scene, caption and metadata."""

    scene: Scene
    caption: str
    metadata: dict[str, object]


@dataclass(frozen=True)
class World:
    """The parameters that determine every byte of an embedded world. `image_size` is in pixels.

    Raises ValueError, which names the parameter, for a value that is out of range.

    >>> World(num_pairs=2048).num_examples("train")
    2048
    """

    name: ClassVar[str] = "world"
    class_names: ClassVar[tuple[str, ...]] = _CLASS_NAMES
    """Names of the classes of the split "heldout", in their order."""
    templates: ClassVar[tuple[str, ...]] = TEMPLATES
    """Sentences around a class name."""
    seed: int = 0
    num_pairs: int = 20480
    image_size: int = 64
    pairs_per_shard: int = 1024
    images_per_class: int = 20
    num_retrieval_pairs: int = 512
    two_things_share: float = 0.15

    def __post_init__(self) -> None:
        limits = {
            "seed": (0, 2**63 - 1),
            "num_pairs": (1, 10**8),
            "image_size": (16, 4096),
            "pairs_per_shard": (1, 10**4),
            "images_per_class": (1, 10**4),
            "num_retrieval_pairs": (1, 10**6),
            "two_things_share": (0, 1),
        }
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name} of the embedded world is {value}; it must lie between {least} and {most}")

    def pictured(self, split: str, index: int) -> Pictured:
        """Make one example. It depends only on the world, split and index. Raises IndexError after the last one."""
        here = scene(self, split, index)
        metadata: dict[str, object] = {"things": [[thing.shape, thing.colour, thing.texture] for thing in here.things]}
        if split == "heldout":
            metadata["class"] = index % len(HELD_OUT)
        return Pictured(here, caption(here), metadata)

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that differ if a parameter or the generator's version differs."""
        return hashlib.sha256(self.description().encode()).hexdigest()[:12]

    def generator_version(self) -> int:
        """The version of what makes scenes, pictures and captions."""
        return GENERATOR_VERSION

    def description(self) -> str:
        """Write the parameters and the generator's version as JSON, for `world.json`."""
        return json.dumps({"generator_version": self.generator_version(), **asdict(self)}, indent=1, sort_keys=True)

    def num_examples(self, split: str) -> int:
        """Count the pairs of a split: "train", "heldout" or "retrieval"."""
        counts = (self.num_pairs, self.images_per_class * len(self.class_names), self.num_retrieval_pairs)
        return counts[SPLITS.index(split)]


def make_thing(
    rng: np.random.Generator, triple: Triple, background: str, *, size: str, half_side: float, x: float, y: float
) -> Thing:
    """Draw the tilt, the exact colour and the texture's position of a thing of this class at this place."""
    tilt = _TILTS[triple.shape]
    light = background not in LIGHT_BACKGROUNDS
    turn, period = rng.integers(2) * math.pi / 2 + rng.uniform(-0.05, 0.05), rng.uniform(0.162, 0.172)
    return Thing(
        *triple,
        size=size,
        x=x,
        y=y,
        half_side=half_side,
        angle=rng.uniform(-tilt, tilt),
        rgb=rgb_of(
            triple.colour,
            hue_shift=rng.uniform(-6, 6),
            saturation_scale=rng.uniform(0.85, 1.1),
            value_scale=rng.uniform(0.85, 1.1),
        ),
        light_second_tone=light,
        texture_angle=turn,
        texture_period=period,
        # A texture's phase depends on the position in the image, as if things were cut out of one large sheet.
        texture_phase=turned(x / period, y / period, turn),
    )


def _one_thing(rng: np.random.Generator, triple: Triple, background: str) -> tuple[Thing, str]:
    size = pick(rng, tuple(_SIZES))
    half_side = rng.uniform(*_SIZES[size])
    column, row = (int(number) for number in rng.integers(3, size=2))
    # Places are as far from the middle as possible without leaving the image.
    free = 0.5 - _MARGIN - half_side
    jitter = min(0.04, free / 3)
    x, y = (0.5 + (step - 1) * (free - jitter) + rng.uniform(-jitter, jitter) for step in (column, row))
    thing = make_thing(rng, triple, background, size=size, half_side=half_side, x=x, y=y)
    return thing, _PLACES[row][column]


def _two_things(rng: np.random.Generator, background: str) -> tuple[tuple[Thing, Thing], str]:
    relation = pick(rng, tuple(_DIRECTIONS))
    direction = _DIRECTIONS[relation]
    first, second = rng.choice(len(TRAINING), size=2, replace=False)
    things = []
    for index, sign in ((first, 1), (second, -1)):
        x, y = (
            0.5 + sign * step * 0.26 + rng.uniform(-0.02, 0.02) if step else rng.uniform(0.35, 0.65)
            for step in direction
        )
        half_side = rng.uniform(*_HALF_SIDES_OF_TWO)
        things.append(make_thing(rng, TRAINING[index], background, size="small", half_side=half_side, x=x, y=y))
    return (things[0], things[1]), relation


def generator_of(world: World, split: str, index: int) -> np.random.Generator:
    """Make the generator from which all of one example is drawn. Raises IndexError after the last example."""
    if not 0 <= index < world.num_examples(split):
        raise IndexError(
            f"the split {split!r} of this world has {world.num_examples(split)} examples, no number {index}"
        )
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([world.seed, SPLITS.index(split), index])))


def scene(world: World, split: str, index: int) -> Scene:
    """Make the scene of one example. It depends only on the arguments, not on other examples.

    Example `index` of the split "heldout" shows class `index % len(HELD_OUT)`. Raises IndexError after the last one.
    """
    rng = generator_of(world, split, index)
    background = pick(rng, tuple(BACKGROUNDS))
    place = relation = ""
    if split != "heldout" and rng.random() < world.two_things_share:
        things, relation = _two_things(rng, background)
    else:
        triple = HELD_OUT[index % len(HELD_OUT)] if split == "heldout" else TRAINING[rng.integers(len(TRAINING))]
        thing, place = _one_thing(rng, triple, background)
        things = (thing,)
    return Scene(
        things=things,
        background=background,
        background_angle=rng.uniform(0, 2 * math.pi),
        place=place,
        relation=relation,
        complete=split != "train",
        grain_seed=int(rng.integers(2**63)),
        wording_seed=int(rng.integers(2**63)),
    )


def _examples(world: World, split: str, first: int, end: int) -> Iterator[Example]:
    for index in range(first, end):
        here = world.pictured(split, index)
        image = io.BytesIO()
        # No chroma subsampling, because the colour of a small dot is part of the task.
        Image.fromarray(render(here.scene, image_size=world.image_size)).save(image, "JPEG", quality=92, subsampling=0)
        key = f"{first // world.pairs_per_shard:05d}{index - first:04d}"
        yield Example(key, image.getvalue(), here.caption, here.metadata)


def _is_complete(path: str, num_examples: int) -> bool:
    if not files.exists(path):
        return False
    index = open_index(path)
    return not index.damage and len(index) == num_examples


def write_world(
    world: World, cache_folder: files.Path, progress: Callable[[int, int], None] | None = None
) -> DataFolders:
    """Write the missing shards of the world into the folder `NAME-<digest>` of the cache folder.

    If it is killed and called again, the result has the same bytes. After each shard, `progress` is called with the
    number of pairs so far and the number of all pairs. Raises `StorageError` for a full disk or a missing permission.
    """
    root = os.path.join(os.fspath(cache_folder), f"{world.name}-{world.digest}")
    folders = DataFolders(*(os.path.join(root, split) for split in SPLITS))
    num_pairs = sum(world.num_examples(split) for split in SPLITS)
    done = 0
    for folder in (root, *folders):
        files.remove_leftovers(folder)
    try:
        for split, folder in zip(SPLITS, folders, strict=True):
            for first in range(0, world.num_examples(split), world.pairs_per_shard):
                end = min(first + world.pairs_per_shard, world.num_examples(split))
                path = os.path.join(folder, f"{first // world.pairs_per_shard:05d}.tar")
                if not _is_complete(path, end - first):
                    write_shard(path, _examples(world, split, first, end))
                done += end - first
                if progress is not None:
                    progress(done, num_pairs)
        classes = {"templates": world.templates, "classes": world.class_names}
        for path, text in (
            (os.path.join(folders.zero_shot, "classes.json"), json.dumps(classes, indent=1)),
            # These captions name everything in a scene, so a caption is right for every scene with an equal caption.
            (os.path.join(folders.retrieval, "retrieval.json"), json.dumps({"equal_captions_are_right": True})),
            (os.path.join(root, "world.json"), world.description()),
        ):
            files.write_bytes(path, f"{text}\n".encode())
    except OSError as error:
        megabytes = num_pairs * (4000 + world.image_size**2 / 2) / 1e6
        explanation = files.StorageError(
            f"{error}; the embedded world needs about {megabytes:.0f} MB in its cache folder; "
            "choose another folder with the environment variable LIMOE_CACHE or the setting data.cache_dir"
        )
        explanation.errno = error.errno
        raise explanation from error
    return folders
