"""The mesh of devices, and where on it each parameter, its optimiser state and the rows of a batch lie.

Three axes: `slice` (pod slices), `data` and `expert`. A batch is split over all three; experts and their optimiser
state over `expert`; everything else is the same on every device or, when asked, split over `data` as well. The device
at place p of P in the mesh holds rows p*B/P to (p+1)*B/P of a batch. Devices are placed so that neighbours on a torus
are neighbours along `expert`, which exchanges rows; so the rows of a process may be several ranges.
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
# A split vector saves nothing worth a collective of its own.
_SMALLEST_SPLIT = 2**14

Specs = dict[str, P]
"""The partition of each parameter, by its path."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh of devices, and the settings that say what lies where on it."""

    mesh: Mesh
    config: MeshConfig

    @property
    def size(self) -> int:
        """Devices of the mesh."""
        return self.mesh.size

    @property
    def own_places(self) -> list[int]:
        """Places in the mesh of this process's devices, in order."""
        here = jax.process_index()
        return [place for place, device in enumerate(self.mesh.devices.flat) if device.process_index == here]

    @property
    def rows(self) -> NamedSharding:
        """Rows of a batch, split over all devices."""
        return NamedSharding(self.mesh, P(AXES))

    @property
    def everywhere(self) -> NamedSharding:
        """The same on every device."""
        return NamedSharding(self.mesh, P())


def place(config: MeshConfig, devices: Sequence[Any] | None = None) -> Placement | None:
    """The mesh of a configuration over these devices (default: all that JAX sees); None where one device does it all.

    TPUs are placed by `jax.experimental.mesh_utils`, others in the order of slices and processes. One process may leave
    devices unused; several must use all of theirs. Raises ConfigError for a mesh that does not fit the devices.

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
    """The devices in the shape of a mesh, those that exchange most close together on a TPU's torus.

    In plain order where mesh_utils does not serve: a part of the devices need not be a block of the torus, it does not
    know chips of v4 with two devices, and the slices may be others than those of the configuration.
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
    """How a parameter is split: experts over `expert`; the rest, where asked for, over `data`, but never its repeats.

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


def parameter_specs(parameters: PyTree, kinds: Kinds, config: MeshConfig) -> Specs:
    """The partition of every parameter of a model."""
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    shapes = {parameter_path(path): leaf.shape for path, leaf in leaves}
    return {path: parameter_spec(kinds[path], shape, config) for path, shape in shapes.items()}


def state_shardings(state: PyTree, specs: Specs, parameters: PyTree, placement: Placement) -> PyTree:
    """The sharding of every leaf of a train state: what belongs to a parameter lies where the parameter does.

    A factored moment has the parameter's axes but one. Raises ValueError for an array that belongs to no parameter and
    is not a scalar.
    """
    shapes = {parameter_path(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)}

    def of(path: jax.tree_util.KeyPath, leaf: Any) -> NamedSharding:
        if leaf.ndim == 0:
            return placement.everywhere
        full = parameter_path(path)
        parts = full.split("/")
        part = parts.pop() if parts[-1] in ("row", "column") else ""
        owners = ["/".join(parts[start:]) for start in range(len(parts))]
        owner = next((name for name in owners if name in shapes), None)
        if owner is None:
            raise ValueError(f"{full} {leaf.shape} of the train state belongs to no parameter, so its place is unknown")
        shape = shapes[owner]
        spec = (*specs[owner], *[None] * (len(shape) - len(specs[owner])))
        left_out = {"row": len(shape) - 1, "column": len(shape) - 2}.get(part)
        kept = [axis for axis in range(len(shape)) if axis != left_out]
        assert leaf.shape == tuple(shape[axis] for axis in kept), full
        return NamedSharding(placement.mesh, P(*(spec[axis] for axis in kept)))

    return jax.tree_util.tree_map_with_path(of, state)


def spread(rows: np.ndarray, placement: Placement | None) -> np.ndarray | Array:
    """Rows that every process has, split over all devices; without a mesh as they are."""
    if placement is None:
        return rows
    return jax.make_array_from_callback(rows.shape, placement.rows, lambda index: rows[index])


def own_rows(batch_size: int, placement: Placement | None) -> list[int]:
    """The rows of a batch that this process's devices hold, in order.

    >>> own_rows(4, None)
    [0, 1, 2, 3]
    """
    if placement is None:
        return list(range(batch_size))
    share = batch_size // placement.size
    return [row for place in placement.own_places for row in range(place * share, (place + 1) * share)]


def joined(rows: np.ndarray, placement: Placement | None) -> np.ndarray | Array:
    """The `own_rows` of every process as one array split over all devices; without a mesh as they are."""
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
    """The same values, told to be split over all devices along the first axis."""
    return x if placement is None else jax.lax.with_sharding_constraint(x, placement.rows)


def gathered(tree: PyTree, kinds: Kinds, placement: Placement | None) -> PyTree:
    """Parameters (one of the repeats of stacked ones) made whole on every device where they are split over `data`.

    Their gradients go back to the split form, summed on the way.
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
    # The derivative of a constraint is the same constraint, which would sum whole gradients on every device first.
    return (jax.lax.with_sharding_constraint(cotangent, split),)


_gather.defvjp(_gather_forward, _gather_backward)
