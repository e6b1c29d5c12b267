"""A matmul for kernels, in the precision that the package promises."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def dot(a: Float[Array, "..."], b: Float[Array, "..."], contract: tuple[int, int]) -> Float[Array, "..."]:
    """Product over one axis of each, accumulated in float32; float32 factors are multiplied as float32."""
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
