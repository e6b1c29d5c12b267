"""Block sizes of the routing kernels, by arithmetic over VMEM; pure, tested without kernels."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from moe_kernels.backends.base import Problem, RouteStatic
from moe_kernels.backends.tiling import MARGIN, MIB, SLACK, Chip, round_up

LANES = 128
# Tokens of a tile at most: a copy of as many is long enough for the memory, and a short one hides less.
MOST_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class RouteTiles:
    """How tokens are cut: `tokens` of a tile, worked on `step` at a time; a group is `parts` times `steps` tiles."""

    tokens: int
    step: int
    parts: int
    steps: int
    experts: int
    """Rounded up to whole registers."""
    vmem: int
    """Bytes that the kernel needs, at most."""

    def at(self, part: Any, tile: Any) -> tuple[Any, Any]:
        """Group, and tile in that group, of a part of it and a tile of the part."""
        if self.parts == 1:
            return part, tile
        return part // self.parts, part % self.parts * self.steps + tile


@functools.lru_cache
def route_tiles(
    static: RouteStatic, num_tokens: int, width: int, num_experts: int, itemsize: int, chip: Chip, num_cores: int
) -> RouteTiles | None:
    """Block sizes of the forward pass, or None where not even the smallest fit.

    >>> from moe_kernels.backends.tiling import CHIPS
    >>> tiles = route_tiles(RouteStatic(1, 8, 1, 0.1), 16384, 768, 32, 2, CHIPS["TPU v5 lite"], 1)
    >>> tiles.tokens, tiles.steps
    (1024, 2)
    """
    size = num_tokens // static.num_groups
    experts = round_up(num_experts, 8)
    whole = max(LANES, size // LANES * LANES)
    # Exact divisors of a group first, so that no tile is partly filled.
    options = [n for n in range(min(MOST_TOKENS, whole), 0, -LANES) if whole % n == 0 and size % LANES == 0]
    for tokens in [n for n in options if n >= 256] + [n for n in (512, 256, 128) if n <= whole]:
        step = 256 if tokens % 256 == 0 else LANES
        tiles = max(1, -(-size // tokens))
        parts = num_cores if static.num_groups % num_cores and tiles % num_cores == 0 else 1
        held = 2 * tokens * width * itemsize + 2 * 3 * round_up(experts, 16) * width * 2
        held += 2 * tokens * 4 * (2 * experts + 2 * round_up(static.num_choices, 8) + 8)
        held += 2 * static.num_modalities * (3 * experts + 8) * LANES * 4
        values = step * 4 * 12 * experts
        vmem = int((held + values) * MARGIN) + SLACK
        if vmem <= chip.vmem - MIB:
            return RouteTiles(tokens, step, parts, tiles // parts, experts, vmem)
    return None


def route_misfit(problem: Problem, chip: Chip) -> str | None:
    """Why the kernels cannot take a routing problem, or None."""
    if problem.route is None:
        return "what is static about the routing is not known"
    if 0 in problem.shape:
        return f"tokens of shape {problem.shape} are empty"
    itemsize = 2 if problem.dtype == "bfloat16" else 4
    if route_tiles(problem.route, *problem.shape, problem.num_experts, itemsize, chip, problem.num_cores) is None:
        return f"width {problem.shape[1]} with {problem.num_experts} experts does not fit the VMEM"
    return None
