"""What Hopper's kernels share: swizzled tiles of shared memory, products added up over a ring, exact stores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from moe_kernels.backends.gpu.common.launch import Ring
from moe_kernels.backends.gpu.sm90.tiling import SWIZZLE_BYTES, WARPGROUP_ROWS


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in 128-byte swizzled tiles of 8 rows, the form that the copy engine writes and wgmma reads."""
    elements = SWIZZLE_BYTES // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((8, elements)), plgpu.SwizzleTransform(SWIZZLE_BYTES))
    )


def add_products(
    columns: int,
    ring: Ring,
    filled: jax.Array,
    num_stages: int | jax.Array,
    multiply: Callable[[Any, jax.Array, jax.Array], None],
) -> Float[Array, "64 F"]:
    """What `multiply(accumulator, k, slot)` adds up over the next `num_stages` stages, each released behind it."""

    def add(acc: Any) -> Any:
        def step(k: jax.Array, _: None) -> None:
            multiply(acc, k, ring.wait(filled + k))
            # One product stays in flight; the one before it has read its stage.
            plgpu.wgmma_wait(1)
            pl.when(k > 0)(lambda: ring.release(filled + k - 1))

        lax.fori_loop(0, num_stages, step, None)
        plgpu.wgmma_wait(0)
        pl.when(num_stages > 0)(lambda: ring.release(filled + num_stages - 1))
        return acc[...]

    return pl.run_scoped(add, plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, columns)))


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
