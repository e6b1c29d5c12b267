"""TPU pods: the shapes that exist, and their devices as the compiler knows them."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

from limoe.config.schema import ConfigError
from limoe.plan import compiler
from moe_kernels.chips import TPUS, Tpu

# By the names of libtpu's topologies.
_KINDS = {tpu.topology: tpu for tpu in TPUS.values()}
_BELOW_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_FLAT = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))


def topologies(kind: str) -> list[str]:
    """List the pods of a kind of chip, smallest first. In three dimensions large ones have multiples of four.

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
    """A pod with its devices as the compiler knows them. None of them is here."""

    name: str
    chip: Tpu
    shape: tuple[int, ...]
    devices: tuple[Any, ...]

    @property
    def num_chips(self) -> int:
        """Number of chips. Some kinds of chip have two devices."""
        return len(self.devices) // self.chip.devices_per_chip


def find_pod(name: str, num_slices: int = 1) -> Pod:
    """Find the pod slice of a name such as `v5p:8x8x8`, or several such slices.

    Raises ConfigError if there is no such pod, with those that exist, and if there is no TPU compiler.

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
    compiler.prepare()
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
