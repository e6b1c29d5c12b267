"""What a layer is: everything static about it as frozen dataclasses, and the arrays that vary from call to call."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, get_args

from jaxtyping import Array, Bool, Float, Int, Key

from moe_kernels.types import Activation, CapacityFactor, MatmulActivation, Priority


@dataclasses.dataclass(frozen=True)
class RouterSpec:
    """How logits become a choice and gates: the family of the scores, and what is done to them.

    `family` names an entry of `moe_kernels.ROUTERS`, "softmax" or "sigmoid" unless more are registered. With
    `renormalise` the gates of a token's choices add up to 1; every gate is then multiplied by `scale`. With
    `expert_groups` above 1 only the experts of the `groups_chosen` best groups can be chosen; a group counts as much as
    the `group_best` largest scores in it together (DeepSeek-V3, section 2.1.2).

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
    """How a layer is spread over a mesh; without a mesh nothing reads it.

    Experts are split over `expert_axis`, tokens over `token_axes` (None: all axes of the mesh in its order). With a
    capacity limit, rows are exchanged in `num_chunks` pieces of equal size that may overlap with the experts of other
    pieces. Without one, a device has room for `buffer_factor` times the rows that it sends itself, or (None) for all
    that could arrive. Groups of a device are numbered from `group_stride` after the first group of the device before it
    (None: its number of groups), for callers that work only some groups of each device at a time.

    >>> ExchangeSpec().expert_axis
    'expert'
    """

    expert_axis: str = "expert"
    token_axes: tuple[str, ...] | None = None
    num_chunks: int = 1
    buffer_factor: CapacityFactor | None = None
    group_stride: int | None = None


@dataclasses.dataclass(frozen=True)
class MoeSpec:
    """Everything static about a layer: router, choices, groups, capacity, order, activation, exchange, back end.

    Tokens lie group after group, `num_groups` in a call; each group is planned by itself, with `ceil(S K c / E)` places
    an expert for `capacity_factor=c`, or without a limit for None. Who gets a place: by `priority`, "bpr" (largest gate
    first), "arrival", "random" (needs `RouteInputs.key`) or "modality" (`first_modality` first). `noise_std` is the
    standard deviation of `RouteInputs.noise` (default 1/E), which the smooth load needs. `activation` is that of the
    experts (None: `gelu_tanh` for `MlpWeights`, `silu` for `GluWeights`). `backend` asks for kernels by name (None: the
    first that takes the problem). Raises ValueError for values that cannot be.

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
    activation: Activation | MatmulActivation | None = None
    exchange: ExchangeSpec = ExchangeSpec()
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.priority not in get_args(Priority):
            raise ValueError(f"priority={self.priority!r} is not one of {', '.join(get_args(Priority))}")
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
    """Arrays of a call beside tokens and weights; none of them is differentiated, each may be left out.

    `noise` is added to the logits for the decision and the gates. `modality` holds ids from 0 to `num_modalities - 1`.
    `mask` is False for padding, which takes no place, has gate 0 and is in no sum. `key` is for the random priority;
    group g of this call draws from `first_group + g`. An earlier call over the same tokens may have decided what is not
    to be decided again: `expert` is its choice, for which gates and sums are worked out, and tokens claim places by
    `token_priority`, the largest first.

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
