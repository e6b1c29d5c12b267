"""A control for zero-shot accuracy: classify the held-out triples by the mean colour of an image alone.

    python benchmarks/controls_colour.py [--folder=WORLD]

Each held-out image is assigned to the class with the nearest mean RGB. There are two ways to get the class colours. One
fits the colours of training images as a sum of effects of shape, colour and texture, by least squares. The other, which
helps the control more, takes the mean over four fifths of the held-out images. The mean is over the whole image or over
its colourful pixels, which helps more, too.
"""

import argparse
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from limoe.data import files
from limoe.data.files import cache_folder
from limoe.data.shards import find_shards
from limoe.data.world import COLOURS, HELD_OUT, SHAPES, TEXTURES, Triple, World, write_world

TARGET = 0.4
NUM_FOLDS = 5
NUM_TRAINING_SHARDS = 4


class Colours(NamedTuple):
    """Mean RGB of N images. `whole` and `colourful` are float64 [N, 3]; `triple` says what each image shows."""

    whole: np.ndarray
    colourful: np.ndarray
    triple: list[Triple]


def read_pairs(shard: str) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Read image (uint8 [H, W, 3]) and metadata of each example in a shard of the embedded world."""
    with tarfile.open(shard) as tar:
        content = {member.name: tar.extractfile(member) for member in tar.getmembers()}
        for name, file in content.items():
            metadata = content.get(name.removesuffix(".jpg") + ".json")
            if name.endswith(".jpg") and file is not None and metadata is not None:
                yield np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")), json.load(metadata)


def read_colours(shards: list[str]) -> Colours:
    """Compute the mean colours of all images that show a single thing."""
    whole, colourful, triples = [], [], []
    for shard in shards:
        for image, metadata in read_pairs(shard):
            if len(metadata["things"]) == 1:
                pixels = image.reshape(-1, 3).astype(np.float64)
                # Backgrounds are nearly grey, so only the thing has more than 60 levels of chroma.
                chroma = np.maximum(np.ptp(pixels, axis=1) - 60, 1e-3)
                whole.append(pixels.mean(axis=0))
                colourful.append(np.average(pixels, axis=0, weights=chroma))
                triples.append(Triple(*metadata["things"][0]))
    return Colours(np.stack(whole), np.stack(colourful), triples)


def nearest(colour: np.ndarray, class_colour: np.ndarray) -> np.ndarray:
    """Find the class [N] with the nearest of `class_colour` [C, 3] for each `colour` [N, 3]."""
    return np.square(colour[:, None] - class_colour).sum(axis=-1).argmin(axis=1)


def accuracy_from_training(
    train: np.ndarray, train_triples: list[Triple], test: np.ndarray, label: np.ndarray
) -> float:
    """Measure with class colours extrapolated from training images, none of which shows a held-out triple."""

    def one_hot(triples: list[Triple]) -> np.ndarray:
        attributes = (SHAPES, tuple(COLOURS), TEXTURES)
        return np.array(
            [
                [name == value for name, values in zip(triple, attributes, strict=True) for value in values]
                for triple in triples
            ],
            np.float64,
        )

    effects, *_ = np.linalg.lstsq(one_hot(train_triples), train)
    return float(np.mean(nearest(test, one_hot(list(HELD_OUT)) @ effects) == label))


def accuracy_across_folds(test: np.ndarray, label: np.ndarray) -> float:
    """Measure with class colours averaged over the other folds of the held-out images. Folds have all classes."""
    order = np.argsort(label, kind="stable")
    fold = np.empty(len(label), np.int64)
    fold[order] = np.arange(len(label)) % NUM_FOLDS
    right = 0
    for number in range(NUM_FOLDS):
        seen, asked = fold != number, fold == number
        means = np.stack([test[seen & (label == index)].mean(axis=0) for index in range(len(HELD_OUT))])
        right += int(np.sum(nearest(test[asked], means) == label[asked]))
    return right / len(label)


def measure(folder: str) -> dict[str, float]:
    """Measure the accuracy of each variant on the world in `folder`. Raises `DataError` if there is none."""
    train = read_colours(find_shards(os.path.join(folder, "train"))[:NUM_TRAINING_SHARDS])
    test = read_colours(find_shards(os.path.join(folder, "heldout")))
    label = np.array([HELD_OUT.index(triple) for triple in test.triple])
    return {
        "whole image, from training images": accuracy_from_training(train.whole, train.triple, test.whole, label),
        "whole image, from held-out images": accuracy_across_folds(test.whole, label),
        "colourful pixels, from training images": accuracy_from_training(
            train.colourful, train.triple, test.colourful, label
        ),
        "colourful pixels, from held-out images": accuracy_across_folds(test.colourful, label),
    }


def main() -> None:
    """Print the table. The exit status is 1 if a variant reaches the target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", default="", help="folder of a written world (default: the default world, written if needed)"
    )
    folder = parser.parse_args().folder or os.path.dirname(write_world(World(), cache_folder()).train)
    if not files.is_folder(folder):
        parser.error(f"--folder={folder} is not a folder; give one that holds train/ and heldout/")
    accuracies = measure(folder)
    chance = 1 / len(HELD_OUT)
    print(f"nearest mean colour, {len(HELD_OUT)} held-out classes, chance {chance:.1%}, must stay under {TARGET:.0%}")
    for name, accuracy in accuracies.items():
        print(f"{name:<40} {accuracy:6.1%}")
    raise SystemExit(int(max(accuracies.values()) >= TARGET))


if __name__ == "__main__":
    main()
