"""What a release says of itself: its version and date everywhere, CI's workflow, and the promises of SECURITY.md."""

import ast
import importlib
import inspect
import re
import tomllib
from pathlib import Path

import pytest
from measure import in_package, python_files

import limoe
import moe_kernels
from limoe import cli

ROOT = Path(__file__).resolve().parents[1]
OURS = {
    name: path for name, path in python_files().items() if in_package(name, "limoe") or in_package(name, "moe_kernels")
}


def test_the_command_says_its_version(capsys, monkeypatch):
    monkeypatch.setattr(cli, "TRAINER", ("not_installed",))
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"limoe {limoe.__version__}\n"


def test_changelog_and_citation_name_the_version_and_its_date():
    (version, date), *_ = re.findall(
        r"^## \[([\d.]+)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    citation = (ROOT / "CITATION.cff").read_text()
    facts = dict(re.findall(r"^([\w-]+): *(.+)$", citation, re.M))
    assert (facts["version"], facts["date-released"]) == (version, date) == (limoe.__version__, date)
    assert facts["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    title = re.search(r'^  title: "(.*)"$', citation, re.M)
    assert title and title[1] in (ROOT / "README.md").read_text().replace("{", "").replace("}", "")


def test_the_workflow_runs_the_checks_with_the_oldest_python_first():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.findall(r"^ +- run: (.*)$", workflow, re.M) == [".ci/run"]
    *newer, oldest = re.findall(r"^ {12}(3\.\d+)$", workflow, re.M)
    assert f">={oldest}" == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert newer and all(int(version[2:]) > int(oldest[2:]) for version in newer)


# Modules that run what they read, or that open connections.
FORBIDDEN = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch", "yaml"} | {
    *("runpy", "code", "ctypes", "socket", "urllib", "http", "ftplib", "requests", "xmlrpc", "multiprocessing")
}
CALLS = {"eval", "exec", "compile", "__import__", "import_module"}


def breaches(source: str) -> set[str]:
    """What in a module may run, unpickle or fetch what it reads."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").split(".")[0], *(alias.name for alias in node.names)} & (FORBIDDEN | CALLS)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if (isinstance(node.func, ast.Name) and called in CALLS) or called.endswith("importlib.import_module"):
                found.add(called)
            safe = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}.get("allow_pickle") == "False"
            if called in ("np.load", "numpy.load") and not safe:
                found.add(called)
            if called.startswith("os.") and called[3:] in ("system", "popen"):
                found.add(called)
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle as p", {"pickle"}),
        ("from torch import load", {"torch"}),
        ("from importlib import import_module", {"import_module"}),
        ("eval(text)", {"eval"}),
        ("np.load(file)", {"np.load"}),
        ("np.load(file, allow_pickle=True)", {"np.load"}),
        ("np.load(file, allow_pickle=False); re.compile('a'); program.compile()", set()),
        ("os.system(text)", {"os.system"}),
    ],
)
def test_breaches_are_found(source, found):
    assert breaches(source) == found


def test_nothing_that_is_read_is_run_or_unpickled():
    # limoe index: what its own processes send each other through their own pipes, and nothing that is read.
    allowed = {"limoe.data.indexing": {"multiprocessing"}}
    assert {
        name: found for name, path in OURS.items() if (found := breaches(path.read_text(encoding="utf-8")))
    } == allowed


def test_two_places_start_processes_and_read_no_data_for_it():
    starts = {
        name
        for name, path in OURS.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import) and "subprocess" in {alias.name for alias in node.names}
    }
    assert starts == {"limoe.parallel.processes", "limoe.study.runner"}


def documented(page):
    return set(re.findall(r"^::: (\S+)$", (ROOT / "docs" / page).read_text(), re.M))


def test_the_reference_has_every_public_name():
    """The build of the site fails for names that do not exist, and shows what is public in a module that it names."""
    assert documented("api-moe-kernels.md") == {f"moe_kernels.{name}" for name in moe_kernels.__all__}
    modules = {name for name in OURS if in_package(name, "limoe.use") and name != "limoe.use"}
    missing = ({f"limoe.{name}" for name in limoe.__all__} | modules) - documented("api-limoe.md")
    assert modules and not missing


def test_what_the_reference_shows_says_what_it_is():
    for page in ("api-moe-kernels.md", "api-limoe.md"):
        for name in documented(page):
            module, _, own = name.rpartition(".")
            value = importlib.import_module(name) if name in OURS else getattr(importlib.import_module(module), own)
            shown = vars(value).items() if inspect.ismodule(value) else [(own, value)]
            for member, found in shown:
                if not member.startswith("_") and getattr(found, "__module__", "") in OURS and callable(found):
                    assert inspect.getdoc(found), f"{name}: {member} has no docstring"
