"""A logger for TensorBoard: scalars, the picture of the experts, and their load. Needs the extra `tensorboard`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter

from limoe.config.schema import Config
from limoe.report.panels import MODALITIES
from limoe.report.pictures import draw_expert_shares
from limoe.report.results import factor_of_present_tokens


class TensorBoard:
    """A `Logger` that writes into the folder `tensorboard` of the run; see it with `tensorboard --logdir=RUN`.

    Every number of every step is a scalar. In the first step, every `train.routing_every`th and the last one there are
    also the figure of the shares of experts, and for each layer and modality a histogram whose place e is expert e.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self._folder, self._config = folder / "tensorboard", config
        self._writer: SummaryWriter | None = None

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Take the figures of a step."""
        if self._writer is None:
            # Steps after the last checkpoint come again when a run goes on; TensorBoard forgets the older ones.
            self._writer = SummaryWriter(str(self._folder), purge_step=step, filename_suffix=f".from{step}")
        for name, value in scalars(figures, self._config.model.moe_layers):
            self._writer.add_scalar(name, value, step)
        train = self._config.train
        if step in (1, train.steps) or step % train.routing_every == 0:
            self._draw(self._writer, step, figures)
            self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()

    def _draw(self, writer: SummaryWriter, step: int, figures: Mapping[str, Any]) -> None:
        if figures.get("wanted") is None:
            return
        wanted, kept = (np.asarray(figures[name], np.float64) for name in ("wanted", "kept"))
        model = self._config.model
        picture = self._folder / "experts.png"
        factor = factor_of_present_tokens(model, self._config.train.batch_size, wanted)
        draw_expert_shares(picture, wanted, kept, moe_layers=model.moe_layers, capacity_factor=factor)
        with Image.open(picture) as image:
            writer.add_image("experts", np.asarray(image.convert("RGB")), step, dataformats="HWC")
        expert = np.arange(model.num_experts)
        for layer, modality in np.ndindex(wanted.shape[:2]):
            load = wanted[layer, modality]
            writer.add_histogram_raw(
                f"load/block{model.moe_layers[layer]}_{MODALITIES[modality]}",
                min=0,
                max=model.num_experts,
                num=int(load.sum()),
                sum=float(load @ expert),
                sum_squares=float(load @ expert**2),
                bucket_limits=(expert + 1).tolist(),
                bucket_counts=load.tolist(),
                global_step=step,
            )


def scalars(figures: Mapping[str, Any], moe_layers: Sequence[int]) -> Iterator[tuple[str, float]]:
    """Give a name to every number among the figures of a step; figures by layer and modality get one for each.

    >>> figures = {"total": 5.0, "zero_shot_top1": None, "bad_first": [], "success_rate": [[0.9, 0.8]]}
    >>> list(scalars(figures, moe_layers=[3]))
    [('total', 5.0), ('success_rate/block3_image', 0.9), ('success_rate/block3_text', 0.8)]
    """
    for name, value in figures.items():
        array = np.asarray(value)
        if array.dtype.kind not in "fiu":
            continue
        if array.ndim == 0:
            yield name, float(array)
        elif array.shape == (len(moe_layers), len(MODALITIES)):
            for layer, modality in np.ndindex(array.shape):
                yield f"{name}/block{moe_layers[layer]}_{MODALITIES[modality]}", float(array[layer, modality])
