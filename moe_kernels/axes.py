"""What JAX's types say of an array and the axes of a mesh: over which it varies, and over which it is split.

In a `jax.shard_map` that checks over which mesh axes values vary (`check_vma=True`, its default), a loop must return
what it was given, and a hand-written derivative must vary over the axes of its argument. So a span gets arguments that
all vary over the same axes. JAX adds up the gradient of what did not vary before. Elsewhere nothing varies, and nothing
here adds to a program.
"""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, ManualAxisType, Mesh, NamedSharding, PartitionSpec

Values = TypeVar("Values")


def varying_axes(*values: Any) -> frozenset[str]:
    """Find the mesh axes over which any array of these trees varies.

    >>> varying_axes(1.0, None)
    frozenset()
    """
    return frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(values)))


def vary(values: Values, axes: frozenset[str]) -> Values:
    """Let every array of a tree vary over at least these axes.

    >>> vary(1.0, frozenset())
    1.0
    """

    def widened(leaf: Any) -> Any:
        missing = axes - varying_axes(leaf)
        return jax.lax.pcast(leaf, tuple(sorted(missing)), to="varying") if missing else leaf

    return jax.tree.map(widened, values)


def vary_like(values: Values, *others: Any) -> Values:
    """Let every array of a tree vary over all axes over which the others vary.

    >>> vary_like(1.0, 2.0)
    1.0
    """
    return vary(values, varying_axes(*others))


def kernel_results(shapes: Values, operands: Any) -> Values:
    """Complete the shapes of a kernel's results: they vary over all axes over which its operands vary.

    >>> kernel_results(jax.ShapeDtypeStruct((2,), "float32"), 1.0).shape
    (2,)
    """
    kind = ManualAxisType(varying=varying_axes(operands))
    return jax.tree.map(lambda shape: shape.update(manual_axis_type=kind), shapes)


def refuse_varying(kernels: str, operands: Any) -> None:
    """Refuse operands that vary, for kernels that JAX cannot trace with them. Raises ValueError."""
    if axes := varying_axes(operands):
        raise ValueError(
            f"{kernels} do not run in a shard_map that checks over which axes values vary (here {sorted(axes)}): pass "
            "check_vma=False to jax.shard_map, or use backend='xla'"
        )


def place(values: Values, specs: Any, mesh: Mesh | AbstractMesh) -> Values:
    """Split arrays over the Explicit axes of a mesh as `specs` say, a prefix of their tree.

    On other axes the compiler does it. On a mesh without Explicit axes the arrays come back as they are.

    >>> mesh = jax.make_mesh((1,), ("expert",), axis_types=(AxisType.Auto,))
    >>> place(1.0, PartitionSpec("expert"), mesh)
    1.0
    """
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if AxisType.Explicit not in kinds.values():
        return values

    def placed(spec: PartitionSpec, value: Any) -> Any:
        names = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
        explicit = [tuple(name for name in entry if kinds[name] == AxisType.Explicit) for entry in names]
        return jax.sharding.reshard(value, NamedSharding(mesh, PartitionSpec(*explicit)))

    return jax.tree.map(lambda spec, value: jax.tree.map(functools.partial(placed, spec), value), specs, values)


def refuse_split(**values: Any) -> None:
    """Refuse arrays of a mesh with Explicit axes that are split over one of them, or whose mesh was not entered.

    >>> refuse_split(tokens=1.0)
    """
    entered = jax.sharding.get_abstract_mesh()
    for name, value in values.items():
        for leaf in jax.tree.leaves(value):
            sharding = jax.typeof(leaf).sharding
            if axes := [axis for axis in sharding.spec if axis is not None]:
                raise ValueError(
                    f"{name}: an array is split over the Explicit mesh axes {axes}; pass the mesh, as in "
                    "moe_mlp(..., mesh=mesh), or call this in jax.sharding.auto_axes or jax.shard_map"
                )
            if AxisType.Explicit in sharding.mesh.axis_types and entered.empty:
                raise ValueError(
                    f"{name}: an array is on a mesh with Explicit axes; enter it with jax.set_mesh(mesh), or pass it, "
                    "as in moe_mlp(..., mesh=mesh)"
                )


def refuse_symbolic(**values: Any) -> None:
    """Refuse arrays with sizes that `jax.export` leaves open. Raises ValueError.

    >>> refuse_symbolic(tokens=1.0)
    """
    for name, value in values.items():
        for leaf in jax.tree.leaves(value):
            if open_sizes := [size for size in jax.typeof(leaf).shape if not isinstance(size, int)]:
                raise ValueError(
                    f"{name}: an array has the symbolic size {open_sizes[0]}; capacity and rows follow from sizes, so "
                    "export the layer for each size, with fixed shapes"
                )
