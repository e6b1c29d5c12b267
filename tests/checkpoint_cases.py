"""A small state, its checkpoints, and how they are compared and harmed: for the tests of checkpoints."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from limoe.workdir.checkpoint import Checkpoints


def small_state(step: int) -> dict[str, jax.Array]:
    return {"kernel": jnp.full((3, 5), step, jnp.float32), "step": jnp.int32(step)}


def abstract(state: Any) -> Any:
    return jax.eval_shape(lambda: state)


SMALL = abstract(small_state(0))


def assert_same_bits(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array)
        assert (a.shape, a.dtype, a.weak_type) == (e.shape, e.dtype, e.weak_type)
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


def saved(folder: Path, *steps: int) -> Checkpoints:
    checkpoints = Checkpoints(folder)
    for step in steps:
        checkpoints.save(step, small_state(step))
    checkpoints.wait()
    return checkpoints


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)
