"""A trained model in Python: load it, embed pictures and texts, classify pictures, look at its experts."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float32, Int32, UInt8
from PIL import Image
from tqdm import tqdm

from limoe.config.schema import PAD_ID
from limoe.data import files
from limoe.data.classes import Classes
from limoe.data.images import ImageError, Preprocess, decode, prepare, preprocess_of
from limoe.data.templates import templates_of
from limoe.errors import InputError
from limoe.evaluate.encode import Encoder
from limoe.evaluate.restore import restored_encoder
from limoe.evaluate.zero_shot import embed_classes, probability
from limoe.use.export import read_export
from limoe.workdir.weights import ExportError, is_export

Picture = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
"""A path, the bytes of a JPEG, PNG, WebP, BMP or GIF file, a PIL image, or uint8 pixels [H, W], [H, W, 1], [H, W, 3] or
[H, W, 4]."""

# Sizes of batches; each is compiled when it is first needed.
_BATCH_SIZES = (1, 8, 64)

T = TypeVar("T")


class TokenExperts(NamedTuple):
    """The first choice of every token, and its gate, by MoE layer."""

    expert: Int32[np.ndarray, "L N T"]
    gate: Float32[np.ndarray, "L N T"]
    """0 for padding."""


class Model:
    """A trained LIMoE that embeds and classifies. Made by `limoe.load`; threads may share it.

    Embeddings are L2-normalised float32 arrays. Nothing is dropped and there is no noise, so a result does not depend
    on the other inputs of a call.
    """

    def __init__(self, encoder: Encoder, preprocess: Preprocess, *, preset: str, step: int) -> None:
        self.preset = preset
        self.step = step
        """The training step of the parameters."""
        self.logit_scale = encoder.scale
        """The factor that turns similarities into logits."""
        self._encoder, self.preprocess = encoder, preprocess

    def encode_image(self, images: Iterable[Picture], *, progress: bool = False) -> Float32[np.ndarray, "N P"]:
        """Embed pictures. Each becomes a square as in training (`data.preprocess`), without random crops.

        The pictures may come from a generator: only one batch of them is in memory. Raises InputError for one that
        cannot be read.
        """
        return self._of_images(self._encoder.images, images, progress)

    def features(self, images: Iterable[Picture], *, progress: bool = False) -> Float32[np.ndarray, "N D"]:
        """Compute what `encode_image` projects: the mean of a picture's tokens, L2-normalised, for a linear probe."""
        return self._of_images(self._encoder.image_features, images, progress)

    def encode_text(self, texts: Iterable[str], *, progress: bool = False) -> Float32[np.ndarray, "N P"]:
        """Embed texts, in lower case, cut to the length of training. Raises InputError for anything but texts."""
        return _in_batches(self._encoder.texts, _text, _several(texts, "texts"), progress)

    def similarity(self, images: Iterable[Picture], texts: Iterable[str]) -> Float32[np.ndarray, "N M"]:
        """Compute the cosine of every picture with every text."""
        return self.encode_image(images) @ self.encode_text(texts).T

    def classify(
        self, images: Iterable[Picture], classes: Sequence[str], *, templates: str | Sequence[str] = "none"
    ) -> Float32[np.ndarray, "N Q"]:
        """Compute how likely each class is for each picture: the softmax of scaled similarities (paper, section 7).

        `templates` are sentences with `{}` for the class name, or the name of a set: "none", "simple" or "imagenet80".
        The embedding of a class is the mean over its sentences. Raises InputError without classes or for other
        templates.
        """
        names = tuple(_several(classes, "classes"))
        _refuse_none(names, "classes")
        candidates = embed_classes(self._encoder, Classes(templates_of(templates), names))
        return probability(self.encode_image(images), candidates, self.logit_scale)

    def image_experts(self, images: Iterable[Picture]) -> TokenExperts:
        """Find the expert of every patch, row by row of the picture. Raises ValueError for a dense model."""
        pixels = [self._pixels(*numbered) for numbered in enumerate(_several(images, "images"))]
        _refuse_none(pixels, "images")
        return TokenExperts(*map(np.asarray, self._encoder.assignments(self._stacked(pixels), None)))

    def text_experts(self, texts: Iterable[str]) -> tuple[TokenExperts, list[list[str]]]:
        """Find the expert of every text token, and the tokens in words. Raises ValueError for a dense model."""
        given = [_text(*numbered) for numbered in enumerate(_several(texts, "texts"))]
        _refuse_none(given, "texts")
        ids = self._encoder.tokenize(given)
        found = TokenExperts(*map(np.asarray, self._encoder.assignments(None, ids)))
        return found, [[self._encoder.piece(token) for token in row if token != PAD_ID] for row in ids.tolist()]

    def _of_images(
        self, run: Callable[[np.ndarray], np.ndarray], images: Iterable[Picture], progress: bool
    ) -> np.ndarray:
        stacked = lambda pixels: run(self._stacked(pixels))  # noqa: E731
        return _in_batches(stacked, self._pixels, _several(images, "images"), progress)

    def _pixels(self, number: int, image: Any) -> UInt8[np.ndarray, "H W 3"]:
        try:
            return read_picture(image, self.preprocess)
        except (ImageError, files.DataError, OSError) as error:
            named = f" ({os.fspath(image)})" if isinstance(image, str | os.PathLike) else ""
            raise InputError(f"image {number}{named} cannot be used: {error}") from error

    def _stacked(self, pixels: Sequence[np.ndarray]) -> UInt8[np.ndarray, "N H W 3"]:
        size = self.preprocess.size
        return np.array(pixels, np.uint8).reshape(-1, size, size, 3)


def read_picture(image: Any, preprocess: Preprocess) -> UInt8[np.ndarray, "H W 3"]:
    """Prepare a `Picture` for the model. Raises ImageError if it is none, and OSError if a file cannot be read.

    >>> read_picture(np.full((4, 6), 9, np.uint8), Preprocess(2))[0, 0].tolist()
    [9, 9, 9]
    """
    if isinstance(image, str | os.PathLike):
        image = files.read_bytes(os.fspath(image))
    if isinstance(image, bytes):
        return decode(image, preprocess)
    if isinstance(image, np.ndarray):
        pixels = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
        channels = pixels.shape[2:] if pixels.ndim == 3 else ()
        if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or channels not in ((), (3,), (4,)) or not pixels.size:
            raise ImageError(
                f"an array of {image.dtype} {list(image.shape)} is no picture; give uint8 [H, W], [H, W, 1], [H, W, 3] "
                "or [H, W, 4]"
            )
        image = Image.fromarray(pixels)
    if not isinstance(image, Image.Image):
        raise ImageError(f"{type(image).__name__} is no picture; give a path, bytes, a PIL image or a uint8 array")
    return prepare(image, preprocess)


def _text(number: int, text: Any) -> str:
    if not isinstance(text, str):
        raise InputError(f"text {number} is {type(text).__name__}; give a str")
    return text


def _several(inputs: Iterable[T], name: str) -> Iterable[T]:
    """Refuse one input where a list of them is wanted: a str would be taken letter by letter."""
    one = isinstance(inputs, str | bytes | os.PathLike | Image.Image)
    if one or (isinstance(inputs, np.ndarray) and inputs.ndim < 4 and inputs.dtype == np.uint8):
        raise InputError(f"{name} must be a list; put the one that you have into [ ]")
    return inputs


def _refuse_none(inputs: Sequence[Any], name: str) -> None:
    if not inputs:
        raise InputError(f"{name} is empty; give at least one")


def _in_batches(
    run: Callable[[Any], np.ndarray], prepare: Callable[[int, T], Any], inputs: Iterable[T], progress: bool
) -> np.ndarray:
    total = len(inputs) if isinstance(inputs, Sized) else None
    numbered, parts = enumerate(inputs), []
    with ThreadPoolExecutor() as pool, tqdm(total=total, disable=not progress) as bar:
        while batch := list(pool.map(lambda one: prepare(*one), itertools.islice(numbered, _BATCH_SIZES[-1]))):
            parts.append(run(batch))
            bar.update(len(batch))
    return np.concatenate(parts or [run([])])


def load(path: str | os.PathLike[str], *, step: int | None = None) -> Model:
    """Load a trained model: the newest good checkpoint of a run's work folder, or that of `step`, or an export.

    Only parameters are read, onto one device if they fit there, else onto all. Raises LimoeError if the folder is not a
    run or an export, has no such checkpoint, or if parameters are not finite.

    >>> import limoe
    >>> limoe.load("no/such/run")
    Traceback (most recent call last):
    limoe.workdir.folder.WorkdirError: ...
    """
    if is_export(path):
        if step is not None:
            raise ExportError(f"{path} is an export, which has one step; leave step={step} out")
        restored = read_export(path, batch_sizes=_BATCH_SIZES)
    else:
        restored = restored_encoder(path, step=step, batch_sizes=_BATCH_SIZES)
    config = restored.config
    return Model(restored.encoder, preprocess_of(config), preset=config.preset, step=restored.step)
