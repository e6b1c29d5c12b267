"""The letters of all axes, the values that flow through a layer, and their static facts.

Axes: `T` tokens, `G` groups, `S` tokens in a group, `D` width, `F` expert width, `E` experts, `K` choices,
`C` capacity, `R` rows, `N` runs, `M` modalities. Traced values are NamedTuples; static facts are frozen dataclasses.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Literal, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Float, Int

# Runs start at multiples of this many rows and are rounded up to them. A float32 tile of a TPU has 8 rows, and copies
# on a GPU start at a multiple of 8. On a CPU every row of padding costs its share of the matmuls: at a capacity of 135
# places, 144 rows (multiples of 16) took 5% longer than 136 (2 cores, November 2026).
ROW_ALIGNMENT = 8
Number = TypeVar("Number", int, Array, np.ndarray)

Activation = MatmulActivation = str
"""A name in `moe_kernels.ACTIVATIONS`."""
Epilogue = Literal["none", "pointwise", "gated"]
"""What a grouped matmul does before it rounds its result: nothing, bias and activation, or a product of two matmuls."""
Priority = Literal["bpr", "arrival", "random", "modality"]
CapacityFactor = float | int | str | Fraction
"""A float means the decimal number that it prints as."""


def round_up(value: Number, multiple: int) -> Number:
    """Round up to a multiple.

    >>> round_up(9, 8)
    16
    """
    return -(-value // multiple) * multiple


class RoutingSums(NamedTuple):
    """Sums over the tokens of a group, without padding. All losses and figures are functions of them.

    Sums add up over groups, devices and accumulation chunks, so a loss does not depend on how a step was split. They
    are of the *clean* router (no noise) unless stated. Logarithms are natural; everything is float32.

    >>> import jax.numpy as jnp
    >>> from moe_kernels import MoeSpec, route
    >>> sums = route(jnp.eye(4), jnp.zeros((4, 2)), MoeSpec(num_groups=2)).sums
    >>> sums.tokens.tolist(), sums.wanted.tolist()  # two groups of two tokens; ties go to expert 0
    ([[2.0], [2.0]], [[[2.0, 0.0]], [[2.0, 0.0]]])
    """

    tokens: Float[Array, "G M"]
    """Number of tokens."""
    wanted: Float[Array, "G M E"]
    """Choices of each expert, before any capacity limit (noisy router)."""
    probability: Float[Array, "G M E"]
    """Sum of the probabilities of each expert."""
    entropy: Float[Array, "G M"]
    """Sum of each token's entropy over experts."""
    logsumexp_squared: Float[Array, "G M"]
    """Sum of the squared log-partition (z-loss)."""
    load: Float[Array, "G M E"]
    """Sum of the probability that a fresh noise draw keeps the expert among the K largest; 0 without noise."""
    largest_gate: Float[Array, "G M"]
    """Sum of each token's largest gate (noisy router)."""


class Routing(NamedTuple):
    """What the router decided: experts and gates of every token, best first, and the sums of the step.

    >>> import jax.numpy as jnp
    >>> from moe_kernels import MoeSpec, route
    >>> routing = route(jnp.array([[0.0, 1.0]]), jnp.eye(2), MoeSpec(num_choices=2))
    >>> routing.expert.tolist(), [round(gate, 4) for gate in routing.gate[0].tolist()]
    ([[1, 0]], [0.7311, 0.2689])
    """

    expert: Int[Array, "T K"]
    gate: Float[Array, "T K"]
    """float32, as `RouterSpec` says; 0 for padding, NaN for a token whose logits are not finite."""
    sums: RoutingSums


class Runs(NamedTuple):
    """Runs of rows: `size` rows of `expert` from row `first` on. First rows ascend, and no row is in two runs.

    A run starts at a multiple of 8 rows (`ROW_ALIGNMENT`). Kernels copy eight rows at a time and may overwrite rows up
    to the start of the next run.

    >>> import jax.numpy as jnp
    >>> from moe_kernels import make_plan, route
    >>> runs = make_plan(route(jnp.eye(2), jnp.eye(2)), num_experts=2).runs
    >>> runs.first.tolist(), runs.size.tolist()
    ([0, 8], [1, 1])
    """

    expert: Int[Array, " N"]
    first: Int[Array, " N"]
    size: Int[Array, " N"]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Layout:
    """The static facts of a plan's rows.

    `rows_per_expert` is set if the rows are an `[E, rows_per_expert]` block (a capacity near the mean load); None if
    the first rows of the runs are traced. An expert has `runs_per_expert` adjacent runs, at equal distances in a block;
    after an exchange it has one from each shard.

    >>> import jax.numpy as jnp
    >>> from moe_kernels import make_plan, route
    >>> layout = make_plan(route(jnp.eye(2), jnp.eye(2)), num_experts=2, capacity=1).layout
    >>> layout.num_rows, layout.rows_per_expert
    (16, 8)
    """

    num_tokens: int
    num_choices: int
    num_groups: int
    num_experts: int
    num_rows: int
    rows_per_expert: int | None
    runs_per_expert: int = 1


class Plan(NamedTuple):
    """Which row each choice gets. Built once a layer; dispatch, experts, combine and every backward pass read it.

    >>> import jax.numpy as jnp
    >>> from moe_kernels import make_plan, route
    >>> plan = make_plan(route(jnp.ones((2, 2)), jnp.eye(2)), num_experts=2, capacity=1)
    >>> plan.row.tolist(), plan.kept.tolist()  # both want expert 0; the second token finds no room
    ([[0], [16]], [[[1.0, 0.0]]])
    """

    row: Int[Array, "T K"]
    """Row of each choice; `layout.num_rows` for a choice without a place."""
    source: Int[Array, " R"]
    """Flat choice `t * K + k` that fills each row; `T * K` for an unused row."""
    runs: Runs
    kept: Float[Array, "G M E"]
    """Choices that found a place, by group, modality and expert."""
    layout: Layout


class RouterWeights(NamedTuple):
    """Weights of a router: `logits = x kernel + bias`. `choice_bias` is added to the scores for the choice only.

    Gates do not depend on `choice_bias`, and it gets no gradient (balancing without an auxiliary loss, Wang et al.
    2024).

    >>> import jax.numpy as jnp
    >>> RouterWeights(jnp.ones((4, 2))).bias is None
    True
    """

    kernel: Float[Array, "D E"]
    bias: Float[Array, " E"] | None = None
    choice_bias: Float[Array, " E"] | None = None


class MlpWeights(NamedTuple):
    """Weights of all experts: `y = activation(x w1 + b1) w2 + b2`; a bias may be None.

    >>> import jax.numpy as jnp
    >>> MlpWeights(w1=jnp.ones((2, 4, 8)), b1=None, w2=jnp.ones((2, 8, 4)), b2=None).w1.shape
    (2, 4, 8)
    """

    w1: Float[Array, "E D F"]
    b1: Float[Array, "E F"] | None
    w2: Float[Array, "E F D"]
    b2: Float[Array, "E D"] | None


class GluWeights(NamedTuple):
    """Weights of all gated experts: `y = (activation(x gate) * (x up)) down` (Shazeer 2020).

    A bias is added to its product. There are biases of `gate` and `up`, or of neither.

    >>> import jax.numpy as jnp
    >>> GluWeights(gate=jnp.ones((2, 4, 8)), up=jnp.ones((2, 4, 8)), down=jnp.ones((2, 8, 4))).down.shape
    (2, 8, 4)
    """

    gate: Float[Array, "E D F"]
    up: Float[Array, "E D F"]
    down: Float[Array, "E F D"]
    gate_bias: Float[Array, "E F"] | None = None
    up_bias: Float[Array, "E F"] | None = None
    down_bias: Float[Array, "E D"] | None = None


class JoinedGluWeights(NamedTuple):
    """Weights of gated experts with `gate` and `up` in one array, which is multiplied as it is.

    The columns of `gate` come first, then those of `up`; with `MoeSpec.interleaved` they alternate.

    >>> import jax.numpy as jnp
    >>> JoinedGluWeights(gate_up=jnp.ones((2, 4, 16)), down=jnp.ones((2, 8, 4))).gate_up_bias is None
    True
    """

    gate_up: Float[Array, "E D 2*F"]
    down: Float[Array, "E F D"]
    gate_up_bias: Float[Array, "E 2*F"] | None = None
    down_bias: Float[Array, "E D"] | None = None


PlainWeights = MlpWeights | GluWeights | JoinedGluWeights
"""Experts that a router chooses among."""


class WithShared(NamedTuple):
    """Routed experts and one that every token goes through: `y = routed(x) + s(x) shared(x)`.

    `shared` has the shapes of one expert, without the axis E. `s(x) = sigmoid(x gate)`, or 1 without a `gate`.

    >>> import jax.numpy as jnp
    >>> one = GluWeights(jnp.ones((4, 8)), jnp.ones((4, 8)), jnp.ones((8, 4)))
    >>> WithShared(routed=jax.tree.map(lambda w: jnp.stack([w, w]), one), shared=one).gate is None
    True
    """

    routed: PlainWeights
    shared: PlainWeights
    gate: Float[Array, " D"] | None = None


ExpertWeights = PlainWeights | WithShared


class MoeOutput(NamedTuple):
    """Result of a layer: the tokens, the router's sums, the counts of kept choices, and the decision.

    Pass `expert` and `priority` (None in order of arrival) to a second call over the same tokens, as
    `RouteInputs.expert` and `token_priority`. It then decides the same even if it rounds differently. No gradient goes
    through them.

    >>> MoeOutput._fields
    ('tokens', 'sums', 'kept', 'expert', 'priority')
    """

    tokens: Float[Array, "T D"]
    sums: RoutingSums
    kept: Float[Array, "G M E"]
    expert: Int[Array, "T K"]
    priority: Float[Array, " T"] | None
