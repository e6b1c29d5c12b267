"""How every kernel is launched: on which device, with which operands, results and scratch memory, all by name.

A kernel takes `(scalars, inputs, outputs, scratch)`, each a NamedTuple, in which what a call does not have is None:
Pallas takes such trees as they are. A kernel without scalars takes the other three.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe_kernels.axes import kernel_results, refuse_varying
from moe_kernels.chips import MIB, Tpu, find_tpu

# The chip whose block sizes are taken where kernels run interpreted on another platform.
STAND_IN = "TPU v6 lite"
Outputs = TypeVar("Outputs")


@dataclasses.dataclass(frozen=True)
class Target:
    """The device that a kernel is traced for; `interpret` on anything but a TPU."""

    chip: str
    num_cores: int = 1
    interpret: bool = False

    @property
    def facts(self) -> Tpu:
        """What block sizes are chosen by."""
        found = find_tpu(self.chip)
        assert found is not None, "refused by why_not"
        return found


@dataclasses.dataclass(frozen=True)
class Operand:
    """An operand, or shape and dtype of a result, and how the kernel gets it: in blocks, or by its own copies."""

    array: Any
    spec: pl.BlockSpec = dataclasses.field(default_factory=lambda: pl.BlockSpec(memory_space=pltpu.MemorySpace.HBM))


def result(shape: tuple[int, ...], dtype: Any, *spec: pl.BlockSpec) -> Operand:
    """A result of a kernel."""
    return Operand(jax.ShapeDtypeStruct(shape, dtype), *spec)


@dataclasses.dataclass(frozen=True)
class Call:
    """How a kernel is called: its grid, whose first axis is shared by cores if it has others, and what it takes."""

    name: str
    grid: tuple[int, ...]
    vmem: int
    """Bytes that it needs, at most."""
    flops: int
    """Of all planned rows: XLA and whoever counts a compiled program's work see no further into a kernel."""
    transcendentals: int = 0
    moved: int | None = None
    """Bytes to and from HBM; None if those are of every operand and result once."""
    aliases: tuple[tuple[str, str], ...] = ()
    """Operands, by name, and the results that take their memory."""


def launch(
    kernel: Callable[..., None],
    call: Call,
    target: Target,
    *,
    inputs: Any,
    outputs: Outputs,
    scalars: Any = None,
    scratch: Any = None,
) -> Outputs:
    """Run a kernel on NamedTuples of Blocks and give the results by name; scalars lie in scalar memory.

    Under `jax.vmap` a kernel with scalars runs one after the other: Pallas would give batched scalars a loop of its
    own, but not every batched array that a kernel copies by hand.
    """
    if target.interpret:
        refuse_varying("interpreted kernels", (_field(inputs, "array"), scalars))
    others: tuple[Literal["arbitrary"], ...] = ("arbitrary",) * (len(call.grid) - 1)
    shapes = _field(outputs, "array")
    moved = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves((_field(inputs, "array"), shapes)))
    num_scalars = len(jax.tree.leaves(scalars))

    def run(*operands: Any) -> Outputs:
        (found,) = pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(operands) - 1,
                grid=call.grid,
                in_specs=[_field(inputs, "spec")],
                out_specs=(_field(outputs, "spec"),),
                scratch_shapes=(scratch,),
            ),
            out_shape=(kernel_results(shapes, operands),),
            input_output_aliases={
                num_scalars + _number(inputs, given): _number(outputs, taken) for given, taken in call.aliases
            },
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel" if others else "arbitrary", *others),
                vmem_limit_bytes=min(target.facts.vmem, call.vmem + MIB),
            ),
            cost_estimate=pl.CostEstimate(
                flops=call.flops,
                transcendentals=call.transcendentals,
                bytes_accessed=moved if call.moved is None else call.moved,
            ),
            interpret=target.interpret,
            name=call.name,
        )(*operands)
        return apart(found)

    if scalars is None:
        return run(_field(inputs, "array"))
    return jax.custom_batching.sequential_vmap(run)(scalars, _field(inputs, "array"))


def apart(outputs: Outputs) -> Outputs:
    """The outputs of a kernel, none of which XLA may have it write straight into the stack that a scan makes.

    Where one of several outputs goes there, XLA makes one fusion of both, forgets how much VMEM the kernel asked for,
    and refuses it for taking more than 16 MiB (libtpu 0.0.42). A kernel of a single output is left alone.
    """
    return outputs if len(jax.tree.leaves(outputs)) == 1 else jax.lax.optimization_barrier(outputs)


def _field(blocks: Any, name: str) -> Any:
    """What all blocks of a tree have under a name."""
    return jax.tree.map(lambda block: getattr(block, name), blocks)


def _number(blocks: Any, name: str) -> int:
    """Arrays before the one of a name."""
    return len(jax.tree.leaves(blocks[: blocks._fields.index(name)]))
