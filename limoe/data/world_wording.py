"""Wording of the world `scenes`: a vocabulary of some hundred words, of which few are frequent, and free word order.

The word at place r of a list is used with a probability that is proportional to 1/r, as Zipf found it in books.
"""

import bisect
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Look(NamedTuple):
    """What a thing is, as far as classes tell."""

    colour: str
    shape: str


class Composition(NamedTuple):
    """What a scene of the world `scenes` shows.

    `relation` is where the first thing lies, seen from the second: "left", "above" or "inside"; or it is "" for
    `number` equal things, beside which one other thing may lie: `second`.
    """

    first: Look
    number: int
    relation: str
    second: Look | None

    @property
    def name(self) -> str:
        """The composition in the most frequent words.

        >>> Composition(Look("red", "circle"), 1, "left", Look("blue", "star")).name
        'a red circle left of a blue star'
        """
        return _phrase(None, self, texture="", complete=True)


COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "crimson", "scarlet", "ruby", "cherry"),
    "orange": ("orange", "tangerine", "amber", "apricot", "carrot"),
    "yellow": ("yellow", "golden", "lemon", "canary", "mustard"),
    "green": ("green", "emerald", "jade", "olive", "fern"),
    "cyan": ("cyan", "turquoise", "aqua", "teal", "aquamarine"),
    "blue": ("blue", "cobalt", "navy", "azure", "sapphire"),
    "purple": ("purple", "violet", "plum", "indigo", "mauve"),
    "pink": ("pink", "rosy", "salmon", "fuchsia", "blush"),
}
SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc", "ball", "dot", "coin"),
    "square": ("square", "box", "block", "tile"),
    "triangle": ("triangle", "wedge", "pyramid"),
    "star": ("star", "starburst", "pentagram"),
    "cross": ("cross", "plus", "crucifix"),
    "ring": ("ring", "hoop", "loop", "band"),
    "heart": ("heart", "valentine"),
    "crescent": ("crescent", "moon", "sickle"),
}
_TEXTURE_WORDS: dict[str, tuple[str, ...]] = {
    "solid": ("solid", "plain", "uniform"),
    "striped": ("striped", "stripy", "banded", "lined"),
    "dotted": ("dotted", "spotted", "speckled"),
    "checkered": ("checkered", "checked", "chequered"),
}
_BACKGROUND_WORDS: dict[str, tuple[str, ...]] = {
    "white": ("white", "snowy", "blank"),
    "grey": ("grey", "gray", "silver"),
    "black": ("black", "dark", "inky"),
    "cream": ("cream", "beige", "ivory"),
    "gradient": ("shaded", "faded", "gradual"),
}
_GROUNDS = ("background", "backdrop", "wall", "canvas", "sheet", "surface")
RELATION_PHRASES: dict[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of", "on the left of", "west of"),
    "above": ("above", "over", "on top of", "higher than", "north of"),
    "inside": ("inside", "within", "in", "enclosed by", "surrounded by"),
}
# The same relation, told from the second thing to the first.
_REVERSED: dict[str, tuple[str, ...]] = {
    "left": ("right of", "to the right of", "on the right of", "east of"),
    "above": ("below", "under", "beneath", "lower than", "south of"),
    "inside": ("around", "surrounding", "enclosing", "containing"),
}
_VAGUE = ("and", "with", "near", "beside", "together with")
COUNT_WORDS: dict[int, tuple[str, ...]] = {
    1: ("a", "one", "the", "a single"),
    2: ("two", "a pair of", "2", "a couple of"),
    3: ("three", "3", "a trio of"),
    4: ("four", "4", "a quartet of"),
}
_NOUNS = (
    "photo",
    "picture",
    "image",
    "drawing",
    "sketch",
    "painting",
    "print",
    "poster",
    "card",
    "sticker",
    "snapshot",
)
_NOUNS = (*_NOUNS, "illustration", "graphic", "postcard", "rendering", "figure", "icon", "logo", "pattern", "doodle")
_OPENINGS = (
    "a {} of",
    "{} of",
    "this {} shows",
    "my {} with",
    "another {} of",
    "the {} has",
    "old {} of",
    "{} showing",
)
_SAYINGS = ("there is", "i see", "here is", "look at", "we can see", "behold", "notice", "you get", "somebody drew")
_PRAISE = (
    "nice",
    "lovely",
    "simple",
    "pretty",
    "neat",
    "cute",
    "fine",
    "odd",
    "funny",
    "charming",
    "elegant",
    "modest",
)
_PRAISE = (*_PRAISE, "curious", "handsome", "dainty", "quaint", "crisp", "bold", "quiet", "cheerful", "famous", "tidy")
_NAMES = ("anna", "ben", "carla", "david", "emma", "felix", "greta", "hugo", "ida", "jonas", "karin", "leo", "maria")
_NAMES = (*_NAMES, "nora", "oscar", "paula", "quentin", "rosa", "simon", "tilda", "ulf", "vera", "walter", "yara")
_TOWNS = ("paris", "london", "rome", "berlin", "madrid", "vienna", "oslo", "lisbon", "prague", "athens", "dublin")
_TOWNS = (*_TOWNS, "zurich", "kyoto", "lima", "cairo", "boston", "delhi", "perth", "quito", "tunis", "riga", "bern")
_DAYS = ("monday", "sunday", "friday", "tuesday", "saturday", "thursday", "wednesday")
_MONTHS = ("may", "june", "july", "march", "april", "august", "october", "january", "december", "november", "february")
_ENDINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("by {}", _NAMES),
    ("from {}", _TOWNS),
    ("for {}", _NAMES),
    ("on {}", _DAYS),
    ("in {}", _MONTHS),
    ("seen in {}", _TOWNS),
)
TEMPLATES: tuple[str, ...] = ("{}", "a photo of {}", "a picture of {}", "there is {}", "i see {}")


def zipf(rng: np.random.Generator | None, words: Sequence[str]) -> str:
    """Pick one of the words, the first one most often; without a generator always the first.

    >>> zipf(None, ("usual", "rare"))
    'usual'
    """
    if rng is None:
        return words[0]
    return words[bisect.bisect_right(_shares(len(words)), rng.random())]


@functools.cache
def _shares(count: int) -> list[float]:
    """Compute how likely one of the first words is, for each number of them but the last."""
    weight = 1 / np.arange(1, count + 1)
    return (np.cumsum(weight) / weight.sum())[:-1].tolist()


def _plural(word: str) -> str:
    return word + ("es" if word.endswith(("s", "x")) else "s")


def _thing(rng: np.random.Generator | None, kind: Look, texture: str, *, count: int = 1, complete: bool = False) -> str:
    """Describe `count` equal things. One description in ten leaves out the colour, unless it must be complete."""
    words = [zipf(rng, COLOUR_WORDS[kind.colour])]
    shape = zipf(rng, SHAPE_WORDS[kind.shape])
    if rng is not None and not complete and rng.random() < 0.1:
        words = []
    if texture and (rng is None or rng.random() < 0.3):
        words.insert(int(rng is not None and rng.random() < 0.5), zipf(rng, _TEXTURE_WORDS[texture]))
    if rng is not None and not complete and rng.random() < 0.15:
        words.insert(0, zipf(rng, _PRAISE))
    article = zipf(rng, COUNT_WORDS[count])
    words.append(shape if count == 1 else _plural(shape))
    return " ".join([f"{article}n" if article == "a" and words[0][0] in "aeiou" else article, *words])


def _phrase(rng: np.random.Generator | None, what: Composition, texture: str, *, complete: bool) -> str:
    first = _thing(rng, what.first, texture, count=what.number, complete=complete)
    if what.second is None:
        return first
    second = _thing(rng, what.second, "", complete=complete)
    if rng is not None and (not what.relation or rng.random() < 0.15):
        return f"{first} {zipf(rng, _VAGUE)} {second}"
    if not what.relation:
        return f"{first} and {second}"
    if rng is not None and rng.random() < 0.35:
        return f"{second} {zipf(rng, _REVERSED[what.relation])} {first}"
    return f"{first} {zipf(rng, RELATION_PHRASES[what.relation])} {second}"


def describe(rng: np.random.Generator, what: Composition, texture: str, background: str) -> str:
    """Write a caption in free wording, in lower case, that may leave out what is there and tell what cannot be seen."""
    opening = ""
    if rng.random() < 0.5:
        opening = zipf(rng, _OPENINGS).format(zipf(rng, _NOUNS)) if rng.random() < 0.6 else zipf(rng, _SAYINGS)
    phrase = _phrase(rng, what, texture, complete=False)
    ground = f"on a {zipf(rng, _BACKGROUND_WORDS[background])} {zipf(rng, _GROUNDS)}" if rng.random() < 0.2 else ""
    form, words = _ENDINGS[rng.integers(len(_ENDINGS))]
    ending = form.format(zipf(rng, words)) if rng.random() < 0.2 else ""
    parts = (ground, opening, phrase, ending) if rng.random() < 0.15 else (opening, phrase, ground, ending)
    return " ".join(part for part in parts if part)


def describe_plainly(what: Composition, background: str) -> str:
    """Write the caption that is the same for all scenes that show the same, in the most frequent words."""
    return f"{_phrase(None, what, '', complete=True)} on a {_BACKGROUND_WORDS[background][0]} background"
