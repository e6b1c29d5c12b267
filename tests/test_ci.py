"""`.ci/run` does what the README says, and finds out by running it whether a newer Python works."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CI = ROOT / ".ci" / "run"


def ci(*arguments, **variables):
    # Not inherited: what whoever runs the tests has told pyenv.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYENV_")} | variables
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


def fake_python(path, status):
    """A program that ends with `status` whatever it is asked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\nexit {status}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def bare(tmp_path):
    """What finds no Python but those that a test makes: a PATH, and a pyenv that is not on it."""
    for tool in ("bash", "dirname", "sort"):
        (tmp_path / "bin" / tool).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    return {"PATH": str(tmp_path / "bin"), "PYENV_ROOT": str(tmp_path / "pyenv")}


def test_a_newer_python_is_named_only_if_it_runs(tmp_path, bare):
    """A shim that exists and fails, as pyenv's do, is passed over for the next candidate."""
    for name, status in {"python3.14": 127, "python3.13": 1, "python3.12": 0}.items():
        fake_python(tmp_path / "bin" / name, status)
    assert ci("newer-python", **bare).stdout.strip() == str(tmp_path / "bin" / "python3.12")
    (tmp_path / "bin" / "python3.12").unlink()
    assert ci("newer-python", **bare).stdout.strip() == ""


@pytest.mark.parametrize("on_the_path", [True, False], ids=["pyenv on the PATH", "its folder only"])
def test_an_activated_environment_does_not_hide_the_newer_python(tmp_path, bare, on_the_path):
    """Its python, too old here, comes before pyenv's shims; the newest that works is still found."""
    fake_python(tmp_path / "bin" / "python", 1)
    versions = tmp_path / "pyenv" / "versions"
    for version, status in {"3.9.18": 1, "3.12.9": 0, "3.12.11": 0, "3.13.2": 127}.items():
        fake_python(versions / version / "bin" / "python", status)
    if on_the_path:
        pyenv = fake_python(tmp_path / "bin" / "pyenv", 0)
        pyenv.write_text(f"#!/bin/sh\necho {bare.pop('PYENV_ROOT')}\n")
    assert ci("newer-python", **bare).stdout.strip() == str(versions / "3.12.11" / "bin" / "python")


def test_what_it_names_is_new_enough_and_it_names_one_if_there_is_one():
    def new_enough(python):
        question = "import ensurepip, sys, venv; print(sys.version_info >= (3, 12))"
        return subprocess.run([python, "-c", question], capture_output=True, text=True).stdout.strip() == "True"

    found = ci("newer-python").stdout.strip()
    on_the_path = [path for name in ("python3.14", "python3.13", "python3.12") if (path := shutil.which(name))]
    assert new_enough(found) if found else not any(map(new_enough, on_the_path))


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


# Stands for every program: it says how it was called, and fails where it was told to.
STAGE = """#!/bin/sh
name="${0##*/} $*"
echo "called: $name"
case "$name" in *"$FAILING"*) exit 1 ;; esac
"""
# Stands for a newer Python, whose environments hold such programs.
NEWER = """#!/bin/sh
case "$*" in
  -c*) exit 0 ;;
  "-m venv "*) mkdir -p "$3/bin" && cp stage "$3/bin/pip" && cp stage "$3/bin/python" ;;
esac
"""
EVERYTHING = [
    *(
        "test",
        "development tools",
        "package",
        "site",
        "format",
        "lint",
        "types",
        "mutants",
        "accelerators' compilers",
        "compatibility",
    ),
]


@pytest.fixture
def staged(tmp_path, bare):
    """Runs a copy of .ci/run in a checkout of such programs, with one of them told to fail."""
    folder = tmp_path / "checkout"
    (folder / ".ci").mkdir(parents=True)
    (folder / ".ci" / "run").write_bytes(CI.read_bytes())
    copies = " && ".join(f"cp stage .venv/bin/{name}" for name in ("pip", "python", "ruff", "pyright"))
    (folder / "README.md").write_text(f"python3 -m venv .venv && {copies} && .venv/bin/python -m pytest\n")
    (folder / "stage").write_text(STAGE)
    (folder / "stage").chmod(0o755)
    for tool in ("mkdir", "cp", "rm", "mktemp", "cat", "touch", "grep", "wc", "sh", "id"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    (tmp_path / "bin" / "python3").write_text(NEWER.replace("-c*) exit 0", "-c*) exit 1"))
    (tmp_path / "bin" / "python3").chmod(0o755)

    def run(failing="nothing", *, newer=True, browser=True):
        if browser:
            fake_python(tmp_path / "bin" / "chromium", 0)
        if newer:
            (tmp_path / "bin" / "python3.13").write_text(NEWER)
            (tmp_path / "bin" / "python3.13").chmod(0o755)
        variables = bare | {"FAILING": failing, "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
        return subprocess.run(
            ["bash", folder / ".ci" / "run"], capture_output=True, text=True, env=variables, timeout=60
        )

    return run


def test_every_stage_runs_and_the_last_line_says_how_long(staged):
    done = staged()
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(" passed")[0][4:] for line in done.stdout.splitlines() if " passed in " in line] == EVERYTHING
    assert "called: python -m pytest -m compat" in done.stdout
    assert re.fullmatch(r"\d+ s in all", done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("failing", "stage"),
    [
        ("python -m pytest", "test"),
        ("python -m build", "package"),
        ("python tests/installed.py", "package"),
        ("python -m mkdocs", "site"),
        ("ruff check", "lint"),
        ("pytest -m mutants", "mutants"),
        ("pytest -m aot", "accelerators' compilers"),
        ("pytest -m compat", "compatibility"),
    ],
)
def test_a_stage_that_fails_is_named_after_the_others_ran(staged, failing, stage):
    done = staged(failing)
    assert done.returncode == 1
    assert stage in done.stdout.splitlines()[-1].removeprefix("FAILED: ")
    assert len([line for line in done.stdout.splitlines() if re.search(r"^=== .* in \d+ s$", line)]) == len(EVERYTHING)


def test_an_environment_that_cannot_be_made_fails_with_its_reason(staged):
    done = staged("pip install -e .[test]")
    assert done.returncode == 1 and "compatibility FAILED" in done.stdout
    assert "called: pip install -e .[test]" in done.stdout


def test_without_a_newer_python_the_last_line_says_what_was_not_tested(staged):
    done = staged(newer=False)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].endswith("compatibility NOT tested: no Python 3.12 or newer works here")
    assert "=== compatibility" not in done.stdout


def test_without_a_browser_the_last_line_says_what_was_not_opened(staged):
    done = staged(browser=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("; the report NOT opened in a browser: no Chromium here")
