"""The mutants of the kernels are found where the code is today, and the tests notice them.

Every day: what they replace and what they run exists. `pytest -m 'mutants and not full'` runs a sample of them, and
`pytest -m mutants --dist=load` all (an hour of two cores).
"""

import ast
import contextlib
import functools
import inspect
import io

import mutants_fused
import mutants_gpu
import mutants_tpu
import mutate
import pytest

TABLES = {"mutants_tpu": mutants_tpu, "mutants_fused": mutants_fused, "mutants_gpu": mutants_gpu}
MUTANTS = [(table, name) for table, module in TABLES.items() for name in module.MUTANTS]
SAMPLE = {
    *(("mutants_tpu", name) for name in ("mask one row too short", "last piece left out", "dx not reset")),
    *(("mutants_fused", name) for name in ("every piece moves the first rows", "gates of the first block")),
    *(("mutants_gpu", name) for name in ("ties go to the higher expert", "every group is the first")),
}


def the(table, name):
    return TABLES[table].MUTANTS[name]


@pytest.mark.parametrize(("table", "name"), MUTANTS)
def test_what_a_mutant_replaces_is_in_the_code_once(table, name):
    """And what comes of it is Python: a file that cannot be read would be noticed by every check."""
    path, text = mutate.mutated(the(table, name))
    assert text != path.read_text(encoding="utf-8")
    ast.parse(text)


def test_what_is_not_there_or_is_ambiguous_is_refused(tmp_path):
    folder = tmp_path / mutate.BACKENDS
    folder.mkdir(parents=True)
    for name, text in {"a.py": "x = 1\ny = 2\n", "b.py": "x = 1\nz = 3\nz = 3\n"}.items():
        (folder / name).write_text(text)
    assert mutate.place(mutate.Mutant(print, "y = 2", ""), tmp_path).name == "a.py"
    assert mutate.place(mutate.Mutant(print, "x = 1", "", beside="z"), tmp_path).name == "b.py"
    for old in ("x = 1", "z = 3", "w"):
        with pytest.raises(LookupError, match="must be in one file"):
            mutate.place(mutate.Mutant(print, old, ""), tmp_path)


def test_the_tests_that_mutants_name_exist():
    checks = {the(*mutant).check for mutant in MUTANTS}
    ids = sorted({f"tests/{name}" for check in checks if isinstance(check, mutate.Tests) for name in check.ids})
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = pytest.main(["--collect-only", "-q", "-n0", "--rootdir", str(mutate.ROOT), *ids])
    assert status == pytest.ExitCode.OK, output.getvalue()
    assert len(ids) > 20 and set(ids) <= set(output.getvalue().splitlines())


def test_the_functions_that_mutants_call_take_their_arguments():
    checks = [the(*mutant).check for mutant in MUTANTS]
    calls = [check for check in checks if not isinstance(check, mutate.Tests)]
    assert calls
    for call in calls:
        inspect.signature(call).bind()


@functools.cache
def passes_unbroken(check, table, name):
    return not mutate.caught(table, name, broken=False)


@pytest.mark.mutants
@pytest.mark.parametrize(
    ("table", "name"),
    [pytest.param(*mutant, marks=[] if mutant in SAMPLE else [pytest.mark.full]) for mutant in MUTANTS],
)
def test_a_mutant_is_caught(table, name):
    # One unbroken run serves all mutants of a check.
    check = the(table, name).check
    first = next(mutant for mutant in MUTANTS if the(*mutant).check == check)
    assert passes_unbroken(check, *first), "the check fails unbroken"
    assert mutate.caught(table, name, broken=True), "the mutant survives"


def test_the_sample_names_mutants():
    assert set(MUTANTS) >= SAMPLE
