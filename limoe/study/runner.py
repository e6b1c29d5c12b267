"""The runner of a study: one training after the other, each in a process of its own; finished ones are kept as JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from limoe import __version__
from limoe.config.presets import preset
from limoe.config.settings import override
from limoe.data import files
from limoe.report.panels import MODALITIES
from limoe.report.results import LAST_STEPS, read_log
from limoe.study.studies import SCALES, Arm, Study, StudyError
from limoe.workdir.folder import Workdir
from limoe.workdir.metrics import read_metrics, write_json

PRESET = "tiny"
# Points that are kept of each curve.
_POINTS = 40
# The first steps include compilation; their time says nothing of the rate.
_FIRST_STEPS = 5
# Settings that say where something lies. They are no part of what was measured.
_PLACES = ("data.cache_dir", "data.threads")


class StudyCell(NamedTuple):
    """One training of a study: an arm, a model size and a seed."""

    arm: Arm
    size: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.size}-{re.sub(r'[^a-z0-9.]+', '-', self.arm.name.lower())}-seed{self.seed}"


class Finished(NamedTuple):
    """What is kept of a finished training. Figures are None where there is nothing to measure, as routing if dense."""

    arm: str
    size: str
    seed: int
    settings: list[str]
    figures: dict[str, float | None]
    curves: dict[str, list[float | None]]
    step_seconds: float
    command: str
    machine: str
    date: str
    commit: str


# Trains with settings into a folder; it must leave the folder of a finished run.
Train = Callable[[Sequence[str], Path], None]


def merged(*lists: Sequence[str]) -> list[str]:
    """Join lists of settings; a later value takes the place of an earlier one of the same name.

    >>> merged(["train.steps=5", "train.seed=1"], ["train.steps=7"])
    ['train.steps=7', 'train.seed=1']
    """
    values = dict(text.split("=", 1) for settings in lists for text in settings)
    return [f"{name}={value}" for name, value in values.items()]


def cells(study: Study, scale: str, num_seeds: int) -> list[StudyCell]:
    """List the trainings of a study, all arms of one seed before the next seed."""
    sizes = [*SCALES[scale].sizes][: None if study.all_sizes else 1]
    return [StudyCell(arm, size, seed) for size in sizes for seed in range(num_seeds) for arm in study.arms]


def run_cells(
    study: Study,
    scale: str,
    num_seeds: int,
    folder: Path,
    *,
    settings: Sequence[str] = (),
    train: Train | None = None,
    say: Callable[[str], None] = print,
    failed: dict[str, str] | None = None,
) -> Iterator[Finished]:
    """Train what is not finished yet, in order, and give every finished training.

    `folder` gets a JSON file for each; a file with the same settings is taken as it is. `settings` are added to all
    trainings. A training that fails leaves its reason in NAME.failed.txt and, by its name, in `failed`; the others go
    on, and the next call tries it anew. Raises StudyError if a training was stopped, or a file cannot be used.
    """
    failed = {} if failed is None else failed
    done: dict[tuple[str, str, int], Finished] = {}
    todo = cells(study, scale, num_seeds)
    for number, cell in enumerate(todo, 1):
        common = merged(
            SCALES[scale].sizes[cell.size], study.settings, study.smoke if scale == "smoke" else (), cell.arm.settings
        )
        record = folder / f"{cell.name}.failed.txt"
        try:
            steps = _steps_of_time(cell, done)
        except StudyError as error:
            _keep_failure(record, cell, error, failed, say)
            continue
        wanted = merged(common, settings, steps, [f"train.seed={cell.seed}"])
        told = [text for text in wanted if text.partition("=")[0] not in _PLACES]
        path = folder / f"{cell.name}.json"
        found = read_cell(path)
        if found is None or found.settings != told:
            say(f"{number} of {len(todo)}: {cell.name}")
            # Other settings get another folder, so an unfinished training of before is not in the way.
            run = folder / "runs" / f"{cell.name}-{sha256(json.dumps(wanted).encode()).hexdigest()[:8]}"
            override(preset(PRESET), wanted)  # refuses before a process is started
            try:
                (train or train_in_child)(wanted, run)
            except StudyError as error:
                _keep_failure(record, cell, error, failed, say)
                continue
            found = _measured(cell, told, run)
            write_json(path, found._asdict())
        record.unlink(missing_ok=True)
        done[cell.size, cell.arm.name, cell.seed] = found
        yield found


def _keep_failure(
    record: Path, cell: StudyCell, error: StudyError, failed: dict[str, str], say: Callable[[str], None]
) -> None:
    failed[cell.name] = str(error)
    files.write_bytes(record, f"{error}\n".encode())
    say(f"{cell.name} failed: {error}")


def _steps_of_time(cell: StudyCell, done: dict[tuple[str, str, int], Finished]) -> list[str]:
    """Choose the steps of an arm that gets as much time as another one took."""
    if not cell.arm.as_long_as:
        return []
    for name in (cell.arm.as_long_as, cell.arm.rate_of):
        if (cell.size, name, cell.seed) not in done:
            raise StudyError(f"it is given as much time as {name!r} of the same seed needs, which failed")
    longer, twin = (done[cell.size, name, cell.seed] for name in (cell.arm.as_long_as, cell.arm.rate_of))
    steps = override(preset(PRESET), longer.settings).train.steps
    return [f"train.steps={round(steps * longer.step_seconds / twin.step_seconds)}"]


def read_cell(path: Path) -> Finished | None:
    """Read what was kept of a finished training; None if there is no such file.

    Raises StudyError if the file holds something else.
    """
    if not files.exists(path):
        return None
    try:
        return Finished(**json.loads(files.read_text(path)))
    except (TypeError, ValueError) as error:
        raise StudyError(f"{path} is no finished training of a study ({error}); remove it to train it again") from error


def train_in_child(settings: Sequence[str], folder: Path) -> None:
    """Train as `limoe train` does, in a process of its own. If this process is stopped, so is the training, which
    saves; the next call continues it. What it writes to the standard error goes there as it comes.

    Raises StudyError with the last line of that if it fails.
    """
    # In a session of its own it gets no Ctrl-C from the terminal beside the one signal from here.
    words = [sys.executable, "-m", "limoe", *_words(settings), f"--workdir={folder}"]
    with subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    ) as child:
        try:
            last = _pass_on(child)
            status = child.wait()
        except BaseException:
            child.terminate()
            _pass_on(child)
            child.wait()
            raise
    if status:
        raise StudyError(f"the training in {folder} ended with status {status}: {last or 'it said nothing'}")


def _pass_on(child: subprocess.Popen[str]) -> str:
    """Copy what a process writes to the standard error until it ends; give its last line that is not empty."""
    last = ""
    assert child.stderr is not None
    for line in child.stderr:
        sys.stderr.write(line)
        last = line.strip() or last
    return last


def _words(settings: Sequence[str]) -> list[str]:
    return ["train", f"--preset={PRESET}", "--set", *settings]


def _measured(cell: StudyCell, settings: list[str], run: Path) -> Finished:
    workdir = Workdir.existing(run)
    if not workdir.finished:
        raise StudyError(f"the training in {run} was stopped before its end; the same command continues it")
    summary: dict[str, Any] = json.loads(files.read_text(workdir.summary))
    lines = list(read_metrics(workdir.metrics))
    history = read_log(workdir.config.model, lines).history
    effective = history.effective_experts.mean(axis=1) if workdir.config.model.moe_layers else None
    names = ("zero_shot_top1", "zero_shot_chance", "image_to_text_r1", "text_to_image_r1", "success_rate_text")
    names = (*names, "success_rate_image", "success_rate_bound", "parameters_total", "parameters_per_token")
    figures: dict[str, float | None] = {name: summary[name] for name in names}
    curves = {"step": history.step, "contrastive": history.contrastive}
    for number, modality in enumerate(MODALITIES):
        curve = np.full(len(lines), np.nan) if effective is None else effective[:, number]
        figures[f"effective_experts_{modality}"] = float(np.mean(curve[-LAST_STEPS:]))
        curves[f"effective_experts_{modality}"] = curve
        curves[f"success_rate_{modality}"] = history.success_rate[:, number]
    return Finished(
        arm=cell.arm.name,
        size=cell.size,
        seed=cell.seed,
        settings=settings,
        figures={name: None if value is None or value != value else value for name, value in figures.items()},
        curves={name: _thinned(curve) for name, curve in curves.items()},
        step_seconds=float(np.median([line["step_seconds"] for line in lines[_FIRST_STEPS:] or lines])),
        command=shlex.join(["limoe", *_words(settings)]),
        machine=_machine(),
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        commit=_commit(),
    )


def _thinned(curve: np.ndarray) -> list[float | None]:
    """Means of at most `_POINTS` parts of a curve that follow each other; None for one without numbers."""
    means = [float(part.mean()) for part in np.array_split(curve, min(_POINTS, len(curve)))]
    return [round(mean, 4) if mean == mean else None for mean in means]


def _machine() -> str:
    name, facts = platform.processor(), Path("/proc/cpuinfo")
    if facts.exists():
        text = facts.read_text(encoding="utf-8")
        model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
        name = (model[1] if model else name) + ", with AVX-512" * ("avx512f" in text)
    return f"{os.cpu_count()} cores, {name}"


def _commit() -> str:
    here = Path(__file__).parent
    if shutil.which("git") is None:
        return f"limoe {__version__}"
    found = subprocess.run(
        ["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or f"limoe {__version__}"
