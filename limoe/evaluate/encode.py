"""Embeddings and expert assignments of data sets, dropless, in batches of few compiled sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float32, Int32, UInt8

from limoe.config.schema import Config
from limoe.data.tokenizer import Tokenizer
from limoe.evaluate.pictures import Pictures
from limoe.model.build import Parameters
from limoe.model.moe import Assignment
from limoe.model.tower import Limoe, scale_images
from limoe.parallel.mesh import Placement, joined, own_rows

PROGRAMS: dict[str, Callable[..., Any]] = {
    "image": lambda model, images: model.encode_image(scale_images(images)),
    "features": lambda model, images: model.image_features(scale_images(images)),
    "text": Limoe.encode_text,
    "experts": lambda model, images, text: model.assignments(None if images is None else scale_images(images), text),
}
"""What a model computes of uint8 images and of token ids."""

Images = UInt8[np.ndarray, "N H W 3"] | Pictures
"""Images in memory, or read batch by batch, by each process those that its devices embed."""


class Encoder:
    """A model that embeds any number of images or texts, without noise and without dropping.

    A batch has one of `batch_sizes`, in rising order, rounded up to a multiple of the devices: the smallest that holds
    what is left, else the largest.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        parameters: Parameters,
        config: Config,
        tokenizer: Tokenizer,
        *,
        placement: Placement | None = None,
        batch_sizes: Sequence[int] = (128,),
    ) -> None:
        num_devices = 1 if placement is None else placement.size
        self._config, self._tokenizer, self.placement = config, tokenizer, placement
        self._batch_sizes = [-(-size // num_devices) * num_devices for size in batch_sizes]
        # Results are replicated on every device, so every process has them.
        everywhere = None if placement is None else placement.everywhere

        def compiled(program: Callable[..., Any]) -> Callable[..., Any]:
            run = lambda parameters, *inputs: program(nnx.merge(graph, parameters), *inputs)  # noqa: E731
            return jax.jit(run, out_shardings=everywhere)

        self._programs = {name: compiled(program) for name, program in PROGRAMS.items()}
        self.use(parameters)

    def use(self, parameters: Parameters) -> Encoder:
        """Replace the parameters by others of the same model, without compiling again."""
        self.parameters = parameters
        self.scale = float(np.exp(parameters["log_scale"]))
        return self

    def images(self, images: Images) -> Float32[np.ndarray, "N P"]:
        """Embed images."""
        return self._all("image", images)

    def image_features(self, images: Images) -> Float32[np.ndarray, "N D"]:
        """Compute the representation before the projection: the mean of an image's tokens, L2-normalised."""
        return self._all("features", images)

    def texts(self, texts: Sequence[str]) -> Float32[np.ndarray, "N P"]:
        """Embed texts."""
        return self._all("text", self.tokenize(texts))

    def tokenize(self, texts: Sequence[str]) -> Int32[np.ndarray, "N T"]:
        """Compute the token ids of texts."""
        return self._tokenizer.encode(texts)

    def piece(self, token: int) -> str:
        """Look up a token id as text."""
        return self._tokenizer.piece(token)

    def assignments(self, images: Images | None, text: Int32[np.ndarray, "N T"] | None) -> Assignment:
        """Compute the first choice and gate of every token `[L, N, tokens]`; a modality that is None has no tokens."""
        parts = [self._programs["experts"](self.parameters, *batch) for batch in self._batches(images, text)]
        count = max(len(each) for each in (images, text) if each is not None)
        return Assignment(*(jnp.concatenate(field, axis=1)[:, :count] for field in zip(*parts, strict=True)))

    def _all(self, program: str, inputs: np.ndarray | Pictures) -> Float32[np.ndarray, "N P"]:
        run = self._programs[program]
        parts = [np.asarray(run(self.parameters, *batch)) for batch in self._batches(inputs)]
        return np.concatenate([*parts, np.zeros((0, self._config.model.width), np.float32)])[: len(inputs)]

    def _batches(self, *inputs: np.ndarray | Pictures | None) -> Iterator[list[np.ndarray | jax.Array | None]]:
        """Cut inputs of one length into batches; copies of the last row fill the last batch."""
        count, first = len(next(each for each in inputs if each is not None)), 0
        while first < count:
            size = next((size for size in self._batch_sizes if size >= count - first), self._batch_sizes[-1])
            rows = np.minimum(first + np.array(own_rows(size, self.placement)), count - 1)
            yield [None if each is None else joined(each[rows], self.placement) for each in inputs]
            first += size
