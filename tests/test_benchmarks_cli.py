"""The dispatch benchmark's command line: what is refused, and what a sweep and an interrupted run say and write."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import markdown

SCRIPT = Path(__file__).with_name("dispatch_calls.py")
REFUSED = {
    ("--case=nope",): "issue-8groups",
    ("--op=plan", "--pass=dx"): "only forward",
    ("--op=layer", "--pass=dw"): "only forward, backward, both",
    ("--suite=full", "--case=tiny"): "remove it, or --case",
    ("--sweep=tokens", "--op=layer", "--op=plan"): "needs exactly one case",
    ("--json=/nonexistent/x",): "no folder /nonexistent",
    ("--plot=/nonexistent/x.png",): "no folder /nonexistent",
    ("--markdown=/nonexistent/x.md",): "no folder /nonexistent",
    ("extra",): "extra",
}
SWEEP = ("--sweep=tokens",)
NOTHING = ("--op=dispatch", "--implementation=dense")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("pages") / "page.md"
    path.write_text(f"{markdown.BEGIN}\nwhole\n{markdown.END}\n")
    return path


@pytest.fixture(scope="module")
def calls(page):
    """All in one process, which takes seconds to start."""
    wanted = [*REFUSED, SWEEP, NOTHING, ("--case=tiny", f"--markdown={page}")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(wanted)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(wanted, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_what_does_not_go_together_is_refused_in_one_line(calls, arguments):
    status, out, err = calls[arguments]
    assert status == 2 and out == "" and err.count("\n") == 1 and REFUSED[arguments] in err


def test_a_sweep_says_how_time_grows(calls):
    status, out, _ = calls[SWEEP]
    assert status == 0 and "power of tokens (512 to 4096)" in out
    grows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if "(useful work: " in line}
    assert grows["moe_kernels/xla"][0] == "1.50" and grows["dense"][0] == "1.00"
    # The layer's FLOPs are in proportion to its tokens.
    assert grows["dense"][-1] == "1.00)"


def test_a_run_that_measures_nothing_fails(calls):
    status, _, err = calls[NOTHING]
    assert status == 1 and "nothing was measured" in err


def test_part_of_a_run_does_not_replace_a_whole_one(calls, page):
    status, out, _ = next(value for key, value in calls.items() if key[0] == "--case=tiny")
    assert status == 130 and "layer both, tiny" in out and "stopped" in out
    assert "whole" in page.read_text()
