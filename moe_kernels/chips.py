"""The one table of accelerators. Kernels, planner and benchmarks read every figure of a chip here.

Figures come from the makers' data sheets and from the book "How to Scale Your Model"; none was measured here. A TPU's
entry describes one JAX device: half a chip of v4 and 7x, a whole chip of v5p with both cores. Constants that depend on
the compiler's version are in `fitted.json`.
"""

from __future__ import annotations

import dataclasses
import re
from typing import NamedTuple

MIB, GIB = 2**20, 2**30
# A register of a TPU holds 8 sublanes of 128 lanes, 32-bit numbers each.
SUBLANES, LANES = 8, 128
# Passes of a bfloat16 matrix unit for one exact float32 product.
FLOAT32_PASSES = 6


class Rates(NamedTuple):
    """Peak rates of a device: FLOP/s for each dtype (float32: exact products) and memory bandwidth in bytes/s."""

    bfloat16: float
    float32: float
    memory: float


@dataclasses.dataclass(frozen=True)
class Tpu:
    """One JAX device of a kind of TPU. A rate is the sum over its cores."""

    name: str
    kind: str
    """JAX's name for it."""
    spellings: str
    """A pattern for all names that versions of JAX give it."""
    topology: str
    """The name of its pods in libtpu."""
    vmem: int
    """Bytes of each core."""
    depth: int
    """Rows and columns of a matrix unit. Loading its weights takes as long as multiplying this many rows."""
    flops: float
    """Peak bfloat16 FLOP/s from the data sheet."""
    gigahertz: float
    """Assumed, since no API gives clocks. v5p and 7x are uncertain by 15% (libtpu's own model has 1.5 and 1.9)."""
    macs_per_cycle: int
    """Multiply-adds in bfloat16 of each core."""
    hbm_bytes: int
    """Bytes that the compiler may use."""
    hbm_bandwidth: float
    """Bytes/s."""
    link_bandwidth: float
    """One device's share of one link between chips, in one direction, bytes/s."""
    largest: tuple[int, ...]
    """Chips along each dimension of a whole pod's torus."""
    num_cores: int = 1
    devices_per_chip: int = 1

    @property
    def dimensions(self) -> int:
        """The number of dimensions of the torus that the chips form."""
        return len(self.largest)

    @property
    def clocked_flops(self) -> float:
        """Peak in bfloat16 by the assumed clock; it differs from the data sheet's `flops` by less than 1%."""
        return 2e9 * self.gigahertz * self.macs_per_cycle * self.num_cores

    @property
    def smallest_topology(self) -> str:
        """The smallest topology that libtpu describes."""
        return f"{self.topology}:{'2x2' if self.dimensions == 2 else '2x2x1'}"

    @property
    def rates(self) -> Rates:
        """Peak rates from the data sheet."""
        return Rates(self.flops, self.flops / FLOAT32_PASSES, self.hbm_bandwidth)


TPUS = {
    tpu.name: tpu
    for tpu in (
        Tpu(
            *("v4", "TPU v4", "TPU v4", "v4"),
            vmem=16 * MIB,
            depth=128,
            flops=137.5e12,
            gigahertz=1.05,
            macs_per_cycle=65_536,
            hbm_bytes=int(15.35 * GIB),
            hbm_bandwidth=614e9,
            link_bandwidth=22.5e9,
            largest=(16, 16, 16),
            devices_per_chip=2,
        ),
        Tpu(
            *("v5e", "TPU v5 lite", "TPU (v5 lite|v5e)", "v5e"),
            vmem=128 * MIB,
            depth=128,
            flops=197e12,
            gigahertz=1.5,
            macs_per_cycle=65_536,
            hbm_bytes=int(15.75 * GIB),
            hbm_bandwidth=819e9,
            link_bandwidth=45e9,
            largest=(16, 16),
        ),
        Tpu(
            *("v5p", "TPU v5", "TPU v5p?", "v5p"),
            vmem=64 * MIB,
            depth=128,
            flops=459e12,
            gigahertz=1.75,
            macs_per_cycle=65_536,
            hbm_bytes=int(95.74 * GIB),
            hbm_bandwidth=2765e9,
            link_bandwidth=90e9,
            largest=(16, 16, 24),
            num_cores=2,
        ),
        Tpu(
            *("v6e", "TPU v6 lite", "TPU (v6 lite|v6e)", "v6e"),
            vmem=128 * MIB,
            depth=256,
            flops=918e12,
            gigahertz=1.75,
            macs_per_cycle=262_144,
            hbm_bytes=int(31.25 * GIB),
            hbm_bandwidth=1640e9,
            link_bandwidth=90e9,
            largest=(16, 16),
        ),
        Tpu(
            *("7x", "TPU7x", "TPU ?v?7x?", "tpu7x"),
            vmem=64 * MIB,
            depth=256,
            flops=1155e12,
            gigahertz=2.2,
            macs_per_cycle=262_144,
            hbm_bytes=int(94.75 * GIB),
            hbm_bandwidth=3690e9,
            link_bandwidth=50e9,
            largest=(16, 24, 24),
            devices_per_chip=2,
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation of GPUs: the name under which kernels are looked up, and a block's bytes of shared memory."""

    name: str
    shared_memory: int


_HOPPER, _BLACKWELL = Generation("hopper", 232_448), Generation("blackwell", 232_448)


class Gpu(NamedTuple):
    """A card, or all cards of a generation. The pattern `spellings` must match the whole name that JAX gives."""

    spellings: str
    rates: Rates | None
    """Peak rates from the data sheet, without sparsity."""
    generation: Generation | None
    """None if there are no kernels for it."""


# The first pattern that matches counts.
GPUS = (
    Gpu("NVIDIA A100.*40GB.*", Rates(312e12, 19.5e12, 1555e9), None),
    Gpu("NVIDIA A100-SXM4-80GB.*", Rates(312e12, 19.5e12, 2039e9), None),
    Gpu("NVIDIA H100.* HBM3.*", Rates(989e12, 67e12, 3350e9), _HOPPER),
    # The NVL cards of H100 and H200 are slower and are not listed.
    Gpu("NVIDIA H200(?! NVL).*", Rates(989e12, 67e12, 4800e9), _HOPPER),
    Gpu("NVIDIA B200.*", Rates(2250e12, 75e12, 8000e9), _BLACKWELL),
    Gpu(r".*\bG?H(20|100|200|800)\b.*", None, _HOPPER),
    Gpu(r".*\bG?B(100|200)\b.*", None, _BLACKWELL),
)


def find_tpu(kind: str) -> Tpu | None:
    """Find the TPU that JAX calls `kind`; None if it is not in the table.

    >>> find_tpu("TPU v5 lite").name, find_tpu("TPU v3")
    ('v5e', None)
    """
    return next((tpu for tpu in TPUS.values() if re.fullmatch(tpu.spellings, kind)), None)


def find_gpu(kind: str) -> Gpu | None:
    """Find the GPU that JAX calls `kind`; None if it is not in the table.

    >>> find_gpu("NVIDIA H200 141GB HBM3e").rates.memory, find_gpu("NVIDIA H200 NVL").rates
    (4800000000000.0, None)
    """
    return next((gpu for gpu in GPUS if re.fullmatch(gpu.spellings, kind)), None)


def find_generation(kind: str) -> Generation | None:
    """Find the generation of the GPU that JAX calls `kind`; None if there are no kernels for it.

    >>> find_generation("NVIDIA H200 141GB HBM3e").shared_memory
    232448
    >>> find_generation("NVIDIA A100-SXM4-80GB") is None
    True
    """
    gpu = find_gpu(kind)
    return gpu and gpu.generation


def find_rates(kind: str) -> Rates | None:
    """Find the peak rates of the device that JAX calls `kind`; None if its data sheet is not in the table.

    >>> find_rates("TPU v5 lite").bfloat16, find_rates("NVIDIA H200 NVL")
    (197000000000000.0, None)
    """
    chip = find_tpu(kind) or find_gpu(kind)
    return chip and chip.rates
