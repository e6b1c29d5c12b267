"""What scripts that break kernels share: one mutation at a time, in a copy of the tree, in front of a check.

A mutant is caught by a wrong value, a race, an error of the interpreter, or by never coming to an end.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = Path("moe_kernels/backends")


class Mutation(NamedTuple):
    """Replace `old`, which is there once, by `new` in a file of the back ends."""

    file: str
    old: str
    new: str


class Mutant(NamedTuple):
    """A mutation and a program, run from the root of the copy, that it must make fail."""

    check: str
    mutation: Mutation


def tests(*names: str) -> str:
    """A program that runs tests and fails where one of them does."""
    arguments = ["-n0", "-x", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in names)]
    return f"import sys, pytest; sys.exit(pytest.main({arguments!r}))"


def caught(check: str, mutation: Mutation | None, limit: int) -> bool:
    """Run a check on a copy of the tree with the mutation applied; True if anything at all went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copy(ROOT / "pyproject.toml", copy)
        for package in ("moe_kernels", "limoe", "reference", "tests"):
            shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
        if mutation is not None:
            path = copy / BACKENDS / mutation.file
            path.write_text(mutated(path.read_text(encoding="utf-8"), mutation), encoding="utf-8")
        environment = os.environ | {"PYTHONPATH": str(copy), "JAX_PLATFORMS": "cpu"}
        try:
            run = subprocess.run(
                [sys.executable, "-c", check],
                cwd=copy,
                env=environment,
                capture_output=True,
                text=True,
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return True
        if mutation is None and run.returncode:
            print(run.stdout[-2000:], run.stderr[-2000:])
        return run.returncode != 0 or "RACE DETECTED" in run.stdout


def mutated(text: str, mutation: Mutation) -> str:
    """The text of a file with the mutation applied."""
    found = text.count(mutation.old)
    assert found == 1, f"{mutation.old!r} is {found} times in {mutation.file}"
    return text.replace(mutation.old, mutation.new)


def main(mutants: dict[str, Mutant], names: list[str], *, limit: int) -> int:
    """Check that nothing is caught unbroken, then that every mutant is; `limit` is the seconds of a check."""
    chosen = {name: mutants[name] for name in names} if names else mutants
    for check in dict.fromkeys(mutant.check for mutant in chosen.values()):
        if caught(check, None, limit):
            print(f"fails unbroken: {check}")
            return 1
    survived = []
    for name, (check, mutation) in chosen.items():
        dead = caught(check, mutation, limit)
        print(f"{'caught' if dead else 'SURVIVED'}: {name}", flush=True)
        survived += [] if dead else [name]
    print(f"{len(chosen) - len(survived)} of {len(chosen)} caught")
    return len(survived)
