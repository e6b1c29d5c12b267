"""What the kernels share: the device they run on, one warp-specialised launch, the ring of stages, exact stores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_kernels.backends.gpu.sm90.tiling import (
    CONSUMER_REGISTERS,
    NUM_CONSUMERS,
    PRODUCER_REGISTERS,
    SWIZZLE_BYTES,
    WARPGROUP_ROWS,
)
from moe_kernels.chips import Generation

PRODUCER = NUM_CONSUMERS
# `simulator(in_bounds=...)` is what `plgpu.kernel` takes as `interpret`; with True no copy may leave its array.
Simulator = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Device:
    """Where a kernel runs: the chip, its number of streaming multiprocessors, and the simulator that stands for it."""

    chip: Generation
    num_sms: int
    simulator: Simulator | None = None

    def read(self, ref: Any, index: tuple[Any, ...]) -> jax.Array:
        """Load from global memory, in whatever layout is asked for."""
        # The interpreter of JAX 0.10.2 knows plain loads only, and has no layouts.
        return ref[index] if self.simulator else plgpu.load(ref, index, optimized=False)

    def cast(self, value: jax.Array, layout: Any) -> jax.Array:
        """Say how values lie in registers."""
        return value if self.simulator else plgpu.layout_cast(value, layout)


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in 128-byte swizzled tiles of 8 rows, the form that the copy engine writes and wgmma reads."""
    elements = SWIZZLE_BYTES // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((8, elements)), plgpu.SwizzleTransform(SWIZZLE_BYTES))
    )


def launch(
    body: Callable[..., None],
    name: str,
    out_type: Any,
    scratch: dict[str, Any],
    device: Device,
    *,
    in_bounds: bool = False,
) -> Callable[..., Any]:
    """Build a persistent kernel of one block per multiprocessor: two consumer warpgroups and a producer.

    `in_bounds` says that no copy reaches past the end of an array; a simulator then holds it to that.
    """
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(device.num_sms,),
        grid_names=("sm",),
        num_threads=NUM_CONSUMERS + 1,
        thread_name="wg",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=None if device.simulator is None else device.simulator(in_bounds=in_bounds),
    )


def specialise(produce: Callable[[], None], consume: Callable[[], None]) -> None:
    """Run the producer in the last warpgroup, with few registers, and the consumers in the others, with many."""

    def producer() -> None:
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        produce()

    def consumer() -> None:
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        consume()

    lax.cond(lax.axis_index("wg") == PRODUCER, producer, consumer)


def over_steps(total: jax.Array, num_sms: int, visit: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """Deal the steps `0 .. total - 1` out to the blocks in turn; carries the number of stages filled so far."""
    sm = lax.axis_index("sm")
    mine = lax.div(jnp.maximum(total - sm + (num_sms - 1), 0), jnp.int32(num_sms))
    return lax.fori_loop(0, mine, lambda i, filled: visit(sm + i * num_sms, filled), jnp.int32(0))


@dataclasses.dataclass(frozen=True)
class Ring:
    """The stages between producer and consumers: `full` when copied, `empty` when both consumers are done with it."""

    full: Any
    empty: Any
    stages: int

    def slot(self, filled: jax.Array) -> jax.Array:
        """Stage of the given fill."""
        return lax.rem(filled, jnp.int32(self.stages))

    def acquire(self, filled: jax.Array) -> jax.Array:
        """Producer: wait until the stage is free, and give it."""
        slot = self.slot(filled)

        @pl.when(filled >= self.stages)
        def _() -> None:
            plgpu.barrier_wait(self.empty.at[slot])

        return slot

    def drain(self, filled: jax.Array) -> None:
        """Producer: see every release, so that no barrier is left in a half phase."""
        pending = jnp.minimum(filled, self.stages)
        lax.fori_loop(filled - pending, filled, lambda i, _: plgpu.barrier_wait(self.empty.at[self.slot(i)]), None)

    def wait(self, filled: jax.Array) -> jax.Array:
        """Consumer: wait until the stage is copied, and give it."""
        slot = self.slot(filled)
        plgpu.barrier_wait(self.full.at[slot])
        return slot

    def release(self, filled: jax.Array) -> None:
        """Consumer: done with the stage."""
        plgpu.barrier_arrive(self.empty.at[self.slot(filled)])


def ring_barriers(stages: int, copies: int) -> dict[str, Any]:
    """Barriers of a ring whose stages are filled by the given number of copies."""
    return {
        "full": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=NUM_CONSUMERS, num_barriers=stages),
    }


def store_rows(smem: Any, gmem: Any, row: jax.Array, num_rows: jax.Array, columns: Any) -> None:
    """Copy the first `num_rows` (a multiple of 8, up to 64) rows of a tile out, in pieces of powers of two.

    A copy's size is static, so a ragged end takes up to three copies; a full tile takes one.
    """
    offset: Any = 0
    piece = WARPGROUP_ROWS
    while piece >= 8:
        part = num_rows & piece

        @pl.when(part != 0)
        def _(offset: Any = offset, piece: int = piece) -> None:
            # Only a traced number can be asserted to be a multiple.
            start = offset if isinstance(offset, int) else pl.multiple_of(offset, 8)
            plgpu.copy_smem_to_gmem(
                smem.at[pl.ds(start, piece)], gmem.at[pl.ds(row + start, piece), columns], commit_group=False
            )

        offset = offset + part
        piece //= 2
    plgpu.commit_smem_to_gmem_group()
