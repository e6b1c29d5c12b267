"""What a run will take before it runs: memory that its arrays need at least, and a rough guess of its time."""

import dataclasses
import os
from collections.abc import Sequence

import jax
import numpy as np

from benchmarks.cases import Case
from benchmarks.implementations import Counts, Implementation, Setting
from benchmarks.roofline import EXPERT_MATMULS, HALVES, Device, Load, Op, Pass, probes, with_probes, work
from benchmarks.run import Problem, chosen
from benchmarks.timing import SLOW_SECONDS, time_programs

# Programs here reach about half of their roofline. Each is also compiled and checked, at the full size and in small.
_SHARE_OF_ROOFLINE, _SECONDS_A_PROGRAM = 0.5, 2.0


def seconds(problem: Problem, implementations: Sequence[Implementation], repetitions: int, device: Device) -> float:
    """An estimate: work by definition at the device's rates, more where an implementation computes more rows."""
    total = 0.0
    rows, itemsize = problem.case.tokens * problem.case.choices, _itemsize(problem.dtype)
    load = Load(rows, problem.case.experts)
    useful = work(problem.op, problem.passes, problem.case, load, itemsize)
    for implementation in implementations:
        more = computed_rows(implementation, problem) / rows if problem.op in EXPERT_MATMULS else 1.0
        flops = useful.flops * more + _around_flops(implementation, problem.op, problem.passes, problem.case)
        # Without known peaks, only what is the same everywhere counts.
        rate = device.flops.get(problem.dtype, float("inf"))
        once = max(flops / rate, useful.bytes / device.bandwidth) / _SHARE_OF_ROOFLINE
        total += _SECONDS_A_PROGRAM + once * (1 + (1 if once > SLOW_SECONDS else repetitions))
    return total


def needed_bytes(problem: Problem, implementations: Sequence[Implementation]) -> int:
    """The least that must be held at once: the inputs, every program's results, and hidden rows of the largest one."""
    case, itemsize = problem.case, _itemsize(problem.dtype)
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
    """Memory of the device, on a CPU that of the machine; None if nobody says."""
    if jax.default_backend() == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def plan_run(
    problems: Sequence[Problem], implementations: Sequence[Implementation], repetitions: int, device: Device
) -> tuple[list[Problem], list[str]]:
    """The problems that can be run here, and what to say of them: why others are left out, their number, and the time.

    `repetitions` of 0 is for a run that only checks.
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
    # A case that does not fit is left out for the same reason in all distributions.
    return kept, list(dict.fromkeys(lines))


def with_rates(device: Device, dtypes: set[str]) -> Device:
    """The device with its rates measured, in a second or two, where no data sheet has them."""
    for dtype in sorted(dtypes - device.flops.keys()):
        beside = probes(dtype)
        if beside:
            time_programs(beside, 1)
            flops = device.flops
            device = with_probes(device, beside, dtype)
            device = dataclasses.replace(device, flops={**flops, **device.flops})
    return device


def computed_rows(implementation: Implementation, problem: Problem) -> int:
    """Rows that the matmuls go through if the experts are balanced; the useful ones where nobody knows."""
    case = problem.case
    wanted = np.full(case.experts, -(-case.tokens * case.choices // case.experts))
    kept = np.minimum(wanted, case.capacity * case.groups)
    setting = Setting(jax.default_backend(), jax.devices()[0].device_kind, problem.dtype)
    return implementation.computed_rows(case, Counts(kept, wanted), setting) or case.tokens * case.choices


def _around_flops(implementation: Implementation, op: Op, passes: Pass, case: Case) -> float:
    """Of products with a one-hot tensor: one for the tokens each way, and in combine one more for the gates."""
    forward = {"dispatch": 1, "combine": 1, "layer": 2}.get(op, 0)
    backward = {"dispatch": 1, "combine": 2, "layer": 3}.get(op, 0)
    products = {"forward": forward, "backward": backward, "both": forward + backward}.get(passes, 0)
    return products * implementation.around_flops(case)


def _itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _duration(seconds: float) -> str:
    """A time that a person reads.

    >>> _duration(95), _duration(1500), _duration(200_000)
    ('2 minutes', '25 minutes', '56 hours')
    """
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.0f} hours"
