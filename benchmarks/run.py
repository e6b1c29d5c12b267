"""Run a selection: for every problem all implementations side by side, checked, then timed in turns."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from benchmarks import oracle, oracle_weights
from benchmarks.cases import Case, make_inputs, small_twin
from benchmarks.implementations import OURS, Counts, Implementation, Setting
from benchmarks.jobs import Job, Prepared, make_job, prepare
from benchmarks.peers import PEERS
from benchmarks.results import Label, Result, make_result
from benchmarks.roofline import EXPERT_MATMULS, Device, Load, Op, Pass, needed_bytes, probes, with_probes, work
from benchmarks.timing import Program, caught, compile_program, time_programs

IMPLEMENTATIONS = {implementation.name: implementation for implementation in (*OURS, *PEERS)}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything but the implementation."""

    op: Op
    passes: Pass
    case: Case
    distribution: str
    dtype: str
    without: tuple[str, ...] = ()
    """Implementations that a suite leaves out here to save time."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How to run."""

    implementations: tuple[Implementation, ...]
    repetitions: int
    check_only: bool = False
    note: Callable[[str], None] = print
    """Told which implementation was left out, and why."""


class _Ready(NamedTuple):
    job: Job
    prepared: Prepared
    program: Program


def run_problem(problem: Problem, options: Options, device: Device) -> Iterator[Result]:
    """Check and time all implementations of a problem. A wrong one is reported and not timed.

    Interrupted by Ctrl-C it gives what has been timed, and then raises KeyboardInterrupt.
    """
    case, dtype = problem.case, problem.dtype
    programs: dict[str, Program | None] = {}
    faults: dict[str, str | None] = {}
    for implementation in options.implementations:
        reason = implementation.why_not(case, dtype, jax.default_backend())
        if reason and concerns(implementation, problem):
            options.note(f"{implementation.name} left out of {case.name}, {dtype}: {reason}")
    implementations = chosen(options.implementations, problem)
    for implementation in implementations:
        programs[implementation.name], faults[implementation.name] = _compile_and_check(implementation, problem)

    # A wrong result is never timed.
    right = [program for name, program in programs.items() if program is not None and faults[name] is None]
    beside = [] if options.check_only else probes(dtype)
    interrupted = False
    try:
        if right and not options.check_only:
            time_programs([*right, *beside], options.repetitions, batched=jax.default_backend() != "cpu")
    except KeyboardInterrupt:
        caught()
        interrupted = True
    device = with_probes(device, beside, dtype)
    load = full_truth(case, problem.distribution, dtype).load
    for implementation in implementations:
        name = implementation.name
        if not interrupted or any(p.name == name and p.seconds for p in right):
            yield _result(implementation, problem, programs[name], programs, load, device, faults[name])
    if interrupted:
        raise KeyboardInterrupt


def concerns(implementation: Implementation, problem: Problem) -> bool:
    """Whether an implementation has the operation, and the suite does not leave it out."""
    return problem.op in implementation.operations and implementation.name not in problem.without


def chosen(implementations: Sequence[Implementation], problem: Problem) -> list[Implementation]:
    """Those that can run a problem here."""
    platform = jax.default_backend()
    return [
        one
        for one in implementations
        if concerns(one, problem) and one.why_not(problem.case, problem.dtype, platform) is None
    ]


# The last arrays are kept, since the next problem often differs in operation or pass only.
@functools.lru_cache(maxsize=1)
def full_truth(case: Case, distribution: str, dtype: str) -> oracle.Truth:
    """Inputs of a case, and its routing by the reference."""
    return oracle.find_truth(case, make_inputs(case, distribution, dtype))


@functools.lru_cache(maxsize=64)
def _small_truth(case: Case, distribution: str, dtype: str) -> oracle.Truth:
    return oracle.find_truth(case, make_inputs(case, distribution, dtype))


@functools.lru_cache(maxsize=64)
def _expected(op: Op, case: Case, distribution: str, dtype: str, is_dense: bool) -> oracle.Expected:
    """All of a small twin."""
    return oracle.expect(op, _small_truth(case, distribution, dtype), is_dense=is_dense)


@functools.lru_cache(maxsize=16)
def _expected_sample(op: Op, case: Case, distribution: str, dtype: str, is_dense: bool) -> oracle.Expected:
    """Sampled tokens of the full size."""
    truth = full_truth(case, distribution, dtype)
    return oracle.expect(op, truth, oracle.sample_tokens(truth), is_dense=is_dense)


@functools.lru_cache(maxsize=4)
def _expected_weights(
    op: Op, case: Case, distribution: str, dtype: str, is_dense: bool
) -> list[oracle_weights.ExpertGradient]:
    return oracle_weights.expect_weights(op, full_truth(case, distribution, dtype), is_dense=is_dense)


@functools.lru_cache(maxsize=256)
def _small_program(implementation: Implementation, op: Op, case: Case, dtype: str) -> Program:
    """Compiled once for all distributions, which differ in values only."""
    return _get_ready(implementation, op, _all_passes(op), _small_truth(case, "balanced", dtype), dtype).program


def _all_passes(op: Op) -> Pass:
    return "forward" if op == "plan" else "both"


def _get_ready(implementation: Implementation, op: Op, passes: Pass, truth: oracle.Truth, dtype: str) -> _Ready:
    job = make_job(op, implementation, truth.case, truth.inputs, truth.routing.gate)
    prepared = prepare(job, passes)
    return _Ready(job, prepared, compile_program(implementation.name, prepared.call, prepared.arguments, dtype))


def _compile_and_check(implementation: Implementation, problem: Problem) -> tuple[Program | None, str | None]:
    """The program at full size (None where the small twin is wrong already), and what is wrong."""
    op, case, distribution, dtype = problem.op, problem.case, problem.distribution, problem.dtype
    # A baseline that fails to compile or runs out of memory must not end the run: it is reported as wrong.
    try:
        if fault := _fault_when_small(implementation, problem):
            return None, fault
        truth = full_truth(case, distribution, dtype)
        job, prepared, program = _get_ready(implementation, op, problem.passes, truth, dtype)
        program.warm_up = program.run()
        expected = _expected_sample(op, case, distribution, dtype, implementation.is_dense)
        answer = prepared.answer(program.last)
        if fault := oracle.find_fault(answer, expected, case, dtype, job.result):
            return program, f"{fault}, for sampled tokens"
        weights = _expected_weights(op, case, distribution, dtype, implementation.is_dense)
        return program, oracle_weights.find_weight_fault(answer, weights, case, dtype)
    except Exception as error:
        return None, f"raises {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _fault_when_small(implementation: Implementation, problem: Problem) -> str | None:
    """Compare everything on the small twin: results and, where there are any, all gradients."""
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
    load: Load,
    device: Device,
    fault: str | None,
) -> Result:
    case, itemsize = problem.case, 4 if problem.dtype == "float32" else 2
    truth = full_truth(case, problem.distribution, problem.dtype)
    setting = Setting(jax.default_backend(), jax.devices()[0].device_kind, problem.dtype)
    wanted = np.bincount(truth.routing.expert.reshape(-1), minlength=case.experts)
    computed = implementation.computed_rows(case, Counts(truth.plan.size, wanted), setting)
    op = problem.op
    if implementation.is_dense:
        load = Load(case.tokens * case.choices, 1)
        op = "expert_mlp" if op == "layer" else op
    return make_result(
        Label(problem.op, problem.passes, case.name, problem.distribution, problem.dtype, implementation.name),
        program,
        beside,
        work(op, problem.passes, case, load, itemsize),
        device,
        useful_rows=load.rows / computed if computed is not None and op in EXPERT_MATMULS else None,
        needed_bytes=None if computed is None or implementation.is_dense else needed_bytes(case, computed, itemsize),
        fault=fault,
    )
