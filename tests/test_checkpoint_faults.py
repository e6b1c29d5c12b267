"""Checkpoints: damage is seen, and neither a full disk nor a kill at any moment loses the last good one."""

import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import pytest
from checkpoint_cases import SMALL, assert_same_bits, files_of, saved, small_state, truncate

from limoe.workdir.checkpoint import CheckpointError, Checkpoints

ROOT = Path(__file__).parents[1]


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_seen(tmp_path: Path) -> None:
    original = tmp_path / "original"
    saved(original, 1, 2)
    names = [path.relative_to(original) for path in files_of(original / "step_00000002")]
    assert len(names) >= 5
    chance = random.Random(0)
    for name in names:
        folder = tmp_path / "damaged"
        shutil.copytree(original, folder)
        flip(folder / name, chance.randrange(8 * (folder / name).stat().st_size))
        damaged = (folder / name).read_bytes()
        restored = Checkpoints(folder).restore(SMALL)
        assert restored is not None and restored.step == 1, name
        assert_same_bits(restored.state, small_state(1))
        (message,) = restored.skipped
        assert str(folder / "step_00000002") in message
        assert (name.name if name.name != "digests.json" else "") in message
        # Nothing is lost, and its step can be saved again.
        aside = folder / "step_00000002.damaged" / name.relative_to("step_00000002")
        assert aside.read_bytes() == damaged
        shutil.rmtree(folder)


def test_any_flipped_bit_in_the_digests_is_seen(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    path = tmp_path / "step_00000001" / "digests.json"
    content = path.read_bytes()
    chance = random.Random(0)
    for bit in [0, *chance.sample(range(8 * len(content)), 60), 8 * len(content) - 1]:
        flip(path, bit)
        with pytest.raises(CheckpointError, match="no checkpoint"):
            Checkpoints(tmp_path).restore(SMALL)
        path.write_bytes(content)
    assert Checkpoints(tmp_path).restore(SMALL) is not None


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("harm", [truncate, empty, Path.unlink])
@pytest.mark.parametrize("name", ["digests.json", "contents.json", "state/_METADATA", "state/manifest.ocdbt"])
def test_a_cut_or_missing_file_is_seen(tmp_path: Path, harm: Any, name: str) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    harm(tmp_path / "step_00000002" / name)
    restored = checkpoints.restore(SMALL)
    assert restored is not None and restored.step == 1
    assert Path(name).name in restored.skipped[0]


def test_training_goes_on_after_damage(tmp_path: Path) -> None:
    for _ in range(2):
        checkpoints = saved(tmp_path, *({1, 2} - set(Checkpoints(tmp_path).steps())))
        truncate(tmp_path / "step_00000002" / "contents.json")
        restored = checkpoints.restore(SMALL)
        assert restored is not None and restored.step == 1
    assert sorted(os.listdir(tmp_path)) == ["step_00000001", "step_00000002.damaged", "step_00000002.damaged-2"]


def test_all_damaged_is_never_a_new_start(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    for step in (1, 2):
        truncate(tmp_path / f"step_0000000{step}" / "contents.json")
    before = files_of(tmp_path)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"step_00000002.*contents\.json has changed.*step_00000001.*start"):
            Checkpoints(tmp_path).restore(SMALL)
    assert files_of(tmp_path) == before


def test_only_damaged_ones_left_is_never_a_new_start(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / "step_00000001").rename(tmp_path / "step_00000001.damaged")
    with pytest.raises(CheckpointError, match="set aside before"):
        Checkpoints(tmp_path).restore(SMALL)


@pytest.mark.parametrize("surfaces_in", ["save", "wait", "restore"])
def test_a_failed_write_is_told_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, surfaces_in: str
) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    before = {path: path.read_bytes() for path in files_of(tmp_path)}

    def full(self: Any, directory: Path) -> None:
        (Path(directory).parent / "half").write_text("written")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.PyTreeCheckpointHandler, "finalize", full)
        checkpoints.save(3, small_state(3))
        with pytest.raises(
            CheckpointError, match=r"step_00000003: .*No space left.*step 2 .*intact.*free space"
        ) as error:
            {
                "save": lambda: checkpoints.save(4, small_state(4)),
                "wait": checkpoints.wait,
                "restore": lambda: checkpoints.restore(SMALL),
            }[surfaces_in]()
    assert isinstance(error.value.__cause__, OSError)
    assert {path: path.read_bytes() for path in files_of(tmp_path)} == before
    checkpoints.save(3, small_state(3))
    checkpoints.wait()
    assert checkpoints.steps() == (2, 3)


def test_a_write_that_fails_before_it_goes_on_in_the_background_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = saved(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(ocp.AsyncCheckpointer, "save", lambda *_: 1 / 0)
        with pytest.raises(CheckpointError, match=r"step_00000002: division .*step 1 .*intact"):
            checkpoints.save(2, small_state(2))
    assert os.listdir(tmp_path) == ["step_00000001"]
    checkpoints.save(2, small_state(2))
    checkpoints.wait()
    assert checkpoints.steps() == (1, 2)


def test_a_stray_file_is_no_damage(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    for folder in ("", "step_00000001", "step_00000001/state"):
        (tmp_path / folder / ".DS_Store").write_bytes(b"left by a file manager")
    restored = checkpoints.restore(SMALL)
    assert restored is not None and (restored.step, restored.skipped) == (1, ())
    checkpoints.save(2, small_state(2))
    checkpoints.save(3, small_state(3))
    checkpoints.wait()
    assert checkpoints.steps() == (2, 3)


def test_a_disk_that_takes_no_more_is_told(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        checkpoints.save(2, {"kernel": jax.random.normal(jax.random.key(0), (100_000,))})
        with pytest.raises(CheckpointError, match=r"step_00000002: .*step 1 .*intact.*needs 0\.4 MB"):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["step_00000001"]
    restored = checkpoints.restore(SMALL)
    assert restored is not None and restored.step == 1


# For each folder and place: saves steps 1 and 2, goes on, and is killed at that place, or after so many seconds.
# Forked, so that the imports are paid once; nothing has started a thread by then.
KILLED = """
import itertools, json, os, signal, sys, time, warnings
import hashlib, shutil
from pathlib import Path
import jax.numpy as jnp
import numpy as np
from limoe.workdir.checkpoint import Checkpoints

def die_in_call(owner, name, number):
    original, calls = getattr(owner, name), itertools.count(1)
    def killed(*args, **kwargs):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(owner, name, killed)

def run(folder, place, ready):
    checkpoints = Checkpoints(folder)
    for step in itertools.count(1):
        if step == 3:
            checkpoints.wait()
            if isinstance(place, str):
                owner, name, number = place.split()
                die_in_call(globals()[owner], name, int(number))
            os.write(ready, b"!")
        kernel = jnp.asarray(np.full((3, 5), step, np.float32))
        checkpoints.save(step, {"kernel": kernel, "step": jnp.asarray(np.int32(step))})

warnings.simplefilter("ignore")
for folder, place in json.loads(sys.argv[1]):
    told, ready = os.pipe()
    child = os.fork()
    if child == 0:
        run(folder, place, ready)
    os.close(ready)
    assert os.read(told, 1) == b"!"
    if not isinstance(place, str):
        time.sleep(place)
        os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""
ANY_STEP = set(range(2, 10_000))
KILLED_IN: dict[str | float, set[int]] = {
    "Path mkdir 1": {2},  # before anything is written
    "hashlib file_digest 1": {2},  # Orbax is done, no digests
    "os fsync 5": {2},
    "Path rename 1": {2},  # whole, not committed
    "Path rename 2": {3},  # committed, nothing removed
    "shutil rmtree 1": {3},
}


def test_a_kill_at_any_moment_leaves_a_good_one(tmp_path: Path) -> None:
    chance = random.Random(time.time_ns())
    cases = KILLED_IN | {chance.uniform(0, 0.2): ANY_STEP for _ in range(2)}
    places = [(str(tmp_path / str(number)), place) for number, place in enumerate(cases)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", KILLED, json.dumps(places)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    for (folder, place), steps in zip(places, cases.values(), strict=True):
        checkpoints = Checkpoints(folder)
        assert set(os.listdir(folder)) == {f"step_{step:08d}" for step in checkpoints.steps()}
        restored = checkpoints.restore(SMALL)
        assert restored is not None and restored.skipped == (), place
        assert restored.step in steps, place
        assert_same_bits(restored.state, small_state(restored.step))
        checkpoints.save(restored.step + 1, small_state(restored.step + 1))
        checkpoints.wait()
        assert checkpoints.steps() == (restored.step, restored.step + 1)
