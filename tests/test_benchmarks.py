"""The dispatch benchmark: every baseline is right, a wrong one is found and not timed, what it writes is complete."""

import contextlib
import dataclasses
import doctest
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_cases import assert_close

from benchmarks import cases, estimate, gated, markdown, oracle, peers, roofline, rounding, selection, summary, timing
from benchmarks.cases import CASES, DISTRIBUTIONS, Case, draw_experts, make_inputs, small_twin
from benchmarks.plot import save_plot
from benchmarks.roofline import OPS, Device, Load, work
from benchmarks.run import IMPLEMENTATIONS, Options, Problem, run_problem

ROOT = Path(__file__).resolve().parents[1]
DEVICE = Device("test", {"float32": 1e11, "bfloat16": 1e11}, 1e10, "given")
SMALL = dataclasses.replace(small_twin(CASES["issue"]), name="case")
# Two choices, two groups, expert widths that are no multiple of anything.
ODD = Case("odd", 60, 2, 9, 21, 5, 2, 1.1)
RUNNABLE = [name for name, peer in IMPLEMENTATIONS.items() if peer.why_not(SMALL, "float32", "cpu") is None]
FIELDS = {
    *("op", "pass", "case", "distribution", "dtype", "implementation", "device", "ms_median", "ms_p10", "ms_p90"),
    *("tflops", "gbytes_per_s", "roofline_percent", "useful_rows", "temp_bytes", "compile_seconds", "ratio_to_dense"),
    *("ratios", "correct", "fault", "versions", "commit", "date"),
}


def run(problem: Problem, *implementations, check_only: bool = False) -> list:
    chosen = implementations or tuple(IMPLEMENTATIONS[name] for name in RUNNABLE)
    return list(run_problem(problem, Options(chosen, 2, check_only, lambda text: None), DEVICE))


ABLE = [(op, name) for op in OPS for name in RUNNABLE if op in IMPLEMENTATIONS[name].operations]


def test_every_operation_has_an_implementation_that_runs_here():
    assert {op for op, _ in ABLE} == set(OPS) and {name for _, name in ABLE} == set(RUNNABLE)


@pytest.mark.parametrize(("op", "name"), ABLE)
def test_every_implementation_agrees_with_the_reference(op, name):
    # Gradients too: the small twin is always compared in full.
    problem = Problem(op, "forward", ODD, "zipf", "float32")
    (result,) = run(problem, IMPLEMENTATIONS[name], check_only=True)
    assert result.correct, result.fault


def test_gated_experts_are_compared_with_float64_and_run_beside_a_dense_gated_mlp():
    for made in (gated.layer_of, gated.dense_of):
        out, (dtokens, *_) = made(Case("small", 64, 1, 8, 16, 4, 2, None)).last
        assert out.shape[1] == dtokens.shape[1] == 8


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_layer_in_other_passes_dtypes_and_distributions(name):
    problems = [
        Problem("layer", "backward", SMALL, "empty", "float32"),
        Problem("layer", "forward", ODD, "hot", "bfloat16"),
    ]
    for problem in problems:
        (result,) = run(problem, IMPLEMENTATIONS[name], check_only=True)
        assert result.correct, result.fault


def test_megablox_agrees_in_the_interpreter():
    rng = np.random.default_rng(0)
    rows, weight = rng.normal(size=(30, 8)).astype(np.float32), rng.normal(size=(3, 8, 24)).astype(np.float32)
    sizes = np.array([7, 0, 23], np.int32)
    d_out = rng.normal(size=(30, 24)).astype(np.float32)
    mine, pull = jax.vjp(
        lambda r, w: peers.megablox_matmul(r, w, jnp.asarray(sizes), interpret=True),
        jnp.asarray(rows),
        jnp.asarray(weight),
    )
    d_rows, d_weight = pull(jnp.asarray(d_out))
    empty = np.zeros((1, 8)), np.zeros((1, 24))

    def exact(r, w, d):
        out = np.concatenate([r[:7] @ w[0], r[7:] @ w[2]])
        back = np.concatenate([d[:7] @ w[0].T, d[7:] @ w[2].T])
        return out, back, np.stack([x.T @ y for x, y in ((r[:7], d[:7]), empty, (r[7:], d[7:]))])

    wide = [array.astype(np.float64) for array in (rows, weight, d_out)]
    lengths = {"out": 8, "drows": 24, "dweight": 23}
    for (name, length), found, expected, scale in zip(
        lengths.items(), (mine, d_rows, d_weight), exact(*wide), exact(*map(np.abs, wide)), strict=True
    ):
        assert_close(found, expected, length=length, name=name, roundings=1, scale=scale)


def spoil(implementation, op: str, change):
    """The implementation with one operation that is wrong."""
    right = implementation.operations[op]
    operations = {**implementation.operations, op: lambda case, *arguments: change(right(case, *arguments), arguments)}
    return dataclasses.replace(implementation, name="spoilt", operations=operations)


def spoil_smallest_row(out, arguments):
    """The one of the smallest norm that is not 0; in bfloat16 its error is some 1% of the largest entry."""
    size = jnp.abs(out).sum(axis=1)
    return out.at[jnp.where(size > 0, size, jnp.inf).argmin()].multiply(1.125)


WRONG = {
    ("some rows", "float32"): lambda out, arguments: out.at[::5].multiply(1.01),
    ("a dropped token's zero", "float32"): lambda out, arguments: jnp.where(out == 0, 1e-7, out),
    ("not a number", "float32"): lambda out, arguments: out.at[0, 0].set(jnp.nan),
    ("the gradient only", "float32"): lambda out, arguments: out + (arguments[0] - jax.lax.stop_gradient(arguments[0])),
    ("a bias of 1%", "bfloat16"): lambda out, arguments: out * 1.01,
    ("a small row", "bfloat16"): spoil_smallest_row,
}


@pytest.mark.parametrize(("dtype", "change"), [(key[1], change) for key, change in WRONG.items()], ids=map(str, WRONG))
def test_a_wrong_result_is_reported_and_not_timed(dtype, change):
    ours, dense = IMPLEMENTATIONS["moe_kernels/xla"], IMPLEMENTATIONS["dense"]
    wrong, right = run(Problem("layer", "both", SMALL, "hot", dtype), spoil(ours, "layer", change), dense)
    assert not wrong.correct and wrong.ms_median is None and wrong.ratio_to_dense is None
    assert wrong.fault and json.loads(wrong.to_json())["fault"] == wrong.fault
    assert right.correct and right.ms_median > 0


def test_a_row_is_held_to_its_own_size():
    exact = np.random.default_rng(0).normal(size=(64, 8)) * np.array([1e-3, *[1] * 63])[:, None]
    u = rounding.unit("bfloat16", 8)
    assert rounding.compare(exact, exact, u) is None
    wrong = exact.copy()
    wrong[0] *= 2
    assert "row 0" in rounding.compare(wrong, exact, u)
    # Half of the rows too large and half too small by two roundings is no bias of the whole.
    assert rounding.compare(exact * (1 + 2 * u * np.resize([1, -1], (64, 1))), exact, u) is None
    assert "as a whole too small by 0.78%" in rounding.compare(exact * (1 - 2 * 2.0**-8), exact, u)


def test_what_is_wrong_at_the_full_size_only_is_found():
    case = dataclasses.replace(SMALL, tokens=2 * SMALL.tokens)
    wrong = spoil(
        IMPLEMENTATIONS["moe_kernels/xla"], "layer", lambda out, _: 2 * out if len(out) == case.tokens else out
    )
    (result,) = run(Problem("layer", "forward", case, "balanced", "float32"), wrong)
    assert not result.correct and "sampled" in result.fault and result.ms_median is None


def test_a_weight_gradient_that_is_wrong_at_the_full_size_only_is_found():
    case = dataclasses.replace(SMALL, tokens=2 * SMALL.tokens)

    def change(out, arguments):
        total = arguments[2].w2.sum()
        return out + (total - jax.lax.stop_gradient(total)) if len(out) == case.tokens else out

    wrong = spoil(IMPLEMENTATIONS["moe_kernels/xla"], "layer", change)
    (result,) = run(Problem("layer", "both", case, "hot", "float32"), wrong)
    assert not result.correct and "dw2 of expert" in result.fault and result.ms_median is None


def test_an_implementation_that_raises_is_reported():
    def fail(out, arguments):
        raise RuntimeError("no such instruction")

    wrong = spoil(IMPLEMENTATIONS["moe_kernels/xla"], "layer", fail)
    (result,) = run(Problem("layer", "both", SMALL, "balanced", "float32"), wrong)
    assert not result.correct and "no such instruction" in result.fault


def test_a_line_of_json_has_all_fields():
    ours, dense = run(Problem("layer", "both", SMALL, "balanced", "float32"), *OURS_AND_DENSE)
    line = json.loads(ours.to_json())
    assert line.keys() == FIELDS
    assert line["pass"] == "both" and line["correct"] is True and line["versions"]["jax"] == jax.__version__
    assert 0 < line["ms_p10"] <= line["ms_median"] <= line["ms_p90"]
    # Capacity 5 is rounded up to 8 rows for each of 8 experts, of which 4 hold all of the 4 that are wanted.
    assert line["useful_rows"] == 1 == dense.useful_rows
    assert line["ratios"].keys() == {"moe_kernels/xla", "dense"} and line["ratios"]["dense"] == line["ratio_to_dense"]
    assert dense.ratio_to_dense == 1 and line["temp_bytes"] > 0 and line["compile_seconds"] > 0


OURS_AND_DENSE = (IMPLEMENTATIONS["moe_kernels/xla"], IMPLEMENTATIONS["dense"])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_distribution_holds_and_the_router_follows_it(distribution):
    case = CASES["tiny"]
    counts = np.sort(np.bincount(draw_experts(case, distribution)[:, 0], minlength=case.experts))[::-1] / case.tokens
    expected = {
        "balanced": np.full(8, 1 / 8),
        "zipf": 1 / np.arange(1, 9) / (1 / np.arange(1, 9)).sum(),
        "hot": np.array([1 / 2, *[1 / 14] * 7]),
        "empty": np.array([1 / 2, 1 / 2, *[0] * 6]),
    }[distribution]
    np.testing.assert_allclose(counts, expected, atol=1e-3)
    # Raises if the router decides otherwise.
    oracle.find_truth(ODD, make_inputs(ODD, distribution, "bfloat16"))


# T 4, D 8, F 16, E 2, K 1 in float32, by hand: FLOPs forward, bytes of what has a gradient, of what else is read, of
# the result. Tokens and rows have 128 bytes, gates and ids 16, a matrix of both experts 1,024, biases 192.
WORK = {
    "routing": (2 * 4 * 8 * 2, 128 + 64, 32, 16 + 16),
    "plan": (0, 0, 16 + 16, 16 + 16),
    "dispatch": (0, 128, 16, 128),
    "combine": (2 * 4 * 8, 128 + 16, 16, 128),
    "grouped_matmul": (2 * 4 * 8 * 16, 128 + 1024, 0, 256),
    "expert_mlp": (2 * 2 * 4 * 8 * 16, 128 + 2 * 1024 + 192, 0, 128),
    "layer": (128 + 2048 + 64, 128 + 64 + 2 * 1024 + 192, 32, 128),
}


@pytest.mark.parametrize("op", OPS)
def test_work_by_hand(op):
    case, load = Case("x", 4, 1, 8, 16, 2, 1, None), Load(4, 2)
    flops, arguments, constants, result = WORK[op]
    assert work(op, "forward", case, load, 4) == (flops, arguments + constants + result)
    # Backward: everything is read, the cotangent too, and gradients are written.
    assert work(op, "backward", case, load, 4) == (2 * flops, arguments + constants + result + arguments)
    assert work(op, "both", case, load, 4) == (3 * flops, arguments + constants + 2 * result + arguments)


def test_work_is_that_of_the_definition():
    rows, d, f = 4_096, 512, 2_048
    dense = work("expert_mlp", "both", CASES["issue"], Load(rows, 1), 4)
    assert dense.flops == 3 * 2 * 2 * rows * d * f
    layer = work("layer", "both", CASES["issue"], Load(rows, 32), 4)
    assert 1 < layer.flops / dense.flops < 1.05
    # Weights and their gradients, both matrices of 32 experts.
    assert layer.bytes > 2 * 2 * 32 * d * f * 4 > 10 * dense.bytes / 4


def test_the_exponent_of_a_sweep():
    sizes = [case.tokens for case in selection.sweep("tokens", CASES["issue"])]
    assert summary.exponent(sizes, [3e-6 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert [case.expert_width for case in selection.sweep("width", CASES["issue"])] == [256, 512, 1_024, 2_048]
    assert [case.experts for case in selection.sweep("experts", CASES["mixtral-8x7b"])] == [2, 4, 8]


def test_the_suites_take_as_long_as_they_say_and_what_does_not_fit_is_left_out(monkeypatch):
    # What was measured on the machine of docs/benchmarks.md, where the quick suite took 1 min 49 s.
    machine = Device("2 cores", {"float32": 0.27e12, "bfloat16": 0.27e12}, 23e9, "given")
    every = tuple(IMPLEMENTATIONS.values())
    _, (quick,) = estimate.plan_run(selection.quick(), every, 5, machine)
    _, (cpu,) = estimate.plan_run(selection.cpu(), every, 5, machine)
    assert "2 minutes" in quick and 10 < int(cpu.split()[2]) < 40
    # 652 MB were measured.
    (layer,) = selection.product(["layer"], ["both"], ["issue"], ["balanced"], ["float32"])
    assert estimate.needed_bytes(layer, OURS_AND_DENSE) == pytest.approx(652e6, rel=0.05)
    monkeypatch.setattr(estimate, "device_bytes", lambda: 600 << 20)
    kept, said = estimate.plan_run(selection.quick(), every, 5, machine)
    assert layer not in kept and any("left out: issue, layer both, float32 needs at least" in text for text in said)
    assert {problem.op for problem in kept} == {"routing", "plan", "dispatch", "combine", "grouped_matmul"}


def test_the_quick_suite_holds_what_the_readme_shows():
    suite = [(problem.op, problem.passes, problem.case.name, problem.distribution) for problem in selection.quick()]
    assert {("layer", "both", "issue", "balanced"), ("layer", "both", "issue", "zipf")} <= set(suite)
    assert ("layer", "both", "issue-8groups", "balanced") in suite
    assert {op for op, *_ in suite} == set(OPS) and len(set(suite)) == len(suite)


def test_the_summary_and_the_picture(tmp_path):
    results = [
        result
        for op in OPS
        for result in run(
            Problem(op, "forward" if op == "plan" else "both", SMALL, "balanced", "float32"), *OURS_AND_DENSE
        )
    ]
    (share,) = summary.share_around_experts(results, "moe_kernels/xla")
    (peak,) = summary.peak_memory(results, "moe_kernels/xla")
    (against,) = summary.against_peers(results, "moe_kernels/xla")
    paired = f"{results[-1].ratios['moe_kernels/xla']:.2f}x as fast as peer"
    peer = dataclasses.replace(results[-1], implementation="peer")
    assert results[-1].op == "layer" and paired in summary.against_peers([*results, peer], "moe_kernels/xla")[0]
    assert "% of the layer" in share and "x the layer's inputs" in peak and "x the time of dense" in against
    save_plot(results, str(tmp_path / "bars.png"))
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_a_section_is_replaced_and_the_rest_stays(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Figures\n")
    markdown.write_section(str(page), "first")
    page.write_text(page.read_text() + "\nafter\n")
    markdown.write_section(str(page), "second")
    assert page.read_text() == f"# Figures\n\n{markdown.BEGIN}\nsecond\n{markdown.END}\n\nafter\n"


@pytest.mark.parametrize(
    "module", [cases, estimate, rounding, roofline, selection, summary, timing], ids=lambda module: module.__name__
)
def test_examples_in_docstrings(module):
    done = doctest.testmod(module)
    assert done.failed == 0 and done.attempted > 0


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "benchmarks" / "dispatch.py"), *arguments]


def test_a_ctrl_c_that_is_dropped_comes_again():
    """Python drops what a callback of its garbage collector raises, and JAX has such a callback."""
    before = [signal.signal(number, timing.interrupt) for number in (signal.SIGINT, signal.SIGALRM)]
    try:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            time.sleep(5)
        timing.caught()
        time.sleep(1.2)
    finally:
        timing.caught()
        for number, handler in zip((signal.SIGINT, signal.SIGALRM), before, strict=True):
            signal.signal(number, handler)


@pytest.mark.slow
def test_it_runs_from_another_folder_and_ctrl_c_keeps_what_was_measured(tmp_path):
    # The second problem would take minutes; the first one's lines are there before it is interrupted.
    chosen = ["--case=tiny", "--case=h14", "--op=dispatch", "--pass=forward", "--repetitions=2"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        command(*chosen, "--implementation=moe_kernels/xla", "--json=lines.jsonl"),
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = tmp_path / "lines.jsonl"
    deadline = time.monotonic() + 240
    while not (lines.exists() and lines.read_text().endswith("\n")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "dispatch forward, tiny" in out and "stopped" in out
    assert [json.loads(line)["case"] for line in lines.read_text().splitlines()] == ["tiny"]
