"""Evaluation data: captions and labels in memory, pictures read when they are needed, and the files beside them.

A first pass, in which each process reads its share, finds what is good, its captions and its labels. Then each picture
is read for the batch in which it is embedded.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from os.path import join
from typing import Any, NamedTuple

import jax
import numpy as np

from limoe.config.schema import Config
from limoe.data import files
from limoe.data.classes import Classes, json_of, kind_of
from limoe.data.files import DataError
from limoe.data.images import preprocess_of
from limoe.data.inputs import RETRIEVAL_FILE, DataFolders
from limoe.data.places import open_source
from limoe.data.source import Bad, CachedSource, Source, spread_evenly
from limoe.evaluate.pictures import Pictures
from limoe.parallel import processes

# Memory for decoded pictures: all of small data are read once.
_KEPT_BYTES = 64 * 2**20
# Examples of each folder that the start of a run looks at.
_LOOKED_AT = 100


class Pairs(NamedTuple):
    """Good examples: pictures, captions, and class labels [N] (-1 without a label)."""

    images: Pictures
    captions: tuple[str, ...]
    labels: np.ndarray
    image_ids: tuple[int | str | bytes, ...]
    """The `image_id` of the metadata; without one the picture's digest, in bytes."""
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


def read_evaluation_data(
    config: Config, folders: DataFolders, probe_folder: str = "", *, limit: int | None = None
) -> EvaluationData:
    """Read captions and labels of the evaluation data; bad examples are left out and counted. All processes call it.

    With `limit`, only so many examples of each folder are read, spread evenly over it. Raises DataError if a folder has
    no usable example, if an example in a folder with classes.json has no valid class, or if a probe has no evaluation
    folder with classes.json.
    """
    zero_shot = probe = matched = None
    num_bad = 0
    found = None
    if folders.zero_shot:
        found = _read(config, folders.zero_shot, limit)
        zero_shot = _labelled(found, folders.zero_shot)
        if probe_folder:
            probe = _labelled(_read(config, probe_folder, limit), probe_folder, zero_shot.classes)
        num_bad = zero_shot.pairs.num_bad
    elif probe_folder:
        raise DataError("a probe needs evaluation data with classes.json; give its folder with --data")
    if folders.retrieval:
        if found is None or folders.retrieval != folders.zero_shot:
            found = _read(config, folders.retrieval, limit)
            num_bad += len(found.bad)
        pairs = _by_caption(found)
        if pairs.captions:
            matched = match(pairs, equal_captions_are_right=equal_captions_are_right(folders.retrieval))
    return EvaluationData(zero_shot, matched, probe, num_bad)


EvaluationReader = Callable[[], EvaluationData]
"""Reads evaluation data at the first call, and gives the same at each later one."""


def evaluation_when_needed(config: Config, folders: DataFolders, say: Callable[[str], None]) -> EvaluationReader:
    """Look at a few examples of a run's evaluation data, so that errors come early, and leave the rest for later.

    The reader says how many examples are bad. Raises the errors of `read_evaluation_data`, here and when it is called.
    """
    read_evaluation_data(config, folders, limit=_LOOKED_AT)

    @functools.cache
    def read() -> EvaluationData:
        found = read_evaluation_data(config, folders)
        if found.num_bad:
            say(f"{found.num_bad} bad examples of the evaluation data are left out")
        return found

    return read


def match(pairs: Pairs, *, equal_captions_are_right: bool) -> Matched:
    """Decide which pairs show one image, and which captions are right for it.

    Pairs with the same `image_id` show one image. Pairs without an id do if their pictures are equal. The right
    captions of an image are its own; with `equal_captions_are_right` also all captions equal to one of them.

    >>> pictures = Pictures([].__getitem__, [0, 0, 1])
    >>> pairs = Pairs(pictures, ("a dog", "one dog", "a dog"), np.full(3, -1), (7, 7, 8), 0, "")
    >>> matched = match(pairs, equal_captions_are_right=False)
    >>> matched.image_id.tolist(), matched.caption_id.tolist(), matched.rule
    ([0, 0, 1], [0, 1, 2], 'images by image_id; captions of the image are right')
    """
    images = [(type(image_id), image_id) for image_id in pairs.image_ids]
    ways = {False: "equal pictures", True: "image_id"}
    given = sorted({not isinstance(image_id, bytes) for image_id in pairs.image_ids}, reverse=True)
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


class _Facts(NamedTuple):
    """What is kept of a good example: its number, captions, label, given identity, and the digest of its picture."""

    number: int
    captions: Sequence[str]
    label: int
    image_id: int | str | None
    digest: str
    has_metadata: bool
    key: str

    @property
    def identity(self) -> int | str | bytes:
        return bytes.fromhex(self.digest) if self.image_id is None else self.image_id


class _Found(NamedTuple):
    """What the first pass found in a folder."""

    good: list[_Facts]
    bad: list[Bad]
    source: Source
    classes: Classes | None
    threads: int

    def pairs(self, chosen: Sequence[_Facts], captions: Sequence[str], bad: Sequence[Bad]) -> Pairs:
        return Pairs(
            images=Pictures(self.source.__getitem__, [facts.number for facts in chosen], threads=self.threads),
            captions=tuple(captions),
            labels=np.array([facts.label for facts in chosen], np.int64),
            image_ids=tuple(facts.identity for facts in chosen),
            num_bad=len(bad),
            first_bad=f"{bad[0].key}: {bad[0].reason}" if bad else "",
            classes=self.classes,
        )


def _labelled(found: _Found, folder: str, classes: Classes | None = None) -> Labelled:
    """Take each image once, with its label; without `classes`, those of the folder are meant."""
    if classes and found.classes and found.classes.names != classes.names:
        raise DataError(
            f"{folder} has other classes, or in another order, than the images it is tested on: "
            f"{len(found.classes.names)} and {len(classes.names)}; put the same classes.json beside both"
        )
    classes = classes or found.classes
    if classes is None:
        raise DataError(f"{folder} has no list of classes; put a classes.json or a classnames.txt beside its images")
    good = [facts for facts in found.good if facts.has_metadata]
    bare = [Bad(facts.key, "the metadata is missing") for facts in found.good if not facts.has_metadata]
    _require_some(good, [*found.bad, *bare], folder)
    pairs = found.pairs(good, [facts.captions[0] for facts in good], [*found.bad, *bare])
    num_classes = len(classes.names)
    wrong = np.flatnonzero((pairs.labels < 0) | (pairs.labels >= num_classes))
    if len(wrong):
        raise DataError(
            f"{len(wrong)} examples in {folder} have no class between 0 and {num_classes - 1}; "
            'give each a .json with {"class": index} or a .cls with the index, or evaluate without a list of classes'
        )
    return Labelled(pairs, classes, folder)


def _by_caption(found: _Found) -> Pairs:
    """Take each image once for each of its captions."""
    each = [(facts, caption) for facts in found.good for caption in facts.captions if caption]
    return found.pairs([facts for facts, _ in each], [caption for _, caption in each], found.bad)


def _read(config: Config, folder: str, limit: int | None) -> _Found:
    """Look at all examples of a folder, or at a few. Raises DataError if none is good."""
    source = open_source(folder, preprocess=preprocess_of(config), metadata=True, cache_dir=config.data.cache_dir)
    kept, threads = CachedSource(source, max_bytes=_KEPT_BYTES), max(1, config.data.threads)
    numbers = spread_evenly(len(source), limit or len(source))

    def facts_of(number: int) -> _Facts | Bad:
        example = kept[number]
        if isinstance(example, Bad):
            return example
        metadata = example.metadata or {}
        label = min(max(_value(metadata, "class", int, -1), -1), 2**62)
        image_id = _value(metadata, "image_id", int | str, None)
        digest = "" if image_id is not None else hashlib.sha256(example.image.tobytes()).hexdigest()
        captions = (example.caption, *example.more_captions)
        return _Facts(number, captions, label, image_id, digest, example.metadata is not None, example.key)

    with ThreadPoolExecutor(threads) as pool:
        mine = list(pool.map(facts_of, numbers[jax.process_index() :: jax.process_count()]))
    told = json.dumps([(isinstance(each, Bad), *each) for each in mine])
    shares = [json.loads(text) for text in processes.texts_of_all(told)]
    in_order = [row for turn in itertools.zip_longest(*shares) for row in turn if row is not None]
    good = [_Facts(*row) for is_bad, *row in in_order if not is_bad]
    bad = [Bad(*row) for is_bad, *row in in_order if is_bad]
    _require_some(good, bad, folder)
    return _Found(good, bad, kept, source.classes, threads)


def _require_some(good: Sequence[_Facts], bad: Sequence[Bad], folder: str) -> None:
    if not good:
        raise DataError(
            f"none of the {len(bad)} examples in {folder} is usable, {bad[0].key}: {bad[0].reason}; repair them"
        )


def _value(metadata: dict[str, Any], name: str, kind: Any, otherwise: Any) -> Any:
    """Read a value of this type. A bool is not an integer here, although it is in Python."""
    value = metadata.get(name)
    return value if isinstance(value, kind) and not isinstance(value, bool) else otherwise
