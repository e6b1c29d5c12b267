"""Check all implementations on a problem, then time them in turns."""

import dataclasses
import datetime
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import oracle, oracle_weights
from benchmarks.cases import Case, make_inputs, small_twin
from benchmarks.implementations import OURS, Counts, Implementation, Setting
from benchmarks.jobs import Job, Prepared, make_job, prepare
from benchmarks.peers import PEERS
from benchmarks.results import Result, commit, versions
from benchmarks.roofline import (
    EXPERT_MATMULS,
    Device,
    Load,
    Op,
    Pass,
    Problem,
    needed_bytes,
    percent,
    probes,
    with_probes,
    work,
)
from benchmarks.timing import Program, caught, compile_program, paired_ratio, time_programs

IMPLEMENTATIONS = {implementation.name: implementation for implementation in (*OURS, *PEERS)}


@dataclasses.dataclass(frozen=True)
class Options:
    """How to run a problem."""

    implementations: tuple[Implementation, ...]
    repetitions: int
    check_only: bool = False
    note: Callable[[str], None] = print
    """Called with the reason for each implementation that is left out."""


class _Ready(NamedTuple):
    job: Job
    prepared: Prepared
    program: Program


def run_problem(problem: Problem, options: Options, device: Device) -> Iterator[Result]:
    """Check and time all implementations of a problem. A wrong one is reported but never timed.

    After Ctrl-C it yields what was timed, and then raises KeyboardInterrupt.
    """
    case, dtype = problem.case, problem.dtype
    for implementation in options.implementations:
        reason = implementation.why_not(case, dtype, jax.default_backend())
        if reason and concerns(implementation, problem):
            options.note(f"{implementation.name} left out of {case.name}, {dtype}: {reason}")
    implementations = chosen(options.implementations, problem)
    checked = {one.name: _compile_and_check(one, problem) for one in implementations}
    right = [program for program, fault in checked.values() if program is not None and fault is None]
    beside = [] if options.check_only else probes(dtype)
    interrupted = False
    try:
        if right and not options.check_only:
            time_programs([*right, *beside], options.repetitions, batched=jax.default_backend() != "cpu")
    except KeyboardInterrupt:
        caught()
        interrupted = True
    device = with_probes(device, beside, dtype)
    programs = {name: program for name, (program, _) in checked.items()}
    for implementation in implementations:
        program, fault = checked[implementation.name]
        if not interrupted or (program is not None and program.seconds):
            yield _result(implementation, problem, program, programs, device, fault)
    if interrupted:
        raise KeyboardInterrupt


def concerns(implementation: Implementation, problem: Problem) -> bool:
    """Say whether an implementation has the operation and the suite does not leave it out."""
    return problem.op in implementation.operations and implementation.name not in problem.without


def chosen(implementations: Sequence[Implementation], problem: Problem) -> list[Implementation]:
    """List the implementations that can run a problem here."""
    platform = jax.default_backend()
    return [
        one
        for one in implementations
        if concerns(one, problem) and one.why_not(problem.case, problem.dtype, platform) is None
    ]


def _truth(case: Case, distribution: str, dtype: str) -> oracle.Truth:
    return oracle.find_truth(case, make_inputs(case, distribution, dtype))


full_truth = functools.lru_cache(maxsize=1)(_truth)
"""Makes the inputs of a case and its routing by the reference. Keeps the last, because the next problem often differs
only in operation or pass."""
_small_truth = functools.lru_cache(maxsize=64)(_truth)


@functools.lru_cache(maxsize=64)
def _expected(op: Op, case: Case, distribution: str, dtype: str, is_dense: bool) -> oracle.Expected:
    """Compute all values and gradients of a small twin."""
    return oracle.expect(op, _small_truth(case, distribution, dtype), is_dense=is_dense)


class _Sample(NamedTuple):
    """What is compared at the full size: sampled tokens, and weight gradients of some experts."""

    tokens: oracle.Expected
    weights: list[oracle_weights.ExpertGradient]


@functools.lru_cache(maxsize=4)
def _expected_sample(op: Op, case: Case, distribution: str, dtype: str, is_dense: bool) -> _Sample:
    truth = full_truth(case, distribution, dtype)
    tokens = oracle.expect(op, truth, oracle.sample_tokens(truth), is_dense=is_dense)
    return _Sample(tokens, oracle_weights.expect_weights(op, truth, is_dense=is_dense))


@functools.lru_cache(maxsize=256)
def _small_program(implementation: Implementation, op: Op, case: Case, dtype: str) -> Program:
    """Compile once for all distributions, which differ only in values."""
    return _get_ready(implementation, op, _all_passes(op), _small_truth(case, "balanced", dtype), dtype).program


def _all_passes(op: Op) -> Pass:
    return "forward" if op == "plan" else "both"


def _get_ready(implementation: Implementation, op: Op, passes: Pass, truth: oracle.Truth, dtype: str) -> _Ready:
    job = make_job(op, implementation, truth.case, truth.inputs, truth.routing.gate)
    prepared = prepare(job, passes)
    return _Ready(job, prepared, compile_program(implementation.name, prepared.call, prepared.arguments, dtype))


def _compile_and_check(implementation: Implementation, problem: Problem) -> tuple[Program | None, str | None]:
    """Make the program of the full size (None if the small twin is wrong), and describe the first fault."""
    op, case, distribution, dtype = problem.op, problem.case, problem.distribution, problem.dtype
    # A baseline that fails to compile or runs out of memory is reported as wrong and does not end the run.
    try:
        if fault := _fault_when_small(implementation, problem):
            return None, fault
        truth = full_truth(case, distribution, dtype)
        job, prepared, program = _get_ready(implementation, op, problem.passes, truth, dtype)
        program.warm_up = program.run()
        expected = _expected_sample(op, case, distribution, dtype, implementation.is_dense)
        answer = prepared.answer(program.last)
        if fault := oracle.find_fault(answer, expected.tokens, case, dtype, job.result):
            return program, f"{fault}, for sampled tokens"
        return program, oracle_weights.find_weight_fault(answer, expected.weights, case, dtype)
    except Exception as error:
        return None, f"raises {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _fault_when_small(implementation: Implementation, problem: Problem) -> str | None:
    """Compare the results and all gradients on the small twin."""
    op, distribution, dtype = problem.op, problem.distribution, problem.dtype
    twin = small_twin(problem.case, narrow=jax.default_backend() == "cpu")
    truth = _small_truth(twin, distribution, dtype)
    job = make_job(op, implementation, twin, truth.inputs, truth.routing.gate)
    prepared = prepare(job, _all_passes(op))
    program = _small_program(implementation, op, twin, dtype)
    program.arguments = prepared.arguments
    program.run()
    expected = _expected(op, twin, distribution, dtype, implementation.is_dense)
    fault = oracle.find_fault(prepared.answer(program.last), expected, twin, dtype, job.result)
    return fault and f"{fault}, on the small twin"


def _result(
    implementation: Implementation,
    problem: Problem,
    program: Program | None,
    beside: Mapping[str, Program | None],
    device: Device,
    fault: str | None,
) -> Result:
    """Sum up the repetitions of a program; None if a fault was found before it was compiled at the full size.

    `beside` has the programs that ran in turns with it, by implementation.
    """
    op, case, dtype = problem.op, problem.case, problem.dtype
    itemsize, truth = jnp.dtype(dtype).itemsize, full_truth(case, problem.distribution, dtype)
    wanted = np.bincount(truth.routing.expert.reshape(-1), minlength=case.experts)
    setting = Setting(jax.default_backend(), jax.devices()[0].device_kind, dtype)
    computed = implementation.computed_rows(case, Counts(truth.plan.size, wanted), setting)
    load, defined = truth.load, op
    if implementation.is_dense:
        load, defined = Load(case.tokens * case.choices, 1), "expert_mlp" if op == "layer" else op
    useful = work(defined, problem.passes, case, load, itemsize)

    rounds = {} if program is None else program.seconds
    seconds = [*rounds.values()]
    median, p10, p90 = (float(np.quantile(seconds, share)) if seconds else None for share in (0.5, 0.1, 0.9))
    paired = {name: paired_ratio(rounds, other.seconds) for name, other in beside.items() if other is not None}
    ratios = {name: ratio for name, ratio in paired.items() if ratio is not None}
    return Result(
        op=op,
        passes=problem.passes,
        case=case.name,
        distribution=problem.distribution,
        dtype=dtype,
        implementation=implementation.name,
        device=device.name,
        ms_median=median and 1e3 * median,
        ms_p10=p10 and 1e3 * p10,
        ms_p90=p90 and 1e3 * p90,
        tflops=median and useful.flops / median / 1e12,
        gbytes_per_s=median and useful.bytes / median / 1e9,
        roofline_percent=median and percent(useful, median, device, dtype),
        useful_rows=load.rows / computed if computed is not None and op in EXPERT_MATMULS else None,
        temp_bytes=program and program.temp_bytes,
        compile_seconds=program and program.compile_seconds,
        ratio_to_dense=ratios.get("dense"),
        ratios=ratios,
        correct=fault is None,
        fault=fault or "",
        versions=versions(),
        commit=commit(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        peak_bytes=program and program.peak_bytes,
        needed_bytes=None if computed is None or implementation.is_dense else needed_bytes(case, computed, itemsize),
    )
