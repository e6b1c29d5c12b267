"""Places of data by name: `PATH`, `LAYOUT:PATH` or `LAYOUT:PATH?option=value&option=value`, and mixtures of them."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from limoe.config.schema import ConfigError
from limoe.data import files, images, layouts
from limoe.data.classes import has_classes
from limoe.data.files import DataError
from limoe.data.source import SOURCES, MixedSource, Source


class Place(NamedTuple):
    """A layout's name, a path, and options of the layout."""

    layout: str
    path: str
    options: dict[str, str]

    def __str__(self) -> str:
        options = "&".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.layout}:{self.path}{'?' * bool(options)}{options}"


def parsed(place: files.Path) -> Place:
    """Take a place apart. Without a layout's name, ending and content decide; else it means shards.

    >>> parsed("csv:pairs.txt?caption=title&image=filepath")
    Place(layout='csv', path='pairs.txt', options={'caption': 'title', 'image': 'filepath'})
    >>> parsed("data/{00..09}.tar").layout
    'shards'
    """
    text, options = str(place), {}
    if match := re.fullmatch(r"(.*)\?(\w+=[^&]*(?:&\w+=[^&]*)*)", text, re.DOTALL):
        text, options = match[1], dict(pair.split("=", 1) for pair in match[2].split("&"))
    name, colon, path = text.partition(":")
    if colon and not path.startswith("//") and re.fullmatch("[a-z][a-z0-9_]+", name):
        return Place(name, path, options)
    return Place(layouts.layout_of(text), text, options)


def open_source(
    place: files.Path | Place,
    *,
    preprocess: images.Preprocess,
    metadata: bool = False,
    cache_dir: files.Path = "",
) -> Source:
    """Open the examples at a place, in words or taken apart.

    `metadata` asks for the metadata of each example too. Raises DataError for an unknown layout or option, and the
    layout's errors.

    >>> open_source("parquet:pairs", preprocess=images.Preprocess(8))
    Traceback (most recent call last):
    limoe.data.files.DataError: there is no data source 'parquet' for parquet:pairs; there are: shards, folders, coco,
    csv, clip_benchmark. Write ./parquet:pairs if that is the name of a folder
    """
    name, path, options = place if isinstance(place, Place) else parsed(place)
    if name not in SOURCES:
        raise DataError(
            f"there is no data source {name!r} for {place}; there are: {', '.join(SOURCES)}. "
            f"Write ./{place} if that is the name of a folder"
        )
    known = OPTIONS.get(name, tuple(options))
    if unknown := sorted(options.keys() - set(known)):
        raise DataError(f"{place}: the layout {name} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    return SOURCES[name](path, preprocess=preprocess, metadata=metadata, cache_dir=cache_dir, **options)


OPTIONS = {
    "shards": ("caption", "templates"),
    "folders": ("templates",),
    "coco": ("images", "split"),
    "csv": ("image", "caption", "images"),
    "clip_benchmark": ("split", "templates"),
}
"""The options of each layout."""


def place_has_classes(place: files.Path) -> bool:
    """Say whether the examples at a place are labelled images with a list of classes."""
    layout, path, _ = parsed(place)
    return layout == "folders" or has_classes(path)


def open_mixture(sources: str, *, preprocess: images.Preprocess, cache_dir: files.Path = "") -> MixedSource:
    """Open several sources from a JSON list of objects with path, and if wanted layout, weight (1) and options.

    Raises ConfigError for a list that is none or a weight that is not positive, and the errors of `open_source`.
    """
    try:
        listed = json.loads(sources)
    except ValueError as error:
        raise ConfigError(f"data.sources is not JSON: {error}; give [{_ITEM}, ...]") from error
    if (
        not isinstance(listed, list)
        or not listed
        or not all(isinstance(one, dict) and one.get("path") for one in listed)
    ):
        raise ConfigError(f"data.sources must be a list of objects with a path: [{_ITEM}, ...]")
    names, parts, weights = [], [], []
    for one in listed:
        weight = one.pop("weight", 1)
        if type(weight) not in (int, float) or not 0 < weight < float("inf"):
            raise ConfigError(f"data.sources: the weight of {one['path']} is {weight!r}; give a number above 0")
        layout, path = one.pop("layout", ""), str(one.pop("path"))
        place = Place(layout or layouts.layout_of(path), path, {name: str(value) for name, value in one.items()})
        names.append(str(place))
        parts.append(open_source(place, preprocess=preprocess, cache_dir=cache_dir))
        weights.append(float(weight))
    return MixedSource(names, parts, weights)


_ITEM = '{"path": "data/coco.json", "layout": "coco", "weight": 2}'
