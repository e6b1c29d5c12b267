"""The shape of the code base: who may import whom, how long a file may be, what is packaged, what is documented."""

import ast
import functools
import importlib
import importlib.metadata
import inspect
import re
import sys
import tomllib
from pathlib import Path

import measure
import pytest
from measure import OURS, in_package

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]

SHIPPED = OURS[:3]
STANDARD = set(sys.stdlib_module_names)

# A module of moe_kernels imports modules of earlier levels only. A level that ends in ".*" is a package whose modules
# may also import each other.
LEVELS = (
    ("types", "axes", "packed_sort", "chips", "fitted", "precision", "activations", "routers", "sums"),
    ("spec",),
    ("capacity", "priority"),
    ("backends.base", "backends.route_parts"),
    ("backends.mlp_parts",),
    ("backends.xla.*",),
    ("backends.tpu.*", "backends.gpu.*"),
    ("backends",),
    ("routing", "figures", "balance"),
    ("plan",),
    ("permute",),
    ("experts",),
    ("choice",),
    ("local",),
    ("parallel", "parallel.exchange", "parallel.width"),
    ("parallel.ragged",),
    ("parallel.shard",),
    ("layer", "explanation", "expert_parallel"),
    ("",),
    ("__main__",),
)

# The rooms of limoe in order of imports: a module imports modules of its own room and of earlier ones.
ROOMS = (
    "errors",
    "config",
    "data",
    "parallel",
    "model",
    "workdir",
    "evaluate",
    "report",
    "train",
    "plan",
    "use",
    "study",
    "usage",
    "cli",
)

MAX_LINES_OF_CODE = 320
MAX_LINES_OF_A_FUNCTION = 60
MAX_PARAMETERS = 8

# Functions that are longer, and parameter lists that are. These lists only shrink.
LONG_FUNCTIONS = {}
LONG_PARAMETER_LISTS: set[str] = set()


def where(path: Path) -> str:
    return str(path.relative_to(ROOT))


FILES = measure.python_files()


@functools.cache
def imports_of(module: str) -> frozenset[str]:
    return measure.imports_of(module, FILES)


def level_of(module: str) -> tuple[int, str]:
    """The level of a module of moe_kernels, and the entry of LEVELS that says so."""
    name = module.removeprefix("moe_kernels").removeprefix(".")
    for number, level in enumerate(LEVELS):
        for entry in level:
            if name == entry or (entry.endswith(".*") and in_package(name, entry[:-2])):
                return number, entry
    raise AssertionError(
        f"{module} has no place in the order of imports; give it one in LEVELS and in docs/architecture.md"
    )


def cycles(graph: dict[str, set[str]]) -> set[str]:
    """The modules that import each other in a circle, or that only such modules import."""
    left = {name: set(targets) for name, targets in graph.items()}
    while free := {name for name, targets in left.items() if not targets & left.keys()}:
        for name in free:
            del left[name]
    return set(left)


# Classes that play the same part each in its own module: what a kernel gets, what a backward pass needs, an evaluator's
# figures.
ONE_EACH = {"Figures", "MatmulSaved", "MlpSaved", "RouteSaved", "_Inputs", "_Kernel", "_Scratch"}


def test_no_two_classes_share_a_name():
    homes: dict[str, list[str]] = {}
    for module, path in FILES.items():
        if in_package(module, "moe_kernels") or in_package(module, "limoe"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef) and node.name not in ONE_EACH:
                    homes.setdefault(node.name, []).append(module)
    assert not {name: modules for name, modules in homes.items() if len(modules) > 1}


@pytest.mark.parametrize("module", [name for name in FILES if in_package(name, "moe_kernels")])
def test_moe_kernels_imports_run_downwards(module):
    number, entry = level_of(module)
    for imported in sorted(imports_of(module)):
        if in_package(imported, "moe_kernels"):
            other_number, other_entry = level_of(imported)
            same_package = entry.endswith(".*") and other_entry == entry
            assert other_number < number or same_package, f"{module} imports {imported}, which is not below it"


@pytest.mark.parametrize("module", [name for name in FILES if name.count(".") and in_package(name, "limoe")])
def test_limoe_imports_run_downwards(module):
    room = room_of(module)
    for imported in sorted(imports_of(module)):
        if imported.startswith("limoe."):
            other = room_of(imported)
            assert other <= room, f"{module} imports {imported}, whose room is not below it"


def room_of(module: str) -> int:
    name = module.split(".")[1]
    return len(ROOMS) if name == "__main__" else ROOMS.index(name)


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("moe_kernels", {"moe_kernels", "jax", "jaxtyping", "numpy"}),
        ("reference", {"reference", "numpy"}),
    ],
)
def test_packages_know_only_what_they_may(package, allowed):
    for module in FILES:
        if in_package(module, package):
            unknown = {name for name in imports_of(module) if name.split(".")[0] not in allowed | STANDARD}
            assert not unknown, f"{module} imports {sorted(unknown)}; {package} may only import {sorted(allowed)}"


# The table of chips is plain data, and the precise matmul three lines: whoever needs them may reach for them.
REACHES_CHIPS = ("limoe.model.attention_kernel", "limoe.plan.pods", "limoe.plan.prices", "limoe.plan.scheduled")


def test_limoe_reaches_the_kernels_in_two_places_and_never_the_reference():
    for module in FILES:
        if in_package(module, "limoe"):
            names = {name.split(".")[0] for name in imports_of(module)}
            assert "reference" not in names, f"{module} imports the reference that it is tested against"
            allowed = {"moe_kernels.chips", "moe_kernels.precision"} if module in REACHES_CHIPS else set()
            if module not in ("limoe.model.moe", "limoe.plan.planner"):
                assert not {name for name in imports_of(module) if in_package(name, "moe_kernels")} - allowed, (
                    f"{module} imports moe_kernels; only limoe.model.moe and limoe.plan.planner may"
                )


def test_every_tpu_kernel_says_what_it_costs():
    """`limoe plan` counts the work of a compiled program, and of a kernel it sees the estimate alone."""
    calls = [
        (module, node)
        for module, path in FILES.items()
        if in_package(module, "moe_kernels.backends.tpu") or in_package(module, "limoe")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "pallas_call"
    ]
    # All kernels of the layer go through one launcher, whose `Call` has no default for them.
    assert len(calls) >= 2
    for module, call in calls:
        named = {keyword.arg for keyword in call.keywords}
        assert "cost_estimate" in named, f"{module}, line {call.lineno}: the kernel has no cost estimate"


def test_nothing_imports_tests_benchmarks_or_examples():
    for module in FILES:
        own = module.split(".")[0]
        forbidden = {"tests"} if own in ("tests", "benchmarks") else {"tests", "benchmarks", "examples"}
        names = {name.split(".")[0] for name in imports_of(module)} - {own}
        assert not names & forbidden, f"{module} imports {sorted(names & forbidden)}"


@pytest.mark.parametrize("package", SHIPPED)
def test_no_import_cycles(package):
    inside = {name for name in FILES if in_package(name, package)}
    # A package's own __init__ is imported by everything in it; only what it imports itself counts.
    graph = {name: {target for target in imports_of(name) & inside if target != name} for name in inside}
    assert not cycles(graph), f"these import each other in a circle: {sorted(cycles(graph))}"


def test_cycles_are_found():
    assert cycles({"a": {"b"}, "b": {"a"}, "c": set(), "d": {"c"}}) == {"a", "b"}
    assert cycles({"a": {"b"}, "b": {"c"}, "c": set()}) == set()


def test_third_party_imports_are_declared():
    layer = declared(PYPROJECT["project"]["dependencies"])
    trainer = declared([*EXTRAS["train"], *EXTRAS["tensorboard"]])
    providers = importlib.metadata.packages_distributions()
    allowed_for = {"moe_kernels": layer, "reference": layer, "limoe": layer | trainer, "examples": layer | trainer}
    for package, allowed in allowed_for.items():
        used = {name.split(".")[0] for module in FILES if in_package(module, package) for name in imports_of(module)}
        for name in sorted(used - STANDARD - set(OURS)):
            distributions = {normal(distribution) for distribution in providers.get(name, [name])}
            assert distributions & allowed, (
                f"{package} imports {name} (of {sorted(distributions)}), not declared for it"
            )


def test_the_command_knows_what_the_extra_train_installs():
    from limoe.cli import TRAINER

    providers = importlib.metadata.packages_distributions()
    assert {normal(distribution) for name in TRAINER for distribution in providers[name]} >= declared(EXTRAS["train"])
    assert len(TRAINER) == len(EXTRAS["train"])


def declared(requirements: list[str]) -> set[str]:
    return {normal(re.match(r"[\w.-]+", item)[0]) for item in requirements}


def normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_lines_of_code_are_counted():
    source = (
        '"""One.\n\nTwo."""\n\n# three\nx = 1  # four\n\n\ndef f():\n    """Five."""\n    return (\n        x\n    )\n'
    )
    assert len(measure.code_of(source)) == 5


@pytest.mark.parametrize("path", FILES.values(), ids=where)
def test_files_are_short(path):
    count = len(measure.code_of(path.read_text(encoding="utf-8")))
    assert count < MAX_LINES_OF_CODE, f"{where(path)} has {count} lines of code; is it still one idea?"


MEASURED = [
    (f"{name}.{function.name}", function)
    for name, path in FILES.items()
    if name.split(".")[0] in ("moe_kernels", "limoe", "benchmarks", "examples")
    for function in measure.functions(path.read_text(encoding="utf-8"))
]


def test_functions_are_short():
    found = {name: function.lines for name, function in MEASURED if function.lines > MAX_LINES_OF_A_FUNCTION}
    new, mended = sorted(found.keys() - LONG_FUNCTIONS), sorted(LONG_FUNCTIONS - found.keys())
    assert not new, f"over {MAX_LINES_OF_A_FUNCTION} lines of code: {[(name, found[name]) for name in new]}"
    assert not mended, f"these are short now, or gone: take them from LONG_FUNCTIONS: {mended}"


def test_parameter_lists_are_short():
    found = {name: function.parameters for name, function in MEASURED if function.parameters > MAX_PARAMETERS}
    new, mended = sorted(found.keys() - LONG_PARAMETER_LISTS), sorted(LONG_PARAMETER_LISTS - found.keys())
    assert not new, f"over {MAX_PARAMETERS} parameters; make a value of those that belong together: {new}"
    assert not mended, f"these are short now, or gone: take them from LONG_PARAMETER_LISTS: {mended}"


def test_functions_are_measured():
    source = (
        'class A:\n    def f(self, a, *b, c, **d):\n        """One."""\n\n        def g(): return 1\n        return g\n'
    )
    assert list(measure.functions(source)) == [("A.f", 3, 4), ("A.f.g", 1, 0)]


# limoe is a command and has no list of public names. These are the functions that a program of one's own starts from.
# Not limoe.train.loop.train: the shortest run takes ten seconds; tests/run_cases.py starts it.
ENTRIES = (
    *("config.presets.preset", "config.settings.override", "config.settings.to_json", "model.describe.describe"),
    *(
        "data.shards.write_shard",
        "data.shards.find_shards",
        "data.index_file.open_index",
        "data.tokenizer.train_tokenizer",
    ),
    *("train.losses.softmax_contrastive", "train.losses.sigmoid_contrastive", "train.losses.auxiliary_terms"),
    *("train.losses.total_loss", "train.step.prepare", "evaluate.zero_shot.zero_shot", "evaluate.retrieval.retrieval"),
    *("workdir.folder.Workdir", "report.pictures.draw_overview", "plan.pods.find_pod"),
)


def public_names() -> list[str]:
    """Functions and classes of moe_kernels' `__all__`, and of the modules in it; the entries to limoe."""
    package = importlib.import_module("moe_kernels")
    modules = {name: getattr(package, name) for name in package.__all__ if inspect.ismodule(getattr(package, name))}
    inside = [
        f"{module.__name__}.{own}"
        for module in modules.values()
        for own, value in vars(module).items()
        if not own.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]
    listed = [f"moe_kernels.{name}" for name in package.__all__ if name not in modules]
    return [*listed, *inside, *(f"limoe.{entry}" for entry in ENTRIES)]


def test_public_names_have_an_example():
    seen = []
    for name in public_names():
        module, _, own = name.rpartition(".")
        value = getattr(importlib.import_module(module), own)
        if inspect.isroutine(inspect.unwrap(value)) or inspect.isclass(value):
            seen.append(name)
            assert ">>> " in (inspect.getdoc(value) or ""), f"{name} has no docstring with an example that runs"
    assert {"moe_kernels.moe_mlp", "moe_kernels.Plan", "moe_kernels.moe_mlp_on_shard"} <= set(seen)
    assert {f"limoe.{entry}" for entry in ENTRIES} <= set(seen)


def test_every_folder_of_the_packages_is_packaged():
    for module, path in FILES.items():
        if module.split(".")[0] in SHIPPED:
            assert path.with_name("__init__.py") in FILES.values(), f"{where(path)} is in a folder without __init__.py"


def test_the_command_exists():
    for target in PYPROJECT["project"]["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_the_version_is_said_once():
    import limoe

    assert limoe.__version__ == PYPROJECT["project"]["version"]
    assert f"## [{limoe.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_no_file_names_a_place_of_one_machine():
    places = re.compile(
        r"(?<![\w.}:/])/(?:home|root|work|opt|Users|mnt|media)/\w|https?://[^\s\"']*/(?:simple/|packages/[0-9a-f]{2}/)"
    )
    top = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]
    inside = [path for folder in (*OURS, "docs", ".ci") for path in (ROOT / folder).rglob("*")]
    for path in [*top, *inside]:
        if path.suffix in {".py", ".md", ".toml", ".json", ".yaml", ".yml", ".cfg", ".txt", ""} and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            assert not (found := places.search(text)), f"{where(path)} names {found[0]!r}"
