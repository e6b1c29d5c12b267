"""The TPU back end: Pallas kernels for the Mosaic compiler; interpreted on other platforms when asked for by name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from moe_kernels.backends.base import Backend, Problem, Span, SpanName, activation_misfit, by_kernel_alone, rows_misfit
from moe_kernels.backends.mlp_parts import in_two_matmuls, problems_of
from moe_kernels.backends.tpu.common.launch import STAND_IN, Target
from moe_kernels.backends.tpu.common.tiling import MOST_ROWS, GivenTiles, Sizes, Tiles, tiles_misfit
from moe_kernels.backends.tpu.common.vmem import needed_vmem
from moe_kernels.backends.tpu.fused.span import layer_backward, layer_forward, layer_value
from moe_kernels.backends.tpu.fused.tiles import fused_backward_tiles, fused_tiles
from moe_kernels.backends.tpu.matmul.backward import grouped_matmul_backward
from moe_kernels.backends.tpu.matmul.forward import grouped_matmul_forward
from moe_kernels.backends.tpu.matmul.tiles import (
    matmul_backward_need,
    matmul_backward_tiles,
    matmul_forward_need,
    matmul_forward_tiles,
)
from moe_kernels.backends.tpu.mlp.backward import expert_mlp_backward
from moe_kernels.backends.tpu.mlp.forward import expert_mlp, expert_mlp_forward
from moe_kernels.backends.tpu.mlp.hidden import hidden_cost, keeps_hidden
from moe_kernels.backends.tpu.mlp.one_or_two import glu_cost
from moe_kernels.backends.tpu.mlp.tiles import (
    mlp_backward_need,
    mlp_backward_tiles,
    mlp_forward_need,
    mlp_forward_tiles,
)
from moe_kernels.backends.tpu.permute.backward import combine_backward, dispatch_backward
from moe_kernels.backends.tpu.permute.forward import combine_forward, dispatch_forward
from moe_kernels.backends.tpu.permute.tiles import PLANE_BYTES, GatherTiles, gather_tiles
from moe_kernels.backends.tpu.route.backward import route_backward
from moe_kernels.backends.tpu.route.forward import route_forward
from moe_kernels.backends.tpu.route.tiles import route_misfit
from moe_kernels.chips import LANES, MIB, TPUS, find_tpu

ITEMSIZES = {"float32": 4, "bfloat16": 2}
# Weights whose dtype a problem does not say may be float32, whatever the rows are.
LARGEST_WEIGHT = 4
GATHERS = ("dispatch", "combine")
# Bytes of scalar memory that places and gates of a layer in one kernel may take.
SMEM = 512 * 1024
TILES = {
    "expert_mlp": (mlp_forward_tiles, mlp_backward_tiles),
    "expert_glu": (mlp_forward_tiles, mlp_backward_tiles),
    "grouped_matmul": (matmul_forward_tiles, matmul_backward_tiles),
    "dispatch_mlp_combine": (mlp_backward_tiles, fused_tiles),
}
# Bytes of VMEM of kernels whose block sizes a call may bring along.
NEEDS = {
    "expert_mlp": (mlp_forward_need, mlp_backward_need),
    "expert_glu": (mlp_forward_need, mlp_backward_need),
    "grouped_matmul": (matmul_forward_need, matmul_backward_need),
}


def why_not(problem: Problem) -> str | None:
    """Refuse other platforms (unless asked for by name), dtypes that the MXU has no matmul for, and what cannot fit.

    >>> why_not(Problem("expert_mlp", "cpu", "float32", (16, 8), 2))
    'platform cpu is not tpu; named, it runs interpreted'
    """
    if problem.platform != "tpu" and not problem.named:
        return f"platform {problem.platform} is not tpu; named, it runs interpreted"
    if problem.dtype not in ITEMSIZES:
        return f"dtype {problem.dtype} is none of {tuple(ITEMSIZES)}"
    if problem.platform == "tpu" and find_tpu(problem.chip) is None:
        return f"chip {problem.chip!r} is none of {tuple(tpu.kind for tpu in TPUS.values())}"
    if problem.weight_dtype not in ("", *ITEMSIZES):
        return f"weights of dtype {problem.weight_dtype} are none of {tuple(ITEMSIZES)}"
    if problem.tiles is not None and problem.span not in NEEDS:
        return f"block sizes can be given for {', '.join(NEEDS)}"
    if problem.span == "expert_glu" and _in_two(problem):
        return next(filter(None, map(why_not, problems_of(problem))), None)
    if problem.span in TILES:
        fused = _fused_misfit(problem) if problem.span == "dispatch_mlp_combine" else None
        return activation_misfit(problem) or rows_misfit(problem.layout) or fused or _vmem_misfit(problem)
    if problem.span == "route":
        target = _target(problem)
        if problem.route is not None and (reason := problem.route.beyond_kernels):
            return reason
        return route_misfit(problem, ITEMSIZES[problem.dtype], target.facts, target.num_cores)
    if problem.span in GATHERS:
        return _gather_misfit(problem)
    return None


def _vmem_misfit(problem: Problem) -> str | None:
    sizes = _sizes(problem)
    options = {"epilogue": problem.epilogue} if problem.span == "grouped_matmul" else {}
    given = _given(problem)
    for choose, tiles in zip(TILES[problem.span], (given.forward, given.backward), strict=True):
        if tiles is None and choose(sizes, **options) is None:
            return (
                f"width {sizes.width} with expert width {sizes.expert_width} does not fit the "
                f"{sizes.chip.vmem // MIB} MiB of VMEM of {_target(problem).chip}"
            )
        if tiles is not None and (reason := tiles_misfit(tiles, sizes, tiles.vmem)):
            return f"the block sizes that were given do not fit: {reason}"
    return None


def _in_two(problem: Problem) -> bool:
    """Whether gated experts are two kernels, of which the first writes the hidden layer: where that is faster."""
    if problem.tiles is not None or problem.layout is None:
        return False
    one, two = glu_cost(_sizes(problem))
    return 1.01 * two < one


def _experts(problem: Problem) -> Span:
    """Experts as one kernel, or gated ones that do not fit as two."""
    if problem.span == "expert_glu" and _in_two(problem):
        return in_two_matmuls(*(SPANS["grouped_matmul"](part) for part in problems_of(problem)))
    return _span(expert_mlp_forward, expert_mlp_backward, _target(problem), expert_mlp, _given(problem))


def _given(problem: Problem) -> GivenTiles:
    """The block sizes that a call brings along, with the bytes that they need."""
    given = problem.tiles
    if given is None:
        return GivenTiles()
    assert isinstance(given, GivenTiles), "refused by the table"
    sizes = _sizes(problem)
    options = {"epilogue": problem.epilogue} if problem.span == "grouped_matmul" else {"keep": keeps_hidden(sizes)}

    def counted(tiles: Tiles | None, need: Callable[..., int]) -> Tiles | None:
        if tiles is None:
            return None
        return dataclasses.replace(tiles, vmem=needed_vmem(need(sizes, tiles.rows, tiles.chunk, **options)))

    forward, backward = NEEDS[problem.span]
    return GivenTiles(counted(given.forward, forward), counted(given.backward, backward))


def _sizes(problem: Problem, unknown: int = LARGEST_WEIGHT) -> Sizes:
    """What block sizes are chosen by; `unknown` are the bytes of a weight where the problem does not say."""
    assert problem.layout is not None
    weight = ITEMSIZES.get(problem.weight_dtype, unknown)
    itemsize = ITEMSIZES[problem.dtype]
    facts, gated = _target(problem).facts, problem.span == "expert_glu"
    return Sizes(problem.layout, problem.shape[-1], problem.expert_width, itemsize, weight, facts, gated)


def _fused_misfit(problem: Problem) -> str | None:
    """Why dispatch, experts and combine cannot be one kernel; a backward pass in its parts gathers rows."""
    layout = problem.layout
    assert layout is not None
    if layout.num_tokens == 0:
        return "there are no tokens"
    if problem.platform == "tpu" and problem.num_cores > 1:
        return f"the kernel runs on one TensorCore, the device has {problem.num_cores}"
    if layout.num_choices > 1:
        return f"{layout.num_choices} choices of a token are added up; results of one take its place"
    if layout.rows_per_expert is None:
        return "rows are packed; those of an expert must be a block"
    if layout.runs_per_expert > 1:
        return f"an expert has {layout.runs_per_expert} runs from other shards; tokens of this one become rows"
    if layout.rows_per_expert > MOST_ROWS:
        return f"an expert has up to {layout.rows_per_expert} rows; at most {MOST_ROWS} are held at once"
    if (needed := 4 * (2 * layout.num_rows + layout.num_tokens)) > SMEM:
        return f"{layout.num_tokens} tokens need {needed} bytes of scalar memory; at most {SMEM} are used"
    if (odd := problem.shape[-1] * ITEMSIZES[problem.dtype]) % PLANE_BYTES:
        return f"rows of {odd} bytes are no multiple of {PLANE_BYTES}"
    return _gather_misfit(problem)


def _gather_misfit(problem: Problem) -> str | None:
    layout, width = problem.layout, problem.shape[-1]
    if layout is None:
        return "the layout of the rows is not known"
    if width == 0 or width % LANES:
        return f"width {width} is no multiple of {LANES}"
    for length, tiles in _gathers(problem):
        if tiles is None:
            return f"{PLANE_BYTES} bytes of each of {length} rows do not fit {_vmem(problem)}"
    return None


def _gathers(problem: Problem) -> Iterator[tuple[int, GatherTiles | None]]:
    """From how many rows dispatch and combine gather, and in which blocks."""
    layout, target = problem.layout, _target(problem)
    assert layout is not None
    tokens, rows, itemsize = layout.num_tokens, layout.num_rows, ITEMSIZES[problem.dtype]
    for length, count, terms in ((tokens, rows, 1), (rows, tokens, layout.num_choices)):
        if min(length, count):
            yield length, gather_tiles(length, count, problem.shape[-1], itemsize, terms, target.facts)


def _gather_note(problem: Problem) -> str | None:
    """Into how many blocks columns are cut, and why."""
    cut = [f"{tiles.blocks} for {length} rows" for length, tiles in _gathers(problem) if tiles and tiles.blocks > 1]
    if not cut:
        return None
    return f"blocks of columns, which pick rows again: {', '.join(cut)}, to fit {_vmem(problem)}"


def _vmem(problem: Problem) -> str:
    return f"{_target(problem).facts.vmem // MIB} MiB of VMEM"


def _target(problem: Problem) -> Target:
    if problem.platform != "tpu":
        return Target(STAND_IN, interpret=True)
    # A chip that does not say how many cores it shows as one device has one.
    return Target(problem.chip, max(problem.num_cores, 1))


@functools.lru_cache
def _span(forward: Any, backward: Any, target: Target, value: Any = None, tiles: GivenTiles | None = None) -> Span:
    """One span for each target, so that JAX finds what it has traced before."""

    def bound(function: Any, given: Tiles | None) -> Any:
        return functools.partial(function, target, **({} if given is None else {"tiles": given}))

    tiles = tiles or GivenTiles()
    alone = None if value is None else bound(value, tiles.forward)
    return Span(bound(forward, tiles.forward), bound(backward, tiles.backward), alone)


def note(problem: Problem) -> str | None:
    """Which kernels a layer's passes are; what becomes of the hidden layer, with both times; blocks of columns.

    Weights of unknown dtype have that of the rows. A layer in one kernel always computes the hidden layer again.

    >>> from moe_kernels.types import Layout
    >>> layout = Layout(16384, 1, 1, 32, 17408, 544)
    >>> note(Problem("expert_mlp", "tpu", "bfloat16", (17408, 768), 32, 3072, layout, "TPU v6 lite"))
    'hidden layer computed again: 0.664 ms; kept: 0.764 ms and 107 MB (forward and backward by the roofline, modelled)'
    """
    if problem.span in GATHERS and problem.layout is not None:
        return _gather_note(problem)
    if problem.span not in ("expert_mlp", "expert_glu", "dispatch_mlp_combine") or problem.layout is None:
        return None
    if problem.span == "expert_glu":
        return _glu_note(problem)
    sizes = _sizes(problem, ITEMSIZES[problem.dtype])
    again, kept = (f"{1e3 * seconds / _target(problem).num_cores:.3f} ms" for seconds in hidden_cost(sizes))
    hidden_mb = 1e-6 * problem.layout.num_rows * problem.expert_width * sizes.itemsize
    ways = [f"computed again: {again}", f"kept: {kept} and {hidden_mb:.0f} MB"]
    if problem.span == "expert_mlp":
        begin = "hidden layer"
        if keeps_hidden(sizes):
            ways.reverse()
    else:
        begin = f"{_passes(sizes)}; hidden layer always"
    return f"{begin} {'; '.join(ways)} (forward and backward by the roofline, modelled)"


def _glu_note(problem: Problem) -> str:
    one, two = (f"{1e3 * seconds / _target(problem).num_cores:.3f} ms" for seconds in glu_cost(_sizes(problem)))
    ways = [f"one kernel: {one}", f"grouped_glu, then grouped_matmul: {two}"]
    if _in_two(problem):
        ways.reverse()
    # What does not fit would take forever.
    return f"{'; '.join(ways)} (forward and backward by the roofline, modelled)".replace("inf ms", "does not fit VMEM")


def _passes(sizes: Sizes) -> str:
    """Which kernels both passes of a layer in one kernel are."""
    if fused_backward_tiles(sizes) is not None:
        return "one kernel forward and one backward"
    return (
        "one kernel forward; backward in its parts, since tokens, cotangents and a chunk of weights do not fit the "
        f"{sizes.chip.vmem // MIB} MiB of VMEM together"
    )


SPANS: dict[SpanName, Callable[[Problem], Span]] = {
    "route": lambda problem: by_kernel_alone(_span(route_forward, route_backward, _target(problem))),
    "grouped_matmul": lambda problem: _span(
        grouped_matmul_forward, grouped_matmul_backward, _target(problem), tiles=_given(problem)
    ),
    "dispatch": lambda problem: _span(dispatch_forward, dispatch_backward, _target(problem)),
    "combine": lambda problem: _span(combine_forward, combine_backward, _target(problem)),
    "expert_mlp": _experts,
    "expert_glu": _experts,
    "dispatch_mlp_combine": lambda problem: _span(layer_forward, layer_backward, _target(problem), layer_value),
}
TPU = Backend(
    name="tpu",
    why_not=why_not,
    spans=SPANS,
    optional=frozenset(("route", *GATHERS)),
    note=note,
    tiles=GivenTiles,
)
