"""TPU pods: which exist, and models of how long exchanges between their chips take."""

from __future__ import annotations

import itertools
import math
import os
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from limoe.config.schema import ConfigError
from moe_kernels.chips import TPUS, Tpu

# By the names of libtpu's topologies.
_KINDS = {tpu.topology: tpu for tpu in TPUS.values()}
# Between slices, bytes/s of a chip's share of its host's network: 200 Gbit/s for four chips.
DATACENTRE_BANDWIDTH = 6.25e9
# A collective's own latency over a pod; it matters for scalars only.
LATENCY = 10e-6
_BELOW_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_FLAT = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))


def topologies(kind: str) -> list[str]:
    """The slices of that kind that one can have, smallest first: of three dimensions multiples of four from a cube on.

    >>> topologies("v6e")[:3], topologies("v5p")[4:7]
    (['v6e:2x2', 'v6e:2x4', 'v6e:4x4'], ['v5p:4x4x4', 'v5p:4x4x8', 'v5p:4x4x12'])
    """
    chip = _KINDS[kind]
    if chip.dimensions == 2:
        shapes = list(_FLAT)
    else:
        steps = (range(4, limit + 1, 4) for limit in chip.largest)
        cubes = [shape for shape in itertools.product(*steps) if list(shape) == sorted(shape)]
        shapes = [*_BELOW_A_CUBE, *sorted(cubes, key=lambda shape: (math.prod(shape), shape))]
    return [f"{kind}:{'x'.join(map(str, shape))}" for shape in shapes]


class Pod(NamedTuple):
    """The devices of a pod as the compiler knows them; none of them is here."""

    name: str
    chip: Tpu
    shape: tuple[int, ...]
    devices: tuple[Any, ...]

    @property
    def num_chips(self) -> int:
        """Chips, of which some kinds have two devices each."""
        return len(self.devices) // self.chip.devices_per_chip


def find_pod(name: str, num_slices: int = 1) -> Pod:
    """The pod slice of that name, such as `v5p:8x8x8`, or several of them.

    Raises ConfigError for one that does not exist, with those that do, and without TPU compiler.

    >>> find_pod("v5e:3x3")
    Traceback (most recent call last):
    limoe.config.section.ConfigError: --topology=v5e:3x3 does not exist; v5e has v5e:2x2, v5e:2x4, ...
    """
    kind, _, dims = name.partition(":")
    if kind not in _KINDS:
        raise ConfigError(
            f"--topology={name} is no TPU pod; kinds are {', '.join(_KINDS)}, as in --topology={topologies('v5p')[5]}"
        )
    if name not in topologies(kind):
        raise ConfigError(f"--topology={name} does not exist; {kind} has {', '.join(topologies(kind))}")
    _describe_to_libtpu()
    from jax.experimental import topologies as compile_only

    try:
        found = compile_only.get_topology_desc(platform="tpu", topology_name=name, num_slices=num_slices)
    except (RuntimeError, ImportError, ValueError, FileNotFoundError) as error:
        raise ConfigError(
            "planning needs the TPU compiler (libtpu), which is not installed or does not start here; install it with "
            f"the extra aot: pip install '.[aot]' ({error})"
        ) from error
    shape = tuple(int(size) for size in dims.split("x"))
    return Pod(name, _KINDS[kind], shape, tuple(found.devices))


def _describe_to_libtpu() -> None:
    """What libtpu wants to know before it is loaded on a machine without a TPU; what is set already stays."""
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # no metadata server to ask
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two plans at a time
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # silences a warning; the topology decides
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")


class _Span(NamedTuple):
    """How a group of devices lies on the torus: its extent along each dimension, whether that closes a ring, and how
    many slices it is in."""

    sizes: tuple[int, ...]
    closed: tuple[bool, ...]
    num_slices: int


def _span(group: tuple[int, ...], pod: Pod, mesh: Mesh) -> _Span:
    members = [mesh.devices.flat[number] for number in group]
    places = np.array([device.coords[: len(pod.shape)] for device in members])
    sizes = tuple(int(n) for n in places.max(axis=0) - places.min(axis=0) + 1)
    rings = 16 if pod.chip.dimensions == 2 else 4  # flat pods close at their full side, cubes at every multiple of 4
    whole_cubes = pod.chip.dimensions == 2 or all(size % rings == 0 for size in pod.shape)
    closed = tuple(
        whole_cubes and size == side and side % rings == 0 for size, side in zip(sizes, pod.shape, strict=True)
    )
    return _Span(sizes, closed, len({getattr(device, "slice_index", 0) for device in members}))


def exchange_seconds(kind: str, size: int, group: tuple[int, ...], pod: Pod, mesh: Mesh) -> float:
    """Modelled time of a collective of `size` bytes a device over a group of devices.

    Inside a slice, on its torus: what crosses each half of the group over the links there (all-to-all), or rings along
    all dimensions at once (the others). Devices of a group count as a full block of the torus, so a scattered group is
    modelled too fast. Between slices, over the datacentre's network: sums and gathers are done in two levels, as the
    TPU compiler writes them, so that each device ships its share of its slice's part only; in an all-to-all and in a
    permutation there is nothing to share. The longer of the two levels counts, as if pieces of the buffer went through
    both at once.
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
