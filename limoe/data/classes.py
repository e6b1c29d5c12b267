"""The classes of labelled images: names and templates, from the files beside the images."""

from __future__ import annotations

import json
from dataclasses import dataclass
from os import PathLike
from os.path import join

from limoe.data import files
from limoe.data.files import DataError
from limoe.data.templates import TEMPLATES

CLASSES_FILE = "classes.json"
# As CLIP_benchmark's shards have them.
NAMES_FILE, TEMPLATES_FILE = "classnames.txt", "zeroshot_classification_templates.txt"
_USUAL_TEMPLATE = "a photo of a {}."


@dataclass(frozen=True)
class Classes:
    """Names of the candidate classes, and templates that turn a name into a sentence."""

    templates: tuple[str, ...]
    names: tuple[str, ...]


def has_classes(folder: str | PathLike[str]) -> bool:
    """Say whether a folder holds a list of classes."""
    return files.is_folder(folder) and any(files.exists(join(folder, name)) for name in (CLASSES_FILE, NAMES_FILE))


def read_classes(folder: str | PathLike[str]) -> Classes:
    """Reads `classes.json` of an evaluation folder: `{"templates": ["a photo of a {}"], "classes": ["red square"]}`.

    "templates" may be the name of a set of templates, and `{c}` stands for `{}`. Without that file the names are the
    lines of `classnames.txt`, and the templates those of `zeroshot_classification_templates.txt` if it is there. A name
    may stand twice, as in ImageNet's usual list. Raises DataError, which names the file and what to change, if there is
    neither file, one is not JSON, a list is missing or empty, or a template does not have exactly one `{}`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     files.write_bytes(join(folder, "classes.json"), b'{"templates": ["a {}"], "classes": ["cat", "dog"]}')
    ...     read_classes(folder)
    Classes(templates=('a {}',), names=('cat', 'dog'))
    """
    path = join(folder, CLASSES_FILE)
    if not files.exists(path):
        return _from_lines(folder, path)
    content = json_of(path)
    if not isinstance(content, dict):
        raise DataError(f'{path} must hold an object with the lists "templates" and "classes", not {kind_of(content)}')
    if isinstance(named := content.get("templates"), str) and named in TEMPLATES:
        content["templates"] = list(TEMPLATES[named])
    return Classes(_checked(_strings(content, "templates", path), path), _strings(content, "classes", path))


def _from_lines(folder: str | PathLike[str], missing: str) -> Classes:
    names, templates = join(folder, NAMES_FILE), join(folder, TEMPLATES_FILE)
    if not files.exists(names):
        raise DataError(
            f"{missing} does not exist; zero-shot evaluation needs it: "
            f'{{"templates": ["a photo of a {{}}"], "classes": ["cat", "dog"]}}, or a {NAMES_FILE} with a name a line'
        )
    found = _lines(templates) if files.exists(templates) else (_USUAL_TEMPLATE,)
    return Classes(_checked(found, templates), _lines(names))


def _lines(path: str) -> tuple[str, ...]:
    found = tuple(line.strip() for line in files.read_text(path).splitlines() if line.strip())
    if not found:
        raise DataError(f"{path} is empty; write one name or template a line")
    return found


def _checked(templates: tuple[str, ...], path: str) -> tuple[str, ...]:
    templates = tuple(template.replace("{c}", "{}") for template in templates)
    for template in templates:
        if template.count("{}") != 1:
            raise DataError(f"template {template!r} in {path} must hold {{}} exactly once, where the class name goes")
    return templates


def json_of(path: str) -> object:
    """Read a JSON file. Raises DataError if it is none."""
    try:
        return json.loads(files.read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); write it again") from error


def _strings(content: dict[str, object], key: str, path: str) -> tuple[str, ...]:
    if key not in content:
        raise DataError(f'{path} has no "{key}"; add a list of strings of that name')
    value = content[key]
    if not isinstance(value, list) or not value:
        raise DataError(f'"{key}" in {path} must be a list of at least one string, not {kind_of(value)}')
    for index, item in enumerate(value):
        if not isinstance(item, str) or not item.strip():
            raise DataError(f'entry {index} of "{key}" in {path} must be a string that is not empty, not {item!r:.60}')
    return tuple(value)


def kind_of(value: object) -> str:
    """Describe a value that should be another."""
    return "an empty list" if value == [] else f"{type(value).__name__} {value!r:.60}"
