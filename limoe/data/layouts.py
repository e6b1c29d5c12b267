"""Layouts other than shards: folders of classes, COCO's and Karpathy's captions, tables, CLIP_benchmark's folders."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from limoe.data import files
from limoe.data.classes import Classes, has_classes, json_of, read_classes
from limoe.data.files import DataError
from limoe.data.images import Preprocess, decode
from limoe.data.shards import IMAGE_EXTENSIONS
from limoe.data.source import MAX_IMAGE_BYTES, SOURCES, Bad, Decoded, ShardSource, Source, described_by, spread_evenly
from limoe.data.templates import templates_of


class Entry(NamedTuple):
    """An example as a list has it: a picture's file, its captions, and what is known of it."""

    path: str
    captions: tuple[str, ...]
    facts: dict[str, Any]


class ListedSource(Source):
    """Pictures in files of their own. An example without a caption is good only where its class is known and asked for.

    With `templates` (the name of a set), the captions of a labelled picture are sentences with its class.
    """

    def __init__(
        self,
        entries: Iterable[Entry],
        *,
        preprocess: Preprocess,
        metadata: bool,
        classes: Classes | None = None,
        templates: str = "",
        notes: Iterable[str] = (),
    ) -> None:
        self._notes = list(notes)
        self._entries, self._preprocess, self._metadata = list(entries), preprocess, metadata
        self._classes = classes
        # Once for each class: each picture's own strings would be 8 kB a picture.
        self._by_class: list[tuple[str, ...]] = []
        if templates and classes is not None:
            sentences = templates_of(templates)
            self._by_class = [described_by(number, classes, sentences) for number in range(len(classes.names))]

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def classes(self) -> Classes | None:
        """The classes that labels count in."""
        return self._classes

    @property
    def notes(self) -> list[str]:
        """What beside the pictures is not read."""
        return self._notes

    @property
    def contents(self) -> dict[str, str]:
        """The number of pictures, and a digest of their names, sizes, captions and classes."""
        folders = {os.path.dirname(os.path.abspath(entry.path)) for entry in self._entries}
        common = os.path.commonpath(folders) if folders else ""
        digest = hashlib.sha256(json.dumps(self._by_class).encode())
        for path, captions, facts in self._entries:
            named = (os.path.abspath(path).removeprefix(common), _size_of(path), captions, sorted(facts.items()))
            digest.update(json.dumps(named).encode())
        return {"pictures": f"{len(self)}, list {digest.hexdigest()[:16]}"}

    def __getitem__(self, number: int) -> Decoded | Bad:
        path, _, facts = self._entries[number]
        captions = self._captions_of(number)
        if not captions and not (self._metadata and "class" in facts):
            return Bad(path, "the caption is missing")
        try:
            content = files.read_range(path, 0, MAX_IMAGE_BYTES + 1)
            if len(content) > MAX_IMAGE_BYTES:
                return Bad(path, f"the image is too large: the limit is {MAX_IMAGE_BYTES} bytes")
            image = decode(content, self._preprocess)
        except (OSError, ValueError, DataError) as error:  # also of a name that cannot be one
            return Bad(path, str(error))
        return Decoded(image, captions[0] if captions else "", path, facts if self._metadata else None, captions[1:])

    def captions(self, *, limit: int) -> Iterator[str]:
        """Yield captions as `Source` does, without reading images."""
        for number in spread_evenly(len(self), limit):
            yield from self._captions_of(number)

    def _captions_of(self, number: int) -> tuple[str, ...]:
        _, captions, facts = self._entries[number]
        given = self._by_class[facts["class"]] if self._by_class else captions
        return tuple(caption for caption in given if isinstance(caption, str) and caption.strip())


def _size_of(path: str) -> int | None:
    """Ask for a picture's size in bytes; None if it is not there or its name cannot be one."""
    try:
        return files.stamp(path).size
    except (OSError, ValueError):
        return None


def _is_picture(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def open_folders(
    path: str, *, preprocess: Preprocess, metadata: bool, cache_dir: files.Path = "", templates: str = ""
) -> Source:
    """Open a folder with one folder of pictures for each class, in the order of their names.

    The classes are those of `classes.json` or `classnames.txt` beside them, else the names of the folders.
    """
    folders = class_folders(path)
    if not folders:
        raise DataError(
            f"{path} has no folders with pictures; give a folder with one folder of pictures for each class"
        )
    names = tuple(folder.replace("_", " ") for folder in folders)
    classes = read_classes(path) if has_classes(path) else Classes(("a photo of a {}.",), names)
    # By name where the list has the folders' names, whatever its order; else one after the other.
    number_of = {name.replace("_", " "): number for number, name in enumerate(classes.names)}
    by_name = set(names) <= number_of.keys()
    if not by_name and len(classes.names) != len(folders):
        raise DataError(
            f"{path} has {len(folders)} folders and {len(classes.names)} classes; there must be one for each"
        )
    entries = [
        Entry(os.path.join(path, folder, name), (), {"class": number_of[names[place]] if by_name else place})
        for place, folder in enumerate(folders)
        for name in files.names_in(os.path.join(path, folder))
        if _is_picture(name)
    ]
    listed = {os.path.join(path, folder) for folder in folders}
    others = [os.path.join(path, name) for name in files.names_in(path) if os.path.join(path, name) not in listed]
    others = [one for one in others if files.is_folder(one)]
    for folder in sorted(listed):
        others += [os.path.join(folder, name) for name in files.names_in(folder) if not _is_picture(name)]
    notes = [f"ignored {len(others)} files and folders without a picture, the first is {others[0]}"] if others else []
    return ListedSource(
        entries, preprocess=preprocess, metadata=metadata, classes=classes, templates=templates, notes=notes
    )


def class_folders(path: str) -> list[str]:
    """List the folders in a folder that hold a picture."""
    if not files.is_folder(path):
        return []
    inside = [name for name in files.names_in(path) if files.is_folder(os.path.join(path, name))]
    return [name for name in inside if any(map(_is_picture, files.names_in(os.path.join(path, name))))]


def open_captions(
    path: str,
    *,
    preprocess: Preprocess,
    metadata: bool,
    cache_dir: files.Path = "",
    images: str = "",
    split: str = "",
) -> Source:
    """Open COCO's captions, or a `split` of Karpathy's `dataset_*.json`; `images` is the folder of pictures."""
    content, folder = json_of(path), images or os.path.dirname(path)
    pictures = content.get("images") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(pictures, list) or not pictures:
        raise DataError(f"{path} has no list \"images\"; give COCO's captions_*.json or Karpathy's dataset_*.json")
    try:
        if "sentences" in pictures[0]:
            entries = _karpathy(pictures, folder, split, path)
        else:
            captions: dict[Any, list[str]] = {}
            for note in content["annotations"]:
                captions.setdefault(note["image_id"], []).append(note["caption"])
            entries = [
                Entry(
                    os.path.join(folder, one["file_name"]), tuple(captions.get(one["id"], ())), {"image_id": one["id"]}
                )
                for one in pictures
            ]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is neither COCO's nor Karpathy's captions: {type(error).__name__} {error}") from error
    return ListedSource(entries, preprocess=preprocess, metadata=metadata)


def _karpathy(pictures: list[dict[str, Any]], folder: str, split: str, path: str) -> list[Entry]:
    splits = sorted({one["split"] for one in pictures})
    if split not in splits:
        raise DataError(f"{path} has the splits {', '.join(splits)}; choose one: {path}?split={splits[0]}")
    return [
        Entry(
            os.path.join(folder, one.get("filepath", ""), one["filename"]),
            tuple(sentence["raw"] for sentence in one["sentences"]),
            {"image_id": one.get("cocoid", one["filename"])},
        )
        for one in pictures
        if one["split"] == split
    ]


def open_table(
    path: str,
    *,
    preprocess: Preprocess,
    metadata: bool,
    cache_dir: files.Path = "",
    image: str = "image",
    caption: str = "caption",
    images: str = "",
) -> Source:
    """Open a CSV or TSV file; `image` and `caption` name its columns, `images` the folder of its relative paths.

    Rows with one path are one picture with several captions.
    """
    text, tabs = files.read_text(path).removeprefix("\ufeff"), path.lower().endswith(".tsv")
    # Strict: else a quote that opens a caption and is never closed swallows all rows up to the next quote.
    rows = csv.DictReader(io.StringIO(text, newline=None), delimiter="\t" if tabs else ",", strict=True)
    columns = rows.fieldnames or []
    if missing := [name for name in (image, caption) if name not in columns]:
        raise DataError(
            f"{path} has no column {missing[0]!r}; it has {', '.join(columns)}; name them: "
            f"{path}?image=NAME&caption=NAME"
        )
    captions: dict[str, list[str]] = {}
    try:
        for row in rows:
            if None in row:
                raise csv.Error(f"more fields than the {len(columns)} columns; put a caption with commas in quotes")
            captions.setdefault(row[image] or "", []).append(row[caption] or "")
    except csv.Error as error:
        raise DataError(
            f"{path}, line {rows.line_num}: {error}; double a quote inside a field that begins with one"
        ) from error
    folder = images or os.path.dirname(path)
    entries = [Entry(os.path.join(folder, name), tuple(texts), {"image_id": name}) for name, texts in captions.items()]
    return ListedSource(entries, preprocess=preprocess, metadata=metadata)


def open_clip_benchmark(
    path: str,
    *,
    preprocess: Preprocess,
    metadata: bool,
    cache_dir: files.Path = "",
    split: str = "test",
    templates: str = "",
) -> Source:
    """Open a folder of CLIP_benchmark: `SPLIT/*.tar`, with classes or, where its dataset_type.txt says so, captions."""
    kind = os.path.join(path, "dataset_type.txt")
    retrieval = files.exists(kind) and files.read_text(kind).strip() == "retrieval"
    return ShardSource(
        os.path.join(path, split),
        preprocess=preprocess,
        metadata=metadata,
        cache_dir=cache_dir,
        classes=None if retrieval else read_classes(path),
        templates=templates,
        lines=retrieval,
    )


def layout_of(path: str) -> str:
    """Name the layout of a place that does not name it.

    >>> layout_of("pairs.csv"), layout_of("captions_val2014.json"), layout_of("data/{00..09}.tar")
    ('csv', 'coco', 'shards')
    """
    ending = path.rpartition(".")[2].lower()
    if ending in ("csv", "tsv", "json"):
        return {"json": "coco"}.get(ending, "csv")
    if not files.is_folder(path) or any(name.endswith(".tar") for name in files.names_in(path)):
        return "shards"
    if any(
        files.exists(os.path.join(path, name)) for name in ("dataset_type.txt", "zeroshot_classification_templates.txt")
    ):
        return "clip_benchmark"
    return "folders" if class_folders(path) else "shards"


SOURCES |= {
    "folders": open_folders,
    "coco": open_captions,
    "csv": open_table,
    "clip_benchmark": open_clip_benchmark,
}
