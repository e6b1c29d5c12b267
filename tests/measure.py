"""Figures of the code: files, lines of code, functions, imports. `python tests/measure.py [CHECKOUT]` prints them.

tests/test_architecture.py holds the code to bounds on them.
"""

import ast
import io
import resource
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
OURS = ("moe_kernels", "limoe", "reference", "benchmarks", "examples", "tests")


class Function(NamedTuple):
    """A function, or a method of a class, of a module."""

    name: str
    lines: int
    parameters: int


def python_files(root: Path = ROOT) -> dict[str, Path]:
    """The files of all packages by the names of their modules."""
    return {module_name(path, root): path for package in OURS for path in sorted((root / package).rglob("*.py"))}


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def in_package(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imports_of(module: str, files: Mapping[str, Path]) -> frozenset[str]:
    """Full names of all that a module imports, anywhere in it; `from a import b` is a.b if that is a module, else a."""
    path = files[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in files else base for alias in node.names}
    return frozenset(found)


def code_of(source: str) -> frozenset[int]:
    """The lines that hold something other than white space, comments and docstrings, from 1."""
    docstrings = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            code |= set(range(token.start[0], token.end[0] + 1))
    return frozenset(code - docstrings)


def functions(source: str) -> Iterator[Function]:
    """Every function with its lines of code, those of functions in it included, and its parameters without `self`."""
    code = code_of(source)

    def inside(node: ast.AST, prefix: str, method: bool) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                name, given = prefix + child.name, child.args
                count = len([*given.posonlyargs, *given.args, *given.kwonlyargs])
                count += (given.vararg is not None) + (given.kwarg is not None)
                static = any(getattr(decorator, "id", "") == "staticmethod" for decorator in child.decorator_list)
                lines = len([line for line in code if child.lineno <= line <= (child.end_lineno or child.lineno)])
                yield Function(name, lines, count - (method and not static))
                yield from inside(child, f"{name}.", False)
            elif isinstance(child, ast.ClassDef):
                yield from inside(child, f"{prefix}{child.name}.", True)
            else:
                yield from inside(child, prefix, method)

    return inside(ast.parse(source), "", False)


def room_of(module: str, files: Mapping[str, Path]) -> str:
    """The folder that a module lies in; a file that lies in the package's own folder is a room of its own."""
    folder = module if files[module].name == "__init__.py" else module.rpartition(".")[0]
    return folder if "." in folder else module


def report(root: Path) -> Iterator[str]:
    """Lines of text with the figures of a checkout."""
    files = python_files(root)
    for package in OURS:
        inside = [name for name in files if in_package(name, package)]
        sources = {name: files[name].read_text(encoding="utf-8") for name in inside}
        lines = {name: len(code_of(source)) for name, source in sources.items()}
        every = [(name, function) for name, source in sources.items() for function in functions(source)]
        longest = max(every, key=lambda item: item[1].lines)
        widest = max(every, key=lambda item: item[1].parameters)
        edges = {
            (name, other) for name in inside for other in imports_of(name, files) if other in lines and other != name
        }
        arrows = {(room_of(name, files), room_of(other, files)) for name, other in edges}
        yield f"{package}: {len(inside)} files, {sum(source.count(chr(10)) for source in sources.values())} lines, " + (
            f"{sum(lines.values())} of code; longest file {max(lines.values())}"
        )
        yield f"  functions over 60 lines: {sum(function.lines > 60 for _, function in every)}, longest: " + (
            f"{longest[1].lines} ({longest[0]}.{longest[1].name})"
        )
        yield f"  parameter lists over 8: {sum(function.parameters > 8 for _, function in every)}, longest: " + (
            f"{widest[1].parameters} ({widest[0]}.{widest[1].name})"
        )
        yield f"  imports between modules: {len(edges)}, between rooms: {len({a for a in arrows if a[0] != a[1]})}"
    jax = seconds(root, "-c", "import jax, numpy, jaxtyping")
    yield f"import moe_kernels: {seconds(root, '-c', 'import moe_kernels') - jax:.2f} s over the {jax:.2f} s of jax"
    yield f"limoe --help: {seconds(root, '-m', 'limoe', '--help'):.2f} s"


def seconds(root: Path, *words: str) -> float:
    """The seconds of processor time that Python takes, the least of three runs after one that leaves its bytecode."""
    taken = []
    for _ in range(4):
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], cwd=root, check=True, stdout=subprocess.DEVNULL)
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime)
    return min(taken[1:])


if __name__ == "__main__":
    print(*report(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT), sep="\n")
