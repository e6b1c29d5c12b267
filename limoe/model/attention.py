"""Self-attention within each modality, by XLA or, on TPUs, by one kernel that keeps the scores in VMEM.

Tokens `[T, D]` are ordered by example and, within an example, by modality. D holds the heads side by side. XLA writes
every score to main memory, once in the forward pass and several times in the backward pass. At 196 patches that is most
of a layer's traffic.
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
    """The device for which a program is traced: platform, JAX's device kind, and the number of devices that share the
    examples."""

    platform: str
    kind: str
    count: int = 1


def device_of(placement: Placement | None) -> TracedChip:
    """Find the device of the mesh, else JAX's default device."""
    device = jax.devices()[0] if placement is None else placement.mesh.devices.flat[0]
    return TracedChip(device.platform, device.device_kind, 1 if placement is None else placement.size)


def geometry_of(config: ModelConfig, lengths: Lengths | None = None) -> Geometry:
    """Describe the layout of an example's tokens, by default with both modalities."""
    return Geometry((lengths or config.lengths).spans, config.width, config.num_heads)


def why_not_kernel(
    config: ModelConfig,
    num_tokens: int,
    dtype: Any,
    masked: bool,
    device: TracedChip,
    lengths: Lengths | None = None,
) -> str | None:
    """Say why the kernel cannot process these tokens; None if it can.

    >>> from limoe.config.presets import preset
    >>> model, chip = preset("b16").model, TracedChip("tpu", "TPU v5", 64)
    >>> why_not_kernel(model, 16384 * 212, "bfloat16", False, chip) is None
    True
    >>> why_not_kernel(model, 16384 * 212, "bfloat16", True, chip)
    'it does not support masks, as with text_padding=mask'
    """
    if device.platform != "tpu" and config.attention != "kernel":
        return f"platform {device.platform} is not tpu; model.attention=kernel runs it interpreted"
    if masked:
        return "it does not support masks, as with text_padding=mask"
    geometry = geometry_of(config, lengths)
    if num_tokens % (device.count * geometry.length):
        return f"{num_tokens} tokens do not divide into whole examples on {device.count} devices"
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
    """Attend within each modality of each example. Other tokens do not see a token with `present` False.

    An example has `lengths` tokens of each modality (default: the model's). `model.attention` names the kernel or XLA;
    auto uses the kernel if it can process the tokens. Raises ConfigError if the kernel is named but cannot.
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
        raise ConfigError(f"model.attention=kernel cannot be used: {refusal}; use auto or xla")
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
