"""The router as one kernel, forward: logits, softmax, the K best experts, gates and all sums, reading tokens once.

Grid (group and part of it, tile of tokens). Tokens lie along the lanes and experts along the sublanes: 32 experts fill
registers that way, what a token has one of (its top, its sum, its gate) is a row, and `[K, S]` leaves without padding.
Sums are kept by lane in VMEM over the tiles of a part; lanes and parts are added up outside. No logits are kept.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from moe_kernels.backends.base import RouteInputs, RouteStatic
from moe_kernels.backends.route_parts import FAR, NEVER, Experts
from moe_kernels.backends.tpu.common.launch import Call, Target, launch, result
from moe_kernels.backends.tpu.route.parts import (
    by_group,
    by_lane,
    by_token,
    lanes_of,
    logit_factor,
    logits_of,
    members,
    over_experts,
)
from moe_kernels.backends.tpu.route.tiles import RouteTiles, forward_tiles
from moe_kernels.chips import LANES
from moe_kernels.types import Routing, RoutingSums


class RouteSaved(NamedTuple):
    """What the backward pass needs: it computes the logits again; `expert` is the decision itself."""

    tokens: Float[Array, "T D"]
    router: Float[Array, "D E"]
    expert: Int[Array, "T K"]
    inputs: RouteInputs


def route_forward(
    target: Target,
    static: RouteStatic,
    tokens: Float[Array, "T D"],
    router: Float[Array, "D E"],
    inputs: RouteInputs,
) -> tuple[Routing, RouteSaved]:
    """Decide experts (ties to the lower index), gates and sums."""
    tiles = forward_tiles(static, *tokens.shape, router.shape[1], tokens.dtype.itemsize, target.facts, target.num_cores)
    assert tiles is not None, "refused by why_not"
    expert, gate, sums = run_forward(tiles, target, static, tokens, router, inputs)
    # Named here, inside, so that a remat policy saves the decision itself and not a recomputed twin of it.
    expert = checkpoint_name(expert, "moe_routing")
    return Routing(expert, checkpoint_name(gate, "moe_routing"), sums), RouteSaved(tokens, router, expert, inputs)


def run_forward(
    tiles: RouteTiles,
    target: Target,
    static: RouteStatic,
    tokens: Float[Array, "T D"],
    router: Float[Array, "D E"],
    inputs: RouteInputs,
) -> Routing:
    """The forward pass with given block sizes."""
    num_tokens, num_experts = tokens.shape[0], router.shape[1]
    groups, padded = static.num_groups, tiles.experts
    member, noise = members(num_tokens, inputs), inputs.noise
    operands = _RouteForwardInputs(
        tokens=tiles.of_rows(by_group(tokens, groups, tiles)),
        factor=tiles.whole(logit_factor(router, tokens.dtype, padded)),
        noise=None if noise is None else tiles.of_lanes(by_lane(noise.astype(jnp.float32), groups, tiles, padded)),
        member=None if member is None else tiles.of_lanes(by_lane(member, groups, tiles, 1)),
    )
    kernel = _RouteForward(tiles, static, num_experts, num_tokens // groups)
    length = operands.tokens.array.shape[1]
    by_choice = (groups, static.num_choices, length)
    sums = (groups * tiles.parts, static.num_modalities, kernel.num_sums(noise is not None), LANES)
    found = launch(
        kernel.run,
        Call(
            "route_forward",
            (groups * tiles.parts, tiles.steps),
            tiles.vmem,
            flops=2 * tokens.size * num_experts,
            transcendentals=2 * groups * length * padded,
        ),
        target,
        inputs=operands,
        outputs=_RouteForwardOutputs(
            expert=tiles.of_lanes(jax.ShapeDtypeStruct(by_choice, jnp.int32)),
            gate=tiles.of_lanes(jax.ShapeDtypeStruct(by_choice, jnp.float32)),
            sums=result(sums, jnp.float32, pl.BlockSpec((1, *sums[1:]), lambda part, tile: (part, 0, 0, 0))),
        ),
    )
    size = kernel.size
    sums = kernel.sums_of(found.sums, has_noise=noise is not None)
    return Routing(by_token(found.expert, size), by_token(found.gate, size), sums)


class _RouteForwardInputs(NamedTuple):
    tokens: Any
    factor: Any
    noise: Any
    member: Any


class _RouteForwardOutputs(NamedTuple):
    expert: Any
    gate: Any
    sums: Any


class _Decision(NamedTuple):
    """What is decided and added up: `[E, C]` by expert, `[1, C]` by token; lists by choice."""

    expert: list[Int[Array, "1 C"]]
    gate: list[Float[Array, "1 C"]]
    wanted: Float[Array, "E C"]
    probability: Float[Array, "E C"]
    load: Float[Array, "E C"] | None
    entropy: Float[Array, "1 C"]
    log_partition: Float[Array, "1 C"]


@dataclasses.dataclass(frozen=True)
class _RouteForward:
    """The kernel for a static problem."""

    tiles: RouteTiles
    static: RouteStatic
    num_experts: int
    size: int
    """Tokens of a group."""

    def num_sums(self, has_noise: bool) -> int:
        """Rows of sums of a modality: those by expert (wanted, probability, load), then four single ones."""
        return (3 if has_noise else 2) * self.tiles.experts + 8

    def run(self, inputs: _RouteForwardInputs, outputs: _RouteForwardOutputs, scratch: None) -> None:
        """Work on one tile."""
        expert, gate, sums = outputs
        tile = pl.program_id(1)

        @pl.when(tile == 0)
        def _() -> None:
            sums[...] = jnp.zeros(sums.shape, jnp.float32)

        first = self.tiles.at(pl.program_id(0), tile)[1] * self.tiles.tokens

        member = None if inputs.member is None else inputs.member[0]
        clean = logits_of(inputs.factor[...], inputs.tokens[0], self.tiles.experts, member)
        found = self.decide(clean, None if inputs.noise is None else clean + inputs.noise[0])
        for choice in range(self.static.num_choices):
            kept = found.gate[choice]
            expert[0, pl.ds(choice, 1)] = found.expert[choice]
            gate[0, pl.ds(choice, 1)] = kept if member is None else jnp.where(member == NEVER, 0.0, kept)
        if self.size % self.tiles.tokens:
            place = first + jax.lax.broadcasted_iota(jnp.int32, (1, self.tiles.tokens), 1)
            member = jnp.where(place < self.size, 0 if member is None else member, NEVER)
        for modality in range(self.static.num_modalities if inputs.member is not None else 1):
            self.add(sums.at[0, modality], found, None if member is None else member == modality)

    def decide(self, clean: Float[Array, "E C"], noisy: Float[Array, "E C"] | None) -> _Decision:
        """Softmax, the best experts, their gates and what is added up, for some tokens."""
        experts = Experts.of(clean.shape, self.num_experts)
        softmax = experts.softmax(clean)
        decided = clean if noisy is None else noisy
        finite = experts.finite(decided)
        # A token that is not finite gets the first experts: it wants none, but an index is never out of range.
        score = experts.only(jnp.where(finite, decided, 0.0), FAR)
        wanted = jnp.zeros(clean.shape, jnp.float32)
        best: list[Float[Array, "1 C"]] = []
        expert: list[Int[Array, "1 C"]] = []
        for _ in range(self.static.num_choices):
            best.append(over_experts(jnp.max, score))
            chosen = over_experts(jnp.min, jnp.where(score == best[-1], experts.ids, float(clean.shape[0])))
            expert.append(chosen.astype(jnp.int32))
            mine = experts.ids == chosen
            wanted = jnp.where(mine & finite, 1.0, wanted)
            score = jnp.where(mine, FAR, score)

        inverse, load = softmax.inverse, None
        if noisy is not None:
            inverse = experts.softmax(noisy).inverse
            threshold = jnp.where(finite, best[-1], math.nan)
            load = 0.5 + 0.5 * jax.lax.erf((clean - threshold) * (math.sqrt(0.5) / self.static.noise_std))
        gate = [jnp.where(finite, jnp.exp(value - best[0]) * inverse, math.nan) for value in best]
        return _Decision(expert, gate, wanted, softmax.probability, load, softmax.entropy, softmax.log_partition)

    def add(self, sums: Any, found: _Decision, mine: Bool[Array, "1 C"] | None) -> None:
        """Add some tokens to the sums of a modality, each lane to itself; by selection."""
        rows = [found.wanted, found.probability, *([] if found.load is None else [found.load])]
        rows += [jnp.ones_like(found.entropy), found.entropy, jnp.square(found.log_partition), found.gate[0]]
        first = 0
        for values in rows:
            if mine is not None:
                values = jnp.where(mine, values, 0.0)
            sums[pl.ds(first, values.shape[0])] += functools.reduce(jnp.add, lanes_of(values))
            first += values.shape[0]

    def sums_of(self, totals: Float[Array, "P M N L"], *, has_noise: bool) -> RoutingSums:
        """The sums by name, from those of each part and lane."""
        single = self.num_sums(has_noise) - 8
        parts = (self.static.num_groups, self.tiles.parts, self.static.num_modalities, single + 8, LANES)
        totals = jnp.sum(totals.reshape(parts), axis=(1, 4))
        by_expert = [totals[..., first : first + self.num_experts] for first in range(0, single, self.tiles.experts)]
        tokens, entropy, logsumexp_squared, largest_gate = (totals[..., single + n] for n in range(4))
        return RoutingSums(
            tokens=tokens,
            wanted=by_expert[0],
            probability=by_expert[1],
            entropy=entropy,
            logsumexp_squared=logsumexp_squared,
            load=by_expert[2] if has_noise else jnp.zeros_like(by_expert[1]),
            largest_gate=largest_gate,
        )
