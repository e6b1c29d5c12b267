"""Tests marked `devices(n)` run in a child process in which JAX has n CPU devices: one for all such tests of a file.

JAX fixes the number of devices when it starts, and the rest of the suite is right to have one. Each test still passes
or fails under its own name. With JAX_NUM_CPU_DEVICES=n in the environment the tests run where they are, for a debugger.
"""

from __future__ import annotations

import os
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
        _outcomes[key] = run_child(same, count)
    outcome = _outcomes[key].get(pyfuncitem.name, Outcome("failed", "the child process did not run this test"))
    if outcome.status != "passed":
        pytest.fail(f"with {count} devices, in a child process:\n{outcome.text}", pytrace=False)
    return True


def devices_of(item: pytest.Item) -> int | None:
    marker = item.get_closest_marker("devices")
    return None if marker is None else marker.args[0]


def run_child(items: list[pytest.Item], count: int) -> dict[str, Outcome]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", ""]
        try:
            done = subprocess.run(
                [*words, f"--junitxml={report}", *(item.nodeid for item in items)],
                cwd=items[0].config.rootpath,
                env=os.environ | {VARIABLE: str(count), "JAX_PLATFORMS": "cpu"},
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired as late:
            said = (late.stdout or b"").decode(errors="replace")[-3000:]
            return {item.name: Outcome("failed", f"not done after {SECONDS} s; it said:\n{said}") for item in items}
        if not report.exists():
            return {item.name: Outcome("failed", done.stdout + done.stderr) for item in items}
        return {case.attrib["name"]: outcome_of(case) for case in ElementTree.parse(report).iter("testcase")}


def outcome_of(case: ElementTree.Element) -> Outcome:
    for status in ("failure", "error", "skipped"):
        if (found := case.find(status)) is not None:
            return Outcome("failed", found.text or found.attrib.get("message", status))
    return Outcome("passed", "")
