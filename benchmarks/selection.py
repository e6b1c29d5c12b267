"""Choose the problems of a run: suites, a choice by name, and sweeps."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

from benchmarks.cases import CASES, DISTRIBUTIONS, DTYPES, Case
from benchmarks.roofline import HALVES, OPS, PASSES, Op, Pass, Problem

MODELS = ("mixtral-8x7b", "qwen3-30b", "olmoe", "deepseek-v3-ep32")
"""Cases at the sizes of language models."""

Axis = Literal["tokens", "experts", "width"]
_SWEEP_STEPS = 4


def product(
    ops: Sequence[Op],
    passes: Sequence[Pass],
    cases: Sequence[str],
    distributions: Sequence[str],
    dtypes: Sequence[str],
) -> list[Problem]:
    """Make every combination, in an order that makes the arrays of a case once.

    A plan has only its forward pass, even if other passes are named. Only a grouped matmul has halves of a backward
    pass.
    """
    forward: Sequence[Pass] = ["forward"]
    return [
        Problem(op, a_pass, CASES[case], distribution, dtype)
        for case, dtype, distribution, op in itertools.product(cases, dtypes, distributions, ops)
        for a_pass in (forward if op == "plan" else passes)
        if has_pass(op, a_pass)
    ]


def has_pass(op: str, a_pass: str) -> bool:
    """Say whether an operation has a pass.

    >>> has_pass("layer", "both"), has_pass("layer", "dx"), has_pass("plan", "both")
    (True, False, False)
    """
    return a_pass == "forward" if op == "plan" else a_pass not in HALVES or op == "grouped_matmul"


def quick() -> list[Problem]:
    """Make the quick suite: the layer in both groupings, balanced and Zipf, and each operation.

    Every baseline runs at least once. ragged_dot takes about 35 times as long as dense on a CPU, so it runs only once.
    A baseline is left out of a problem where it would show nothing new.
    """
    others: list[Op] = [op for op in OPS if op != "layer"]
    problems = product(["layer"], ["both"], ["issue"], ["balanced"], ["float32"])
    problems += _without(("one-hot", "ragged_dot"), product(["layer"], ["both"], ["issue"], ["zipf"], ["float32"]))
    problems += _without(
        ("scatter", "ragged_dot"), product(["layer"], ["both"], ["issue-8groups"], ["balanced"], ["float32"])
    )
    around = product(others, ["both"], ["issue"], ["balanced"], ["float32"])
    problems += _without(("ragged_dot",), [p for p in around if p.op not in ("grouped_matmul", "expert_mlp")])
    matmuls = [problem for problem in around if problem.op in ("grouped_matmul", "expert_mlp")]
    return problems + _without(("one-hot", "scatter", "ragged_dot"), matmuls)


def _without(names: tuple[str, ...], problems: list[Problem]) -> list[Problem]:
    return [dataclasses.replace(problem, without=names) for problem in problems]


def cpu() -> list[Problem]:
    """Make a suite for tens of minutes on a CPU: everything on tiny, fewer distributions on issue, the layer on S/32.

    The slowest baselines, ragged_dot and one-hot in one large group, run only once on cases other than tiny.
    """
    passes: list[Pass] = ["forward", "backward", "both"]
    quickly = [p for p in quick() if p.op == "layer" and (p.case.name, p.distribution) == ("issue", "balanced")]
    problems = product(OPS, passes, ["tiny"], DISTRIBUTIONS, ["float32"]) + quickly
    slowest = ("one-hot", "ragged_dot")
    issue = product(OPS, passes, ["issue"], ["balanced", "zipf"], ["float32"])
    problems += _without(slowest, [problem for problem in issue if problem not in quickly])
    groups = product(["layer"], passes, ["issue-8groups"], ["balanced", "zipf"], ["float32"])
    problems += _without(("ragged_dot",), groups)
    s32 = product(["layer"], ["both"], ["s32", "s32-8groups"], ["balanced", "zipf"], ["float32"])
    return problems + _without(slowest, s32)


def gpu() -> list[Problem]:
    """Make the suite for GPUs in bfloat16: grouped matmuls first, at LIMoE's sizes and at the size of an LLM.

    It should fit into 8 minutes (not measured on an H200). V-MoE's two baselines share their batched matmul, so one of
    them is enough.
    """
    kinds = ["balanced"], ["bfloat16"]
    matmul: Sequence[Pass] = ["forward", *HALVES]
    around: list[Op] = ["routing", "plan"]
    moves: list[Op] = ["dispatch", "combine"]
    problems = _without(("scatter",), product(["grouped_matmul"], matmul, ["l16"], *kinds))
    problems += _without(("scatter", "one-hot"), product(["grouped_matmul"], matmul, ["llm-256x2048"], *kinds))
    problems += product(["layer"], ["forward", "both"], ["l16"], *kinds)
    problems += product(around, ["both"], ["l16"], *kinds)
    problems += product(moves, ["forward", "backward"], ["l16"], *kinds)
    problems += _without(("scatter", "one-hot"), product(["expert_mlp"], ["forward", "both"], ["l16"], *kinds))
    problems += _without(("scatter",), product(["layer"], ["both"], ["l16"], ["zipf"], ["bfloat16"]))
    for case in ("b16", "h14"):
        problems += _without(("scatter", "one-hot"), product(["grouped_matmul"], matmul, [case], *kinds))
        problems += _without(("scatter",), product(["layer"], ["both"], [case], *kinds))
    for case in MODELS:
        problems += _without(("scatter", "one-hot"), product(["layer"], ["forward", "both"], [case], *kinds))
        problems += _without(("scatter", "one-hot"), product(moves, ["forward"], [case], *kinds))
    return problems


def models() -> list[Problem]:
    """Make the layer at the sizes of language models, an eighth of each, for a CPU."""
    return product(["layer"], ["forward", "both"], [f"{case}-eighth" for case in MODELS], ["balanced"], ["float32"])


def full() -> list[Problem]:
    """Make the suite of everything that fits on one device."""
    return product(OPS, PASSES, [name for name in CASES if name != "llm-256x2048"], DISTRIBUTIONS, DTYPES)


SUITES = {"quick": quick, "cpu": cpu, "models": models, "gpu": gpu, "full": full}


def sweep(axis: Axis, case: Case) -> list[Case]:
    """Double one axis up to the case itself. F grows with the width.

    >>> [case.tokens for case in sweep("tokens", CASES["issue"])]
    [512, 1024, 2048, 4096]
    """
    cases = []
    for step in reversed(range(_SWEEP_STEPS)):
        change = {axis: getattr(case, axis) >> step}
        if axis == "width":
            change["expert_width"] = case.expert_width >> step
        if change[axis] < (case.choices if axis == "experts" else case.groups if axis == "tokens" else 1):
            continue
        cases.append(dataclasses.replace(case, name=f"{case.name}, {axis} {change[axis]}", **change))
    return cases
