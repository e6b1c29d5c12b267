"""Self-attention within each modality: by XLA, and on TPUs by one kernel that keeps the scores in VMEM.

Tokens `[T, D]` lie example after example, of each the tokens of one modality after those of the other, heads side by
side in D. XLA writes every score to the main memory, forward once and backward several times: at 196 patches that is
most of a layer's traffic.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from limoe.config.schema import ConfigError, Lengths, ModelConfig
from limoe.model import attention_kernel
from limoe.model.attention_kernel import Geometry
from limoe.parallel.mesh import Placement


@dataclasses.dataclass(frozen=True)
class TracedChip:
    """What a program is traced for: the platform, the kind of chip as JAX names it, and over how many devices examples
    are split."""

    platform: str
    kind: str
    count: int = 1


def device_of(placement: Placement | None) -> TracedChip:
    """The device of a mesh, else JAX's default one."""
    device = jax.devices()[0] if placement is None else placement.mesh.devices.flat[0]
    return TracedChip(device.platform, device.device_kind, 1 if placement is None else placement.size)


def geometry_of(config: ModelConfig, lengths: Lengths | None = None) -> Geometry:
    """How the tokens of an example lie, of both modalities or of those in `lengths`."""
    return Geometry((lengths or config.lengths).spans, config.width, config.num_heads)


def why_not_kernel(
    config: ModelConfig,
    num_tokens: int,
    dtype: Any,
    masked: bool,
    device: TracedChip,
    lengths: Lengths | None = None,
) -> str | None:
    """Why the kernel does not take these tokens; None if it does.

    >>> from limoe.config.presets import preset
    >>> model, chip = preset("b16").model, TracedChip("tpu", "TPU v5", 64)
    >>> why_not_kernel(model, 16384 * 212, "bfloat16", False, chip) is None
    True
    >>> why_not_kernel(model, 16384 * 212, "bfloat16", True, chip)
    'it has no masks, which text_padding=mask needs'
    """
    if device.platform != "tpu" and config.attention != "kernel":
        return f"platform {device.platform} is not tpu; named, it runs interpreted"
    if masked:
        return "it has no masks, which text_padding=mask needs"
    geometry = geometry_of(config, lengths)
    if num_tokens % (device.count * geometry.length):
        return f"{num_tokens} tokens are no whole examples on each of {device.count} devices"
    return attention_kernel.misfit(geometry, num_tokens // device.count, dtype)


def attend(
    query: Float[Array, "T D"],
    key: Float[Array, "T D"],
    value: Float[Array, "T D"],
    present: Bool[Array, "B S"] | None,
    config: ModelConfig,
    placement: Placement | None,
    lengths: Lengths | None = None,
) -> Float[Array, "T D"]:
    """Attend within each modality of each example; `present` False hides a token from the others.

    An example has tokens of both modalities, or as many of each as `lengths` says.

    By the kernel where it takes the tokens, else by XLA, as `model.attention` says. Raises ConfigError where the kernel
    was asked for and refuses.
    """
    device = device_of(placement)
    refusal = "model.attention=xla" if config.attention == "xla" else None
    refusal = refusal or why_not_kernel(config, query.shape[0], query.dtype, present is not None, device, lengths)
    if refusal is None:
        run = functools.partial(_by_kernel, geometry_of(config, lengths), device)
        if placement is None:
            return run(query, key, value)
        rows = PartitionSpec(tuple(placement.mesh.axis_names))
        return jax.shard_map(run, mesh=placement.mesh, in_specs=rows, out_specs=rows, check_vma=False)(
            query, key, value
        )
    if config.attention == "kernel":
        raise ConfigError(f"model.attention=kernel does not take this: {refusal}; use auto or xla")
    by_xla = jax.checkpoint(_by_xla, static_argnums=4) if config.remat == "attention" else _by_xla
    return by_xla(query, key, value, present, geometry_of(config, lengths))


def _by_xla(query: Array, key: Array, value: Array, present: Array | None, geometry: Geometry) -> Float[Array, "T D"]:
    sizes = {"s": geometry.length, "h": geometry.num_heads}
    heads = [rearrange(x, "(b s) (h d) -> b s h d", **sizes) for x in (query, key, value)]
    parts = []
    for start, end in geometry.spans:
        span = slice(start, end)
        mask = None if present is None else present[:, None, None, span]
        parts.append(jax.nn.dot_product_attention(*(head[:, span] for head in heads), mask=mask))
    return rearrange(jnp.concatenate(parts, axis=1), "b s h d -> (b s) (h d)")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_kernel(geometry: Geometry, device: TracedChip, query: Array, key: Array, value: Array) -> Float[Array, "T D"]:
    return attention_kernel.forward(geometry, device.kind, device.platform != "tpu", query, key, value)


def _by_kernel_forward(
    geometry: Geometry, device: TracedChip, query: Array, key: Array, value: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    return _by_kernel(geometry, device, query, key, value), (query, key, value)


def _by_kernel_backward(
    geometry: Geometry, device: TracedChip, saved: tuple[Array, Array, Array], cotangent: Array
) -> tuple[Array, Array, Array]:
    return attention_kernel.backward(geometry, device.kind, device.platform != "tpu", *saved, cotangent)


_by_kernel.defvjp(_by_kernel_forward, _by_kernel_backward)
