"""The prices of work on a chip, in modelled seconds.

Both yardsticks use them: the roofline by instruction (planner.py) and the compiler's own schedule (scheduled.py).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from limoe.plan.pods import Pod
from moe_kernels.chips import Tpu

# Between slices, bytes/s of a chip's share of its host's network: 200 Gbit/s for four chips.
DATACENTRE_BANDWIDTH = 6.25e9
# Latency of a collective over a pod. It matters for small ones only.
LATENCY = 10e-6


def at_peak(flops: int | float, chip: Tpu) -> float:
    """Compute the seconds of FLOPs on a device, at the peak of its data sheet."""
    return flops / chip.flops


def through_memory(size: int | float, chip: Tpu) -> float:
    """Compute the seconds of bytes to or from a device's main memory, at full bandwidth."""
    return size / chip.hbm_bandwidth


def in_bundles(count: int, chip: Tpu) -> float:
    """Compute the seconds of bundles on one core, at one a clock cycle."""
    return count / (1e9 * chip.gigahertz)


def on_matrix_units(macs: int | float, chip: Tpu) -> float:
    """Compute the seconds of bfloat16 multiply-adds on the matrix units of one core."""
    return macs / chip.macs_per_cycle / (1e9 * chip.gigahertz)


class _Span(NamedTuple):
    """The place of a group of devices on the torus: its extent along each dimension, whether that is a closed ring, and
    the number of slices."""

    sizes: tuple[int, ...]
    closed: tuple[bool, ...]
    num_slices: int


def _span(group: tuple[int, ...], pod: Pod, mesh: Mesh) -> _Span:
    members = [mesh.devices.flat[number] for number in group]
    places = np.array([device.coords[: len(pod.shape)] for device in members])
    sizes = tuple(int(n) for n in places.max(axis=0) - places.min(axis=0) + 1)
    rings = 16 if pod.chip.dimensions == 2 else 4  # flat pods have rings of 16, cubes of any multiple of 4
    whole_cubes = pod.chip.dimensions == 2 or all(size % rings == 0 for size in pod.shape)
    closed = tuple(
        whole_cubes and size == side and side % rings == 0 for size, side in zip(sizes, pod.shape, strict=True)
    )
    return _Span(sizes, closed, len({getattr(device, "slice_index", 0) for device in members}))


def exchange_seconds(kind: str, size: int, group: tuple[int, ...], pod: Pod, mesh: Mesh) -> float:
    """Compute the modelled seconds of a collective over a group of devices, of `size` bytes a device.

    Inside a slice it runs on the torus. The time of an all-to-all is that of the bytes which cross the middle of the
    group, over the links there; the others run rings along all dimensions at once. A group counts as a full block of
    the torus, so a scattered group is modelled too fast. Between slices it runs over the datacentre's network. Sums and
    gathers have two levels there, as the TPU compiler writes them, and each device ships its share of its slice's part.
    An all-to-all and a permutation have nothing to share. The longer level counts, as if pieces of the buffer went
    through both at once.
    """
    count = len(group)
    if count == 1 or not size:
        return 0.0
    span, chip = _span(group, pod, mesh), pod.chip
    within = count // span.num_slices
    leaving = (span.num_slices - 1) / span.num_slices * size
    ways = [(n, 2 if ring else 1) for n, ring in zip(span.sizes, span.closed, strict=True) if n > 1]
    if not ways:
        ways = [(2, 1)]  # the devices of one chip
    if kind in ("all-to-all", "ragged-all-to-all"):
        # A quarter of all that is shipped in the slice crosses the middle each way, over the links of one cut.
        inside = max(n * (size - leaving) / (4 * links * chip.link_bandwidth) for n, links in ways)
    elif kind == "collective-permute":
        inside, leaving = size / chip.link_bandwidth, size if span.num_slices > 1 else 0.0
    else:
        inside = (within - 1) / within * size / sum(links * chip.link_bandwidth for _, links in ways)
        leaving /= within
    if within == 1:
        inside = 0.0
    crossing = leaving * chip.devices_per_chip / DATACENTRE_BANDWIDTH
    passes = 2 if kind == "all-reduce" else 1  # reduced, then gathered
    return LATENCY + passes * max(inside, crossing)
