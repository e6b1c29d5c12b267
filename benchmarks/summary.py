"""Summaries of several results: the share of routing, peak memory, comparisons, growth, and targets."""

from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.results import Result

# The four operations around the experts, with the pass that a training step runs.
_AROUND = {"routing": "both", "plan": "forward", "dispatch": "both", "combine": "both"}


def share_around_experts(results: Sequence[Result], implementation: str) -> list[str]:
    """Compare routing + plan + dispatch + combine (each run alone) with the layer, forward and backward.

    There is a line for each problem with times of all five.
    """
    times = {
        (r.op, r.passes, r.case, r.distribution, r.dtype): r for r in results if r.implementation == implementation
    }
    lines = []
    for (op, passes, case, distribution, dtype), layer in times.items():
        problem = (case, distribution, dtype)
        around = [times.get((name, its_pass, *problem)) for name, its_pass in _AROUND.items()]
        milliseconds = [result.ms_median for result in around if result is not None and result.ms_median is not None]
        if (op, passes) == ("layer", "both") and layer.ms_median and len(milliseconds) == len(_AROUND):
            share = sum(milliseconds) / layer.ms_median
            parts = ", ".join(f"{name} {ms:.1f}" for name, ms in zip(_AROUND, milliseconds, strict=True))
            lines.append(
                f"{implementation}, {', '.join(problem)}: routing + plan + dispatch + combine take {100 * share:.1f}% "
                f"of the layer's time{_target(layer, 'at most 10%')}; ms: {parts}"
            )
    return lines


def peak_memory(results: Iterable[Result], implementation: str) -> list[str]:
    """Compare peak memory with the least possible; a line for each problem of the layer, forward and backward."""
    return [
        f"{implementation}, {r.case}, {r.distribution}, {r.dtype}: peak memory {r.peak_bytes / 1e6:.0f} MB, "
        f"{r.peak_bytes / r.needed_bytes:.2f}x the layer's inputs, outputs, gradients and routed rows"
        f"{_target(r, 'at most 1.3x')}"
        for r in results
        if (r.op, r.passes, r.implementation) == ("layer", "both", implementation) and r.correct
        if r.needed_bytes is not None and r.peak_bytes is not None
    ]


def against_peers(results: Sequence[Result], implementation: str) -> list[str]:
    """Compare the layer, forward and backward, with every baseline, paired by round; a line for each problem."""
    layers = [r for r in results if (r.op, r.passes) == ("layer", "both") and r.ms_median]
    lines = []
    for mine in (r for r in layers if r.implementation == implementation):
        problem = (mine.case, mine.distribution, mine.dtype)
        others = [
            f"{r.ratios[implementation]:.2f}x as fast as {r.implementation}"
            for r in layers
            if (r.case, r.distribution, r.dtype) == problem and r.implementation not in (implementation, "dense")
            if implementation in r.ratios
        ]
        target = _target(mine, "at most 1.2x")
        dense = [] if mine.ratio_to_dense is None else [f"{mine.ratio_to_dense:.2f}x the time of dense{target}"]
        lines.append(f"{implementation}, {', '.join(problem)}: {', '.join(dense + others)}")
    return lines


# Targets for kernels on GPUs, in per cent of a dense matmul.
_OF_DENSE = {"forward": 70, "dx": 65, "dw": 65}


def of_dense_matmul(results: Sequence[Result], implementation: str) -> list[str]:
    """Compare each pass of the grouped matmul with a dense matmul of equal FLOPs; a line for each case."""
    rates = {
        (r.case, r.distribution, r.dtype, r.passes, r.implementation): r.tflops
        for r in results
        if r.op == "grouped_matmul" and r.passes in _OF_DENSE and r.tflops
    }
    lines = []
    for problem in dict.fromkeys(key[:3] for key in rates):
        shares = [
            f"{passes} {100 * rates[(*problem, passes, implementation)] / rates[(*problem, passes, 'dense')]:.0f}% "
            f"(target: at least {least}% on a GPU)"
            for passes, least in _OF_DENSE.items()
            if {(*problem, passes, name) for name in (implementation, "dense")} <= rates.keys()
        ]
        if shares:
            lines.append(f"{implementation}, {', '.join(problem)}: of a dense matmul's rate, {', '.join(shares)}")
    return lines


SUMMARIES = (against_peers, of_dense_matmul, share_around_experts, peak_memory)


def _target(result: Result, text: str) -> str:
    """Format a target. Targets are set for one case only."""
    return f" (target: {text})" if (result.case, result.dtype) == ("issue", "float32") else ""


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Fit the slope of log(values) over log(sizes): 1 for a cost that is proportional to the size.

    >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
