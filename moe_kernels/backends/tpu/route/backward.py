"""The router as one kernel, backward: gradients of logits, tokens and router, reading tokens once.

Logits are computed again (the tokens are in VMEM anyway, for `dW = xᵀ dA`). With p = softmax(A), q = softmax(A +
noise), u the experts of a token and L = logsumexp(A):
  gates, largest gate:         dA = q (dq - Σ q dq), dq = dgate at u
  probability, entropy:        dA = p (v - Σ p v), v = dprobability - log p dentropy
  squared log-partition:       dA = 2 L p d(L²)
  load, threshold A + noise at u_K:  dA = s - (Σ s at u_K), s = φ((A - threshold) / std) / std dload
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from moe_kernels.backends.base import RouteStatic
from moe_kernels.backends.route_parts import NEVER, Experts, split
from moe_kernels.backends.tpu.common.launch import Call, Operand, Target, launch, result
from moe_kernels.backends.tpu.route.forward import RouteSaved
from moe_kernels.backends.tpu.route.parts import (
    add_pieces,
    by_group,
    by_lane,
    logit_factor,
    logits_of,
    members,
    over_experts,
    turned_router,
)
from moe_kernels.backends.tpu.route.tiles import RouteTiles, backward_tiles
from moe_kernels.chips import LANES
from moe_kernels.precision import dot
from moe_kernels.types import Routing, RoutingSums


def route_backward(
    target: Target,
    static: RouteStatic,
    saved: RouteSaved,
    cotangent: Routing,
    passed: Float[Array, "T D"] | None = None,
) -> tuple[Float[Array, "T D"], Float[Array, "D E"]]:
    """Gradients of tokens and router, for the choice already made; with the cotangent of tokens passed on."""
    tokens, router = saved.tokens, saved.router
    sizes = (*tokens.shape, router.shape[1], tokens.dtype.itemsize)
    tiles = backward_tiles(static, *sizes, target.facts, target.num_cores, passes=passed is not None)
    assert tiles is not None, "refused by why_not"
    return run_backward(tiles, target, static, saved, cotangent.gate, cotangent.sums, passed)


def run_backward(
    tiles: RouteTiles,
    target: Target,
    static: RouteStatic,
    saved: RouteSaved,
    dgate: Float[Array, "T K"],
    dsums: RoutingSums,
    passed: Float[Array, "T D"] | None = None,
) -> tuple[Float[Array, "T D"], Float[Array, "D E"]]:
    """The backward pass with given block sizes."""
    tokens, router = saved.tokens, saved.router
    (num_tokens, width), num_experts = tokens.shape, router.shape[1]
    operands = _operands(tiles, static, saved, dgate, dsums, passed)
    groups, padded, block = static.num_groups, tiles.experts, operands.tokens
    kernel = _RouteBackward(tiles, static, num_experts, num_tokens // groups)
    of_router = (groups * tiles.parts, padded, width)
    found = launch(
        kernel.run,
        Call(
            "route_backward",
            (groups * tiles.parts, tiles.steps),
            tiles.vmem,
            flops=6 * tokens.size * num_experts,
            transcendentals=2 * groups * block.array.shape[1] * padded,
        ),
        target,
        inputs=operands,
        outputs=_RouteBackwardOutputs(
            dtokens=result(block.array.shape, tokens.dtype, block.spec),
            drouter=result(of_router, jnp.float32, pl.BlockSpec((1, padded, width), lambda part, tile: (part, 0, 0))),
        ),
    )
    drouter = jnp.sum(found.drouter, axis=0)[:num_experts].T.astype(router.dtype)
    return found.dtokens[:, : kernel.size].reshape(num_tokens, width), drouter


class _RouteBackwardInputs(NamedTuple):
    tokens: Any
    factor: Any
    back: Any
    """The factor of the tokens' gradient."""
    sums: Any
    expert: Any
    dgate: Any
    noise: Any
    member: Any
    passed: Any


class _RouteBackwardOutputs(NamedTuple):
    dtokens: Any
    drouter: Any


def _operands(
    tiles: RouteTiles,
    static: RouteStatic,
    saved: RouteSaved,
    dgate: Float[Array, "T K"],
    dsums: RoutingSums,
    passed: Float[Array, "T D"] | None,
) -> _RouteBackwardInputs:
    tokens, router, noise = saved.tokens, saved.router, saved.inputs.noise
    groups, padded = static.num_groups, tiles.experts
    member = members(tokens.shape[0], saved.inputs)
    sums = _by_lane(dsums, padded, noise is not None)
    of_group = pl.BlockSpec((1, *sums.shape[1:]), lambda part, tile: (tiles.at(part, tile)[0], 0, 0, 0))

    def lanes(values: Array, rows: int = static.num_choices) -> Operand:
        return tiles.of_lanes(by_lane(values, groups, tiles, rows))

    return _RouteBackwardInputs(
        tokens=tiles.of_rows(by_group(tokens, groups, tiles)),
        factor=tiles.whole(logit_factor(router, tokens.dtype, padded)),
        back=tiles.whole(_token_factor(router, tokens.dtype, padded)),
        sums=Operand(sums, of_group),
        expert=lanes(saved.expert),
        dgate=lanes(dgate.astype(jnp.float32)),
        noise=None if noise is None else lanes(noise.astype(jnp.float32), padded),
        member=None if member is None else lanes(member, 1),
        passed=None if passed is None else tiles.of_rows(by_group(passed, groups, tiles)),
    )


def _token_factor(router: Float[Array, "D E"], dtype: Any, padded: int) -> Float[Array, "P D"]:
    """The factor of `dx = dA Wᵀ`: for bfloat16 tokens the pieces that `_pieces_for_tokens` meets, else the router.

    Three of the six products of a float32 one: what is left out is 2^-16 of the result, which has 2^-9.
    """
    turned = turned_router(router, padded)
    if dtype != jnp.bfloat16:
        return turned
    high, low = split(turned, 2)
    return jnp.concatenate([high, low, high])


def _pieces_for_tokens(dlogits: Float[Array, "E C"], dtype: Any) -> Float[Array, "P C"]:
    if dtype != jnp.bfloat16:
        return dlogits
    high, low = split(dlogits, 2)
    return jnp.concatenate([high, high, low])


def _by_lane(dsums: RoutingSums, padded: int, has_noise: bool) -> Float[Array, "G M N L"]:
    """Cotangents of the sums as rows, the same in all lanes: those by expert, then the single ones."""
    by_expert = [dsums.probability, dsums.load] if has_noise else [dsums.probability]
    rows = [jnp.pad(values, ((0, 0), (0, 0), (0, padded - values.shape[2]))) for values in by_expert]
    single = jnp.stack([dsums.entropy, dsums.logsumexp_squared, dsums.largest_gate], axis=-1)
    rows = jnp.concatenate([*rows, jnp.pad(single, ((0, 0), (0, 0), (0, 5)))], axis=-1).astype(jnp.float32)
    return jnp.broadcast_to(rows[..., None], (*rows.shape, LANES))


class _Cotangents(NamedTuple):
    """Those of the sums that each token is in; 0 for one that is in none."""

    probability: Float[Array, "E C"]
    load: Float[Array, "E C"] | None
    entropy: Float[Array, "1 C"]
    logsumexp_squared: Float[Array, "1 C"]
    largest_gate: Float[Array, "1 C"]


@dataclasses.dataclass(frozen=True)
class _RouteBackward:
    """The kernel for a static problem."""

    tiles: RouteTiles
    static: RouteStatic
    num_experts: int
    size: int
    """Tokens of a group."""

    def run(self, inputs: _RouteBackwardInputs, outputs: _RouteBackwardOutputs, scratch: None) -> None:
        """Work on one tile."""
        dtokens, drouter = outputs
        tile = pl.program_id(1)

        @pl.when(tile == 0)
        def _() -> None:
            drouter[...] = jnp.zeros(drouter.shape, jnp.float32)

        first = self.tiles.at(pl.program_id(0), tile)[1] * self.tiles.tokens

        member = None if inputs.member is None else inputs.member[0]
        if self.size % self.tiles.tokens:
            place = first + jax.lax.broadcasted_iota(jnp.int32, (1, self.tiles.tokens), 1)
            member = jnp.where(place < self.size, 0 if member is None else member, NEVER)
        x = inputs.tokens[0]
        if member is not None:
            x = _select(member != NEVER, x)
        clean = logits_of(inputs.factor[...], x, self.tiles.experts, None)
        dlogits = self.dlogits(
            clean,
            None if inputs.noise is None else clean + inputs.noise[0],
            [inputs.expert[0, pl.ds(choice, 1)] for choice in range(self.static.num_choices)],
            [inputs.dgate[0, pl.ds(choice, 1)] for choice in range(self.static.num_choices)],
            self.cotangents(inputs, member),
        )
        if member is not None:
            dlogits = jnp.where(member != NEVER, dlogits, 0.0)
        product = dot(_pieces_for_tokens(dlogits, x.dtype), inputs.back[...], (0, 0))
        if inputs.passed is not None:
            product += inputs.passed[0].astype(jnp.float32)
        dtokens[0] = product.astype(dtokens.dtype)
        pieces = jnp.concatenate(split(dlogits, 3)) if x.dtype == jnp.bfloat16 else dlogits
        drouter[0] += add_pieces(dot(pieces, x, (1, 0)), self.tiles.experts)

    def cotangents(self, inputs: _RouteBackwardInputs, member: Int[Array, "1 C"] | None) -> _Cotangents:
        """From those of each modality, by selection."""
        copies, sums, has_noise = self.tiles.tokens // LANES, inputs.sums.at[0], inputs.noise is not None

        def of(first: int, count: int) -> Float[Array, "N C"]:
            found = None
            for modality in range(self.static.num_modalities if inputs.member is not None else 1):
                values = jnp.concatenate([sums[modality, pl.ds(first, count)]] * copies, axis=1)
                if member is not None:
                    values = jnp.where(member == modality, values, 0.0 if found is None else found)
                found = values
            assert found is not None
            return found

        experts = self.tiles.experts
        single = (2 if has_noise else 1) * experts
        load = of(experts, experts) if has_noise else None
        return _Cotangents(of(0, experts), load, *(of(single + n, 1) for n in range(3)))

    def dlogits(
        self,
        clean: Float[Array, "E C"],
        noisy: Float[Array, "E C"] | None,
        expert: list[Int[Array, "1 C"]],
        dgate: list[Float[Array, "1 C"]],
        given: _Cotangents,
    ) -> Float[Array, "E C"]:
        """The gradient of the logits, as in the docstring of the module."""
        experts = Experts.of(clean.shape, self.num_experts)
        softmax = experts.softmax(clean)
        finite = experts.finite(clean if noisy is None else noisy)
        chosen = [experts.ids == index.astype(jnp.float32) for index in expert]
        dgate = [dgate[0] + given.largest_gate, *dgate[1:]]
        dq = jnp.zeros(clean.shape, jnp.float32)
        for mine, value in zip(chosen, dgate, strict=True):
            dq = jnp.where(mine, jnp.where(finite, value, 0.0), dq)

        dp = given.probability - (softmax.distance - softmax.log_total) * given.entropy
        shift = 2.0 * softmax.log_partition * given.logsumexp_squared
        if noisy is None:
            return _through_softmax(softmax.probability, dp + dq, shift)
        found = _through_softmax(softmax.probability, dp, shift)
        found += _through_softmax(experts.softmax(noisy).probability, dq, 0.0)
        assert given.load is not None
        std = self.static.noise_std
        threshold = over_experts(jnp.sum, jnp.where(chosen[-1], noisy, 0.0))
        distance = (clean - threshold) * (1 / std)
        slope = jnp.exp(-0.5 * jnp.square(distance)) * given.load * (1 / (math.sqrt(2 * math.pi) * std))
        return found + slope - jnp.where(chosen[-1], over_experts(jnp.sum, slope), 0.0)


def _through_softmax(
    probability: Float[Array, "E C"], cotangent: Float[Array, "E C"], shift: Float[Array, "1 C"] | float
) -> Float[Array, "E C"]:
    return probability * (cotangent - over_experts(jnp.sum, probability * cotangent) + shift)


def _select(mine: Bool[Array, "1 C"], tokens: Float[Array, "C D"]) -> Float[Array, "C D"]:
    """Tokens, and 0 in the place of others, whatever they hold; the flags lie along the lanes."""
    flags = jnp.broadcast_to(jnp.where(mine, 1.0, 0.0), (LANES, mine.shape[1])).T
    columns = [
        jnp.where(flags[:, : min(LANES, tokens.shape[1] - at)] > 0, tokens[:, at : at + LANES].astype(jnp.float32), 0.0)
        for at in range(0, tokens.shape[1], LANES)
    ]
    return jnp.concatenate(columns, axis=1).astype(tokens.dtype)
