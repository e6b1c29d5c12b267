"""The world `scenes`: several things with relations, counts and bound attributes; classes differ in these alone.

A scene shows two things, one left of, above or inside the other, or up to four equal things, maybe with another one. Of
every four classes with a relation, all four are of the same words: which attributes belong together, and which thing
is where, is all that tells them apart. The things of a class with a relation are never together in a training scene,
and the number, colour and shape of a class with a count neither; every word and every pair of a class is.
"""

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from limoe.data.world import Pictured, Triple, World, generator_of, make_thing
from limoe.data.world_captions import pick
from limoe.data.world_render import BACKGROUNDS, COLOURS, SHAPES, TEXTURES, Scene, Thing
from limoe.data.world_wording import TEMPLATES, Composition, Look, describe, describe_plainly

RELATIONS = ("left", "above", "inside")
_COUNTS = (2, 3, 4)
LOOKS: tuple[Look, ...] = tuple(itertools.starmap(Look, itertools.product(COLOURS, SHAPES)))


def _four(number: int) -> tuple[Composition, ...]:
    """Make the four compositions of two colours, two shapes and a relation: both bindings, both orders."""
    colours, shapes = tuple(COLOURS), SHAPES
    step = 1 + number // 8
    red, blue = colours[number % 8], colours[(number + 2 * step) % 8]
    disc, star = shapes[(3 * number + step) % 8], shapes[(3 * number + step + 3) % 8]
    relation = RELATIONS[number % 3]
    bindings = ((Look(red, disc), Look(blue, star)), (Look(blue, disc), Look(red, star)))
    return tuple(
        Composition(first, 1, relation, second) for pair in bindings for first, second in (pair, reversed(pair))
    )


_RELATED = tuple(composition for number in range(12) for composition in _four(number))
# As in a Latin square: no two of them share two of count, colour and shape.
_COUNTED = tuple(
    Composition(Look(tuple(COLOURS)[(shape + 3 * turn) % 8], SHAPES[shape]), count, "", None)
    for turn, count in enumerate(_COUNTS)
    for shape in range(8)
)
CLASSES: tuple[Composition, ...] = _RELATED + _COUNTED
"""The held-out compositions."""
_CLASS_NAMES = tuple(composition.name for composition in CLASSES)
_NEVER_TOGETHER = {frozenset((one.first, one.second)) for one in _RELATED}
_NEVER_SO_MANY = {(one.first, one.number) for one in _COUNTED}

# Half sides of things, as shares of the image's side: of two, of an inner and an outer one, of one of many.
_TWO, _INNER, _OUTER, _MANY = (0.16, 0.21), (0.13, 0.16), (0.38, 0.43), (0.15, 0.19)
_CELLS = ((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73))


@dataclass(frozen=True)
class Scenes(World):
    """The parameters that determine every byte of the world `scenes`.

    >>> len(CLASSES), Scenes().num_examples("heldout"), Scenes().digest == World().digest
    (72, 720, False)
    """

    name: ClassVar[str] = "scenes"
    class_names: ClassVar[tuple[str, ...]] = _CLASS_NAMES
    templates: ClassVar[tuple[str, ...]] = TEMPLATES
    images_per_class: int = 10
    two_things_share: float = 0.6
    distractor_share: float = 0.05
    """Training captions that belong to another scene."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.distractor_share <= 1:
            raise ValueError(
                f"distractor_share of the embedded world is {self.distractor_share}; it must lie between 0 and 1"
            )

    def generator_version(self) -> int:
        """The version of what makes scenes and captions, after that of the things in them."""
        return 1000 * super().generator_version() + 1

    def pictured(self, split: str, index: int) -> Pictured:
        """Make the scene, caption and metadata of one example, which depend only on the arguments.

        Examples of "heldout" and "retrieval" show the held-out compositions in turn. Raises IndexError after the last.
        """
        rng = generator_of(self, split, index)
        what = self._training(rng) if split == "train" else CLASSES[index % len(CLASSES)]
        texture = "solid" if rng.random() < 0.7 else pick(rng, TEXTURES)
        background = pick(rng, tuple(BACKGROUNDS))
        scene = Scene(
            things=_things(rng, what, texture, background),
            background=background,
            background_angle=rng.uniform(0, 2 * math.pi),
            place="",
            relation=what.relation,
            complete=split != "train",
            grain_seed=int(rng.integers(2**63)),
            wording_seed=0,
        )
        if split != "train":
            caption = describe_plainly(what, background)
        elif rng.random() < self.distractor_share:
            caption = describe(rng, self._training(rng), "", pick(rng, tuple(BACKGROUNDS)))
        else:
            caption = describe(rng, what, texture, background)
        things: list[object] = [[thing.shape, thing.colour, thing.texture] for thing in scene.things]
        metadata: dict[str, object] = {"things": things, "relation": what.relation}
        if split == "heldout":
            metadata["class"] = index % len(CLASSES)
        return Pictured(scene, caption, metadata)

    def _training(self, rng: np.random.Generator) -> Composition:
        """Draw a composition that is not held out."""
        while True:
            first, second = (LOOKS[number] for number in rng.choice(len(LOOKS), size=2, replace=False))
            if rng.random() < self.two_things_share:
                what = Composition(first, 1, pick(rng, RELATIONS), second)
                if what.relation == "inside" and first.colour == second.colour:
                    continue  # it could not be seen
            else:
                count = int(rng.integers(1, 5))
                what = Composition(first, count, "", second if count < 4 and rng.random() < 0.4 else None)
            if frozenset((first, what.second)) not in _NEVER_TOGETHER and (first, what.number) not in _NEVER_SO_MANY:
                return what


def _things(rng: np.random.Generator, what: Composition, texture: str, background: str) -> tuple[Thing, ...]:
    """Place the things of a composition; the first one comes first, but an outer one before its inner one."""

    def thing(kind: Look, pattern: str, sizes: tuple[float, float], x: float, y: float) -> Thing:
        triple = Triple(kind.shape, kind.colour, pattern)
        x, y = x + rng.uniform(-0.03, 0.03), y + rng.uniform(-0.03, 0.03)
        return make_thing(rng, triple, background, size="small", half_side=rng.uniform(*sizes), x=x, y=y)

    if not what.relation:
        cells = [_CELLS[number] for number in rng.permutation(len(_CELLS))]
        many = [thing(what.first, texture, _MANY, *cells[number]) for number in range(what.number)]
        return (*many, *([thing(what.second, "solid", _MANY, *cells[what.number])] if what.second else []))
    assert what.second is not None
    if what.relation == "inside":
        outer = thing(what.second, "solid", _OUTER, 0.5, 0.5)
        return outer, thing(what.first, texture, _INNER, outer.x, outer.y)
    aside = rng.uniform(0.4, 0.6)
    places = [(0.5 + sign * 0.23, aside) for sign in (-1, 1)]
    if what.relation == "above":
        places = [(y, x) for x, y in places]
    return thing(what.first, texture, _TWO, *places[0]), thing(what.second, "solid", _TWO, *places[1])
