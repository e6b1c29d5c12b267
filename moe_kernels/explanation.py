"""Which back end runs each part of a layer on a chip, and why others do not: as text and as JSON."""

from __future__ import annotations

from typing import Any, NamedTuple

from moe_kernels import local
from moe_kernels.backends import Choice, Traced, traced_for
from moe_kernels.chips import TPUS
from moe_kernels.choice import LayerChoice
from moe_kernels.parallel.shard import check_exchange, choose_exchanged
from moe_kernels.spec import MoeSpec, RouteInputs
from moe_kernels.types import RouterWeights, Routing


class Explanation(NamedTuple):
    """The choice for each verb of a layer. It prints as text; `as_json` is for programs.

    >>> Explanation._fields
    ('choice', 'on')
    """

    choice: LayerChoice
    on: Traced

    def as_json(self) -> dict[str, dict[str, Any]]:
        """Give `{"span": name, "backend": name, "how": text, "refused": {name: reason}}` for each verb and all."""
        return {name: _as_json(choice) for name, choice in self._verbs().items()}

    def _verbs(self) -> dict[str, Choice]:
        choice = self.choice._asdict()
        if (down := choice.pop("down")) is not None:
            ways = f"between matmuls something that expert_glu does not have; down by {down.backend}"
            choice["experts"] = self.choice.experts._replace(how=ways)
        return choice

    def __str__(self) -> str:
        device = f"{self.on.chip or self.on.platform}, {self.on.platform}"
        return "\n".join([device, *(_as_text(name, choice) for name, choice in self._verbs().items())])


def _as_json(choice: Choice) -> dict[str, Any]:
    return {"span": choice.name, "backend": choice.backend, "how": choice.how, "refused": choice.refused}


def _as_text(name: str, choice: Choice) -> str:
    nobody = "verb by verb" if name == "layer" else "nobody"
    how = f" ({choice.how})" if choice.how else ""
    how = f", {choice.name}{how}" if name == "experts" else how
    refused = [f"    not {backend}: {reason}" for backend, reason in choice.refused.items()]
    return "\n".join([f"  {name}: {choice.backend or nobody}{how}", *refused])


def explain(
    tokens: Any,
    router: Any,
    weights: Any,
    spec: MoeSpec = MoeSpec(),  # noqa: B008 (frozen)
    *,
    chip: str | None = None,
    shards: int = 1,
) -> Explanation:
    """Say which back end runs each part of a layer, how, and why others do not.

    The arguments are those of `moe_mlp`, as arrays or `jax.ShapeDtypeStruct`s. `tokens` are those of one device. `chip`
    is v4, v5e, v5p, v6e or 7x (None: this machine's device). `shards` is the number of devices that share the experts.
    Raises ValueError for an unknown chip and for experts that cannot be split.

    >>> import jax.numpy as jnp
    >>> from moe_kernels import MlpWeights
    >>> weights = MlpWeights(jnp.ones((2, 4, 8)), None, jnp.ones((2, 8, 4)), None)
    >>> print(explain(jnp.ones((6, 4)), jnp.ones((4, 2)), weights).as_json()["route"]["backend"])
    xla
    """
    if chip is not None and chip not in TPUS:
        raise ValueError(f"chip {chip!r} is not one of {', '.join(TPUS)}")
    if not isinstance(router, RouterWeights | Routing):
        router = RouterWeights(router)
    on = traced_for() if chip is None else Traced("tpu", TPUS[chip].kind, TPUS[chip].num_cores)
    shapes = local.shapes_of(tokens, router, local.routed_of(weights), spec)
    if shards == 1:
        return Explanation(local.choose_here(router, shapes, spec, RouteInputs(), on=on), on)
    check_exchange(spec, shapes.num_experts, shards)
    return Explanation(choose_exchanged(shapes, router, spec, RouteInputs(), shards, on=on), on)
