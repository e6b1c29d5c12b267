"""A very small run, the cache that all tests of runs share, and how runs are started and compared."""

import atexit
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

import limoe.evaluate.data
import limoe.train.loop as trainer
from limoe.config.data import DataConfig
from limoe.config.init import InitConfig
from limoe.config.presets import preset
from limoe.config.schema import Config
from limoe.config.settings import override
from limoe.data.world import World, write_world
from limoe.evaluate.encode import Encoder
from limoe.report import panels
from limoe.train.step import compile_step
from limoe.workdir.checkpoint import Checkpoints
from limoe.workdir.metrics import read_metrics

ROOT = Path(__file__).parents[1]
WORLD_PAIRS = 200
STEPS = 12
CHECKPOINT_EVERY = 4

SETTINGS = (
    *("model.depth=2", "model.moe_layers=1", "model.width=32", "model.mlp_width=64", "model.num_heads=2"),
    *("model.num_experts=4", "model.image_size=16", "model.patch_size=8", "model.text_length=8"),
    *("train.batch_size=16", f"train.steps={STEPS}", f"train.checkpoint_every={CHECKPOINT_EVERY}"),
    *(
        "optimizer.name=adamw",
        "optimizer.learning_rate=0.001",
        "optimizer.warmup_steps=2",
        "optimizer.cooldown_steps=2",
    ),
    *("model.text_padding=mask", "train.evaluate_every=0", f"data.world_pairs={WORLD_PAIRS}"),
)

# What differs between two runs of the same bits.
TIMES = {"step_seconds", "pairs_per_second", "elapsed_seconds", "memory_bytes", "seconds", "train_seconds"}


@cache
def _kept_folder(name: str) -> str:
    """A folder that is removed when Python ends."""
    folder = tempfile.mkdtemp(prefix=f"limoe-tests-{name}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def cache_folder() -> str:
    """A folder with the embedded world of these tests, written once."""
    folder = _kept_folder("world")
    write_world(World(num_pairs=WORLD_PAIRS), folder)
    return folder


def settings(*more: str) -> list[str]:
    """The settings of a small run; `more` are added, or take the place of those of the same name."""
    return instead((*SETTINGS, f"data.cache_dir={cache_folder()}"), *more)


def instead(own: tuple[str, ...], *more: str) -> list[str]:
    """Both lists of settings, without those of the first that are given again."""
    given = {text.partition("=")[0] for text in more}
    return [*(text for text in own if text.partition("=")[0] not in given), *more]


def config(*more: str, name: str = "tiny") -> Config:
    return override(preset(name), settings(*more))


class Ran(NamedTuple):
    folder: Path
    said: str


def ran(folder: Path, *more: str, name: str = "tiny", rendered: bool = False, **options: Any) -> Ran:
    """Train in this process; `options` are those of `limoe.train.loop.train`."""
    said: list[str] = []
    with shared(rendered=rendered):
        assert trainer.train(config(*more, name=name), folder, say=said.append, **options) == 0
    return Ran(folder, "\n".join(said))


class _Unrendered(Figure):
    """Drawn as always; the file holds one point."""

    def savefig(self, file: Any, **options: Any) -> None:
        Image.new("L", (1, 1)).save(file, "PNG")


@contextlib.contextmanager
def shared(*, rendered: bool = False) -> Iterator[None]:
    """Runs in this process share what takes most of their time.

    Those of equal models share what was compiled, all the images of the world that they are evaluated on, and only
    those that are `rendered` leave pictures to look at.
    """
    with (
        mock.patch.multiple(trainer, compile_step=_shared_step, Encoder=_SharedEncoder),
        mock.patch.object(limoe.evaluate.data, "_read", _shared_read),
        mock.patch.object(panels, "Figure", Figure if rendered else _Unrendered),
    ):
        yield


_steps: dict[Config, Callable[..., Any]] = {}
_encoders: dict[Config, dict[str, Any]] = {}


def _compiled(config: Config) -> Config:
    """The config with what no compiled function depends on set to one value."""
    train = dataclasses.replace(
        config.train, checkpoint_every=1, evaluate_every=0, log_every=1, checkpoints_kept=2, routing_every=1
    )
    return dataclasses.replace(config, preset="any", data=DataConfig(), init=InitConfig(), train=train)


def _shared_step(training: Any, config: Config, placement: Any) -> Callable[..., Any]:
    return _steps.setdefault(_compiled(config), compile_step(training, config, placement))


class _SharedEncoder(Encoder):
    def __init__(self, graph: Any, parameters: Any, config: Config, tokenizer: Any, *, placement: Any):
        super().__init__(graph, parameters, config, tokenizer, placement=placement)
        self._programs = _encoders.setdefault(_compiled(config), self._programs)


_looked_at: dict[tuple[str, int, int | None], Any] = {}
_read = limoe.evaluate.data._read


def _shared_read(config: Config, folder: str, limit: int | None) -> Any:
    """The world never changes; other folders may between two runs."""
    if not folder.startswith(cache_folder()):
        return _read(config, folder, limit)
    key = folder, config.model.image_size, limit
    if key not in _looked_at:
        _looked_at[key] = _read(config, folder, limit)
    return _looked_at[key]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "limoe", *words]


def environment() -> dict[str, str]:
    """Variables of a process that imports this checkout; what one of them has compiled, the others need not."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": _kept_folder("compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    """Start a small run in a process of its own."""
    words = command("train", f"--workdir={folder}", "--set", *settings(*more))
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=folder.parent, env=environment(), text=True, stdout=pipe, stderr=pipe)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return list(read_metrics(folder / "metrics.jsonl"))


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def result(folder: Path) -> dict[str, Any]:
    """Everything about a finished run that does not depend on how long it took: bits, log, summary, pictures."""
    return {
        "state": final_state(folder),
        "metrics": [_without_times(line) for line in metrics(folder)],
        "summary": _without_times(summary(folder)),
        "figures": {path.name for path in (folder / "figures").iterdir()},
    }


def _without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in TIMES}


def final_state(folder: Path) -> dict[str, bytes]:
    """The bytes of every array of the newest checkpoint, by name."""
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    newest = folder / "checkpoints" / f"step_{checkpoints.steps()[-1]:08d}"
    stored = json.loads((newest / "contents.json").read_text())["arrays"]
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        name: jax.ShapeDtypeStruct(tuple(facts["shape"]), facts["dtype"], sharding=device)
        for name, facts in stored.items()
    }
    restored = checkpoints.restore(abstract)
    assert restored is not None and not restored.skipped
    return {name: np.asarray(array).tobytes() for name, array in restored.state.items()}


def assert_figure(path: Path) -> None:
    """The picture decodes and is not of one colour."""
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 100
        assert np.asarray(image.convert("L")).std() > 5, path
