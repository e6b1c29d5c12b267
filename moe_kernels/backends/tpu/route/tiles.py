"""Block sizes of the routing kernels, by arithmetic over VMEM; pure, tested without kernels."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from jax.experimental import pallas as pl

from moe_kernels.backends.base import Problem, RouteStatic
from moe_kernels.backends.tpu.common.launch import Operand
from moe_kernels.backends.tpu.common.vmem import fits, needed_vmem
from moe_kernels.chips import LANES, MIB, Tpu
from moe_kernels.fitted import FITTED
from moe_kernels.types import round_up

# Tokens of a tile at most, and logits of one: the more at once, the better the compiler fills its bundles (a loop over
# 256 tokens at a time takes up to 1.7 times as many, modelled), and the longer it compiles.
MOST_TOKENS, MOST_VALUES = 1024, 32 * 1024
# Choices and modalities are written out one after the other in the kernels.
MOST_CHOICES, MOST_MODALITIES = 16, 16


@dataclasses.dataclass(frozen=True)
class RouteTiles:
    """How tokens are cut: `tokens` of a tile, which is worked on at once; a group is `parts` times `steps` tiles."""

    tokens: int
    parts: int
    steps: int
    experts: int
    """Rounded up to whole registers."""
    vmem: int
    """Bytes that the kernel needs, at most."""

    def at(self, part: Any, tile: Any) -> tuple[Any, Any]:
        """Group, and tile in that group, of a part and a tile of the part; parts are numbered through."""
        if self.parts == 1:
            return part, tile
        return part // self.parts, part % self.parts * self.steps + tile

    def of_rows(self, array: Any) -> Operand:
        """A tile of a `[G, S, D]` array."""
        return Operand(array, pl.BlockSpec((1, self.tokens, array.shape[2]), lambda *step: (*self.at(*step), 0)))

    def of_lanes(self, array: Any) -> Operand:
        """A tile of a `[G, rows, S]` array."""

        def place(part: Any, tile: Any) -> tuple[Any, int, Any]:
            group, block = self.at(part, tile)
            return group, 0, block

        return Operand(array, pl.BlockSpec((1, array.shape[1], self.tokens), place))

    def whole(self, array: Any) -> Operand:
        """All of an array `[N, D]`."""
        return Operand(array, pl.BlockSpec(array.shape, lambda part, tile: (0, 0)))


def _tiles(
    static: RouteStatic,
    num_tokens: int,
    num_experts: int,
    chip: Tpu,
    num_cores: int,
    need: Callable[[int, int], int],
) -> RouteTiles | None:
    """The longest tile that fits, of `need(tokens, experts)` bytes; one that splits a group where cores need that."""
    size, experts = num_tokens // static.num_groups, round_up(num_experts, 8)

    def parts(tokens: int) -> int:
        return num_cores if static.num_groups % num_cores and -(-size // tokens) % num_cores == 0 else 1

    for tokens in sorted(_lengths(size, experts), key=parts, reverse=True):
        vmem = needed_vmem(need(tokens, experts))
        if fits(vmem, chip):
            return RouteTiles(tokens, parts(tokens), -(-size // tokens) // parts(tokens), experts, vmem)
    return None


def _lengths(size: int, experts: int) -> Iterator[int]:
    """Tokens of a tile, descending: a group in equal parts, in whole registers, and not more than a group has."""
    most = max(LANES, min(MOST_TOKENS, MOST_VALUES // experts))
    for count in itertools.count(-(-size // most)):
        tokens = min(round_up(-(-size // count), LANES), max(LANES, size // LANES * LANES))
        yield tokens
        if tokens == LANES:
            return


@functools.lru_cache
def forward_tiles(
    static: RouteStatic, num_tokens: int, width: int, num_experts: int, itemsize: int, chip: Tpu, num_cores: int
) -> RouteTiles | None:
    """Block sizes of the forward pass, or None where not even the smallest fit.

    >>> from moe_kernels.chips import TPUS
    >>> tiles = forward_tiles(RouteStatic(1, 8, 1, 0.1), 16384, 768, 32, 2, TPUS["v5e"], 1)
    >>> tiles.tokens, tiles.steps
    (1024, 2)
    """

    def need(tokens: int, experts: int) -> int:
        held = 2 * tokens * width * itemsize + 2 * _factor(experts, width, itemsize)
        held += _rows(static, tokens, experts) + 2 * static.num_modalities * (3 * experts + 8) * LANES * 4
        return held + _kept(tokens, width, itemsize, "forward")

    return _tiles(static, num_tokens, num_experts, chip, num_cores, need)


@functools.lru_cache
def backward_tiles(
    static: RouteStatic,
    num_tokens: int,
    width: int,
    num_experts: int,
    itemsize: int,
    chip: Tpu,
    num_cores: int,
    *,
    passes: bool = False,
) -> RouteTiles | None:
    """Block sizes of the backward pass, or None where not even the smallest fit; `passes` adds another cotangent.

    >>> from moe_kernels.chips import TPUS
    >>> tiles = backward_tiles(RouteStatic(1, 8, 1, 0.1), 16384, 768, 32, 2, TPUS["v5e"], 1)
    >>> tiles.tokens, tiles.steps
    (1024, 2)
    """

    def need(tokens: int, experts: int) -> int:
        held = (
            (6 if passes else 4) * tokens * width * itemsize
            + 4 * _factor(experts, width, itemsize)
            + 2 * experts * width * 4
        )
        held += _rows(static, tokens, experts) + 2 * static.num_modalities * (2 * experts + 8) * LANES * 4
        return held + _kept(tokens, width, itemsize, "backward")

    return _tiles(static, num_tokens, num_experts, chip, num_cores, need)


def _rows(static: RouteStatic, tokens: int, experts: int) -> int:
    """Bytes of what has its tokens along the lanes: operands and results twice, and what the compiler keeps."""
    return tokens * 4 * (2 * (experts + 2 * static.num_choices + 1) + 3 * (experts + 48))


def _kept(tokens: int, width: int, itemsize: int, direction: str) -> int:
    """Bytes that the compiler keeps for the entries of a tile."""
    return int(tokens * width * FITTED.route_entry_bytes["bfloat16" if itemsize == 2 else "float32"][direction])


def _factor(experts: int, width: int, itemsize: int) -> int:
    """Bytes of the router: as three bfloat16 pieces, or in float32."""
    return round_up(3 * experts, 16) * round_up(width, LANES) * 2 if itemsize == 2 else experts * width * 4


def route_misfit(problem: Problem, itemsize: int, chip: Tpu, num_cores: int) -> str | None:
    """Why the kernels cannot take a routing problem, or None."""
    static = problem.route
    if static is None:
        return "what is static about the routing is not known"
    if 0 in problem.shape:
        return f"tokens of shape {problem.shape} are empty"
    if static.num_choices > MOST_CHOICES or static.num_modalities > MOST_MODALITIES:
        return (
            f"{static.num_choices} choices and {static.num_modalities} modalities are more than "
            f"{MOST_CHOICES} and {MOST_MODALITIES}"
        )
    num_tokens, width = problem.shape
    for choose in (forward_tiles, functools.partial(backward_tiles, passes=True)):
        if choose(static, num_tokens, width, problem.num_experts, itemsize, chip, num_cores) is None:
            return f"width {width} with {problem.num_experts} experts does not fit the {chip.vmem // MIB} MiB of VMEM"
    return None
