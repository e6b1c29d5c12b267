"""Captions of scenes of the embedded world, with synonyms, several word orders, omissions and openings."""

import numpy as np

from limoe.data.world_render import Scene, Thing

# The first word of each entry is the usual one. Class names use the usual words.
_SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"),
    "heart": ("heart",),
    "crescent": ("crescent", "moon"),
}
_COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "crimson", "scarlet"),
    "orange": ("orange", "tangerine"),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "cyan": ("cyan", "turquoise"),
    "blue": ("blue", "cobalt"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rosy"),
}
_TEXTURE_WORDS: dict[str, tuple[str, ...]] = {
    "solid": ("solid", "plain"),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "checked"),
}
_TEXTURE_PHRASES: dict[str, str] = {
    "solid": "without pattern",
    "striped": "with stripes",
    "dotted": "with dots",
    "checkered": "with checks",
}
_SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium",),
    "large": ("large", "big", "huge"),
}
_PLACE_PHRASES: dict[str, tuple[str, ...]] = {
    "top left": ("in the top left", "at the upper left"),
    "top": ("at the top", "near the top"),
    "top right": ("in the top right", "at the upper right"),
    "left": ("on the left", "at the left"),
    "middle": ("in the middle", "in the centre"),
    "right": ("on the right", "at the right"),
    "bottom left": ("in the bottom left", "at the lower left"),
    "bottom": ("at the bottom", "near the bottom"),
    "bottom right": ("in the bottom right", "at the lower right"),
}
_BACKGROUND_WORDS: dict[str, tuple[str, ...]] = {
    "white": ("white",),
    "grey": ("grey", "gray"),
    "black": ("black", "dark"),
    "cream": ("cream", "beige"),
    "gradient": ("shaded", "gradient"),
}
_BACKGROUND_PHRASES: tuple[str, ...] = ("on a {} background", "against a {} background")
_RELATION_PHRASES: dict[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
_OPPOSITE: dict[str, str] = {"left": "right", "right": "left", "above": "below", "below": "above"}
_VAGUE_RELATIONS: tuple[str, ...] = ("and", "next to", "beside")
_SHAPELESS_WORDS: tuple[str, ...] = ("shape", "thing", "object")
_OPENINGS: tuple[str, ...] = ("a photo of", "a picture of", "an image of", "there is", "i see", "this is", "here is")

# Prompts for zero-shot classification, worded like most captions.
TEMPLATES: tuple[str, ...] = ("a {}", *(f"{opening} a {{}}" for opening in _OPENINGS))


def pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    """Pick one of the words."""
    return words[rng.integers(len(words))]


def _usual(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    """Pick the usual word with probability 0.6, else any word."""
    return words[0] if rng.random() < 0.6 else pick(rng, words)


def _with_article(rng: np.random.Generator, phrase: str) -> str:
    draw = rng.random()
    if draw < 0.1:
        return f"one {phrase}"
    if draw < 0.2:
        return f"the {phrase}"
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _describe(rng: np.random.Generator, thing: Thing, *, complete: bool, tell_size: bool) -> str:
    colour = _usual(rng, _COLOUR_WORDS[thing.colour])
    texture = _usual(rng, _TEXTURE_WORDS[thing.texture])
    shape = _usual(rng, _SHAPE_WORDS[thing.shape])
    if complete or rng.random() < 0.9:
        orders = (
            [colour, texture, shape],
            [texture, colour, shape],
            [colour, shape, _TEXTURE_PHRASES[thing.texture]],
            [shape, "that is", colour, "and", texture],
        )
        words = orders[rng.choice(len(orders), p=(0.55, 0.2, 0.15, 0.1))]
    else:
        orders = ([texture, shape], [colour, shape], [colour, texture, pick(rng, _SHAPELESS_WORDS)])
        words = orders[rng.integers(len(orders))]
    if tell_size:
        words = [pick(rng, _SIZE_WORDS[thing.size]), *words]
    return _with_article(rng, " ".join(words))


def _caption_of_one(rng: np.random.Generator, scene: Scene) -> str:
    (thing,) = scene.things
    tell_size, tell_place, tell_background = (
        scene.complete or bool(rng.random() < share) for share in (0.3, 0.25, 0.2)
    )
    opening = pick(rng, _OPENINGS) if rng.random() < 0.5 else ""
    phrase = _describe(rng, thing, complete=scene.complete, tell_size=tell_size)
    place = pick(rng, _PLACE_PHRASES[scene.place]) if tell_place else ""
    background = pick(rng, _BACKGROUND_WORDS[scene.background])
    background = pick(rng, _BACKGROUND_PHRASES).format(background) if tell_background else ""
    parts = (place, opening, phrase, background) if rng.random() < 0.15 else (opening, phrase, place, background)
    return " ".join(part for part in parts if part)


def _caption_of_two(rng: np.random.Generator, scene: Scene) -> str:
    first, second = scene.things
    relation = scene.relation
    if rng.random() < 0.5:
        first, second, relation = second, first, _OPPOSITE[relation]
    vague = not scene.complete and rng.random() < 0.2
    between = pick(rng, _VAGUE_RELATIONS if vague else _RELATION_PHRASES[relation])
    opening = pick(rng, _OPENINGS) if rng.random() < 0.3 else ""
    phrases = [_describe(rng, thing, complete=scene.complete, tell_size=False) for thing in (first, second)]
    return " ".join(part for part in (opening, phrases[0], between, phrases[1]) if part)


def caption(scene: Scene) -> str:
    """Write an English phrase or sentence about a scene, in lower case; the same for the same scene.

    One description in ten omits the colour, the texture or the shape, unless the scene asks for a complete caption.
    """
    rng = np.random.Generator(np.random.Philox(scene.wording_seed))
    return _caption_of_one(rng, scene) if len(scene.things) == 1 else _caption_of_two(rng, scene)
