"""Sentences around a class name that others have used for zero-shot classification, by name."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from limoe.errors import InputError

_ARTICLES = ("a", "the")
_PHOTOS = (
    *("bad", "low resolution", "cropped", "bright", "dark", "close-up", "black and white", "pixelated"),
    *("jpeg corrupted", "blurry", "good"),
)
_THINGS = ("hard to see", "clean", "dirty", "cool", "nice", "weird", "large", "small")
_WORKS = (
    *("a sculpture", "a rendering", "a painting", "a doodle", "a sketch", "a rendition", "a drawing", "a tattoo"),
    *("graffiti", "art", "itap"),
)
_MATERIALS = ("embroidered", "plastic", "origami", "toy", "cartoon", "plushie")

TEMPLATES: dict[str, tuple[str, ...]] = {
    "none": ("{}",),
    "simple": (
        *("itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}."),
        *("a {} in a video game.", "art of the {}.", "a photo of the small {}."),
    ),
    "imagenet80": (
        *(f"a photo of {which} {{}}." for which in (*_ARTICLES, "my", "one", "many")),
        *(f"a {photo} photo of {article} {{}}." for photo, article in product(_PHOTOS, _ARTICLES)),
        *(f"a photo of {article} {thing} {{}}." for thing, article in product(_THINGS, _ARTICLES)),
        *(f"{work} of {article} {{}}." for work, article in product(_WORKS, _ARTICLES)),
        "itap of my {}.",
        *(f"{article} {material} {{}}." for material, article in product(_MATERIALS, _ARTICLES)),
        *(f"{article} {{}} in a video game." for article in _ARTICLES),
    ),
}
"""Sets of templates by name: the name alone, and the 7 and the 80 of CLIP (Radford et al. 2021)."""


def templates_of(choice: str | Sequence[str]) -> tuple[str, ...]:
    """Return a set of templates by its name, or the templates that are given.

    Raises InputError for an unknown name, and for a template that does not have `{}` exactly once.

    >>> len(templates_of("imagenet80")), templates_of(["a drawing of a {}"])
    (80, ('a drawing of a {}',))
    """
    if isinstance(choice, str):
        if choice not in TEMPLATES:
            raise InputError(
                f"there is no set of templates {choice!r}; choose one of {', '.join(TEMPLATES)}, or give a list of "
                "templates such as ['a photo of a {}']"
            )
        return TEMPLATES[choice]
    for template in choice:
        if template.count("{}") != 1:
            raise InputError(f"the template {template!r} must have {{}} exactly once, where the class name goes")
    if not choice:
        raise InputError("the list of templates is empty; give at least one, such as '{}'")
    return tuple(choice)
