"""`.ci/run` does what the README says, and finds out by running it whether a newer Python works."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CI = ROOT / ".ci" / "run"


def ci(*arguments, **variables):
    # Not inherited: a pyenv version that whoever runs the tests has selected.
    environment = {name: value for name, value in os.environ.items() if name != "PYENV_VERSION"} | variables
    return subprocess.run([CI, *arguments], capture_output=True, text=True, env=environment, timeout=60)


def test_it_is_a_program():
    assert os.access(CI, os.X_OK)
    assert subprocess.run(["bash", "-n", CI]).returncode == 0


def test_the_test_command_is_the_readme_s():
    command = ci("test-command").stdout.strip()
    assert command.endswith("-m pytest")
    assert f"```bash\n{command}\n```" in (ROOT / "README.md").read_text()


def test_an_unknown_argument_is_refused():
    assert ci("tests").returncode == 2


def test_a_newer_python_is_named_only_if_it_runs(tmp_path):
    """A shim that exists and fails, as pyenv's do, is passed over for the next candidate."""
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    for name, status in {"python3.14": 127, "python3.13": 1, "python3.12": 0}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    assert ci("newer-python", PATH=str(tmp_path)).stdout.strip() == str(tmp_path / "python3.12")
    (tmp_path / "python3.12").unlink()
    assert ci("newer-python", PATH=str(tmp_path)).stdout.strip() == ""


def test_what_it_names_is_new_enough():
    found = ci("newer-python").stdout.strip()
    if found:
        version = subprocess.run(
            [found, "-c", "import sys; print(sys.version_info >= (3, 12))"], capture_output=True, text=True
        )
        assert version.stdout.strip() == "True"


def test_a_checkout_that_is_not_clean_is_refused(tmp_path):
    """Whatever was installed in .venv before would hide a dependency that is missing."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_bytes(CI.read_bytes())
    (tmp_path / "README.md").write_text("python3 -m venv .venv && false -m pytest\n")
    (tmp_path / ".venv").mkdir()
    done = subprocess.run(["bash", tmp_path / ".ci" / "run"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "no clean checkout" in done.stderr
    assert "=== test" not in done.stdout
