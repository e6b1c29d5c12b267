"""The mesh of devices, and how parameters, optimiser state and batches are sharded over it.

The mesh has three axes: `slice` (pod slices), `data` and `expert`. A batch is split over all three. Experts and their
optimiser state are split over `expert`. Everything else is replicated or, with `mesh.fully_sharded`, split over `data`.
Device p of P in the mesh holds rows p*B/P to (p+1)*B/P of a batch. Devices that are neighbours on a torus are
neighbours along `expert`, which exchanges rows. The rows of a process may therefore be several ranges.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from limoe.config.schema import ConfigError, MeshConfig
from limoe.parallel.parameters import Kind, Kinds, parameter_path

SLICE, DATA, EXPERT = AXES = ("slice", "data", "expert")
# Splitting a small array saves too little memory to pay for its own collective.
_SMALLEST_SPLIT = 2**14


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh of devices, and the settings for sharding over it."""

    mesh: Mesh
    config: MeshConfig

    @property
    def size(self) -> int:
        """The number of devices in the mesh."""
        return self.mesh.size

    @property
    def own_places(self) -> list[int]:
        """The positions of this process's devices in the mesh, in order."""
        here = jax.process_index()
        return [place for place, device in enumerate(self.mesh.devices.flat) if device.process_index == here]

    @property
    def rows(self) -> NamedSharding:
        """The sharding of a batch: rows split over all devices."""
        return NamedSharding(self.mesh, P(AXES))

    @property
    def everywhere(self) -> NamedSharding:
        """The sharding of an array that is replicated on every device."""
        return NamedSharding(self.mesh, P())


def place(config: MeshConfig, devices: Sequence[Any] | None = None) -> Placement | None:
    """Make the mesh of a configuration over these devices (default: all of JAX's). Returns None for a single device.

    `jax.experimental.mesh_utils` orders TPUs; other devices are ordered by slice and process. A single process may
    leave devices unused; several processes must use all of them. Raises ConfigError for a mesh that does not fit.

    >>> place(MeshConfig()) is None
    True
    >>> place(MeshConfig(expert=4096))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    limoe.config.section.ConfigError: mesh.slice=1 x mesh.data=1 x mesh.expert=4096 needs 4096 devices, ...
    """
    here = jax.devices() if devices is None else devices
    needed, processes = config.num_devices, len({device.process_index for device in here})
    if needed > len(here) or (processes > 1 and devices is None and needed < len(here)):
        raise ConfigError(
            f"mesh.slice={config.slice} x mesh.data={config.data} x mesh.expert={config.expert} needs {needed} "
            f"devices, but there are {len(here)} (of {processes} processes); set mesh.data and mesh.expert to fit them"
        )
    if needed == 1:
        return None
    ordered = sorted(here, key=lambda device: (getattr(device, "slice_index", 0), device.process_index))[:needed]
    return Placement(Mesh(_arranged(ordered, len(here), (config.slice, config.data, config.expert)), AXES), config)


def _arranged(devices: Sequence[Any], num_there: int, shape: tuple[int, int, int]) -> np.ndarray:
    """Arrange devices in the shape of a mesh, so that those that exchange most are close on a TPU's torus.

    The order stays as it is in three cases that mesh_utils does not support: only some of the devices are used, which
    may be no block of the torus; a v4 chip appears as two devices; or the number of slices is not the configured one.
    """
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    halves_of_v4 = any(device.device_kind == "TPU v4" and device.core_on_chip for device in devices)
    if len(devices) < num_there or halves_of_v4 or num_slices not in (1, shape[0]):
        return np.array(devices).reshape(shape)
    if num_slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        (1, *shape[1:]), (num_slices, 1, 1), devices, allow_split_physical_axes=True
    )


def parameter_spec(kind: Kind, shape: tuple[int, ...], config: MeshConfig) -> P:
    """Choose how to split a parameter: experts over `expert`, others over `data` if `fully_sharded` is set.

    The axis of repeats is never split.

    >>> from limoe.parallel.parameters import EXPERT_KERNEL, TABLE
    >>> stacked = dataclasses.replace(EXPERT_KERNEL, stacked=True)
    >>> tuple(parameter_spec(stacked, (6, 32, 768, 3072), MeshConfig(expert=8)))
    (None, 'expert')
    >>> tuple(parameter_spec(TABLE, (32000, 768), MeshConfig(data=4, fully_sharded=True)))
    ('data',)
    >>> tuple(parameter_spec(TABLE, (32000, 768), MeshConfig(data=4)))
    ()
    """
    repeats = [None] * kind.stacked
    if kind.per_expert:
        return P(*repeats, EXPERT)
    own = shape[kind.stacked :]
    if not config.fully_sharded or np.prod(own, dtype=np.int64) < _SMALLEST_SPLIT:
        return P()
    fitting = [axis for axis, size in enumerate(own) if size % config.data == 0]
    if not fitting:
        return P()
    largest = max(fitting, key=lambda axis: own[axis])  # the first of equals
    return P(*repeats, *[None] * largest, DATA)


def with_shardings(tree: PyTree, parameters: PyTree, kinds: Kinds, placement: Placement) -> PyTree:
    """Give the abstract arrays of parameters or of a train state their shardings.

    The state of a parameter is split like the parameter; a factored moment lacks one of its axes. Raises ValueError for
    an array that belongs to no parameter and is not a scalar.
    """
    shapes = {parameter_path(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)}

    def sharding_of(path: jax.tree_util.KeyPath, leaf: Any) -> NamedSharding:
        if leaf.ndim == 0:
            return placement.everywhere
        full = parameter_path(path)
        parts = full.split("/")
        part = parts.pop() if parts[-1] in ("row", "column") else ""
        owners = ["/".join(parts[start:]) for start in range(len(parts))]
        owner = next((name for name in owners if name in shapes), None)
        if owner is None:
            raise ValueError(f"cannot shard {full} {leaf.shape} of the train state: it belongs to no parameter")
        shape = shapes[owner]
        spec = parameter_spec(kinds[owner], shape, placement.config)
        axes = list(zip(shape, (*spec, *[None] * (len(shape) - len(spec))), strict=True))
        if part:
            del axes[-1 if part == "row" else -2]
        assert leaf.shape == tuple(size for size, _ in axes), full
        return NamedSharding(placement.mesh, P(*(axis for _, axis in axes)))

    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(path, leaf)), tree
    )


def own_rows(batch_size: int, placement: Placement | None) -> list[int]:
    """List the rows of a batch that this process's devices hold, in order.

    >>> own_rows(4, None)
    [0, 1, 2, 3]
    """
    if placement is None:
        return list(range(batch_size))
    share = batch_size // placement.size
    return [row for place in placement.own_places for row in range(place * share, (place + 1) * share)]


def joined(rows: np.ndarray, placement: Placement | None) -> np.ndarray | Array:
    """Join the `own_rows` of all processes to one array over all devices. Without a mesh they stay as they are."""
    if placement is None:
        return rows
    places = placement.own_places
    share = len(rows) // len(places)
    offsets = {place * share: number * share for number, place in enumerate(places)}

    def of_device(index: Any) -> np.ndarray:
        first = offsets[index[0].start or 0]
        return rows[first : first + share]

    shape = (share * placement.size, *rows.shape[1:])
    return jax.make_array_from_callback(shape, placement.rows, of_device)


def by_rows(x: Array, placement: Placement | None) -> Array:
    """Constrain an array to be split over all devices along its first axis."""
    return x if placement is None else jax.lax.with_sharding_constraint(x, placement.rows)


def gathered(tree: PyTree, kinds: Kinds, placement: Placement | None) -> PyTree:
    """Gather parameters that are split over `data` (of stacked ones, a single repeat) to every device.

    In the backward pass a reduce-scatter sums and splits their gradients.
    """
    if placement is None or not placement.config.fully_sharded:
        return tree

    def whole(path: jax.tree_util.KeyPath, leaf: Array) -> Array:
        kind = dataclasses.replace(kinds[parameter_path(path)], stacked=False)
        spec = parameter_spec(kind, leaf.shape, placement.config)
        return _gather(NamedSharding(placement.mesh, spec), leaf) if DATA in spec else leaf

    return jax.tree_util.tree_map_with_path(whole, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(split: NamedSharding, x: Array) -> Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(split.mesh, P()))


def _gather_forward(split: NamedSharding, x: Array) -> tuple[Array, None]:
    return _gather(split, x), None


def _gather_backward(split: NamedSharding, _: None, cotangent: Array) -> tuple[Array]:
    # JAX's own derivative is the forward constraint again: it would first sum whole gradients on every device.
    return (jax.lax.with_sharding_constraint(cotangent, split),)


_gather.defvjp(_gather_forward, _gather_backward)
