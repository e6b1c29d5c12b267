"""What the dispatch benchmark does for a GPU, as far as it shows without one: its suite, timings, halves, baselines."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import peers, selection, summary, timing
from benchmarks.cases import CASES, small_twin
from benchmarks.implementations import Counts, Setting
from benchmarks.roofline import HALVES, Device, Load, work
from benchmarks.run import IMPLEMENTATIONS, Options, Problem, run_problem
from moe_kernels.backends.base import Problem as KernelProblem
from moe_kernels.backends.gpu import GPU
from moe_kernels.types import Layout

H200 = "NVIDIA H200"
DEVICE = Device("test", {"float32": 1e11}, 1e10, "given")


def test_the_suite_holds_the_matmuls_of_the_targets_and_every_operation():
    problems = selection.gpu()
    matmuls = {(p.case.name, p.passes) for p in problems if p.op == "grouped_matmul"}
    assert matmuls == {
        (case, passes) for case in ("b16", "l16", "h14", "llm-256x2048") for passes in ("forward", *HALVES)
    }
    assert {p.op for p in problems} == set(IMPLEMENTATIONS["moe_kernels/gpu"].operations)
    assert {p.dtype for p in problems} == {"bfloat16"}
    for op in ("dispatch", "combine"):
        assert {p.passes for p in problems if p.op == op and p.case.name == "l16"} == {"forward", "backward"}
        assert {p.case.name for p in problems if p.op == op} == {"l16", *selection.MODELS}
    assert {p.case.name for p in problems if p.op == "layer"} >= set(selection.MODELS)
    llm = CASES["llm-256x2048"]
    assert (llm.tokens, llm.width, llm.experts, llm.expert_width) == (262_144, 7_168, 256, 2_048)


@pytest.mark.parametrize("name", sorted({problem.case.name for problem in selection.gpu()}))
def test_the_kernels_take_every_case_and_its_small_twin(name):
    for case in (CASES[name], small_twin(CASES[name], narrow=False)):
        rows = -(-case.tokens // 8) * 8 + 8 * case.experts
        layout = Layout(case.tokens, case.choices, case.groups, case.experts, rows, None)
        problem = KernelProblem(
            "expert_mlp", "gpu", "bfloat16", (rows, case.width), case.experts, case.expert_width, layout, H200, 132
        )
        for span in ("expert_mlp", "grouped_matmul", "dispatch", "combine"):
            assert GPU.why_not(dataclasses.replace(problem, span=span)) is None


def test_halves_of_a_backward_pass_are_checked_and_counted():
    case = dataclasses.replace(small_twin(CASES["l16"]), name="case")
    chosen = IMPLEMENTATIONS["moe_kernels/xla"], IMPLEMENTATIONS["dense"]
    results = {
        passes: list(
            run_problem(Problem("grouped_matmul", passes, case, "balanced", "float32"), Options(chosen, 2), DEVICE)
        )
        for passes in ("forward", *HALVES)
    }
    for lines in results.values():
        assert [line.correct for line in lines] == [True, True] and all(line.ms_median for line in lines)
    (text,) = summary.of_dense_matmul([line for lines in results.values() for line in lines], "moe_kernels/xla")
    assert all(f"{passes} " in text for passes in results) and "target: at least 65%" in text
    load = Load(case.tokens, case.experts)
    halves = [work("grouped_matmul", passes, case, load, 2).flops for passes in HALVES]
    assert sum(halves) == work("grouped_matmul", "backward", case, load, 2).flops


def test_a_half_computes_only_itself():
    case = dataclasses.replace(small_twin(CASES["l16"], narrow=False), name="case")
    from benchmarks.jobs import make_job, prepare
    from benchmarks.run import full_truth

    truth = full_truth(case, "balanced", "float32")
    job = make_job("grouped_matmul", IMPLEMENTATIONS["dense"], case, truth.inputs, truth.routing.gate)
    flops = {}
    for passes in ("backward", *HALVES):
        prepared = prepare(job, passes)
        cost = jax.jit(prepared.call).lower(*prepared.arguments).compile().cost_analysis()
        flops[passes] = cost["flops"]
    assert flops["dx"] + flops["dw"] == pytest.approx(flops["backward"], rel=0.01)
    assert flops["dx"] == pytest.approx(flops["dw"], rel=0.01)


def test_a_timing_on_an_accelerator_rotates_what_it_reads(monkeypatch):
    monkeypatch.setattr(timing, "WARM_SECONDS", 0.0)
    monkeypatch.setattr(timing, "ROTATED_BYTES", 1 << 20)
    program = timing.compile_program("x", lambda a, b: a + b, (jnp.ones(1 << 14), jnp.ones(1 << 14)), "float32")
    timing.time_programs([program], 2, batched=True)
    # Two arrays of 64 KiB: eight more sets are a mebibyte, and a timing goes through all of them.
    assert len(program.copies) == 8 and 9 <= program.calls <= 200
    buffers = {leaf.unsafe_buffer_pointer() for each in (program.arguments, *program.copies) for leaf in each}
    assert len(buffers) == 18
    assert len(program.seconds) == 2 and np.array_equal(program.last, np.full(1 << 14, 2.0))


def test_rows_that_kernels_compute_are_counted_by_their_tiles():
    case, kept = CASES["l16"], np.array([1, 128, 129, *[0] * 29])
    counts = Counts(kept, kept)
    ours = IMPLEMENTATIONS["moe_kernels/gpu"].computed_rows
    assert ours(case, counts, Setting("gpu", H200, "bfloat16")) == 128 + 128 + 256
    chosen = IMPLEMENTATIONS["moe_kernels/tpu"].computed_rows(case, counts, Setting("tpu", "TPU v5 lite", "bfloat16"))
    assert kept.sum() <= chosen < 1.2 * kept.sum()
    # One, one and two tiles, and the third of them again for each run that ends or begins in it.
    assert IMPLEMENTATIONS["megablox"].computed_rows(case, counts, Setting("tpu", "TPU v5 lite", "bfloat16")) == 128 * 5


def test_jaxs_own_kernel_is_a_baseline_with_both_gradients(monkeypatch):
    # It asks the device for its multiprocessors while it is traced.
    monkeypatch.setattr(jax, "devices", lambda *_: [types.SimpleNamespace(core_count=132, device_kind="cpu")])
    rows, weight = jnp.ones((256, 128), jnp.bfloat16), jnp.ones((4, 128, 256), jnp.bfloat16)
    sizes = jnp.array([64, 0, 128, 64], jnp.int32)

    def loss(rows: jax.Array, weight: jax.Array) -> jax.Array:
        return peers.mosaic_matmul(rows, weight, sizes).astype(jnp.float32).sum()

    shapes = jax.eval_shape(jax.grad(loss, (0, 1)), rows, weight)
    assert [shape.shape for shape in shapes] == [(256, 128), (4, 128, 256)]
    assert "is for Hopper GPUs, not for cpu" in (
        IMPLEMENTATIONS["mosaic"].why_not(CASES["l16"], "bfloat16", "cpu") or ""
    )
