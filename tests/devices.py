"""Tests marked `devices(n)` run in a child process in which JAX has n CPU devices: one child for each n.

JAX fixes the number of devices when it starts, and the rest of the suite is right to have one. A child runs the marked
tests of one file after those of another, so Python, JAX and what was compiled are there already. Each test still passes
or fails under its own name. With JAX_NUM_CPU_DEVICES=n in the environment the tests run where they are, for a debugger.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

VARIABLE = "JAX_NUM_CPU_DEVICES"
SECONDS = 1200


class Outcome(NamedTuple):
    """What the child said about a test: "passed", or "failed" (which a test that was skipped there has), and why."""

    status: str
    text: str


class Child:
    """A process that runs tests when it is told their names, and answers when a file with the results is written."""

    def __init__(self, count: int, root: Path) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.said = Path(self.folder.name) / "said"
        with self.said.open("wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                cwd=root,
                env=os.environ | {VARIABLE: str(count), "JAX_PLATFORMS": "cpu"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
            )

    def run(self, items: list[pytest.Item]) -> dict[str, Outcome]:
        """Run the tests; those of which nothing is known in the end have failed."""
        report, before = Path(self.folder.name) / "report.xml", self.said.stat().st_size
        report.unlink(missing_ok=True)
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([str(report), *(item.nodeid for item in items)]).encode() + b"\n")
            self.process.stdin.flush()
        answered, _, _ = select.select([self.process.stdout], [], [], SECONDS)
        if not (answered and self.process.stdout.readline()):
            self.process.kill()
            self.process.wait()
            late = "" if answered else f"not done after {SECONDS} s; "
            text = f"{late}it said:\n{self.said.read_bytes()[before:].decode(errors='replace')[-3000:]}"
            return {item.name: Outcome("failed", text) for item in items}
        return {case.attrib["name"]: outcome_of(case) for case in ElementTree.parse(report).iter("testcase")}

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.folder.cleanup()


_children: dict[int, Child] = {}
_outcomes: dict[tuple[Path, int], dict[str, Outcome]] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Take a marked test's result from the child instead of calling it."""
    count = devices_of(pyfuncitem)
    if count is None or os.environ.get(VARIABLE) == str(count):
        return None
    key = (pyfuncitem.path, count)
    if key not in _outcomes:
        same = [item for item in pyfuncitem.session.items if item.path == key[0] and devices_of(item) == count]
        _outcomes[key] = child_with(count, pyfuncitem.config.rootpath).run(same)
    outcome = _outcomes[key].get(pyfuncitem.name, Outcome("failed", "the child process did not run this test"))
    if outcome.status != "passed":
        pytest.fail(f"with {count} devices, in a child process:\n{outcome.text}", pytrace=False)
    return True


def pytest_sessionfinish() -> None:
    """End the children."""
    while _children:
        _children.popitem()[1].end()


def devices_of(item: pytest.Item) -> int | None:
    marker = item.get_closest_marker("devices")
    return None if marker is None else marker.args[0]


def child_with(count: int, root: Path) -> Child:
    """Get the child with so many devices; a new one if the last one crashed or hangs."""
    child = _children.get(count)
    if child is not None and not child.is_alive:
        _children.pop(count).end()
    if count not in _children:
        _children[count] = Child(count, root)
    return _children[count]


def outcome_of(case: ElementTree.Element) -> Outcome:
    for status in ("failure", "error", "skipped"):
        if (found := case.find(status)) is not None:
            return Outcome("failed", found.text or found.attrib.get("message", status))
    return Outcome("passed", "")


def serve() -> None:
    """Run the tests that each line of standard input names; answer with a line when their report is written."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what tests print is no answer
    for line in sys.stdin:
        report, *names = json.loads(line)
        pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", "-m", "", f"--junitxml={report}", *names])
        print(file=answers, flush=True)


if __name__ == "__main__":
    serve()
