"""The work folder: nobody else's files are touched, no two runs share it, and every step is in the log exactly once."""

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from limoe.config.presets import preset
from limoe.config.settings import from_json, override, to_json
from limoe.data import files
from limoe.workdir.folder import Workdir, WorkdirError
from limoe.workdir.metrics import MetricsLog, read_metrics, write_json

ROOT = Path(__file__).parents[1]
TINY = preset("tiny")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As on a disk with that much room: a write goes as far as it can, and the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_new_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "tiny"
    with Workdir.open(folder, TINY) as workdir:
        assert from_json((folder / "config.json").read_text()) == TINY
        assert not workdir.finished and workdir.figures.is_dir()
        assert workdir.checkpoints == folder / "checkpoints"
        assert workdir.metrics == folder / "metrics.jsonl"
        write_json(workdir.summary, {"steps": 3})
        assert workdir.finished
    assert Workdir.existing(folder).finished


def test_the_same_settings_go_on(tmp_path: Path) -> None:
    Workdir.open(tmp_path, TINY).close()
    before = (tmp_path / "config.json").stat().st_mtime_ns
    (tmp_path / "metrics.jsonl").write_text("kept")
    with Workdir.open(tmp_path, TINY):
        assert (tmp_path / "metrics.jsonl").read_text() == "kept"
        assert (tmp_path / "config.json").stat().st_mtime_ns == before


def test_other_settings_are_refused(tmp_path: Path) -> None:
    Workdir.open(tmp_path, TINY).close()
    content = (tmp_path / "config.json").read_bytes()
    other = override(TINY, ["train.seed=7", "model.moe_layers=()"])
    with pytest.raises(WorkdirError, match=r"model\.moe_layers \(.*train\.seed \(0 there, 7 now\); .*--workdir"):
        Workdir.open(tmp_path, other)
    with pytest.raises(
        WorkdirError, match=r"preset \('tiny' there, 'tiny-dense' now\), model\.moe_layers \(1,3 there, \(\) now\); "
    ):
        Workdir.open(tmp_path, preset("tiny-dense"))
    with pytest.raises(WorkdirError, match=r"settings: data\.shards \('' there, 'mine' now\); "):
        Workdir.open(tmp_path, override(TINY, ["data.shards=mine"]))
    with pytest.raises(
        WorkdirError, match=r"settings: preset \('tiny' there, 'b16' now\), .*, and \d+ more; "
    ) as caught:
        Workdir.open(tmp_path, preset("b16"))
    assert str(caught.value).count(" there, ") == 5
    assert (tmp_path / "config.json").read_bytes() == content
    Workdir.open(tmp_path, TINY).close()  # a refusal frees the lock


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"{}", to_json(TINY).replace('"depth": 4', '"depth": -4').encode()]
)
def test_a_damaged_config_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    for use in (lambda: Workdir.open(tmp_path, TINY), lambda: Workdir.existing(tmp_path)):
        with pytest.raises(WorkdirError, match=r"config\.json cannot be used"):
            use()
    assert (tmp_path / "config.json").read_bytes() == content


def test_a_bucket_is_refused_and_nothing_is_made_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WorkdirError, match=r"gs://bucket/run is not in a file system.*--workdir"):
        Workdir.open("gs://bucket/run", TINY)
    assert not os.listdir(tmp_path)


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(WorkdirError, match=r"holds other files \(thesis\.tex\).*--workdir"):
        Workdir.open(tmp_path, TINY)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(WorkdirError, match="is a file"):
        Workdir.open(tmp_path / "thesis.tex", TINY)


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("1\n")
    (tmp_path / ".config.json.1-abcdef01.tmp").write_text("{")
    Workdir.open(tmp_path, TINY).close()
    assert sorted(os.listdir(tmp_path)) == [".lock", "config.json", "figures"]


def test_only_a_run_without_a_step_is_discarded(tmp_path: Path) -> None:
    with Workdir.open(tmp_path, TINY) as workdir:
        (tmp_path / "notes.txt").write_text("the user's")
        workdir.tokenizer.write_bytes(b"model")
        workdir.metrics.write_bytes(b"")
        workdir.checkpoints.mkdir()
        assert workdir.discard_unstarted()
    assert sorted(os.listdir(tmp_path)) == [".lock", "notes.txt"]
    (tmp_path / "notes.txt").unlink()
    other = override(TINY, ["train.seed=7"])
    with Workdir.open(tmp_path, other) as workdir:
        MetricsLog(workdir.metrics).append(1, {})
        before = sorted(os.listdir(tmp_path))
        assert not workdir.discard_unstarted()
        assert sorted(os.listdir(tmp_path)) == before


def test_a_folder_where_none_can_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for path, reason in (("/proc/run", "the system makes no folders there"), (tmp_path / "file" / "run", "a file is")):
        with pytest.raises(files.StorageError, match=f"cannot make the folder {path}: {reason}.*choose another folder"):
            Workdir.open(path, TINY)


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    with Workdir.open(tmp_path, TINY):
        with pytest.raises(WorkdirError, match=f"another run .process {os.getpid()}. is using {tmp_path}"):
            Workdir.open(tmp_path, TINY)
        assert Workdir.existing(tmp_path).config == TINY  # looking is allowed
    Workdir.open(tmp_path, TINY).close()


def test_a_killed_run_frees_its_folder(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom limoe.config.presets import preset\nfrom limoe.workdir.folder import Workdir\n"
        "workdir = Workdir.open(sys.argv[1], preset('tiny'))\nprint('open', flush=True)\ntime.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"open\n"
    with pytest.raises(WorkdirError, match=f"process {child.pid}"):
        Workdir.open(tmp_path, TINY)
    child.kill()
    child.communicate(timeout=60)
    Workdir.open(tmp_path, TINY).close()


def test_looking_needs_a_work_folder(tmp_path: Path) -> None:
    with pytest.raises(WorkdirError, match="is not a work folder"):
        Workdir.existing(tmp_path / "absent")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_at_the_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(files.StorageError, match=r"cannot write .*config\.json: the disk is full"):
            Workdir.open(tmp_path, TINY)
    assert os.listdir(tmp_path) == [".lock"]
    Workdir.open(tmp_path, TINY).close()


class Rates(NamedTuple):
    image: float
    text: Any


def test_figures_become_strict_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(
        1,
        {
            "loss": jnp.float32(0.5),
            "half": jnp.array([1.5, np.inf], jnp.bfloat16),
            "kept": {"image": np.arange(3), 7: [True, None, -np.inf]},
            "rates": Rates(np.float64(0.25), jnp.bool_(True)),
            "bad_keys": ["für/000\n1"],
            "nan": float("nan"),
        },
    )
    (line,) = log.path.read_text().splitlines()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(line, parse_constant=refuse) == {
        "step": 1,
        "loss": 0.5,
        "half": [1.5, None],
        "kept": {"image": [0, 1, 2], "7": [True, None, None]},
        "rates": {"image": 0.25, "text": True},
        "bad_keys": ["für/000\n1"],
        "nan": None,
    }
    with pytest.raises(ValueError, match=r"figures\.model\[0\] is a object"):
        log.append(2, {"model": [object()]})
    with pytest.raises(ValueError, match="named 'step'"):
        log.append(2, {"step": 3})
    assert len(list(read_metrics(log.path))) == 1


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


def test_every_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 8):
        log.append(step, {"loss": step / 3})
        assert steps(path)[-1] == step  # on the file at once
    log.sync()
    with pytest.raises(ValueError, match="already holds step 7, so step 7"):
        log.append(7, {})
    again = MetricsLog(path)
    assert again.last_step == 7
    again.truncate_after(9)
    again.truncate_after(4)
    assert again.last_step == 4
    for step in range(5, 9):
        again.append(step, {"loss": 0})
    assert steps(path) == list(range(1, 9))
    again.truncate_after(0)
    assert (again.last_step, path.read_bytes()) == (None, b"")
    again.append(1, {})
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_line_cut_anywhere_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append(1, {"loss": 0.5})
    whole = path.stat().st_size
    log.append(2, {"loss": 0.25})
    content = path.read_bytes()
    for size in range(whole, len(content)):
        path.write_bytes(content[:size])
        assert steps(path) == [1]
        reopened = MetricsLog(path)
        assert (reopened.last_step, path.read_bytes()) == (1, content[:whole])
        reopened.append(2, {"loss": 0.25})
        assert path.read_bytes() == content
    path.write_bytes(content[:3])
    assert (MetricsLog(path).last_step, path.read_bytes(), steps(path)) == (None, b"", [])


@pytest.mark.parametrize("long", [1, 10_000, 70_000])  # the end is read in blocks of 65,536 bytes
def test_a_log_is_cut_after_any_step(tmp_path: Path, long: int) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    here = [2, 3, 7, 8, 20]
    for step in here:
        log.append(step, {"text": "x" * (long if step % 2 else 3)})
    content = path.read_bytes()
    for step in range(22):
        path.write_bytes(content)
        again = MetricsLog(path)
        assert again.last is not None and set(again.last) == {"step", "text"}
        again.truncate_after(step)
        left = [other for other in here if other <= step]
        assert steps(path) == left and again.last_step == (left[-1] if left else None)
        assert path.read_bytes() == content[: path.stat().st_size]


def test_numbers_are_written_with_the_digits_of_their_dtype(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    single = np.random.default_rng(0).random(1000, np.float32)
    log.append(1, {"single": single, "one": jnp.float32(0.1), "double": np.float64(0.1) / 3, "half": jnp.bfloat16(0.1)})
    line = log.path.read_text()
    assert '"one":0.1,' in line and len(line) < 12 * 1000
    (found,) = read_metrics(log.path)
    assert (np.array(found["single"], np.float32) == single).all()
    assert found["double"] == 0.1 / 3 and found["half"] == float(jnp.bfloat16(0.1))


@pytest.mark.parametrize(
    "line", [b"garbage", b"[1]", b'{"loss": 1}', b'{"step": "3"}', b'{"step": true}', b"\xff", b""]
)
def test_a_foreign_line_is_told_and_kept(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line + b"\n")
    for use in (MetricsLog, steps):
        with pytest.raises(WorkdirError, match=r"metrics\.jsonl has a line that is not"):
            use(path)
    assert path.read_bytes() == line + b"\n"


def test_a_failed_append_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append(1, {"text": "x" * 100})
    before = path.read_bytes()
    with largest_file(len(before) + 50), pytest.raises(OSError, match="File too large"):
        log.append(2, {"text": "y" * 100})
    assert path.read_bytes() == before
    log.append(2, {})
    assert steps(path) == [1, 2]


def test_a_full_disk_is_told_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        log.append(step, {})
    write_json(tmp_path / "summary.json", {"steps": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        for name, action in {
            "metrics.jsonl": log.sync,
            "summary.json": lambda: write_json(tmp_path / "summary.json", {"steps": 2}),
        }.items():
            with pytest.raises(files.StorageError, match=f"cannot write .*{name}: the disk is full"):
                action()
        assert steps(log.path) == [1, 2] and log.last_step == 2
        log.truncate_after(1)  # needs no room
    assert steps(log.path) == [1] and log.last_step == 1
    assert json.loads((tmp_path / "summary.json").read_text()) == {"steps": 1}
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "summary.json"]


def test_a_summary_is_strict_json(tmp_path: Path) -> None:
    write_json(tmp_path / "summary.json", {"rate": np.float32(np.nan), "steps": np.int32(3)})
    assert (tmp_path / "summary.json").read_text() == '{\n  "rate": null,\n  "steps": 3\n}\n'
