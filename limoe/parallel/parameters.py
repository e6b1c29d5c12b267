"""What a parameter is, which the module that makes it says, and what follows: decay, factoring, splitting, counting."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
from flax import nnx

Kinds = dict[str, "Kind"]
"""What each parameter is, by its path."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a parameter is, written where it is made: `nnx.Param(value, kind=KERNEL)`.

    >>> EXPERT_KERNEL.decayed, EXPERT_KERNEL.factored, dataclasses.replace(EXPERT_KERNEL, stacked=True).num_copies
    (True, True, 2)
    """

    role: Literal["kernel", "router", "table", "norm", "vector"]
    """A linear map; the map from tokens to experts; rows looked up by number; of a norm; a bias or another number."""
    per_expert: bool = False
    """Whether the first axis, after that of a stack, is E: one for each expert."""
    stacked: bool = False
    """Whether the first axis is one of repeats, over which the tower scans."""

    @property
    def decayed(self) -> bool:
        """Whether weight decay applies."""
        return self.role in ("kernel", "router")

    @property
    def factored(self) -> bool:
        """Whether Adafactor may keep its second moment as one of rows and one of columns.

        Not of a router: the columns of [D, E] are experts, which must not share a second moment. Not of vectors: where
        they are stacked or belong to experts, their shape looks like a matrix's, but they are none.
        """
        return self.role in ("kernel", "table")

    @property
    def num_copies(self) -> int:
        """Leading axes that count parameters of their own: repeats, experts."""
        return self.stacked + self.per_expert


KERNEL, ROUTER, TABLE, NORM, VECTOR = map(Kind, ("kernel", "router", "table", "norm", "vector"))
EXPERT_KERNEL, EXPERT_VECTOR = Kind("kernel", per_expert=True), Kind("vector", per_expert=True)


def parameter_path(path: jax.tree_util.KeyPath) -> str:
    """The names that lead to a parameter, joined by slashes, without the `value` that flax adds at the end.

    >>> params = {"blocks": [{"mlp": {"w1": 0.0}}]}
    >>> [parameter_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    ['blocks/0/mlp/w1']
    """
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def kinds_of(model: nnx.Module) -> Kinds:
    """What each parameter of a model is, as its modules say; raises ValueError for one of which none does.

    >>> kinds_of(nnx.Linear(1, 1, use_bias=False, kernel_metadata={"kind": KERNEL}, rngs=nnx.Rngs(0)))
    {'kernel': Kind(role='kernel', per_expert=False, stacked=False)}
    """
    kinds = {}
    for names, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        path = "/".join(map(str, names))
        kind = variable.get_metadata("kind", None)
        if not isinstance(kind, Kind):
            raise ValueError(
                f"nobody says what parameter {path!r} is; give its nnx.Param a kind of limoe/parallel/parameters.py, "
                "such as kind=KERNEL"
            )
        kinds[path] = kind
    return kinds


def mark_stacked(model: nnx.Module) -> None:
    """Say of every parameter of a module that its first axis is one of repeats."""
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param):
            variable.set_metadata("kind", dataclasses.replace(variable.get_metadata("kind"), stacked=True))
