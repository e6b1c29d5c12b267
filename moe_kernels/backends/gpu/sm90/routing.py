"""The router in one pass over the tokens: logits, softmax, the K best experts, gates and sums.

Grid: one block per multiprocessor walks the tiles of 128 tokens of every group. The producer copies 64-deep slices of
tokens and router into the ring; each consumer holds the logits of 64 tokens in registers and does all the rest there.
The router is float32: its three bfloat16 pieces, which hold all its digits, lie one below the other, so that one
product gives the logits piece by piece, in float32 and exact but for the order of sums. Sums over the tokens of half
a tile leave by modality and are added up outside, in a fixed order: no atomics. Logits are kept for the backward pass.
"""

from __future__ import annotations

import functools
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
from moe_kernels.backends.gpu.common.launch import NUM_CONSUMERS, GpuTarget, Ring, launch, over_steps, specialise
from moe_kernels.backends.gpu.sm90.tiling import DEPTH, WARPGROUP_ROWS, route_blocks
from moe_kernels.backends.gpu.sm90.wgmma import add_products, swizzled
from moe_kernels.backends.route_parts import FAR, NEVER, Experts, split
from moe_kernels.backends.xla.routing import RouteSaved
from moe_kernels.types import RouterWeights, Routing, RoutingSums, round_up

PIECES = 3
TILE_TOKENS = NUM_CONSUMERS * WARPGROUP_ROWS
# The modality of ids that do not exist, which are in no sum but have gates.
NONE = NEVER - 1


class _Decided(NamedTuple):
    """What leaves a tile: choices `[K, 64]`, values by token `[64]`, sums by modality `[M, fields, E]`, logits."""

    expert: Any
    gate: Any
    by_token: Any
    sums: Any
    logits: Any


def route_forward(
    device: GpuTarget,
    static: RouteStatic,
    tokens: Float[Array, "T D"],
    router: Float[Array, "D E"],
    inputs: RouteInputs,
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
    found = _route(_Inputs(tokens, _pieces(router, padded), member, noise), device, static, num_experts)

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


def _pieces(router: Float[Array, "D E"], padded: int) -> Float[Array, "P D"]:
    """The router transposed, its pieces one below the other."""
    turned = jnp.pad(router.astype(jnp.float32).T, ((0, padded - router.shape[1]), (0, 0)))
    return jnp.concatenate(split(turned, PIECES))


class _Inputs(NamedTuple):
    tokens: Any
    pieces: Any
    member: Any
    noise: Any


class _Scratch(NamedTuple):
    tokens: Any
    pieces: Any
    ring: Ring


def _route(inputs: _Inputs, device: GpuTarget, static: RouteStatic, num_experts: int) -> _Decided:
    """Run the kernel on tokens `[T, D]`, pieces `[P, D]`, members `[N, W, 64]` and noise `[N, W, 64, E]` or None."""
    columns, tiles = inputs.pieces.shape[0], inputs.member.shape[0]
    padded, blocks = columns // PIECES, route_blocks(columns, device.chip)
    scratch = _Scratch(
        tokens=swizzled((blocks.stages, TILE_TOKENS, DEPTH), inputs.tokens.dtype),
        pieces=swizzled((blocks.stages, columns, DEPTH), inputs.tokens.dtype),
        ring=Ring.of(blocks.stages, copies=2),
    )
    shape, half, fields = (tiles, NUM_CONSUMERS), WARPGROUP_ROWS, 2 if inputs.noise is None else 3
    outputs = _Decided(
        jax.ShapeDtypeStruct((*shape, static.num_choices, half), jnp.int32),
        jax.ShapeDtypeStruct((*shape, static.num_choices, half), jnp.float32),
        jax.ShapeDtypeStruct((*shape, 3, half), jnp.float32),
        jax.ShapeDtypeStruct((*shape, static.num_modalities, fields, padded), jnp.float32),
        jax.ShapeDtypeStruct((*shape, half, padded), jnp.float32),
    )
    kernel = lambda *refs: _Kernel(device, static, num_experts, *refs).run()  # noqa: E731
    return launch(kernel, "moe_route", device, inputs, outputs, scratch)


class _Logits(NamedTuple):
    """Of the 64 tokens of a consumer: clean, with noise where there is any, and each token's modality."""

    clean: Float[Array, "64 E"]
    noisy: Float[Array, "64 E"] | None
    member: Int[Array, " 64"]


class _Chosen(NamedTuple):
    """Which experts are wanted, the logit of the last of them, and whether a token's logits are finite."""

    wanted: Float[Array, "64 E"]
    last: Float[Array, " 64"]
    finite: Bool[Array, " 64"]


class _Kernel(NamedTuple):
    """What is static, and the references."""

    device: GpuTarget
    static: RouteStatic
    num_experts: int
    inputs: _Inputs
    out: _Decided
    scratch: _Scratch

    @property
    def tiles(self) -> int:
        return self.inputs.member.shape[0]

    @property
    def slices(self) -> int:
        return self.inputs.tokens.shape[1] // DEPTH

    def run(self) -> None:
        specialise(self.produce, self.consume)

    def produce(self) -> None:
        self.scratch.ring.drain(over_steps(jnp.int32(self.tiles), self.device.num_sms, self.fetch))

    def fetch(self, step: jax.Array, filled: jax.Array) -> jax.Array:
        """Copy the slices of a tile's tokens and of the router."""
        inputs, scratch, groups = self.inputs, self.scratch, self.static.num_groups
        size, of_group = inputs.tokens.shape[0] // groups, self.tiles // groups
        group, place = lax.div(step, jnp.int32(of_group)), lax.rem(step, jnp.int32(of_group))
        own = pl.ds(group * size + place * TILE_TOKENS, TILE_TOKENS)

        def copy(k: jax.Array, filled: jax.Array) -> jax.Array:
            slot, deep = scratch.ring.acquire(filled), pl.ds(k * DEPTH, DEPTH)
            full = scratch.ring.full.at[slot]
            plgpu.copy_gmem_to_smem(inputs.tokens.at[own, deep], scratch.tokens.at[slot], full)
            plgpu.copy_gmem_to_smem(inputs.pieces.at[:, deep], scratch.pieces.at[slot], full)
            return filled + 1

        return lax.fori_loop(0, self.slices, copy, filled)

    def consume(self) -> None:
        tile = functools.partial(self.tile, lax.axis_index("wg"))
        over_steps(jnp.int32(self.tiles), self.device.num_sms, tile)

    def tile(self, wg: jax.Array, step: jax.Array, filled: jax.Array) -> jax.Array:
        """Logits of this consumer's half of a tile, and all that is decided by them."""
        inputs, scratch = self.inputs, self.scratch
        columns = inputs.pieces.shape[0]
        padded = columns // PIECES

        def multiply(acc: Any, k: jax.Array, slot: jax.Array) -> None:
            x = scratch.tokens.at[slot, pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)]
            plgpu.wgmma(acc, x, scratch.pieces.at[slot].transpose((1, 0)))

        z = add_products(columns, scratch.ring, filled, self.slices, multiply)
        # The small pieces first.
        clean = z[:, 2 * padded :] + z[:, padded : 2 * padded] + z[:, :padded]
        member = self.device.read(inputs.member, (step, wg))
        real = lax.broadcast_in_dim(member != NEVER, clean.shape, (0,))
        clean = jnp.where(real, clean, jnp.zeros_like(clean))
        noisy = None if inputs.noise is None else clean + self.device.read(inputs.noise, (step, wg))
        self.decide(_Logits(clean, noisy, member), step, wg)
        return filled + self.slices

    def decide(self, logits: _Logits, step: jax.Array, wg: jax.Array) -> None:
        """Store choices, gates and sums."""
        clean, noisy, member = logits
        experts = Experts.of(clean.shape, self.num_experts, axis=1, keepdims=False)
        softmax = experts.softmax(clean)
        inverse = softmax.inverse if noisy is None else experts.softmax(noisy).inverse
        chosen = self.choose(logits, experts, inverse, step, wg)
        self.out.by_token[step, wg, 0] = softmax.entropy
        self.out.by_token[step, wg, 1] = softmax.log_partition
        self.out.logits[step, wg] = clean
        values = [chosen.wanted, softmax.probability]
        if noisy is not None:
            threshold = jnp.where(chosen.finite, chosen.last, jnp.full_like(inverse, jnp.nan))
            distance = (clean - experts.spread(threshold)) * (1 / self.static.noise_std)
            values.append(normal(distance, jnp.exp(-0.5 * distance * distance)))
        for modality in range(self.static.num_modalities):
            mine = experts.spread(member == modality)
            for field, value in enumerate(values):
                kept = jnp.where(mine, value, jnp.zeros_like(value))
                self.out.sums[step, wg, modality, field] = jnp.sum(kept, axis=0)

    def choose(
        self, logits: _Logits, experts: Experts, inverse: Float[Array, " 64"], step: jax.Array, wg: jax.Array
    ) -> _Chosen:
        """Store the best experts and their gates; `inverse` is one over the sum of the softmax that gates are of."""
        clean, out = logits.clean, self.out
        decided = clean if logits.noisy is None else logits.noisy
        finite = experts.finite(decided)
        # A token that is not finite gets the first experts: it wants none, but no index is out of range.
        score = experts.only(jnp.where(experts.spread(finite), decided, jnp.zeros_like(clean)), FAR)
        wanted, best = jnp.zeros_like(clean), []
        for choice in range(self.static.num_choices):
            best.append(jnp.max(score, axis=1))
            equal = score == experts.spread(best[-1])
            chosen = jnp.min(jnp.where(equal, experts.ids, jnp.full_like(clean, clean.shape[1])), axis=1)
            mine = experts.ids == experts.spread(chosen)
            wanted = jnp.where(mine & experts.spread(finite), jnp.ones_like(clean), wanted)
            score = jnp.where(mine, jnp.full_like(clean, FAR), score)
            gate = jnp.where(finite, jnp.exp(best[-1] - best[0]) * inverse, jnp.full_like(inverse, jnp.nan))
            out.expert[step, wg, choice] = chosen.astype(jnp.int32)
            out.gate[step, wg, choice] = jnp.where(logits.member != NEVER, gate, jnp.zeros_like(gate))
            if choice == 0:
                out.by_token[step, wg, 2] = gate
        return _Chosen(wanted, best[-1], finite)
