"""Control experiments for the zero-shot accuracy of the tiny model.

    python benchmarks/controls.py [--controls=limoe,dense,shuffled,colour] [--folder=runs/controls] [--set key=value]

limoe is the run of `limoe train`. dense is its dense twin with the same data and steps. shuffled is the same run with
captions shuffled among the images; it must stay below chance + 3 points. colour classifies by the nearest mean colour,
without a model; it must stay below 40%. Each run has its own work folder and continues if it was stopped. All together
take about 15 minutes on two CPU cores. The program prints one table. Its exit status is 1 if a target is missed.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from absl import app, flags, logging  # noqa: E402

from benchmarks import controls_colour  # noqa: E402
from limoe.config.presets import preset  # noqa: E402
from limoe.config.schema import Config  # noqa: E402
from limoe.config.settings import override  # noqa: E402
from limoe.data import inputs  # noqa: E402
from limoe.data.files import read_range  # noqa: E402
from limoe.data.index_file import open_index  # noqa: E402
from limoe.data.shards import Example, find_shards, write_shard  # noqa: E402
from limoe.train.loop import train  # noqa: E402

_CONTROLS = flags.DEFINE_list("controls", ["limoe", "dense", "shuffled", "colour"], "Controls to run.")
_FOLDER = flags.DEFINE_string("folder", "runs/controls", "Folder for the work folders of the runs.")
_SET = flags.DEFINE_multi_string("set", [], "Settings of every run, key=value, for a shorter trial.")


class Row(NamedTuple):
    """A line of the table: accuracy in 0..1, its target, and whether it is reached (None: no target)."""

    name: str
    accuracy: float
    chance: float
    target: str
    reached: bool | None


def shuffle_captions(train_shards: str, folder: Path) -> None:
    """Write the shards again with the captions permuted among all images, by a fixed permutation."""
    paths = find_shards(train_shards)
    indexes = [open_index(path) for path in paths]
    members = [(path, index, row) for path, index in zip(paths, indexes, strict=True) for row in range(len(index))]
    order = np.random.default_rng(0).permutation(len(members))

    def content(span: tuple[int, int], path: str) -> bytes:
        return read_range(path, *span)

    def examples(first: int, last: int) -> Iterator[Example]:
        for number in range(first, last):
            path, index, row = members[number]
            other_path, other, other_row = members[order[number]]
            caption = content(other.entry(other_row).caption, other_path).decode()
            yield Example(f"{number:09d}", content(index.entry(row).image, path), caption)

    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for path, index in zip(paths, indexes, strict=True):
        last = first + len(index)
        if not (folder / Path(path).name).exists():
            write_shard(folder / Path(path).name, examples(first, last))
        first = last


def trained(name: str, config: Config, folder: Path) -> Row:
    """Train a run unless it is finished, and read its accuracy. The row has no target yet."""
    train(config, folder)
    summary = json.loads((folder / "summary.json").read_text())
    return Row(name, summary["zero_shot_top1"], summary["zero_shot_chance"], "beside it", None)


def run_limoe(config: Config, folder: Path) -> list[Row]:
    """Train the model itself."""
    row = trained("LIMoE (limoe train)", config, folder / "limoe")
    return [row._replace(target=">= 90%", reached=row.accuracy >= 0.9)]


def run_dense(config: Config, folder: Path) -> list[Row]:
    """Train the dense twin."""
    return [trained("dense twin", override(preset("tiny-dense"), _SET.value), folder / "dense")]


def run_shuffled(config: Config, folder: Path) -> list[Row]:
    """Train the model on shuffled captions."""
    data = inputs.data_folders(config)
    shuffle_captions(data.train, folder / "shuffled-shards")
    paths = {"shards": str(folder / "shuffled-shards"), "eval_shards": data.zero_shot}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **paths))
    row = trained("trained on shuffled captions", config, folder / "shuffled")
    most = row.chance + 0.03
    return [row._replace(target=f"<= {most:.1%}", reached=row.accuracy <= most)]


def run_colour(config: Config, folder: Path) -> list[Row]:
    """Classify by mean colour, without a model."""
    accuracies = controls_colour.measure(str(Path(inputs.data_folders(config).train).parent))
    chance = 1 / len(controls_colour.HELD_OUT)
    return [Row(f"nearest mean colour, {what}", x, chance, "< 40%", x < 0.4) for what, x in accuracies.items()]


CONTROLS = {"limoe": run_limoe, "dense": run_dense, "shuffled": run_shuffled, "colour": run_colour}


def main(arguments: list[str]) -> None:
    """Run the chosen controls and print the table."""
    folder = Path(_FOLDER.value)
    if unknown := [name for name in _CONTROLS.value if name not in CONTROLS]:
        raise app.UsageError(f"there is no control {unknown[0]!r}; choose among {', '.join(CONTROLS)}")
    config = override(preset("tiny"), _SET.value)
    rows = [row for name in _CONTROLS.value for row in CONTROLS[name](config, folder)]
    print(f"\n{'zero-shot top-1 on held-out triples':<56} {'top-1':>6} {'chance':>7}  target")
    for row in rows:
        verdict = {None: "", True: "  ok", False: "  MISSED"}[row.reached]
        print(f"{row.name:<56} {row.accuracy:6.1%} {row.chance:7.1%}  {row.target}{verdict}")
    if any(row.reached is False for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    flags.FLAGS.set_default("verbosity", logging.WARNING)
    app.run(main)
