"""Checkpoints: every bit comes back as it was, in the right order, and what would not is refused."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from checkpoint_cases import SMALL, abstract, assert_same_bits, files_of, saved, small_state, truncate

from limoe.workdir.checkpoint import CheckpointError, Checkpoints

ROOT = Path(__file__).parents[1]


class Pair(NamedTuple):
    left: jax.Array
    right: jax.Array


def test_every_bit_comes_back(tmp_path: Path) -> None:
    key = jax.random.key(0)
    params = {
        "half": jax.random.normal(key, (7, 3), jnp.bfloat16),
        "odd": jnp.array([np.nan, -np.nan, np.inf, -np.inf, -0.0, 1e-45], jnp.float32),
        "blocks": [{"kernel": jax.random.normal(key, (130, 140))}, {"kernel": jnp.zeros((2, 1, 2))}],
        "a.b c": (jnp.arange(5, dtype=jnp.uint8), jnp.array([True, False])),
    }
    trained = {"half": params["half"], "blocks": params["blocks"]}
    state = {
        "params": params,
        "optimizer": [optax.adamw(1e-3).init(trained), optax.adafactor(1e-3, min_dim_size_to_factor=100).init(trained)],
        "pair": Pair(jnp.int32(-7), jnp.zeros((0, 4), jnp.bfloat16)),
        "key": jax.random.key_data(key),
    }
    checkpoints = Checkpoints(tmp_path / "new" / "folder")
    checkpoints.save(123, state)
    checkpoints.wait()
    restored = Checkpoints(checkpoints.folder).restore(abstract(state))
    assert restored is not None and (restored.step, restored.skipped) == (123, ())
    assert_same_bits(restored.state, state)
    assert (checkpoints.folder / "step_00000123").is_dir()


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "a").restore(SMALL) is None
    assert Checkpoints(tmp_path / "b", read_only=True).restore(SMALL) is None
    assert not (tmp_path / "b").exists()


def test_a_checkpoint_of_the_first_release_is_restored(tmp_path: Path) -> None:
    """As 0.1.0 wrote it: arrays of NumPy through Orbax's Checkpointer, digests of all files in one go."""
    state = small_state(7)
    folder = tmp_path / "step_00000007"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder / "state", ocp.args.PyTreeSave(jax.tree.map(np.array, state)))
    arrays = {name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in state.items()}
    (folder / "contents.json").write_text(json.dumps({"step": 7, "arrays": arrays}, indent=1))
    digests = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / "digests.json").write_text(json.dumps(digests, indent=1))
    restored = Checkpoints(tmp_path).restore(SMALL)
    assert restored is not None and (restored.step, restored.skipped) == (7, ())
    assert_same_bits(restored.state, state)


def test_a_part_is_restored_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"parameters": {"kernel": jnp.ones((4, 3)), "none": jnp.zeros((0,))}, "optimizer": [jnp.ones((4, 3))]}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state)
    read: list[dict[str, Any]] = []
    restore = ocp.Checkpointer.restore

    def watched(*args: Any, **kwargs: Any) -> Any:
        read.append(restore(*args, **kwargs))
        return read[-1]

    monkeypatch.setattr(ocp.Checkpointer, "restore", watched)
    wanted = {"parameters": state["parameters"]}
    restored = checkpoints.restore(abstract(wanted), part=True)
    assert restored is not None
    assert_same_bits(restored.state, wanted)
    assert set(read[0]) == {"parameters/kernel"}
    with pytest.raises(CheckpointError, match=r"optimizer/0: float32\[4, 3\] in the checkpoint, absent in the model"):
        checkpoints.restore(abstract(wanted))
    with pytest.raises(CheckpointError, match=r"bias: absent in the checkpoint"):
        checkpoints.restore({"bias": jax.ShapeDtypeStruct((2,), jnp.float32)}, part=True)


def test_restored_arrays_lie_as_asked(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), SMALL)
    restored = checkpoints.restore(target)
    assert restored is not None
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(restored.state))


def test_arrays_may_be_donated_at_once(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    kernel = jnp.arange(100_000, dtype=jnp.float32)
    expected = np.array(kernel)
    checkpoints.save(1, {"kernel": kernel})
    overwrite = jax.jit(lambda array: array * 0 - 1, donate_argnums=0)
    jax.block_until_ready(overwrite(kernel))
    assert kernel.is_deleted()
    restored = checkpoints.restore({"kernel": jax.ShapeDtypeStruct((100_000,), jnp.float32)})
    assert restored is not None
    np.testing.assert_array_equal(restored.state["kernel"], expected)


def test_save_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_is_ready = threading.Event()
    finalize = ocp.PyTreeCheckpointHandler.finalize

    def slow_finalize(*args: Any) -> None:
        assert disk_is_ready.wait(60)
        finalize(*args)

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "finalize", slow_finalize)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, small_state(1))
    assert checkpoints.steps() == ()
    disk_is_ready.set()
    checkpoints.wait()
    assert checkpoints.steps() == (1,)


def test_the_newest_stay(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 20, 300)
    assert checkpoints.steps() == (20, 300)
    assert sorted(os.listdir(tmp_path)) == ["step_00000020", "step_00000300"]
    again = Checkpoints(tmp_path, keep=1)
    again.save(123456789, small_state(4))
    again.wait()
    assert os.listdir(tmp_path) == ["step_123456789"]
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


def test_old_ones_go_only_after_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    present: list[set[str]] = []
    rename = Path.rename

    def watched(path: Path, target: Path) -> Path:
        present.append({name for name in os.listdir(tmp_path) if not name.startswith(".")})
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", watched)
    checkpoints.save(3, small_state(3))
    checkpoints.wait()
    assert present == [{"step_00000001", "step_00000002"}, {"step_00000001", "step_00000002", "step_00000003"}]


def test_a_renamed_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    (tmp_path / "step_00000001").rename(tmp_path / "step_00000007")
    with pytest.raises(CheckpointError, match="holds step 1"):
        checkpoints.restore(SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": jax.ShapeDtypeStruct((3, 4), jnp.float32)}, r"kernel: float32\[3, 5\] in .*float32\[3, 4\] in"),
        ({"kernel": jax.ShapeDtypeStruct((3, 5), jnp.bfloat16)}, r"float32\[3, 5\] in .*bfloat16\[3, 5\] in"),
        ({"bias": jax.ShapeDtypeStruct((2,), jnp.float32)}, r"bias: absent in the checkpoint, float32\[2\] in"),
        ({"kernel": None}, r"kernel: float32\[3, 5\] in the checkpoint, absent in the model"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    with pytest.raises(CheckpointError, match=f"another model or optimiser.*{message}"):
        checkpoints.restore({**SMALL, **change})
    assert checkpoints.steps() == (1, 2)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"scale": 1.5}, "'scale' .* is a float"),
        ({"scale": np.ones(3)}, "'scale' .* is a ndarray"),
        ({"nested": [jax.random.key(0)]}, "'nested/0' .* PRNG key"),
        ({"scale": jnp.asarray(1.5)}, "weakly typed"),
        ({"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, "2 leaves with 1 names"),
        ({}, "at least one array"),
    ],
)
def test_what_would_not_come_back_is_refused(tmp_path: Path, state: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Checkpoints(tmp_path).save(1, state)
    assert os.listdir(tmp_path) == []


def test_steps_only_grow(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 5)
    checkpoints.save(5, small_state(5))  # a signal may arrive just after a save
    with pytest.raises(CheckpointError, match="already holds step 5, so step 4"):
        checkpoints.save(4, small_state(4))
    with pytest.raises(ValueError, match="step=-1"):
        checkpoints.save(-1, small_state(1))
    unaware = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="restore that checkpoint first"):
        unaware.save(5, small_state(0))
    restored = unaware.restore(SMALL)
    assert restored is not None
    unaware.save(5, restored.state)
    assert checkpoints.steps() == (1, 5)


def test_leftovers_go_when_the_folder_is_opened_for_writing(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    shutil.copytree(tmp_path / "step_00000001", tmp_path / ".partial-step_00000002")
    restored = Checkpoints(tmp_path, read_only=True).restore(SMALL)
    assert restored is not None and restored.step == 1
    assert (tmp_path / ".partial-step_00000002").exists()
    Checkpoints(tmp_path)
    assert os.listdir(tmp_path) == ["step_00000001"]


def test_read_only_changes_nothing(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    truncate(tmp_path / "step_00000002" / "contents.json")
    before = files_of(tmp_path)
    viewer = Checkpoints(tmp_path, read_only=True)
    restored = viewer.restore(SMALL)
    assert restored is not None and restored.step == 1 and len(restored.skipped) == 1
    with pytest.raises(ValueError, match="read_only"):
        viewer.save(3, small_state(3))
    assert files_of(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot prepare"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_the_end_of_a_block_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small_state(1))
    assert checkpoints.steps() == (1,)
    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "finalize", lambda *_: 1 / 0)
    with pytest.raises(CheckpointError, match="division"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, small_state(2))
    with pytest.raises(KeyError) as error, Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, small_state(2))
        raise KeyError("the news")
    assert "division" in error.value.__notes__[0]


def test_a_run_says_nothing_of_orbax(tmp_path: Path) -> None:
    script = """
import sys
from absl import app, logging
import jax.numpy as jnp
from limoe.workdir.checkpoint import Checkpoints

def main(arguments):
    checkpoints = Checkpoints(arguments[1])
    checkpoints.save(1, {"step": jnp.int32(1)})
    checkpoints.restore({"step": jnp.int32(0)})
    logging.info("own message")

app.run(main)
"""
    command = [sys.executable, "-W", "error", "-c", script, str(tmp_path)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == ""
    assert [line.rpartition("] ")[2] for line in done.stderr.splitlines()] == ["own message"]
