"""The implementations that the benchmark compares: ours by back end. peers.py has the others.

Shared values are in the order of choices: `[M, D]` with M = T K and choice `t * K + k`. Each implementation has its own
layout of rows. `place` brings shared values into it, and `pick` brings them back (0 for a dropped choice). Neither is
timed.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from benchmarks.cases import Case
from benchmarks.roofline import Op
from moe_kernels import (
    MlpWeights,
    MoeSpec,
    Plan,
    RouteInputs,
    Routing,
    RoutingSums,
    combine,
    dispatch,
    expert_mlp,
    grouped_matmul,
    make_plan,
    moe_mlp,
    route,
)
from moe_kernels.backends import BACKENDS, problem_of
from moe_kernels.backends.base import Backend, Problem, RouteStatic
from moe_kernels.backends.gpu.common.launch import NUM_CONSUMERS
from moe_kernels.backends.gpu.sm90.tiling import WARPGROUP_ROWS
from moe_kernels.backends.tpu.common.tiling import Sizes, computed_rows
from moe_kernels.backends.tpu.mlp.tiles import mlp_forward_tiles
from moe_kernels.backends.xla.matmul import TILE_ROWS
from moe_kernels.chips import find_tpu
from moe_kernels.types import Layout, round_up


class Setting(NamedTuple):
    """Where a program runs: platform, JAX's device kind, and the dtype of the rows."""

    platform: str
    kind: str
    dtype: str


class Counts(NamedTuple):
    """Choices of every expert [E] over all groups: those that found room, and all."""

    kept: np.ndarray
    wanted: np.ndarray


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A row of the table. Every function takes the case first; a `plan` is of the implementation's own type.

    `operations` has a function for each operation that the implementation supports. Their further arguments are
    routing(tokens, router, noise), plan(expert, gate), dispatch(plan, tokens), combine(plan, rows, gate),
    grouped_matmul(plan, rows, w1), expert_mlp(plan, rows, weights), layer(tokens, router, weights, noise).
    """

    name: str
    operations: Mapping[Op, Callable[..., Any]] = dataclasses.field(hash=False)
    place: Callable[[Case, Any, Array], Array]
    pick: Callable[[Case, Any, Array], Array]
    computed_rows: Callable[[Case, Counts, Setting], int | None]
    """Rows that its matmuls compute; None if that is not known."""
    why_not: Callable[[Case, str, str], str | None] = lambda case, dtype, platform: None
    """The reason why it cannot run a case in a dtype on a platform; None if it can."""
    around_flops: Callable[[Case], float] = lambda case: 0.0
    """FLOPs of one matmul of a dispatch by matmuls, which the definition of dispatch does not count."""
    is_dense: bool = False
    """Whether it is one MLP for all tokens, with the weights [D, F] and [F, D] of the first expert."""


def from_backend(backend: Backend | None) -> Implementation:
    """Make the operations of moe_kernels with one back end. With None, each operation gets the first that takes it."""
    name = None if backend is None else backend.name

    def spec(case: Case) -> MoeSpec:
        return MoeSpec(num_choices=case.choices, num_groups=case.groups, backend=name)

    def layer(
        case: Case, tokens: Array, router: Array, weights: MlpWeights, noise: Float[Array, "T E"]
    ) -> Float[Array, "T D"]:
        return moe_mlp(
            tokens,
            router,
            weights,
            dataclasses.replace(spec(case), capacity_factor=case.capacity_factor),
            RouteInputs(noise=noise),
        ).tokens

    def routing(case: Case, tokens: Array, router: Array, noise: Array) -> Routing:
        return route(tokens, router, spec(case), RouteInputs(noise=noise))

    return Implementation(
        name="moe_kernels" if name is None else f"moe_kernels/{name}",
        operations={
            "routing": routing,
            "plan": _plan,
            "dispatch": lambda case, plan, tokens: dispatch(tokens, plan, backend=name),
            "combine": lambda case, plan, rows, gate: combine(rows, gate, plan, backend=name),
            "grouped_matmul": lambda case, plan, rows, weight: grouped_matmul(rows, weight, plan, backend=name),
            "expert_mlp": lambda case, plan, rows, weights: expert_mlp(rows, weights, plan, backend=name),
            "layer": layer,
        },
        place=_place,
        pick=_pick,
        computed_rows=lambda case, counts, setting: _computed_rows(backend, case, counts.kept, setting),
        why_not=lambda case, dtype, platform: _why_not(backend, case, dtype, platform),
    )


def _why_not(backend: Backend | None, case: Case, dtype: str, platform: str) -> str | None:
    if backend is None:
        return None
    layout = _layout(case)
    for span in backend.spans:
        # A back end may leave an optional span to another one.
        if span in backend.optional:
            continue
        length = case.tokens if span in ("route", "dispatch") else layout.num_rows
        array = jax.ShapeDtypeStruct((length, case.width), dtype)
        static = RouteStatic(case.choices, case.groups, 1, 1 / case.experts) if span == "route" else None
        problem = problem_of(span, array, case.experts, expert_width=case.expert_width, layout=layout, route=static)
        if reason := backend.why_not(dataclasses.replace(problem, platform=platform)):
            return reason
    return None


def _plan(case: Case, expert: Int[Array, "T K"], gate: Float[Array, "T K"]) -> Plan:
    by_group, by_expert = jnp.zeros((case.groups, 1)), jnp.zeros((case.groups, 1, case.experts))
    sums = RoutingSums(by_group, by_expert, by_expert, by_group, by_group, by_expert, by_group)
    return make_plan(
        Routing(expert, gate, sums),
        num_experts=case.experts,
        num_groups=case.groups,
        capacity=None if case.capacity_factor is None else case.capacity,
        priority=gate[:, 0],
    )


def _place(case: Case, plan: Plan, choices: Array) -> Array:
    padded = jnp.concatenate([choices, jnp.zeros_like(choices[:1])])
    return padded[plan.source]


def _pick(case: Case, plan: Plan, rows: Array) -> Array:
    padded = jnp.concatenate([rows, jnp.zeros_like(rows[:1])])
    return padded[plan.row.reshape(-1)]


@functools.cache
def _layout(case: Case) -> Layout:
    shape = (case.tokens, case.choices)
    choices = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda e, g: _plan(case, e, g), *choices).layout


def _computed_rows(backend: Backend | None, case: Case, kept: np.ndarray, setting: Setting) -> int:
    """Count the rows that the expert MLP of the chosen back end computes."""
    layout = _layout(case)
    problem = Problem(
        "expert_mlp",
        setting.platform,
        setting.dtype,
        (layout.num_rows, case.width),
        case.experts,
        case.expert_width,
        layout,
        setting.kind,
    )
    if backend is None:
        backend = next(one for one in BACKENDS if one.why_not(problem) is None)
    if backend.name == "tpu":
        chip = find_tpu(setting.kind)
        assert chip is not None, "refused by why_not"
        itemsize = jnp.dtype(setting.dtype).itemsize
        tiles = mlp_forward_tiles(Sizes(layout, case.width, case.expert_width, itemsize, itemsize, chip))
        assert tiles is not None, "refused by why_not"
        whole, tail = np.divmod(kept, tiles.rows.rows)
        of_item = functools.partial(computed_rows, tiles=tiles.rows, depth=chip.depth, shorter=True)
        return int(whole.sum()) * of_item(tiles.rows.rows) + sum(of_item(int(count)) for count in tail)
    if backend.name == "gpu":
        return int(round_up(kept, NUM_CONSUMERS * WARPGROUP_ROWS).sum())
    if layout.rows_per_expert is None:
        return int(round_up(kept, TILE_ROWS).sum())
    if setting.platform != "cpu":
        return layout.num_rows
    half = (layout.rows_per_expert + 1) // 2
    return int(np.where(kept <= half, half, layout.rows_per_expert).sum())


CHOSEN = from_backend(None)
OURS = tuple(from_backend(backend) for backend in BACKENDS)
