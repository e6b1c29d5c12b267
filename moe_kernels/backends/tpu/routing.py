"""The router as one kernel, forward: logits, softmax, the K best experts, gates and all sums in one pass over the tokens.

Grid (group and part of it, tile of tokens). Tokens lie along the lanes, experts along the sublanes: 32 experts fill
registers that way, what a token has one of (top, sum, gate) is a row, and `[K, tokens]` leaves without padding. Sums are
kept by lane in VMEM over the tiles of a group, and added up over lanes outside.
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
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from moe_kernels.backends.base import RouteInputs, RouteStatic
from moe_kernels.backends.tiling import MIB
from moe_kernels.backends.tpu.launch import Target
from moe_kernels.backends.tpu.route_tiles import LANES, RouteTiles, route_tiles
from moe_kernels.backends.tpu.rows import dot
from moe_kernels.backends.xla.routing import RouteSaved
from moe_kernels.types import Routing, RoutingSums

NEVER = -1  # the modality of padding
_FAR = float("-inf")


def route_forward(
    target: Target,
    static: RouteStatic,
    tokens: Float[Array, "T D"],
    router: Float[Array, "D E"],
    inputs: RouteInputs,
) -> tuple[Routing, RouteSaved]:
    """Decide experts (ties to the lower index), gates and sums."""
    (num_tokens, width), num_experts = tokens.shape, router.shape[1]
    tiles = route_tiles(static, num_tokens, width, num_experts, tokens.dtype.itemsize, target.facts, target.num_cores)
    assert tiles is not None, "refused by why_not"
    found = run_forward(tiles, target, static, tokens, router, inputs)
    # Named here, inside, so that a remat policy saves the decision itself and not a recomputed twin of it.
    expert = checkpoint_name(found.expert, "moe_routing")
    gate = checkpoint_name(found.gate, "moe_routing")
    return Routing(expert, gate, found.sums), RouteSaved(tokens, router, found.logits, expert, inputs)


class Found(NamedTuple):
    """What the kernel gives."""

    expert: Int[Array, "T K"]
    gate: Float[Array, "T K"]
    logits: Float[Array, "T E"]
    sums: RoutingSums


def run_forward(
    tiles: RouteTiles,
    target: Target,
    static: RouteStatic,
    tokens: Float[Array, "T D"],
    router: Float[Array, "D E"],
    inputs: RouteInputs,
) -> Found:
    """The forward pass with given block sizes."""
    num_tokens, num_experts = tokens.shape[0], router.shape[1]
    kernel = _Kernel(tiles, static, num_experts, inputs.noise is not None, _has_members(static, inputs))
    size = num_tokens // static.num_groups
    groups, choices, padded = static.num_groups, static.num_choices, tiles.experts

    operands = [by_group(tokens, groups, tiles), pieces_of(router, tokens.dtype, padded)]
    specs = [
        pl.BlockSpec((1, tiles.tokens, tokens.shape[1]), lambda part, tile: (*tiles.at(part, tile), 0)),
        pl.BlockSpec(operands[1].shape, lambda part, tile: (0, 0)),
    ]

    def rows(count: int) -> pl.BlockSpec:
        """A `[G, count, S]` array: a tile of tokens along the lanes."""

        def at(part: Any, tile: Any) -> tuple[Any, int, Any]:
            group, block = tiles.at(part, tile)
            return group, 0, block

        return pl.BlockSpec((1, count, tiles.tokens), at)

    if kernel.has_noise:
        assert inputs.noise is not None
        noise = jnp.swapaxes(by_group(inputs.noise.astype(jnp.float32), groups, tiles), 1, 2)
        operands.append(jnp.pad(noise, ((0, 0), (0, padded - num_experts), (0, 0))))
        specs.append(rows(padded))
    if kernel.has_members:
        operands.append(by_group(_members(num_tokens, inputs), groups, tiles)[:, None])
        specs.append(rows(1))

    length = operands[0].shape[1]
    sums = (groups * tiles.parts, static.num_modalities, kernel.num_sums, LANES)
    shapes = [
        jax.ShapeDtypeStruct((groups, choices, length), jnp.int32),
        jax.ShapeDtypeStruct((groups, choices, length), jnp.float32),
        jax.ShapeDtypeStruct((groups, padded, length), jnp.float32),
        jax.ShapeDtypeStruct(sums, jnp.float32),
    ]
    moved = sum(math.prod(array.shape) * array.dtype.itemsize for array in (*operands, *shapes))
    found = pl.pallas_call(
        functools.partial(kernel.run, size),
        grid=(groups * tiles.parts, tiles.steps),
        in_specs=specs,
        out_specs=[
            rows(choices),
            rows(choices),
            rows(padded),
            pl.BlockSpec((1, *sums[1:]), lambda part, tile: (part, 0, 0, 0)),
        ],
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=min(target.facts.vmem, tiles.vmem + MIB),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * math.prod(operands[0].shape) * operands[1].shape[0],
            transcendentals=2 * groups * length * padded,
            bytes_accessed=moved,
        ),
        interpret=target.interpret,
        name="route_forward",
    )(*operands)
    expert, gate, logits, totals = found
    flat = [jnp.swapaxes(array, 1, 2)[:, :size].reshape(num_tokens, -1) for array in (expert, gate, logits)]
    return Found(flat[0], flat[1], flat[2][:, :num_experts], kernel.sums_of(totals))


def by_group(values: Array, groups: int, tiles: RouteTiles) -> Array:
    """`[T, ...]` as `[G, S, ...]`, with S rounded up to a tile where it is shorter than one."""
    values = values.reshape(groups, -1, *values.shape[1:])
    more = max(0, tiles.tokens - values.shape[1])
    return jnp.pad(values, ((0, 0), (0, more), *[(0, 0)] * (values.ndim - 2))) if more else values


def pieces_of(router: Float[Array, "D E"], dtype: Any, padded: int) -> Float[Array, "P D"]:
    """The router transposed, its experts rounded up with zeros; for bfloat16 tokens in pieces that add up to float32.

    Three bfloat16 numbers hold all digits of a float32 one, so the products are those of float32 factors.
    """
    rows = jnp.pad(router.astype(jnp.float32).T, ((0, padded - router.shape[1]), (0, 0)))
    if dtype != jnp.bfloat16:
        return rows
    pieces = []
    for _ in range(3 if router.dtype == jnp.float32 else 1):
        # Not by casts there and back, which a compiler may drop.
        piece = jax.lax.reduce_precision(rows, 8, 7)
        pieces.append(piece.astype(jnp.bfloat16))
        rows = rows - piece
    return jnp.concatenate(pieces)


def _has_members(static: RouteStatic, inputs: RouteInputs) -> bool:
    return inputs.mask is not None or (inputs.modality is not None and static.num_modalities > 0)


def _members(num_tokens: int, inputs: RouteInputs) -> Int[Array, " T"]:
    """The modality of each token, and NEVER for padding."""
    member = jnp.zeros(num_tokens, jnp.int32) if inputs.modality is None else inputs.modality.astype(jnp.int32)
    return member if inputs.mask is None else jnp.where(inputs.mask, jnp.maximum(member, NEVER), NEVER)


class _Token(NamedTuple):
    """What is known of the tokens of a step: `[E, C]` by expert, `[1, C]` by token."""

    expert: list[Int[Array, "1 C"]]
    gate: list[Float[Array, "1 C"]]
    wanted: Float[Array, "E C"]
    probability: Float[Array, "E C"]
    load: Float[Array, "E C"] | None
    entropy: Float[Array, "1 C"]
    log_partition: Float[Array, "1 C"]


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """The kernel for a static problem."""

    tiles: RouteTiles
    static: RouteStatic
    num_experts: int
    has_noise: bool
    has_members: bool

    @property
    def num_sums(self) -> int:
        """Rows of sums of a modality: by expert wanted, probability and load; then four of one row, rounded up."""
        return (3 if self.has_noise else 2) * self.tiles.experts + 8

    def run(self, size: int, *refs: Any) -> None:
        """Work on one tile; `size` is the number of tokens in a group."""
        refs_in, (expert, gate, logits, sums) = list(refs[:-4]), refs[-4:]
        tokens, router = refs_in[:2]
        noise = refs_in[2] if self.has_noise else None
        members = refs_in[-1] if self.has_members else None
        tile = pl.program_id(1)

        @pl.when(tile == 0)
        def _() -> None:
            sums[...] = jnp.zeros(sums.shape, jnp.float32)

        first = self.tiles.at(pl.program_id(0), tile)[1] * self.tiles.tokens
        ragged = size % self.tiles.tokens != 0

        def step(n: Any, carry: None) -> None:
            own = pl.ds(pl.multiple_of(n * self.tiles.step, LANES), self.tiles.step)
            product = dot(router[...], tokens[0, own, :], (1, 1))
            clean = product[-self.tiles.experts :]
            for piece in range(product.shape[0] // self.tiles.experts - 2, -1, -1):
                clean += product[piece * self.tiles.experts : (piece + 1) * self.tiles.experts]
            member = None if members is None else members[0, :, own]
            if members is not None:
                # Whatever padding holds, its logits are 0; by selection.
                clean = jnp.where(member != NEVER, clean, 0.0)
            logits[0, :, own] = clean
            token = self.decide(clean, None if noise is None else clean + noise[0, :, own])
            for choice in range(self.static.num_choices):
                expert[0, pl.ds(choice, 1), own] = token.expert[choice]
                kept = token.gate[choice]
                gate[0, pl.ds(choice, 1), own] = kept if member is None else jnp.where(member == NEVER, 0.0, kept)
            if ragged:
                place = first + n * self.tiles.step + jax.lax.broadcasted_iota(jnp.int32, (1, self.tiles.step), 1)
                member = jnp.where(place < size, 0 if member is None else member, NEVER)
            for modality in range(self.static.num_modalities):
                mine = None if member is None else member == modality
                if mine is not None or modality == 0:
                    self.add(sums, modality, token, mine)

        jax.lax.fori_loop(0, self.tiles.tokens // self.tiles.step, step, None)

    def decide(self, clean: Float[Array, "E C"], noisy: Float[Array, "E C"] | None) -> _Token:
        """Softmax, the best experts, gates and what is added up, for some tokens."""
        shape = clean.shape
        # As float32, which they are exact in: reductions over integers are not for every chip.
        ids = jax.lax.broadcasted_iota(jnp.int32, shape, 0).astype(jnp.float32)
        real = None if self.num_experts == self.tiles.experts else ids < self.num_experts

        def only(values: Float[Array, "E C"], other: float) -> Float[Array, "E C"]:
            return values if real is None else jnp.where(real, values, other)

        top = _over(jnp.max, only(clean, _FAR))
        distance = only(clean - top, 0.0)
        power = only(jnp.exp(distance), 0.0)
        total = _over(jnp.sum, power)
        log_total, inverse = jnp.log(total), 1.0 / total
        # log of the sum and all distances have one sign, so nothing cancels: -sum(p log p).
        entropy = log_total - _over(jnp.sum, power * distance) * inverse
        log_partition = top + log_total
        probability = power * inverse

        decided = clean if noisy is None else noisy
        finite = _over(jnp.sum, only(jnp.where(jnp.abs(decided) < math.inf, 0.0, 1.0), 0.0)) == 0
        score = only(jnp.where(finite, decided, 0.0), _FAR)
        wanted = jnp.zeros(shape, jnp.float32)
        best: list[Float[Array, "1 C"]] = []
        expert: list[Int[Array, "1 C"]] = []
        for _ in range(self.static.num_choices):
            best.append(_over(jnp.max, score))
            chosen = _over(jnp.min, jnp.where(score == best[-1], ids, float(shape[0])))
            expert.append(chosen.astype(jnp.int32))
            mine = ids == chosen
            wanted = jnp.where(mine & finite, 1.0, wanted)
            score = jnp.where(mine, _FAR, score)

        if noisy is not None:
            inverse = 1.0 / _over(jnp.sum, only(jnp.exp(noisy - best[0]), 0.0))
        gate = [jnp.where(finite, jnp.exp(value - best[0]) * inverse, math.nan) for value in best]
        load = None
        if noisy is not None:
            threshold = jnp.where(finite, best[-1], math.nan)
            scale = math.sqrt(0.5) / self.static.noise_std
            load = 0.5 + 0.5 * jax.lax.erf((clean - threshold) * scale)
        return _Token(expert, gate, wanted, probability, load, entropy, log_partition)

    def add(self, sums: Any, modality: int, token: _Token, mine: Bool[Array, "1 C"] | None) -> None:
        """Add the tokens of a modality to its sums, each lane to itself."""
        one = jnp.ones_like(token.entropy)
        rows = [token.wanted, token.probability, *([] if token.load is None else [token.load])]
        rows += [one, token.entropy, token.log_partition * token.log_partition, token.gate[0]]
        first = 0
        for values in rows:
            if mine is not None:
                values = jnp.where(mine, values, 0.0)
            lanes = [values[:, at : at + LANES] for at in range(0, values.shape[1], LANES)]
            own = pl.ds(first, values.shape[0])
            sums[0, modality, own, :] += functools.reduce(jnp.add, lanes)
            first += values.shape[0]

    def sums_of(self, totals: Float[Array, "P M N L"]) -> RoutingSums:
        """The sums by name, from those of each part, row and lane."""
        parts = (self.static.num_groups, self.tiles.parts, self.static.num_modalities, self.num_sums, LANES)
        totals = jnp.sum(totals.reshape(parts), axis=(1, 4))
        by_expert = [
            totals[..., n * self.tiles.experts :][..., : self.num_experts] for n in range(3 if self.has_noise else 2)
        ]
        tokens, entropy, logsumexp_squared, largest_gate = (totals[..., self.num_sums - 8 + n] for n in range(4))
        return RoutingSums(
            tokens=tokens,
            wanted=by_expert[0],
            probability=by_expert[1],
            entropy=entropy,
            logsumexp_squared=logsumexp_squared,
            load=by_expert[2] if self.has_noise else jnp.zeros_like(by_expert[1]),
            largest_gate=largest_gate,
        )


def _over(reduce: Any, values: Float[Array, "E C"]) -> Float[Array, "1 C"]:
    return reduce(values, axis=0, keepdims=True)
