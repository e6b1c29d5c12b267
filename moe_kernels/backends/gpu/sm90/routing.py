"""The router in one pass over the tokens: logits, softmax, the K best experts, gates and sums.

Grid: one block per multiprocessor walks the tiles of 128 tokens of every group. The producer copies 64-deep slices of
tokens and router into the ring; each consumer holds the logits of 64 tokens in registers and does all the rest there.
The router is float32: its three bfloat16 pieces, which hold all its digits, lie one below the other, so that one
product gives the logits piece by piece, in float32 and exact but for the order of sums. Sums over the tokens of half
a tile leave by modality and are added up outside, in a fixed order: no atomics. Logits are kept for the backward pass.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from moe_kernels.backends.base import RouteInputs, RouteStatic
from moe_kernels.backends.gpu.common.activation import normal
from moe_kernels.backends.gpu.common.launch import Device, Ring, launch, over_steps, ring_barriers, specialise, swizzled
from moe_kernels.backends.gpu.sm90.tiling import DEPTH, NUM_CONSUMERS, WARPGROUP_ROWS, route_blocks
from moe_kernels.backends.xla.routing import RouteSaved
from moe_kernels.types import RouterWeights, Routing, RoutingSums, round_up

PIECES = 3
TILE_TOKENS = NUM_CONSUMERS * WARPGROUP_ROWS
# The modality of padding, and of ids that do not exist, which are in no sum but have gates.
NEVER, NONE = -1, -2
FAR = float("-inf")


class _Decided(NamedTuple):
    """What leaves a tile: choices `[K, 64]`, values by token `[64]`, sums by modality `[M, fields, E]`, logits."""

    expert: Any
    gate: Any
    by_token: Any
    sums: Any
    logits: Any


def route_forward(
    device: Device, static: RouteStatic, tokens: Float[Array, "T D"], router: Float[Array, "D E"], inputs: RouteInputs
) -> tuple[Routing, RouteSaved]:
    """Decide experts (ties to the lower index), gates and sums."""
    num_tokens, num_experts = tokens.shape[0], router.shape[1]
    groups, size = static.num_groups, num_tokens // static.num_groups
    member = _by_tile(_members(num_tokens, static, inputs), groups, NEVER)
    padded = round_up(num_experts, 8)
    noise = None
    if inputs.noise is not None:
        noise = jnp.pad(inputs.noise.astype(jnp.float32), ((0, 0), (0, padded - num_experts)))
        noise = _by_tile(noise, groups, 0)
    found = _Decided(*_route(tokens, _pieces(router, padded), member, noise, device, static, num_experts))

    def by_token(values: Array) -> Array:
        """`[tiles, consumers, 64, ...]` as `[T, ...]`."""
        return values.reshape(groups, -1, *values.shape[3:])[:, :size].reshape(num_tokens, *values.shape[3:])

    expert, gate = (by_token(jnp.moveaxis(values, 2, 3)) for values in (found.expert, found.gate))
    # Named here, inside, so that a remat policy saves the decision itself and not a recomputed twin of it.
    expert, gate = checkpoint_name(expert, "moe_routing"), checkpoint_name(gate, "moe_routing")
    sums = found.sums.reshape(groups, -1, *found.sums.shape[2:])[..., :num_experts].sum(axis=1)
    mine = member.reshape(groups, -1)[:, None] == jnp.arange(static.num_modalities)[:, None]

    def total(values: Array) -> Float[Array, "G M"]:
        return jnp.sum(jnp.where(mine, values.reshape(groups, 1, -1), jnp.float32(0)), axis=2)

    entropy, log_partition, largest = (found.by_token[:, :, n] for n in range(3))
    sums = RoutingSums(
        tokens=total(jnp.ones_like(entropy)),
        wanted=sums[:, :, 0],
        probability=sums[:, :, 1],
        entropy=total(entropy),
        logsumexp_squared=total(jnp.square(log_partition)),
        load=sums[:, :, 2] if noise is not None else jnp.zeros_like(sums[:, :, 1]),
        largest_gate=total(largest),
    )
    logits = by_token(found.logits)[:, :num_experts]
    return Routing(expert, gate, sums), RouteSaved(tokens, RouterWeights(router), logits, expert, inputs)


def _members(num_tokens: int, static: RouteStatic, inputs: RouteInputs) -> Int[Array, " T"]:
    """The modality of each token."""
    member = jnp.zeros(num_tokens, jnp.int32) if inputs.modality is None else inputs.modality.astype(jnp.int32)
    member = jnp.where((member >= 0) & (member < static.num_modalities), member, NONE)
    return member if inputs.mask is None else jnp.where(inputs.mask, member, NEVER)


def _by_tile(values: Array, groups: int, fill: int) -> Array:
    """`[T, ...]` as `[tiles, consumers, 64, ...]`, every group rounded up to whole tiles."""
    values = values.reshape(groups, -1, *values.shape[1:])
    more = round_up(values.shape[1], TILE_TOKENS) - values.shape[1]
    values = jnp.pad(values, ((0, 0), (0, more), *[(0, 0)] * (values.ndim - 2)), constant_values=fill)
    return values.reshape(-1, NUM_CONSUMERS, WARPGROUP_ROWS, *values.shape[2:])


def split(values: Float[Array, "..."], count: int) -> list[Float[Array, "..."]]:
    """Float32 as a sum of bfloat16 numbers, large ones first; three hold all digits. By bits, which no compiler drops.

    >>> [float(piece) for piece in split(jnp.float32(1 + 2**-20), 3)]
    [1.0, 9.5367431640625e-07, 0.0]
    """
    found = []
    for _ in range(count):
        high = lax.bitcast_convert_type(values, jnp.uint32) & jnp.uint32(0xFFFF0000)
        piece = lax.bitcast_convert_type(high, jnp.float32)
        found.append(piece.astype(jnp.bfloat16))
        values = values - piece
    return found


def _pieces(router: Float[Array, "D E"], padded: int) -> Float[Array, "P D"]:
    """The router transposed, its pieces one below the other."""
    turned = jnp.pad(router.astype(jnp.float32).T, ((0, padded - router.shape[1]), (0, 0)))
    return jnp.concatenate(split(turned, PIECES))


def _route(
    tokens: Float[Array, "T D"],
    pieces: Float[Array, "P D"],
    member: Int[Array, "N W 64"],
    noise: Float[Array, "N W 64 E"] | None,
    device: Device,
    static: RouteStatic,
    num_experts: int,
) -> Any:
    (num_tokens, width), columns = tokens.shape, pieces.shape[0]
    padded, tiles = columns // PIECES, member.shape[0]
    blocks = route_blocks(columns, device.chip)
    size, of_group, slices = num_tokens // static.num_groups, tiles // static.num_groups, width // DEPTH
    given = [member] if noise is None else [member, noise]
    fields = 2 if noise is None else 3

    def body(x_g: Any, w_g: Any, *refs: Any, x_s: Any, w_s: Any, full: Any, empty: Any) -> None:
        ring, out = Ring(full, empty, blocks.stages), _Decided(*refs[len(given) :])

        def produce() -> None:
            def tile(step: jax.Array, filled: jax.Array) -> jax.Array:
                group, place = lax.div(step, jnp.int32(of_group)), lax.rem(step, jnp.int32(of_group))
                own = pl.ds(group * size + place * TILE_TOKENS, TILE_TOKENS)

                def copy(k: jax.Array, filled: jax.Array) -> jax.Array:
                    slot, deep = ring.acquire(filled), pl.ds(k * DEPTH, DEPTH)
                    plgpu.copy_gmem_to_smem(x_g.at[own, deep], x_s.at[slot], ring.full.at[slot])
                    plgpu.copy_gmem_to_smem(w_g.at[:, deep], w_s.at[slot], ring.full.at[slot])
                    return filled + 1

                return lax.fori_loop(0, slices, copy, filled)

            ring.drain(over_steps(jnp.int32(tiles), device.num_sms, tile))

        def consume() -> None:
            wg = lax.axis_index("wg")

            def accumulate(acc: Any, filled: jax.Array) -> Any:
                def multiply(k: jax.Array, _: None) -> None:
                    slot = ring.wait(filled + k)
                    x = x_s.at[slot, pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)]
                    plgpu.wgmma(acc, x, w_s.at[slot].transpose((1, 0)))
                    # One product stays in flight; the one before it has read its stage.
                    plgpu.wgmma_wait(1)

                    @pl.when(k > 0)
                    def _() -> None:
                        ring.release(filled + k - 1)

                lax.fori_loop(0, slices, multiply, None)
                plgpu.wgmma_wait(0)
                ring.release(filled + slices - 1)
                return acc[...]

            def tile(step: jax.Array, filled: jax.Array) -> jax.Array:
                z = pl.run_scoped(
                    lambda acc: accumulate(acc, filled), plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, columns))
                )
                # The small pieces first.
                clean = z[:, 2 * padded :] + z[:, padded : 2 * padded] + z[:, :padded]
                member = device.read(refs[0], (step, wg))
                clean = jnp.where(_down(member != NEVER, clean.shape), clean, jnp.zeros_like(clean))
                noisy = None if noise is None else clean + device.read(refs[1], (step, wg))
                decide(clean, noisy, member, step)
                return filled + slices

            def decide(clean: jax.Array, noisy: jax.Array | None, member: jax.Array, step: jax.Array) -> None:
                experts = _Experts.of(clean.shape, num_experts)
                softmax = experts.softmax(clean)
                decided = clean if noisy is None else noisy
                finite = experts.finite(decided)
                # A token that is not finite gets the first experts: it wants none, but no index is out of range.
                score = experts.only(jnp.where(_down(finite, clean.shape), decided, jnp.zeros_like(clean)), FAR)
                inverse = softmax.inverse if noisy is None else experts.softmax(noisy).inverse
                wanted, best = jnp.zeros_like(clean), []
                for choice in range(static.num_choices):
                    best.append(jnp.max(score, axis=1))
                    equal = score == _down(best[-1], clean.shape)
                    chosen = jnp.min(jnp.where(equal, experts.ids, jnp.full_like(clean, padded)), axis=1)
                    mine = experts.ids == _down(chosen, clean.shape)
                    wanted = jnp.where(mine & _down(finite, clean.shape), jnp.ones_like(clean), wanted)
                    score = jnp.where(mine, jnp.full_like(clean, FAR), score)
                    gate = jnp.where(finite, jnp.exp(best[-1] - best[0]) * inverse, jnp.full_like(inverse, jnp.nan))
                    out.expert[step, wg, choice] = chosen.astype(jnp.int32)
                    out.gate[step, wg, choice] = jnp.where(member != NEVER, gate, jnp.zeros_like(gate))
                    if choice == 0:
                        out.by_token[step, wg, 2] = gate
                out.by_token[step, wg, 0] = softmax.entropy
                out.by_token[step, wg, 1] = softmax.log_partition
                out.logits[step, wg] = clean
                values = [wanted, softmax.probability]
                if noisy is not None:
                    threshold = jnp.where(finite, best[-1], jnp.full_like(inverse, jnp.nan))
                    distance = (clean - _down(threshold, clean.shape)) * (1 / static.noise_std)
                    values.append(normal(distance, jnp.exp(-0.5 * distance * distance)))
                for modality in range(static.num_modalities):
                    mine = _down(member == modality, clean.shape)
                    for field, value in enumerate(values):
                        kept = jnp.where(mine, value, jnp.zeros_like(value))
                        out.sums[step, wg, modality, field] = jnp.sum(kept, axis=0)

            over_steps(jnp.int32(tiles), device.num_sms, tile)

        specialise(produce, consume)

    scratch = {
        "x_s": swizzled((blocks.stages, TILE_TOKENS, DEPTH), tokens.dtype),
        "w_s": swizzled((blocks.stages, columns, DEPTH), tokens.dtype),
        **ring_barriers(blocks.stages, copies=2),
    }
    shape, half = (tiles, NUM_CONSUMERS), WARPGROUP_ROWS
    outputs = _Decided(
        jax.ShapeDtypeStruct((*shape, static.num_choices, half), jnp.int32),
        jax.ShapeDtypeStruct((*shape, static.num_choices, half), jnp.float32),
        jax.ShapeDtypeStruct((*shape, 3, half), jnp.float32),
        jax.ShapeDtypeStruct((*shape, static.num_modalities, fields, padded), jnp.float32),
        jax.ShapeDtypeStruct((*shape, half, padded), jnp.float32),
    )
    return launch(body, "moe_route", tuple(outputs), scratch, device)(tokens, pieces, *given)


def _down(values: Array, shape: tuple[int, ...]) -> Array:
    """`[64]` for every expert."""
    return lax.broadcast_in_dim(values, shape, (0,))


class _Experts(NamedTuple):
    """The axis of experts: the index of each column, and which are experts (None if all are)."""

    ids: Float[Array, "S E"]
    real: Bool[Array, "S E"] | None

    @classmethod
    def of(cls, shape: tuple[int, ...], num_experts: int) -> _Experts:
        ids = lax.broadcasted_iota(jnp.int32, shape, 1)
        return cls(ids.astype(jnp.float32), None if num_experts == shape[1] else ids < num_experts)

    def only(self, values: Float[Array, "S E"], other: float) -> Float[Array, "S E"]:
        """Something else in columns that are no experts."""
        return values if self.real is None else jnp.where(self.real, values, jnp.full_like(values, other))

    def finite(self, logits: Float[Array, "S E"]) -> Bool[Array, " S"]:
        """Whether all logits of a token are."""
        broken = jnp.where(jnp.abs(logits) < math.inf, jnp.zeros_like(logits), jnp.ones_like(logits))
        return jnp.max(self.only(broken, 0.0), axis=1) == 0

    def softmax(self, logits: Float[Array, "S E"]) -> _Softmax:
        """Over the experts."""
        top = jnp.max(self.only(logits, FAR), axis=1)
        distance = self.only(logits - _down(top, logits.shape), 0.0)
        power = self.only(jnp.exp(distance), 0.0)
        total = jnp.sum(power, axis=1)
        log_total, inverse = jnp.log(total), 1.0 / total
        # Its two terms have one sign, so nothing cancels.
        entropy = log_total - jnp.sum(power * distance, axis=1) * inverse
        return _Softmax(power * _down(inverse, logits.shape), inverse, top + log_total, entropy)


class _Softmax(NamedTuple):
    """A softmax over experts, and by token one over the sum of `exp(logit - top)`, log-partition and entropy."""

    probability: Float[Array, "S E"]
    inverse: Float[Array, " S"]
    log_partition: Float[Array, " S"]
    entropy: Float[Array, " S"]
