"""The documentation is true: the code blocks of a page run from top to bottom, and its links lead somewhere.

A shell command runs as written unless LONG says that it takes too long here; then its last part runs with the settings
given there. Commands of CI run in CI, and it is checked that they do.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from run_cases import environment

import moe_kernels

ROOT = Path(__file__).resolve().parents[1]
SHELLS = ("bash", "console")
PAGES = sorted(
    [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")), *(ROOT / "docs").glob("*.md")]
)

TWO_STEPS = "train.steps=2 train.batch_size=16 optimizer.warmup_steps=1 optimizer.cooldown_steps=1"
SMALL_WORLD = "data.world_pairs=256 data.cache_dir=cache"
SMALL_MODEL = "model.depth=2 model.moe_layers=1 model.width=32 model.mlp_width=64 model.num_heads=2"
SHORT = f"{TWO_STEPS} {SMALL_MODEL} {SMALL_WORLD}"

# A suite of minutes, and one operation of it that takes seconds.
QUICK = "--case=tiny --op=dispatch --check"

# Commands that take minutes, and what makes their last part short; everything else of them is kept.
LONG = {
    "python3 -m venv .venv && .venv/bin/pip install '.[train]' && .venv/bin/limoe train": f"--set {SHORT}",
    ".venv/bin/limoe train --workdir=runs/short --set train.steps=100 warmup_steps=20 cooldown_steps=50": (
        f"train.batch_size=16 {SMALL_MODEL} {SMALL_WORLD}"
    ),
    ".venv/bin/limoe train --workdir=runs/squares --set data.shards=shards data.eval_shards=shards": SHORT,
    ".venv/bin/python benchmarks/dispatch.py": QUICK,
    '.venv/bin/limoe train --workdir=runs/toys --set data.sources=\'[{"path": "toys/captions.json", "weight": 2}, '
    '{"path": "toys/by_class", "templates": "simple"}]\' data.eval_shards=toys/by_class data.preprocess=augment': SHORT,
    ".venv/bin/python examples/language_model.py --family=deepseek_v3": "--steps=2",
}


class Block(NamedTuple):
    language: str
    line: int
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page; `line` is that of the opening fence."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(match[1], text.count("\n", 0, match.start()) + 1, match[2]) for match in found]


def commands(block: Block) -> list[str]:
    """The commands of a shell block; in a console block those after `$ `, the rest is output."""
    lines = re.sub(r"\\\n\s*", "", block.text).splitlines()
    if block.language == "console":
        return [line[2:] for line in lines if line.startswith("$ ")]
    return [line for line in lines if line and not line.startswith("#")]


def all_commands(page: Path) -> list[str]:
    return [command for block in blocks(page) if block.language in SHELLS for command in commands(block)]


EVERY_COMMAND = [command for page in PAGES for command in all_commands(page)]


def run_by_ci(command: str) -> bool:
    """Whether .ci/run runs this very command: it takes it from the README, or has it in its own text."""
    script = (ROOT / ".ci" / "run").read_text()
    test_command = subprocess.run([".ci/run", "test-command"], cwd=ROOT, capture_output=True, text=True, check=True)
    return command in (".ci/run", test_command.stdout.strip()) or command in script


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder that looks like the checkout with its virtual environment; what is written in it is thrown away."""
    for path in ROOT.iterdir():
        if path.name not in (".venv", ".git", "runs", "build"):
            (tmp_path / path.name).symlink_to(path)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, words in {"python": "", "python3": "", "limoe": "-m limoe "}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}"$@"\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tables():
    """What a page adds to a table of moe_kernels, it adds for itself alone."""
    before = [(table, dict(table)) for table in (moe_kernels.ACTIVATIONS, moe_kernels.ROUTERS)]
    yield
    for table, entries in before:
        table.clear()
        table.update(entries)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_runs_from_top_to_bottom(page, checkout, tables):
    names = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language not in ("python", *SHELLS):
            continue
        if block.language == "python":
            # Blank lines in front give a traceback the page's own line numbers.
            exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
        else:
            for command in commands(block):
                run(command, f"{page.name}:{block.line}")


def run(command: str, place: str) -> None:
    if command in LONG:
        command = f"{command.rpartition(' && ')[2]} {LONG[command]}"
    elif run_by_ci(command):
        return
    done = subprocess.run(
        ["bash", "-ec", command], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
    )
    assert done.returncode == 0, f"{place}: {command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_the_block_of_each_family_takes_at_most_12_lines():
    page = ROOT / "docs" / "families.md"
    first = [re.match(r"def (\w+)\(.*?\n\n\n", block.text, re.DOTALL) for block in blocks(page)]
    counted = {match[1]: len(match[0].strip().splitlines()) for match in first if match}
    table = re.findall(r"^\| \[([^]]+)\].*\| (\d+) \|[^|]*\|$", page.read_text(), re.MULTILINE)
    said = {re.sub(r"\W", "_", name).lower(): int(lines) for name, lines in table}
    assert len(said) == 12 and max(said.values()) <= 12
    said["llama4"], said["olmoe"] = said.pop("llama_4"), said["qwen3_moe"]
    assert counted == {name: lines for name, lines in said.items() if name != "olmoe"}


def test_the_list_of_long_commands_is_up_to_date():
    assert not LONG.keys() - set(EVERY_COMMAND), "these commands are in no page any more"


def test_the_readme_begins_with_two_commands_that_set_themselves_up():
    train, test = all_commands(ROOT / "README.md")[:2]
    assert train.startswith("python3 -m venv .venv && ") and train.endswith("/limoe train")
    assert test.startswith("python3 -m venv .venv && ") and run_by_ci(test)


def settings(command: str) -> list[str]:
    """What follows --set in a command, up to the next flag."""
    words = shlex.split(command)
    found = []
    for word in words[words.index("--set") + 1 :] if "--set" in words else []:
        if word.startswith("-"):
            break
        found.append(word)
    return found


@pytest.mark.parametrize("command", [command for command in EVERY_COMMAND if "limoe " in command])
def test_settings_in_commands_exist(command):
    """As written, not as shortened: the long form must be accepted too."""
    from limoe.config.presets import preset
    from limoe.config.settings import override

    name = re.search(r"--preset=(\S+)", command)
    override(preset(name[1] if name else "tiny"), settings(command))


def links(page: Path) -> set[str]:
    """The links of a page to other files of the repository."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s#]+)", prose)
    return {target for target in targets if not re.match(r"https?:|mailto:", target)}


LINKS = [(page.relative_to(ROOT), link) for page in [*PAGES, ROOT / "CHANGELOG.md"] for link in sorted(links(page))]


@pytest.mark.parametrize(("page", "target"), LINKS, ids=str)
def test_links_lead_somewhere(page, target):
    assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}, which is not there"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_pages_of_the_site_link_to_its_pages_alone(page):
    """The site holds `docs` alone; .ci/run builds it and finds all else that leads nowhere."""
    outside = {target for target in links(page) if (ROOT / "docs") not in (page.parent / target).resolve().parents}
    assert not outside, f"{page.name} links to {outside}; name the file without a link"
