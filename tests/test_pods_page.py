"""docs/pods.md: its commands cost minutes or whole pods, so they are parsed here, flag by flag, and not run."""

import re
import shlex
import tomllib

import pytest
from test_docs import ROOT, blocks, settings

from limoe import cli
from limoe.config.presets import preset
from limoe.config.schema import Config
from limoe.config.settings import SECTIONS, override
from limoe.parallel.mesh import AXES
from limoe.plan.pods import topologies

PAGE = ROOT / "docs" / "pods.md"
COMMANDS = [line for block in blocks(PAGE) if block.language == "sh" for line in block.text.splitlines() if line]
TEXT = PAGE.read_text(encoding="utf-8")


def config_of(command: str) -> Config:
    name = re.search(r"--preset=(\S+)", command)
    return override(preset(name[1] if name else "tiny"), settings(command))


def test_the_page_has_commands():
    assert {shlex.split(command)[1] for command in COMMANDS if command.startswith("limoe")} == {"plan", "train"}


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("limoe ")])
def test_flags_and_settings_of_a_command(command):
    words = shlex.split(command)
    taken = cli._COMMANDS[words[1]][1]
    for word in words[2:]:
        if word.startswith("--"):
            assert word.removeprefix("--").partition("=")[0] in taken, word
    config_of(command)
    if words[1] == "plan":
        topology = next(word.partition("=")[2] for word in words if word.startswith("--topology="))
        assert topology in topologies(topology.partition(":")[0])


def test_the_full_run_fills_the_pod_of_the_plan():
    (command,) = (command for command in COMMANDS if "train --preset=h14" in command)
    assert config_of(command).mesh.num_devices == 8 * 8 * 8


def test_the_extras_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in ("aot", "tpu"):
        assert f"pip install '.[train,{extra}]'" in COMMANDS and extra in extras


def test_settings_named_in_prose_exist():
    for name in re.findall(r"`((?:model|mesh|data|train|loss)\.\w+)(?:=[\w.]+)?`", TEXT):
        section, _, field = name.partition(".")
        assert field in {f.name for f in SECTIONS[section].__dataclass_fields__.values()}, name
    assert "slice x data x expert" in TEXT and AXES == ("slice", "data", "expert")
