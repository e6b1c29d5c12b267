"""The static options of a layer, as frozen dataclasses, and the arrays that vary from call to call."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple, get_args

from jaxtyping import Array, Bool, Float, Int, Key

from moe_kernels.activations import ClampedSwiglu
from moe_kernels.types import CapacityFactor, Priority


@dataclasses.dataclass(frozen=True)
class RouterSpec:
    """How logits become choices and gates.

    `family` names an entry of `moe_kernels.ROUTERS`: "softmax", "sigmoid" or one that the program added. With
    `renormalise` the gates of a token's choices add up to 1. Then every gate is multiplied by `scale`. With
    `expert_groups` above 1, a token chooses only among the experts of its `groups_chosen` best groups. The score of a
    group is the sum of its `group_best` largest scores (DeepSeek-V3, section 2.1.2). A softmax over the chosen logits
    alone (Mixtral, gpt-oss) is "softmax" with `renormalise`: the sum over all experts cancels.

    >>> RouterSpec("sigmoid", renormalise=True, scale=2.5, expert_groups=8, groups_chosen=4).family
    'sigmoid'
    """

    family: str = "softmax"
    renormalise: bool = False
    scale: float = 1.0
    expert_groups: int = 1
    groups_chosen: int = 1
    group_best: int = 2


@dataclasses.dataclass(frozen=True)
class ExchangeSpec:
    """How a layer is spread over a mesh. Without a mesh it has no effect.

    Experts are split over `expert_axis`, tokens over `token_axes` (None: all axes of the mesh but `width_axis`, in its
    order). With a `width_axis`, the hidden layer of every expert is split over that axis, and devices that differ only
    in it have the same tokens. With a capacity limit, rows are exchanged in `num_chunks` chunks of equal size; the
    exchange of one chunk may overlap with the experts' work on another. Without a limit, a device has room for
    `buffer_factor` times the rows that it sends (None: for all that could arrive). The first groups of two neighbouring
    devices are `group_stride` apart in number (None: a device's number of groups); set it if a call covers only some
    groups of each device.

    >>> ExchangeSpec().expert_axis
    'expert'
    """

    expert_axis: str = "expert"
    token_axes: tuple[str, ...] | None = None
    width_axis: str | None = None
    num_chunks: int = 1
    buffer_factor: CapacityFactor | None = None
    group_stride: int | None = None


@dataclasses.dataclass(frozen=True)
class MoeSpec:
    """Everything static about a layer: router, choices, groups, capacity, priority, activation, exchange, back end.

    A call has `num_groups` groups of tokens, one after the other. In each group an expert has `ceil(S K c / E)` places
    for `capacity_factor=c`; None means no limit. `priority` says who gets a place first: "bpr" (largest gate),
    "arrival", "random" (needs `RouteInputs.key`) or "modality" (`first_modality`). `noise_std` is the standard
    deviation of `RouteInputs.noise` (default 1/E); the smooth load needs it. `activation` is that of the experts (None:
    `gelu_tanh` for `MlpWeights`, else `silu`). `interleaved` says that the columns of `JoinedGluWeights` alternate.
    `gates_on="input"` multiplies an expert's input by its gate, not its output (Llama 4). `backend` names the back end
    (None: the first that takes the problem). Raises ValueError for impossible values.

    >>> MoeSpec(num_choices=2, capacity_factor=1.25).priority
    'bpr'
    """

    num_choices: int = 1
    num_groups: int = 1
    num_modalities: int = 1
    router: RouterSpec = RouterSpec()
    noise_std: float | None = None
    capacity_factor: CapacityFactor | None = None
    priority: Priority = "bpr"
    first_modality: int = 0
    activation: str | ClampedSwiglu | None = None
    interleaved: bool = False
    gates_on: Literal["output", "input"] = "output"
    exchange: ExchangeSpec = ExchangeSpec()
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.priority not in get_args(Priority):
            raise ValueError(f"priority={self.priority!r} is not one of {', '.join(get_args(Priority))}")
        if self.gates_on not in ("output", "input"):
            raise ValueError(f"gates_on={self.gates_on!r} is not one of output, input")
        if self.num_choices < 1:
            raise ValueError(f"num_choices={self.num_choices} must be at least 1")
        if self.num_groups < 1:
            raise ValueError(f"num_groups={self.num_groups} must be at least 1")
        if self.num_modalities < 1:
            raise ValueError(f"num_modalities={self.num_modalities} must be at least 1")
        if self.priority == "modality" and not 0 <= self.first_modality < self.num_modalities:
            raise ValueError(
                f"first_modality={self.first_modality} is not one of num_modalities={self.num_modalities}; "
                f"choose from 0 to {self.num_modalities - 1}"
            )


class RouteInputs(NamedTuple):
    """Arrays of a call beside tokens and weights. Each is optional and gets no gradient.

    `noise` is added to the logits for the choice and the gates; to differentiate it is an error. Jitter, which
    multiplies what the router sees (Switch), is a routing of its own: `route(jitter * tokens, router, spec)`, given to
    `moe_mlp`. `modality` holds ids from 0 to `num_modalities - 1`. `mask` is False for padding, which takes no place,
    has gate 0 and enters no sum. `key` is for the random priority; group g of the call draws from `first_group + g`. To
    repeat the decision of an earlier call over the same tokens, pass its `expert` and `priority`: gates and sums are
    then computed for the choices `expert`, and the largest `token_priority` claims a place first.

    >>> RouteInputs().first_group
    0
    """

    noise: Float[Array, "T E"] | None = None
    modality: Int[Array, " T"] | None = None
    mask: Bool[Array, " T"] | None = None
    expert: Int[Array, "T K"] | None = None
    token_priority: Float[Array, " T"] | None = None
    key: Key[Array, ""] | None = None
    first_group: int | Int[Array, ""] = 0
