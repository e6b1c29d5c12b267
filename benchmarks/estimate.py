"""Estimate a run before it starts: the memory that its arrays need at least, and roughly its time."""

import dataclasses
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.implementations import Counts, Implementation, Setting
from benchmarks.roofline import EXPERT_MATMULS, HALVES, Device, Load, Problem, probes, with_probes, work
from benchmarks.run import chosen
from benchmarks.timing import SLOW_SECONDS, time_programs

# Programs reach about half of their roofline. Each is also compiled and checked, at full size and on a small twin.
_SHARE_OF_ROOFLINE, _SECONDS_A_PROGRAM = 0.5, 2.0


def seconds(problem: Problem, implementations: Sequence[Implementation], repetitions: int, device: Device) -> float:
    """Estimate the time from the work by definition, the extra rows of implementations, and the device's rates."""
    total, rows = 0.0, problem.case.tokens * problem.case.choices
    load, itemsize = Load(rows, problem.case.experts), jnp.dtype(problem.dtype).itemsize
    useful = work(problem.op, problem.passes, problem.case, load, itemsize)
    for implementation in implementations:
        more = computed_rows(implementation, problem) / rows if problem.op in EXPERT_MATMULS else 1.0
        flops = useful.flops * more + _around_flops(implementation, problem)
        # Without known peaks only the constant part counts.
        rate = device.flops.get(problem.dtype, float("inf"))
        once = max(flops / rate, useful.bytes / device.bandwidth) / _SHARE_OF_ROOFLINE
        total += _SECONDS_A_PROGRAM + once * (1 + (1 if once > SLOW_SECONDS else repetitions))
    return total


def needed_bytes(problem: Problem, implementations: Sequence[Implementation]) -> int:
    """Estimate the least memory: inputs, every program's results, and the hidden rows of the largest program."""
    case, itemsize = problem.case, jnp.dtype(problem.dtype).itemsize
    rows, width = case.tokens * case.choices, case.width
    weights = case.experts * (2 * width * case.expert_width + width + case.expert_width)
    inputs = 2 * (case.tokens + rows) * width + rows * case.expert_width + weights
    has_gradient = problem.passes != "forward" and problem.passes != HALVES[0] and problem.op in EXPERT_MATMULS
    gradients = weights // (2 if problem.op == "grouped_matmul" else 1) if has_gradient else 0
    held = sum(case.tokens * width + (0 if one.is_dense else gradients) for one in implementations)
    most = max((computed_rows(one, problem) for one in implementations), default=0)
    hidden = most * case.expert_width if problem.op in EXPERT_MATMULS else 0
    return itemsize * (inputs + held + hidden) + 4 * case.tokens * case.experts


def device_bytes() -> int | None:
    """Get the memory of the device, on a CPU that of the machine; None if it is not known."""
    if jax.default_backend() == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def plan_run(
    problems: Sequence[Problem], implementations: Sequence[Implementation], repetitions: int, device: Device
) -> tuple[list[Problem], list[str]]:
    """Choose the problems that fit here, and describe the choice: those left out and why, their number, and the time.

    A run that only checks has 0 `repetitions`.
    """
    limit, lines, kept = device_bytes(), [], []
    beside = {problem: chosen(implementations, problem) for problem in problems}
    for problem in problems:
        needed = needed_bytes(problem, beside[problem])
        if limit is not None and needed > limit:
            case = f"{problem.case.name}, {problem.op} {problem.passes}, {problem.dtype}"
            lines.append(f"left out: {case} needs at least {needed / 1e9:.1f} GB of {limit / 1e9:.1f} GB")
        else:
            kept.append(problem)
    if kept and len(problems) > 1:
        total = sum(seconds(problem, beside[problem], repetitions, device) for problem in kept)
        lines.append(f"{len(kept)} problems, {_duration(total)} by a rough estimate")
    # A case that does not fit has the same reason in all distributions.
    return kept, list(dict.fromkeys(lines))


def with_rates(device: Device, dtypes: set[str]) -> Device:
    """Measure the rates of a device without a data sheet, which takes a second or two."""
    for dtype in sorted(dtypes - device.flops.keys()):
        beside = probes(dtype)
        if beside:
            time_programs(beside, 1)
            flops = device.flops
            device = with_probes(device, beside, dtype)
            device = dataclasses.replace(device, flops={**flops, **device.flops})
    return device


def computed_rows(implementation: Implementation, problem: Problem) -> int:
    """Count the rows that the matmuls compute with balanced experts; if that is not known, the useful rows."""
    case = problem.case
    wanted = np.full(case.experts, -(-case.tokens * case.choices // case.experts))
    kept = np.minimum(wanted, case.capacity * case.groups)
    setting = Setting(jax.default_backend(), jax.devices()[0].device_kind, problem.dtype)
    return implementation.computed_rows(case, Counts(kept, wanted), setting) or case.tokens * case.choices


# Matmuls with a one-hot tensor, forward and backward. Other operations have none.
_AROUND = {"dispatch": (1, 1), "combine": (1, 2), "layer": (2, 3)}


def _around_flops(implementation: Implementation, problem: Problem) -> float:
    """Count the FLOPs with a one-hot tensor: a matmul in each direction, and one more for the gates in combine."""
    if problem.op not in _AROUND:
        return 0.0
    forward, backward = _AROUND[problem.op]
    products = {"forward": forward, "backward": backward, "both": forward + backward}[problem.passes]
    return products * implementation.around_flops(problem.case)


def _duration(seconds: float) -> str:
    """Format a time in minutes or hours.

    >>> _duration(95), _duration(1500), _duration(200_000)
    ('2 minutes', '25 minutes', '56 hours')
    """
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.0f} hours"
