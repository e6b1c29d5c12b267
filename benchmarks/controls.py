"""Controls for the zero-shot accuracy of the tiny model: what it must beat, and what must fail.

    python benchmarks/controls.py [--controls=limoe,dense,shuffled,colour] [--folder=runs/controls] [--set key=value]

limoe: the run of `limoe train`. dense: its dense twin, same data and steps. shuffled: the same run on captions that
were shuffled among the images, which must stay at chance + 3 points. colour: nearest mean colour, without a model,
which must stay under 40%. Each run is a work folder of its own and is taken up again if it was stopped; the whole takes
about 15 minutes on two CPU cores. Prints one table; the exit status is 1 if a target is missed.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
from limoe.data.shards import Example, find_shards, load_index, write_shard  # noqa: E402
from limoe.train.loop import train  # noqa: E402

_CONTROLS = flags.DEFINE_list("controls", ["limoe", "dense", "shuffled", "colour"], "Which controls to run.")
_FOLDER = flags.DEFINE_string("folder", "runs/controls", "Folder for the work folders of the runs.")
_SET = flags.DEFINE_multi_string("set", [], "Settings of every run, key=value; for a shorter trial.")


class Row(NamedTuple):
    """A line of the table: accuracy in 0..1, and the target that it is held against (None: shown beside)."""

    name: str
    accuracy: float
    chance: float
    target: str
    reached: bool | None


def shuffle_captions(train_shards: str, folder: Path) -> None:
    """Write the shards again with each caption given to another image, a fixed permutation of all of them."""
    paths = find_shards(train_shards)
    indexes = [load_index(path) for path in paths]
    members = [(path, index, row) for path, index in zip(paths, indexes, strict=True) for row in range(len(index.keys))]
    order = np.random.default_rng(0).permutation(len(members))

    def content(span: np.ndarray, path: str) -> bytes:
        return read_range(path, int(span[0]), int(span[1]))

    def examples(first: int, last: int) -> Iterator[Example]:
        for number in range(first, last):
            path, index, row = members[number]
            other_path, other, other_row = members[order[number]]
            caption = content(other.caption[other_row], other_path).decode()
            yield Example(f"{number:09d}", content(index.image[row], path), caption)

    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for path, index in zip(paths, indexes, strict=True):
        last = first + len(index.keys)
        if not (folder / Path(path).name).exists():
            write_shard(folder / Path(path).name, examples(first, last))
        first = last


def trained(config: Config, folder: Path) -> dict[str, Any]:
    """The summary of a run, trained now unless it is finished."""
    train(config, folder)
    return json.loads((folder / "summary.json").read_text())


def run(name: str, folder: Path, settings: list[str]) -> list[Row]:
    """Run one control."""
    config = override(preset("tiny"), settings)
    if name == "colour":
        world = Path(inputs.data_folders(config).train).parent
        accuracies = controls_colour.measure(str(world))
        chance = 1 / len(controls_colour.HELD_OUT)
        return [Row(f"nearest mean colour, {what}", x, chance, "< 40%", x < 0.4) for what, x in accuracies.items()]
    if name == "limoe":
        summary = trained(config, folder / name)
        top1 = summary["zero_shot_top1"]
        return [Row("LIMoE (limoe train)", top1, summary["zero_shot_chance"], ">= 90%", top1 >= 0.9)]
    if name == "dense":
        summary = trained(override(preset("tiny-dense"), settings), folder / name)
        return [Row("dense twin", summary["zero_shot_top1"], summary["zero_shot_chance"], "beside it", None)]
    if name == "shuffled":
        data = inputs.data_folders(config)
        shuffle_captions(data.train, folder / "shuffled-shards")
        paths = {"shards": str(folder / "shuffled-shards"), "eval_shards": data.zero_shot}
        summary = trained(dataclasses.replace(config, data=dataclasses.replace(config.data, **paths)), folder / name)
        top1, chance = summary["zero_shot_top1"], summary["zero_shot_chance"]
        return [Row("trained on shuffled captions", top1, chance, f"<= {chance + 0.03:.1%}", top1 <= chance + 0.03)]
    raise app.UsageError(f"there is no control {name!r}; choose among limoe, dense, shuffled, colour")


def main(arguments: list[str]) -> None:
    """Run the chosen controls and print the table."""
    folder = Path(_FOLDER.value)
    rows = [row for name in _CONTROLS.value for row in run(name, folder, _SET.value)]
    print(f"\n{'zero-shot top-1 on held-out triples':<56} {'top-1':>6} {'chance':>7}  target")
    for row in rows:
        verdict = {None: "", True: "  ok", False: "  MISSED"}[row.reached]
        print(f"{row.name:<56} {row.accuracy:6.1%} {row.chance:7.1%}  {row.target}{verdict}")
    if any(row.reached is False for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    flags.FLAGS.set_default("verbosity", logging.WARNING)
    app.run(main)
