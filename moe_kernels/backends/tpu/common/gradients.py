"""Weight gradients inside a kernel: chunks of F on their way from VMEM to HBM, under the next matmuls.

Where every expert is one item, its chunks are written once. Else the sums of an expert's last item are read back from
HBM (float32 there) and added to; the same core does both, and has waited for the write by then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from moe_kernels.backends.tpu.common.grid import Grid
from moe_kernels.backends.tpu.common.rows import Scalar, Scalars
from moe_kernels.backends.tpu.common.schedule import PADDING, STARTS, Schedule
from moe_kernels.backends.tpu.common.step import Step
from moe_kernels.types import Layout


class WeightGradient(NamedTuple):
    """One weight: its gradient `[E, D, F]` (`columns`) or `[E, F, D]` in HBM, chunks in VMEM, and their float32 sum."""

    hbm: Any
    slots: Any
    total: Any
    """None where slots are float32: sums are then built there."""
    columns: bool

    def sums(self, slot: Scalar) -> Any:
        """Where to add up."""
        return self.slots.at[slot] if self.slots.dtype == jnp.float32 else self.total


class Gradients(NamedTuple):
    """All weight gradients of a kernel."""

    grid: Grid
    scalars: Scalars
    chunk: int
    once: bool
    weights: tuple[WeightGradient, ...]
    written: Any
    fetched: Any

    @property
    def num_slots(self) -> int:
        """Chunks that can be on their way."""
        return self.weights[0].slots.shape[0]

    def slot(self, step: Scalar) -> Scalar:
        """The slot of a step, free again."""
        return jax.lax.rem(step, self.num_slots)

    def wait(self, core: Scalar, step: Scalar) -> None:
        """Wait until the chunks of an earlier step are written, if it wrote any."""
        at = self.grid.item(core, jax.lax.div(step, self.grid.chunks))
        written = self.scalars.schedule.part[at] != PADDING
        pl.when(written)(
            lambda: self._each(at, jax.lax.rem(step, self.grid.chunks), self.slot(step), lambda copy: copy.wait())
        )

    def fill(self, step: Step, work: Callable[[Scalar], None], idle: Callable[[], None] = lambda: None) -> None:
        """Wait for the slot of a step, let `work(slot)` fill it, or zero it where there are no rows; write it."""
        slot, waits = self.slot(step.number), step.number >= self.num_slots
        pl.when(waits)(lambda: self.wait(step.core, step.number - self.num_slots))
        pl.when(step.busy)(lambda: work(slot))

        @pl.when(jnp.logical_not(step.busy))
        def _() -> None:
            self.zero(slot)
            idle()

        self.write(step.at, step.chunk, slot)

    def drain(self, step: Step) -> None:
        """Wait at the end for what is still on its way."""

        @pl.when(step.is_last)
        def _() -> None:
            for last in range(min(self.num_slots, self.grid.items * self.grid.chunks)):
                self.wait(step.core, step.number - last)

    def write(self, at: Scalar, chunk: Scalar, slot: Scalar) -> None:
        """Start to write what is in the slot, if the item has an expert."""
        wanted = self.scalars.schedule.part[at] != PADDING
        pl.when(wanted)(lambda: self._each(at, chunk, slot, lambda copy: copy.start()))

    def zero(self, slot: Scalar) -> None:
        """An expert without rows."""
        for weight in self.weights:
            weight.slots[slot] = jnp.zeros(weight.slots.shape[1:], weight.slots.dtype)

    def begin(self, at: Scalar, chunk: Scalar, slot: Scalar) -> None:
        """Sums start at zero, or at those of the expert's last item."""

        def start() -> None:
            for weight in self.weights:
                sums = weight.sums(slot)
                sums[...] = jnp.zeros(sums.shape, jnp.float32)

        if self.once:
            start()
            return
        starts = self.scalars.schedule.part[at] == STARTS
        pl.when(starts)(start)

        @pl.when(jnp.logical_not(starts))
        def _() -> None:
            self._each(at, chunk, slot, lambda copy: copy.start(), back=True)
            self._each(at, chunk, slot, lambda copy: copy.wait(), back=True)

    def finish(self, slot: Scalar) -> None:
        """Round the sums."""
        for weight in self.weights:
            if weight.slots.dtype != jnp.float32:
                weight.slots[slot] = weight.total[...].astype(weight.slots.dtype)

    def _each(self, at: Scalar, chunk: Scalar, slot: Scalar, act: Callable[[Any], None], *, back: bool = False) -> None:
        expert = self.scalars.schedule.expert[at]
        for weight in self.weights:
            far, near = weight.hbm.at[expert], weight.slots.at[slot]
            if self.grid.chunks > 1:
                own = pl.ds(pl.multiple_of(chunk * self.chunk, self.chunk), self.chunk)
                far = weight.hbm.at[expert, :, own] if weight.columns else weight.hbm.at[expert, own]
            if back:
                act(pltpu.make_async_copy(far, near, self.fetched))
            else:
                act(pltpu.make_async_copy(near, far, self.written.at[slot]))


def gradient_dtype(weight_dtype: Any, once: bool) -> Any:
    """Sums that come back from HBM to be added to must not have been rounded."""
    return weight_dtype if once else jnp.dtype(jnp.float32)


def gradient_slots(grid: Grid, once: bool) -> int:
    """Two chunks on their way; one where an expert's next item reads the same chunk back in the very next step."""
    return 2 if once or grid.chunks > 1 else 1


def by_expert(sums: Float[Array, "Q F"], schedule: Schedule, layout: Layout, once: bool) -> Float[Array, "E F"]:
    """Add the sums of the items of each expert, without letting a NaN out of its expert."""
    if once:
        return sums[: layout.num_experts]
    experts = jnp.arange(layout.num_experts, dtype=jnp.int32)
    mine = (schedule.expert[None] == experts[:, None]) & (schedule.part[None] != PADDING)
    return jnp.sum(jnp.where(mine[..., None], sums[None], 0.0), axis=1)
