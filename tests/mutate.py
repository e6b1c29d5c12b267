"""Break the kernels one way at a time, in a copy of the tree, in front of a check that must notice it.

Each mutant replaces a piece of text, found by its content in whatever file of the back ends holds it. It is caught by a
wrong value, a race, an error of the interpreter, or by never coming to an end. tests/test_mutants.py runs them.
"""

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = Path("moe_kernels/backends")


class Tests(NamedTuple):
    """The check that these tests pass, each given as in `test_x.py::test_y[case]`."""

    ids: tuple[str, ...]


def tests(*ids: str) -> Tests:
    """The check that these tests pass."""
    return Tests(ids)


class Mutant(NamedTuple):
    """`new` in place of `old`, which one file of the back ends holds once; then tests or a function must fail.

    Where several files hold `old`, `beside` is text that only one of them has.
    """

    check: Tests | Callable[[], object]
    old: str
    new: str
    beside: str = ""


def place(mutant: Mutant, root: Path = ROOT) -> Path:
    """The file that the mutant changes."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted((root / BACKENDS).rglob("*.py"))}
    found = {path: text.count(mutant.old) for path, text in texts.items() if mutant.beside in text}
    found = {path: count for path, count in found.items() if count}
    if list(found.values()) != [1]:
        places = {str(path.relative_to(root)): count for path, count in found.items()}
        raise LookupError(
            f"{mutant.old!r}"
            + f" beside {mutant.beside!r}" * bool(mutant.beside)
            + f" must be in one file of the back "
            f"ends, once, but is in {places or 'none'}; change the text of the mutant as the code was changed"
        )
    return next(iter(found))


def mutated(mutant: Mutant, root: Path = ROOT) -> tuple[Path, str]:
    """The file that the mutant changes, and its text afterwards."""
    path = place(mutant, root)
    return path, path.read_text(encoding="utf-8").replace(mutant.old, mutant.new)


def caught(table: str, name: str, *, broken: bool, limit: int = 240) -> bool:
    """Whether the check of a mutant fails within `limit` seconds, in a copy of the tree, broken by the mutant or not.

    `table` is the module of tests/ whose MUTANTS has it.
    """
    mutant = importlib.import_module(table).MUTANTS[name]
    if isinstance(mutant.check, Tests):
        ids = [f"tests/{name}" for name in mutant.check.ids]
        command = ["-m", "pytest", "-n0", "-x", "-q", "-p", "no:cacheprovider", *ids]
    else:
        imports = f"import conftest; conftest.compile_fast(); import {table}"
        command = ["-c", f"{imports}; {table}.MUTANTS[{name!r}].check()"]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copy(ROOT / "pyproject.toml", copy)
        for package in ("moe_kernels", "limoe", "reference", "benchmarks", "tests"):
            shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
        if broken:
            path, text = mutated(mutant, copy)
            path.write_text(text, encoding="utf-8")
        environment = os.environ | {"PYTHONPATH": f"{copy}{os.pathsep}{copy / 'tests'}", "JAX_PLATFORMS": "cpu"}
        try:
            run = subprocess.run(
                [sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return True
    if not broken and run.returncode:
        print(run.stdout[-2000:], run.stderr[-2000:])
    return run.returncode != 0 or "RACE DETECTED" in run.stdout
