"""What a matmul of rows does with its float32 results before they leave the registers, one value for each way."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from moe_kernels.backends.gpu.common.activation import activate, activate_and_slope
from moe_kernels.backends.gpu.sm90.tiling import CHUNK, Kernel
from moe_kernels.types import MatmulActivation


class Results(NamedTuple):
    """What leaves a kernel; as shapes, arrays or references."""

    hidden: Any
    """Float [R, H]: what the activation was of, forward, or its gradient, backward; None where nobody wants it."""
    out: Any
    """Float [R, F]: the result, forward, or the activated hidden layer again, backward."""


class Fetched(NamedTuple):
    """A buffer of shared memory for each consumer, and the barriers that say that it is full."""

    buffer: Any
    full: Any


class Stored(NamedTuple):
    """64 columns that leave: in which output, from which column on, the values."""

    output: Any
    column: jax.Array
    values: Float[Array, "64 C"]


class TileProducts(NamedTuple):
    """What a consumer has of a tile: the products of 64 rows, what is read beside them, where results go."""

    products: Float[Array, "64 F"]
    bias: Fetched | None
    hidden: Fetched | None
    outputs: Results
    consumer: jax.Array
    column: jax.Array
    """The first."""

    def chunks(self, step: int = 1) -> Iterator[tuple[int, jax.Array]]:
        """Every 64 columns (or every so many times that): their number and the first of them."""
        for chunk in range(0, self.products.shape[1] // CHUNK, step):
            yield chunk, self.column + chunk * CHUNK

    def z(self, chunk: int) -> Float[Array, "64 C"]:
        """Products and bias in float32."""
        across = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        value = self.products[:, across]
        if self.bias is None:
            return value
        return value + lax.broadcast_in_dim(self.bias.buffer[self.consumer, across], value.shape, (1,))

    def rounded(self, chunk: int) -> Float[Array, "64 C"]:
        """The same in the dtype of the rows."""
        return self.z(chunk).astype(self.outputs.out.dtype)


@dataclasses.dataclass(frozen=True)
class Epilogue(abc.ABC):
    """What follows `z = x W + b`: `kernel` says what it costs, `results` is traced inside the kernel."""

    @property
    @abc.abstractmethod
    def kernel(self) -> Kernel:
        """The name under which block sizes are chosen."""

    @property
    def name(self) -> str:
        """What the matmul is called."""
        return self.kernel

    @abc.abstractmethod
    def widths(self, columns: int) -> Results:
        """Columns of the results where z has so many."""

    @abc.abstractmethod
    def results(self, tile: TileProducts) -> Iterator[Stored]:
        """What is stored, chunk by chunk."""


@dataclasses.dataclass(frozen=True)
class Store(Epilogue):
    """`out = z`, rounded."""

    @property
    def kernel(self) -> Kernel:
        """One tile beside the accumulator."""
        return "store"

    def widths(self, columns: int) -> Results:
        """One result."""
        return Results(None, columns)

    def results(self, tile: TileProducts) -> Iterator[Stored]:
        """Nothing but z."""
        for chunk, column in tile.chunks():
            yield Stored(tile.outputs.out, column, tile.rounded(chunk))


@dataclasses.dataclass(frozen=True)
class _Forward(Epilogue):
    """An activation; `keep` says that the backward pass wants what it is of."""

    activation: MatmulActivation
    keep: bool

    @property
    def name(self) -> str:
        """Alone where nothing is kept."""
        return self.kernel if self.keep else f"{self.kernel}_alone"


@dataclasses.dataclass(frozen=True)
class Activate(_Forward):
    """`hidden = z`, if it is kept, and `out = act(hidden)`, computed from the rounded hidden layer."""

    @property
    def kernel(self) -> Kernel:
        """Two tiles beside the accumulator."""
        return "activate"

    def widths(self, columns: int) -> Results:
        """Two results of one size."""
        return Results(columns if self.keep else None, columns)

    def results(self, tile: TileProducts) -> Iterator[Stored]:
        """First what is kept."""
        for chunk, column in tile.chunks():
            rounded = tile.rounded(chunk)
            if self.keep:
                yield Stored(tile.outputs.hidden, column, rounded)
            activated = activate(rounded.astype(jnp.float32), self.activation)
            yield Stored(tile.outputs.out, column, activated.astype(rounded.dtype))


@dataclasses.dataclass(frozen=True)
class Gated(_Forward):
    """`hidden = z`, if it is kept, in which 64 columns of a gate and 64 of what it lets pass take turns.

    `out = act(gate) up [R, F / 2]`, computed from rounded factors.
    """

    @property
    def kernel(self) -> Kernel:
        """The exact GELU takes more registers."""
        return "gated_erf" if self.activation == "gelu_erf" else "gated"

    def widths(self, columns: int) -> Results:
        """The result is half as wide."""
        return Results(columns if self.keep else None, columns // 2)

    def results(self, tile: TileProducts) -> Iterator[Stored]:
        """A gate, what it lets pass, and their product."""
        # A gate and what it lets pass lie in one tile, and a bias would have to take turns with another.
        assert tile.bias is None and tile.products.shape[1] % (2 * CHUNK) == 0
        for chunk, column in tile.chunks(step=2):
            gate = tile.rounded(chunk)
            if self.keep:
                yield Stored(tile.outputs.hidden, column, gate)
            up = tile.rounded(chunk + 1)
            if self.keep:
                yield Stored(tile.outputs.hidden, column + CHUNK, up)
            half = pl.multiple_of(lax.div(column, jnp.int32(2)), CHUNK)
            # Only now, so that no float32 value is live while factors are stored.
            activated = activate(gate.astype(jnp.float32), self.activation)
            yield Stored(tile.outputs.out, half, (activated * up.astype(jnp.float32)).astype(gate.dtype))


@dataclasses.dataclass(frozen=True)
class ActivateBackward(Epilogue):
    """`hidden = z act'(h)` and `out = act(h)` for the hidden layer h, which is read while the matmul runs."""

    activation: MatmulActivation

    @property
    def kernel(self) -> Kernel:
        """It reads the hidden layer."""
        return "activate_backward"

    def widths(self, columns: int) -> Results:
        """Two results of one size."""
        return Results(columns, columns)

    def results(self, tile: TileProducts) -> Iterator[Stored]:
        """First the gradient."""
        # There are registers for two chunks, and a buffer for each.
        assert tile.hidden is not None and tile.products.shape[1] == 2 * CHUNK
        for chunk, column in tile.chunks():
            value, dtype = tile.z(chunk), tile.outputs.out.dtype
            plgpu.barrier_wait(tile.hidden.full.at[2 * tile.consumer + chunk])
            hidden = tile.hidden.buffer[tile.consumer, chunk].astype(jnp.float32)
            activated, slope = activate_and_slope(hidden, self.activation)
            yield Stored(tile.outputs.hidden, column, (value * slope).astype(dtype))
            yield Stored(tile.outputs.out, column, activated.astype(dtype))
