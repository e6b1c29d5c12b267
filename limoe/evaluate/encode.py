"""Embeddings and expert assignments of data sets, in batches of one compiled size, as in evaluation (dropless)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from limoe.config.schema import Config
from limoe.data.tokenizer import Tokenizer
from limoe.model.build import Parameters
from limoe.model.moe import Assignment
from limoe.model.tower import Embeddings, scale_images
from limoe.parallel.mesh import Placement, spread


class Encoder:
    """A model that embeds any number of images or texts; noise off, nothing dropped."""

    def __init__(
        self,
        graph: nnx.GraphDef,
        parameters: Parameters,
        config: Config,
        tokenizer: Tokenizer,
        *,
        placement: Placement | None = None,
        batch_size: int = 128,
    ) -> None:
        num_devices = 1 if placement is None else placement.size
        self._config, self._tokenizer, self.placement = config, tokenizer, placement
        self._batch_size = -(-batch_size // num_devices) * num_devices

        def embed(parameters: Parameters, images: jax.Array, text: jax.Array) -> Embeddings:
            return nnx.merge(graph, parameters)(scale_images(images), text, None).embeddings

        def assign(parameters: Parameters, images: jax.Array, text: jax.Array) -> Assignment:
            return nnx.merge(graph, parameters).assignments(scale_images(images), text)

        # Results whole on every device, so that every process has them.
        everywhere = None if placement is None else placement.everywhere
        self._embed, self._assign = (jax.jit(function, out_shardings=everywhere) for function in (embed, assign))
        self.use(parameters)

    def use(self, parameters: Parameters) -> Encoder:
        """Go on with other parameters of the same model, without compiling again."""
        self.parameters = parameters
        self.scale = float(np.exp(parameters["log_scale"]))
        return self

    def images(self, images: np.ndarray, parameters: Parameters | None = None) -> np.ndarray:
        """Embeddings [N, P] of uint8 images [N, H, W, 3], by these parameters if not by one's own."""
        text = np.ones((len(images), self._config.model.text_length), np.int32)
        return self._all(parameters or self.parameters, images, text, "image")

    def image_features(self, images: np.ndarray) -> np.ndarray:
        """What `images` are projected from: mean of their tokens, L2-normalised, [N, D]."""
        kernel = self.parameters["image_projection"]["kernel"]
        unprojected = {**self.parameters, "image_projection": {"kernel": jnp.eye(len(kernel), dtype=kernel.dtype)}}
        return self.images(images, unprojected)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings [N, P] of texts."""
        size = self._config.model.image_size
        return self._all(
            self.parameters, np.zeros((len(texts), size, size, 3), np.uint8), self._tokenizer.encode(texts), "text"
        )

    def assignments(self, images: np.ndarray, texts: Sequence[str]) -> tuple[Assignment, np.ndarray]:
        """First choice and gate of every token `[L, N, tokens]`, and the text ids [N, text tokens]."""
        text = self._tokenizer.encode(texts)
        parts = [self._assign(self.parameters, *batch) for batch in self._batches(images, text)]
        joined = [jnp.concatenate(field, axis=1)[:, : len(images)] for field in zip(*parts, strict=True)]
        return Assignment(*joined), text

    def _all(self, parameters: Parameters, images: np.ndarray, text: np.ndarray, which: str) -> np.ndarray:
        parts = [np.asarray(getattr(self._embed(parameters, *batch), which)) for batch in self._batches(images, text)]
        width = self._config.model.width
        return np.concatenate([*parts, np.zeros((0, width), np.float32)])[: len(images)]

    def _batches(
        self, images: np.ndarray, text: np.ndarray
    ) -> Iterator[tuple[np.ndarray | jax.Array, np.ndarray | jax.Array]]:
        """Batches of one size, the last one filled up with copies of the last row."""
        for first in range(0, len(images), self._batch_size):
            rows = np.minimum(np.arange(first, first + self._batch_size), len(images) - 1)
            yield spread(images[rows], self.placement), spread(text[rows], self.placement)
