"""Record what CLIP_benchmark's metrics are for drawn embeddings, beside the embeddings.

    pip install clip_benchmark 'numpy<2.4'
    python tests/parity/record_clip_benchmark.py

The file clip_benchmark.npz was made by clip_benchmark 1.6.2 with torch 2.13.0+cpu, scikit-learn 1.9.1 and numpy 2.2.6
(with 2.4 its accuracy fails). Its metrics are called as its command calls them, with a model that looks embeddings up.
It has no rule for ties, so the embeddings have none.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

RECORDED = Path(__file__).with_name("clip_benchmark.npz")
WIDTH, IMAGES, CLASSES, TEMPLATES = 16, 60, 12, 3


class LookedUp:
    """A model whose inputs are the numbers of embeddings."""

    def __init__(self, image: Any, text: Any) -> None:
        self.encode_image = lambda numbers: image[numbers]
        self.encode_text = lambda numbers: text[numbers]


class Loader(list[Any]):
    """Batches, and the classes that the metrics of classification count."""

    dataset = SimpleNamespace(classes=range(CLASSES))


def drawn() -> dict[str, np.ndarray]:
    """Draw unit vectors: images with four to six captions that are somewhat like them, and with classes and prompts."""
    rng = np.random.default_rng(0)
    unit = lambda x: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)  # noqa: E731
    image = rng.normal(size=(IMAGES, WIDTH))
    image_of_text = np.repeat(np.arange(IMAGES), rng.integers(4, 7, IMAGES))
    text = image[image_of_text] + 2.0 * rng.normal(size=(len(image_of_text), WIDTH))
    centre = rng.normal(size=(CLASSES, WIDTH))
    label = np.sort(rng.integers(0, CLASSES, IMAGES) // rng.integers(1, 3, IMAGES))
    labelled = centre[label] + 1.6 * rng.normal(size=(IMAGES, WIDTH))
    prompt = np.repeat(centre, TEMPLATES, axis=0) + rng.normal(size=(CLASSES * TEMPLATES, WIDTH))
    vectors = {"image": image, "text": text, "labelled": labelled, "prompt": prompt}
    return {**{name: unit(x) for name, x in vectors.items()}, "image_of_text": image_of_text, "label": label}


def figures(arrays: dict[str, np.ndarray]) -> dict[str, float]:
    """Run CLIP_benchmark's retrieval and zero-shot classification."""
    import torch
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    image, text, labelled, prompt = (torch.from_numpy(arrays[n]) for n in ("image", "text", "labelled", "prompt"))
    numbers = torch.arange(IMAGES)
    captions = [np.flatnonzero(arrays["image_of_text"] == n).tolist() for n in range(IMAGES)]
    halves = [slice(0, IMAGES // 2), slice(IMAGES // 2, IMAGES)]
    found = zeroshot_retrieval.evaluate(
        LookedUp(image, text),
        Loader((numbers[half], captions[half]) for half in halves),
        torch.tensor,
        "cpu",
        amp=False,
        recall_k_list=[1, 5, 10],
    )
    label = torch.from_numpy(arrays["label"])
    names = [[str(TEMPLATES * n + t) for t in range(TEMPLATES)] for n in range(CLASSES)]
    return found | zeroshot_classification.evaluate(
        LookedUp(labelled, prompt),
        Loader((numbers[half], label[half]) for half in halves),
        lambda texts: torch.tensor([int(one) for one in texts]),
        [" ".join(each) for each in names],
        [FromName(t) for t in range(TEMPLATES)],
        "cpu",
        amp=False,
    )


class FromName:
    """A template: it takes the number of one prompt from a class's name, which lists those of all."""

    def __init__(self, number: int) -> None:
        self.number = number

    def format(self, **named: str) -> str:
        return named["c"].split()[self.number]


if __name__ == "__main__":
    arrays = drawn()
    found = figures(arrays)
    np.savez_compressed(RECORDED, names=list(found), figures=list(found.values()), **arrays)
    packages = ("clip_benchmark", "torch", "scikit-learn", "numpy")
    print(found, ", ".join(f"{name} {version(name)}" for name in packages))
