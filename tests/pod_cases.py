"""Pods for tests without the TPU compiler."""

import dataclasses

import numpy as np

from limoe.plan.pods import Pod
from moe_kernels.chips import TPUS


@dataclasses.dataclass(frozen=True)
class Device:
    """What a plan asks of a device."""

    coords: tuple[int, ...]
    process_index: int = 0
    slice_index: int = 0


def paper_pod(kind: str, *sides: int) -> Pod:
    """A pod without the compiler: devices with their places, in the order of libtpu's hosts of 2 x 2 chips."""
    grid = np.stack(np.meshgrid(*[np.arange(side) for side in sides], indexing="ij"), axis=-1).reshape(-1, len(sides))
    host = [tuple(reversed((place // [2, 2, 1][: len(sides)]).tolist())) for place in grid]
    order = sorted(range(len(grid)), key=lambda n: (host[n], tuple(reversed(grid[n].tolist()))))
    chip = next(chip for chip in TPUS.values() if chip.topology == kind)
    devices = tuple(Device((*grid[n].tolist(), 0)[:3]) for n in order)
    return Pod(f"{kind}:{'x'.join(map(str, sides))}", chip, sides, devices)
