"""Evaluation data: pairs in memory with their metadata, and the files beside the shards."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from os import PathLike
from os.path import join
from typing import Any, NamedTuple

import numpy as np

from limoe.config.schema import Config
from limoe.data import files
from limoe.data.classes import Classes, json_of, kind_of
from limoe.data.files import DataError
from limoe.data.images import preprocess_of
from limoe.data.inputs import RETRIEVAL_FILE, DataFolders
from limoe.data.places import open_source
from limoe.data.source import Bad, Decoded


class Pairs(NamedTuple):
    """Decoded examples: uint8 images [N, H, W, 3], captions, and class labels [N] (-1 without a label)."""

    images: np.ndarray
    captions: tuple[str, ...]
    labels: np.ndarray
    image_ids: tuple[int | str | None, ...]
    """The `image_id` of the metadata; None without one."""
    num_bad: int
    first_bad: str
    """Key and reason of the first bad example, "" if there is none."""
    classes: Classes | None = None
    """The classes that the labels count in."""


class Labelled(NamedTuple):
    """Images with labels, the candidate classes, and the folder that they come from."""

    pairs: Pairs
    classes: Classes
    folder: str


class Matched(NamedTuple):
    """Pairs, each with the number of its image [N] and of its caption [N].

    Equal image numbers mean the same image. Captions with equal numbers are right for the same images.
    """

    pairs: Pairs
    image_id: np.ndarray
    caption_id: np.ndarray
    rule: str
    """How the numbers were decided, in words."""


class EvaluationData(NamedTuple):
    """The data of an evaluation; a field is None if there is no such data."""

    zero_shot: Labelled | None
    retrieval: Matched | None
    probe: Labelled | None
    """Data from which a linear probe learns; it is tested on the zero-shot images."""
    num_bad: int
    """Examples that could not be read and are left out, without those of `probe`."""


def read_evaluation_data(config: Config, folders: DataFolders, probe_folder: str = "") -> EvaluationData:
    """Read the evaluation shards into memory; bad examples are left out and counted.

    Raises DataError if a folder has no usable example, if an example in a folder with classes.json has no valid class,
    or if a probe has no evaluation folder with classes.json.
    """
    zero_shot = probe = matched = None
    num_bad = 0
    if folders.zero_shot:
        zero_shot = _labelled(config, folders.zero_shot)
        probe = _labelled(config, probe_folder, zero_shot.classes) if probe_folder else None
        num_bad = zero_shot.pairs.num_bad
    elif probe_folder:
        raise DataError("a probe needs evaluation data with classes.json; give its folder with --data")
    if folders.retrieval:
        if zero_shot is not None and folders.retrieval == folders.zero_shot:
            pairs = zero_shot.pairs
        else:
            pairs = _read(config, folders.retrieval)
            num_bad += pairs.num_bad
        if any(pairs.captions):
            matched = match(pairs, equal_captions_are_right=equal_captions_are_right(folders.retrieval))
    return EvaluationData(zero_shot, matched, probe, num_bad)


def match(pairs: Pairs, *, equal_captions_are_right: bool) -> Matched:
    """Decide which pairs show one image, and which captions are right for it.

    Pairs with the same `image_id` show one image. Pairs without an id do if their pictures are equal. The right
    captions of an image are its own; with `equal_captions_are_right` also all captions equal to one of them.

    >>> image = np.zeros((3, 1, 1, 3), np.uint8)
    >>> pairs = Pairs(image, ("a dog", "one dog", "a dog"), np.full(3, -1), (7, 7, 8), 0, "")
    >>> matched = match(pairs, equal_captions_are_right=False)
    >>> matched.image_id.tolist(), matched.caption_id.tolist(), matched.rule
    ([0, 0, 1], [0, 1, 2], 'images by image_id; captions of the image are right')
    """
    images = [
        hashlib.sha256(image.tobytes()).digest() if given is None else (type(given), given)
        for image, given in zip(pairs.images, pairs.image_ids, strict=True)
    ]
    ways = {False: "equal pictures", True: "image_id"}
    given = sorted({image_id is not None for image_id in pairs.image_ids}, reverse=True)
    rule = f"images by {', else '.join(ways[one] for one in given)}; "
    if equal_captions_are_right:
        captions, rule = _numbered(pairs.captions), rule + "captions equal to one of the image are right"
    else:
        captions, rule = np.arange(len(images)), rule + "captions of the image are right"
    return Matched(pairs, _numbered(images), captions, rule)


def _numbered(values: Any) -> np.ndarray:
    """Number the values in the order in which they first appear."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values])


def equal_captions_are_right(folder: str | PathLike[str]) -> bool:
    """Read from `retrieval.json` whether a caption is right for every image that has an equal caption.

    The file holds `{"equal_captions_are_right": true}` if captions describe everything that an image shows. Without the
    file such captions are wrong. Raises DataError for any other content.
    """
    path = join(folder, RETRIEVAL_FILE)
    if not files.is_folder(folder) or not files.exists(path):
        return False
    content = json_of(path)
    if not isinstance(content, dict) or type(content.get("equal_captions_are_right")) is not bool:
        raise DataError(f'{path} must hold {{"equal_captions_are_right": true}} or false, not {kind_of(content)}')
    return content["equal_captions_are_right"]


def _labelled(config: Config, folder: str, classes: Classes | None = None) -> Labelled:
    """Read labelled images; without `classes`, those of the folder are meant."""
    found = _read(config, folder, needs_metadata=True)
    if classes and found.classes and found.classes.names != classes.names:
        raise DataError(
            f"{folder} has other classes, or in another order, than the images it is tested on: "
            f"{len(found.classes.names)} and {len(classes.names)}; put the same classes.json beside both"
        )
    classes = classes or found.classes
    if classes is None:
        raise DataError(f"{folder} has no list of classes; put a classes.json or a classnames.txt beside its images")
    num_classes = len(classes.names)
    wrong = np.flatnonzero((found.labels < 0) | (found.labels >= num_classes))
    if len(wrong):
        raise DataError(
            f"{len(wrong)} examples in {folder} have no class between 0 and {num_classes - 1}; "
            'give each a .json with {"class": index} or a .cls with the index, or evaluate without a list of classes'
        )
    return Labelled(found, classes, folder)


def _read(config: Config, folder: str, *, needs_metadata: bool = False) -> Pairs:
    """Read all good examples into memory, one pair for each caption. Bad ones are left out and counted.

    With `needs_metadata`, an example without metadata is bad, and each image is there once. Raises DataError if no
    example is good.
    """
    source = open_source(folder, preprocess=preprocess_of(config), metadata=True, cache_dir=config.data.cache_dir)
    good: list[Decoded] = []
    bad: list[Bad] = []
    for number in range(len(source)):
        example = source[number]
        if isinstance(example, Bad):
            bad.append(example)
        elif needs_metadata and example.metadata is None:
            bad.append(Bad(example.key, "the metadata is missing"))
        elif needs_metadata:
            good.append(example)
        else:
            captions = (example.caption, *example.more_captions)
            good += [example._replace(caption=caption) for caption in captions]
    first_bad = f"{bad[0].key}: {bad[0].reason}" if bad else ""
    if not good:
        raise DataError(f"none of the {len(bad)} examples in {folder} is usable, {first_bad}; repair them")
    metadata = [example.metadata or {} for example in good]
    return Pairs(
        images=np.stack([example.image for example in good]),
        captions=tuple(example.caption for example in good),
        labels=np.array([min(max(_value(facts, "class", int, -1), -1), 2**62) for facts in metadata], np.int64),
        image_ids=tuple(_value(facts, "image_id", int | str, None) for facts in metadata),
        num_bad=len(bad),
        first_bad=first_bad,
        classes=source.classes,
    )


def _value(metadata: dict[str, Any], name: str, kind: Any, otherwise: Any) -> Any:
    """Read a value of this type. A bool is not an integer here, although it is in Python."""
    value = metadata.get(name)
    return value if isinstance(value, kind) and not isinstance(value, bool) else otherwise
