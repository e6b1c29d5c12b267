"""Kinds of parameters. A module says the kind of each parameter that it makes; from it follow weight decay, the
optimiser's factoring, sharding and counts."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
from flax import nnx

Kinds = dict[str, "Kind"]
"""The kind of each parameter, by its path."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """The kind of a parameter, given where it is made: `nnx.Param(value, kind=KERNEL)`.

    >>> EXPERT_KERNEL.decayed, EXPERT_KERNEL.factored, dataclasses.replace(EXPERT_KERNEL, stacked=True).num_copies
    (True, True, 2)
    """

    role: Literal["kernel", "router", "table", "norm", "vector"]
    """kernel: a linear map. router: the map from tokens to experts. table: rows looked up by index. norm: scale or bias
    of a LayerNorm. vector: a bias or a scalar."""
    per_expert: bool = False
    """Whether there is one for each expert: the first axis (the second one if stacked) is E."""
    stacked: bool = False
    """Whether the first axis counts the repeats that the tower scans over."""

    @property
    def decayed(self) -> bool:
        """Whether weight decay applies."""
        return self.role in ("kernel", "router")

    @property
    def factored(self) -> bool:
        """Whether Adafactor may factor its second moment into rows and columns.

        A router is not factored, because the columns of [D, E] are experts, which must not share a second moment. Nor
        are vectors: if they are stacked or per expert, they only look like matrices.
        """
        return self.role in ("kernel", "table")

    @property
    def num_copies(self) -> int:
        """Number of leading axes that count separate parameters: repeats, experts."""
        return self.stacked + self.per_expert


KERNEL, ROUTER, TABLE, NORM, VECTOR = map(Kind, ("kernel", "router", "table", "norm", "vector"))
EXPERT_KERNEL, EXPERT_VECTOR = Kind("kernel", per_expert=True), Kind("vector", per_expert=True)


def parameter_path(path: jax.tree_util.KeyPath) -> str:
    """Join the names that lead to a parameter by slashes, without the `value` that flax adds at the end.

    >>> params = {"blocks": [{"mlp": {"w1": 0.0}}]}
    >>> [parameter_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    ['blocks/0/mlp/w1']
    """
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def kinds_of(model: nnx.Module) -> Kinds:
    """Collect the kinds of a model's parameters. Raises ValueError for a parameter without a kind.

    >>> kinds_of(nnx.Linear(1, 1, use_bias=False, kernel_metadata={"kind": KERNEL}, rngs=nnx.Rngs(0)))
    {'kernel': Kind(role='kernel', per_expert=False, stacked=False)}
    """
    kinds = {}
    for names, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        path = "/".join(map(str, names))
        kind = variable.get_metadata("kind", None)
        if not isinstance(kind, Kind):
            raise ValueError(
                f"parameter {path!r} has no kind; give its nnx.Param one from limoe/parallel/parameters.py, such as "
                "kind=KERNEL"
            )
        kinds[path] = kind
    return kinds


def mark_stacked(model: nnx.Module) -> None:
    """Mark every parameter of a module as stacked: its first axis counts repeats."""
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param):
            variable.set_metadata("kind", dataclasses.replace(variable.get_metadata("kind"), stacked=True))
