"""The command line as a person meets it: what is printed where, exit statuses, and messages that help."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from run_cases import command, environment, ran, settings, summary

from limoe import cli
from limoe.config.presets import PRESETS, preset
from limoe.config.section import setting_types
from limoe.config.settings import SECTIONS
from limoe.train.progress import progress_bar


def main(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command."""
    status = cli.main(words)
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["trian"], 2, "there is no command 'trian'; did you mean 'train'?"),
        (["train", "--prest=tiny"], 2, "Did you mean: preset"),
        (["train", "--profile=-1"], 2, "flag --profile=-1: -1 is not a non-negative integer"),
        (["train", "--set"], 2, "Missing value for flag --set"),
        (["train", "quickly"], 2, "'quickly' is not expected after 'train'"),
        (["train", "train.steps=3"], 2, "'train.steps=3' is not expected after 'train'; put --set before it"),
        (["train", "--data=shards"], 2, "limoe train does not take --data; its flags are --preset, --workdir, --set"),
        (["eval", "--workdir=x", "--set", "train.steps=3"], 2, "limoe eval does not take --set"),
        (["describe", "--workdir=x"], 2, "limoe describe does not take --workdir"),
        (["eval"], 2, "eval needs --workdir=DIR"),
        (["report"], 2, "report needs --workdir=DIR"),
        (["eval", "--workdir=nowhere"], 1, "it has no config.json; give the folder of a training run"),
        (["train", "--preset=tinny"], 1, "there is no preset 'tinny'; did you mean 'tiny'?"),
        (["describe", "--preset=h-14"], 1, "did you mean 'h14'?"),
        (["train", "--set", "train.stps=3"], 1, "there is no setting 'train.stps'; did you mean train.steps?"),
        (["describe", "--set", "train.steps=many"], 1, "train.steps=many is not of the right type; use integer"),
        (["describe", "--set", "model.depth=2", "model.depth=3"], 1, "model.depth is given twice"),
        (["describe", "--set", "model.moe_layers=9"], 1, "must lie in 0..3 (model.depth=4)"),
    ],
)
def test_wrong_words(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    got, out, err = main(capsys, *words)
    assert (got, out) == (status, "") and err.startswith("limoe: ") and message in err
    assert not list(tmp_path.iterdir())


def test_without_arguments_it_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = main(capsys)
    assert (status, err) == (0, "") and out == f"{cli.USAGE}\n"
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize("words", [("--help",), ("-h",), ("help",), ("train", "--help", "--preset=h14")])
def test_help_names_every_flag_and_setting_with_its_default(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    status, out, _ = main(capsys, *words)
    shown = preset("h14" if len(words) > 1 else "tiny")
    assert status == 0
    for name in ("preset", "workdir", "set", "data", "json", "profile"):
        assert f"  --{name}  " in out
    assert "(default: tiny)" in out and "(default: runs/PRESET)" in out and "pixels" in out
    for section, kind in SECTIONS.items():
        for name in setting_types(kind):
            assert f"\n{section}.{name} = " in out
    assert f"model.depth = {shown.model.depth} " in out


@pytest.mark.parametrize("name", PRESETS)
def test_describe_as_json(capsys: pytest.CaptureFixture[str], name: str) -> None:
    status, out, _ = main(capsys, "describe", f"--preset={name}", "--json")
    found = json.loads(out)
    assert status == 0 and found["preset"] == name
    assert {"parameters_total", "parameters_per_token", "flops_per_example", "moe_layers"} <= set(found)
    assert found["moe_layers"] == list(PRESETS[name].model.moe_layers)


def test_describe_for_a_person_takes_several_settings(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = main(capsys, "describe", "--set", "model.num_experts=4", "steps=500", "--set", "batch_size=64")
    assert status == 0 and "500 steps of 64 pairs" in out and "4, 1" in out


def test_a_second_command_in_one_process_begins_anew(capsys: pytest.CaptureFixture[str]) -> None:
    main(capsys, "describe", "--preset=s32", "--json", "--set", "model.num_experts=4")
    status, out, _ = main(capsys, "describe")
    assert status == 0 and out.startswith("tiny: ") and "8, 1" in out


def test_settings(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = main(capsys, "settings", "--preset=b32")
    assert status == 0 and "train.batch_size = 16384  [integer]" in out


@pytest.mark.slow
def test_evaluation_of_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = ran(tmp_path / "run", "train.steps=4").folder
    status, out, _ = main(capsys, "eval", f"--workdir={run}", "--json")
    assert status == 0 and json.loads(out)["zero_shot_top1"] == summary(run)["zero_shot_top1"]
    status, out, _ = main(capsys, "eval", f"--workdir={run}")
    assert status == 0 and out.startswith("tiny, step 4\n  zero-shot, 480 images: top-1 ")
    status, out, err = main(capsys, "eval", f"--workdir={run}", f"--data={tmp_path / 'nothing'}", "--json")
    assert (status, out) == (1, "") and "no shards found" in err


@pytest.mark.slow
def test_python_m_limoe_is_quiet_and_brief(tmp_path: Path) -> None:
    """One process from start to end: only our own words, and no bar drawn a thousand times into a file."""
    words = command("train", "--set", *settings("train.steps=5"), "--profile=2")
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("limoe train: preset tiny, work folder runs/tiny\n")
    assert "tiny: 5 steps in" in done.stdout
    lines = done.stderr.splitlines()
    assert all(line.startswith(("compiling the first step: ", "training: ")) for line in lines), done.stderr
    assert len(lines) <= 5 and "\r" not in done.stderr
    assert summary(tmp_path / "runs" / "tiny")["steps"] == 5


@pytest.mark.parametrize(
    ("word", "before", "after"),
    [
        ("train", "", "glibc.malloc.hugetlb=1"),
        ("train", "glibc.malloc.check=0", "glibc.malloc.check=0:glibc.malloc.hugetlb=1"),
        ("train", "glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
        ("eval", "", ""),
    ],
)
def test_training_begins_again_with_huge_pages_unless_somebody_has_chosen(word: str, before: str, after: str) -> None:
    say = "cli.main = lambda words: print(words, os.environ['GLIBC_TUNABLES']) or 0"
    words = [sys.executable, "-c", f"import os; from limoe import cli; {say}; cli.run()", word, "--workdir=a b"]
    chosen = {**environment(), "GLIBC_TUNABLES": before}
    done = subprocess.run(words, env=chosen, capture_output=True, text=True, check=True)
    assert done.stdout == f"['{word}', '--workdir=a b'] {after}\n"


def test_a_reader_that_goes_away_early() -> None:
    line = f"{sys.executable} -c 'from limoe.cli import run; run()' --help | head -n 1"
    done = subprocess.run(line, shell=True, env=environment(), capture_output=True, text=True, check=False)
    assert done.stdout.startswith("limoe: train and evaluate") and done.stderr == ""


def test_a_bar_in_a_file_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    with progress_bar("counting", total=1000, unit="step") as bar:
        for _ in range(1000):
            bar.set_postfix_str("loss 1.0", refresh=False)
            bar.update(1)
    lines = written.getvalue().splitlines()
    assert len(lines) == 2 and lines[0].startswith("counting: 0/1000 ")
    assert lines[1].startswith("counting: 1000/1000 ") and "loss 1.0" in lines[1]


def test_a_bar_on_a_terminal_is_one_line_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    written = Terminal()
    monkeypatch.setattr(sys, "stderr", written)
    with progress_bar("counting", total=3, unit="step", done=1) as bar:
        bar.update(2)
    first, last = written.getvalue().strip("\r").split("\r")
    assert "1/3" in first and "3/3" in last and last.endswith("\n") and "\n" not in first
