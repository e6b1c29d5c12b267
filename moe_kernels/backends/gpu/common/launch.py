"""What the kernels share: the device they run on, one warp-specialised launch, the ring of stages."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_kernels.axes import refuse_varying
from moe_kernels.chips import Generation

NUM_CONSUMERS = 2
PRODUCER = NUM_CONSUMERS
# 65,536 registers are 512 for each thread of a warpgroup: 40 for the producer's leave 232 for both consumers'.
PRODUCER_REGISTERS = 40
CONSUMER_REGISTERS = 232

# JAX 0.12 has the index in the reference.
_LOAD: Any = plgpu.load
_TAKES_INDEX = "idx" in inspect.signature(_LOAD).parameters

# `simulator(in_bounds=...)` is what `plgpu.kernel` takes as `interpret`; with True no copy may leave its array.
Simulator = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class GpuTarget:
    """Where a kernel runs: the chip, its number of streaming multiprocessors, and the simulator that stands for it."""

    chip: Generation
    num_sms: int
    simulator: Simulator | None = None

    def read(self, ref: Any, index: tuple[Any, ...]) -> jax.Array:
        """Load from global memory, in whatever layout is asked for."""
        # The interpreter of JAX 0.10.2 knows plain loads only, and has no layouts.
        if self.simulator:
            return ref[index]
        if _TAKES_INDEX:
            return _LOAD(ref, index, optimized=False)
        return _LOAD(ref.at[index], optimized=False)

    def cast(self, value: jax.Array, layout: Any) -> jax.Array:
        """Say how values lie in registers."""
        return value if self.simulator else plgpu.layout_cast(value, layout)


def launch(
    kernel: Callable[[Any, Any, Any], None],
    name: str,
    device: GpuTarget,
    inputs: Any,
    outputs: Any,
    scratch: Any,
    *,
    in_bounds: bool = False,
) -> Any:
    """Run a persistent kernel of one block per multiprocessor: two consumer warpgroups and a producer.

    `kernel(inputs, outputs, scratch)` gets references in the same NamedTuples as these arrays, shapes and types of
    memory, and the arrays that come back lie in that of the shapes; a field that is None stays None. `in_bounds` says
    that no copy reaches past the end of an array; a simulator then holds it to that.
    """
    # JAX 0.10.2 traces the body with references that vary and with numbers that do not, and refuses its loops.
    refuse_varying("GPU kernels", inputs)
    structure, result = jax.tree.structure((inputs, outputs, scratch)), jax.tree.structure(outputs)
    run = plgpu.kernel(
        lambda *refs: kernel(*jax.tree.unflatten(structure, refs)),
        out_type=jax.tree.leaves(outputs),
        scratch_types=jax.tree.leaves(scratch),
        grid=(device.num_sms,),
        grid_names=("sm",),
        num_threads=NUM_CONSUMERS + 1,
        thread_name="wg",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=None if device.simulator is None else device.simulator(in_bounds=in_bounds),
    )
    return jax.tree.unflatten(result, run(*jax.tree.leaves(inputs)))


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


class Ring(NamedTuple):
    """The stages between producer and consumers: `full` when copied, `empty` when both consumers are done with it."""

    full: Any
    empty: Any

    @classmethod
    def of(cls, stages: int, copies: int) -> Ring:
        """Barriers of a ring whose stages are filled by the given number of copies."""
        return cls(
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            plgpu.Barrier(num_arrivals=NUM_CONSUMERS, num_barriers=stages),
        )

    @property
    def stages(self) -> int:
        """How many there are."""
        return self.full.shape[0]

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
