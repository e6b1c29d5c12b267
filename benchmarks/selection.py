"""Which problems a run goes through: the suites, a choice by name, and sweeps."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

from benchmarks.cases import CASES, DISTRIBUTIONS, DTYPES, Case
from benchmarks.roofline import HALVES, OPS, PASSES, Op, Pass
from benchmarks.run import Problem

Axis = Literal["tokens", "experts", "width"]
_SWEEP_STEPS = 4


def product(
    ops: Sequence[Op],
    passes: Sequence[Pass],
    cases: Sequence[str],
    distributions: Sequence[str],
    dtypes: Sequence[str],
) -> list[Problem]:
    """Every combination, in an order that draws the arrays of a case once.

    The plan has a forward pass only, whatever is asked for; halves of the backward pass are for the grouped matmul.
    """
    forward: Sequence[Pass] = ["forward"]
    return [
        Problem(op, a_pass, CASES[case], distribution, dtype)
        for case, dtype, distribution, op in itertools.product(cases, dtypes, distributions, ops)
        for a_pass in (forward if op == "plan" else passes)
        if has_pass(op, a_pass)
    ]


def has_pass(op: str, a_pass: str) -> bool:
    """Whether an operation has a pass: a plan only forward, halves of a backward pass only the grouped matmul.

    >>> has_pass("layer", "both"), has_pass("layer", "dx"), has_pass("plan", "both")
    (True, False, False)
    """
    return a_pass == "forward" if op == "plan" else a_pass not in HALVES or op == "grouped_matmul"


def quick() -> list[Problem]:
    """The layer in both groupings, balanced and Zipf, and each of its operations; every baseline at least once.

    ragged_dot takes some 35 times as long as dense on a CPU, so it runs once; where a baseline would repeat what
    another line says, it is left out.
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
    """What a CPU runs in tens of minutes: everything on tiny; on issue what one distribution shows; the layer on S/32.

    The slowest baselines, ragged_dot and one-hot in one large group, run once beyond tiny, in the layer.
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
    """What matters on a GPU, the grouped matmul first: in bfloat16, at LIMoE's sizes and at one of today's LLMs.

    Made to fit into 8 minutes (on an H200: not measured). Batched einsums of V-MoE's ways are one matmul in all.
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
    return problems


def full() -> list[Problem]:
    """Everything that one device holds."""
    return product(OPS, PASSES, [name for name in CASES if name != "llm-256x2048"], DISTRIBUTIONS, DTYPES)


SUITES = {"quick": quick, "cpu": cpu, "gpu": gpu, "full": full}


def sweep(axis: Axis, case: Case) -> list[Case]:
    """Doublings of one axis that end at the case itself; F grows with the width.

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
