"""The versions of Python and packages that trained a run, since which step."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import NamedTuple

from limoe import __version__
from limoe.data import files
from limoe.workdir.metrics import write_json

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Since(NamedTuple):
    """Versions by name, and the last step before they came into use."""

    step: int
    versions: dict[str, str]


def versions_here() -> dict[str, str]:
    """Return the versions of this process by name.

    >>> sorted(versions_here())[:3]
    ['Python', 'flax', 'jax']
    """
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"limoe": __version__, "Python": platform.python_version(), **packages}


def keep_versions(path: Path, step: int) -> None:
    """Add the versions of this process, which goes on after `step`, to a file, if they differ from the last there.

    What a run that went back to `step` did later is forgotten.
    """
    before, here = read_versions(path), versions_here()
    kept = [one for one in before if one.step <= step]
    if not kept or kept[-1].versions != here:
        kept.append(Since(step, here))
    if kept != before:
        write_json(path, {"since": [one._asdict() for one in kept]})


def read_versions(path: Path) -> list[Since]:
    """Read what `keep_versions` wrote; nothing if there is no such file, as in folders of older runs."""
    return [Since(**one) for one in json.loads(files.read_text(path))["since"]] if files.exists(path) else []
