"""Which problems the GPU back end takes and why not the others; block sizes and schedules; no kernel is run."""

import dataclasses

import gpu_cases  # noqa: F401 (installs the simulator)
import gpu_simulator
import jax.numpy as jnp
import numpy as np
import pytest

from moe_kernels.backends import choose, explain
from moe_kernels.backends.base import Problem
from moe_kernels.backends.gpu import GPU, install_simulator, why_not
from moe_kernels.backends.gpu.common.launch import CONSUMER_REGISTERS, NUM_CONSUMERS, PRODUCER_REGISTERS
from moe_kernels.backends.gpu.common.schedule import max_tiles, row_tiles
from moe_kernels.backends.gpu.sm90.tiling import (
    choose_blocks,
    registers,
    shared_memory,
)
from moe_kernels.chips import find_generation
from moe_kernels.types import Layout, Runs

BLOCK = Layout(512, 1, 1, 4, 544, 136)
PROBLEM = Problem(
    "expert_mlp", "gpu", "bfloat16", (544, 768), 4, 3072, BLOCK, chip="NVIDIA H200 141GB HBM3e", num_cores=132
)


@pytest.mark.parametrize(
    "chip", ["NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA GH200 480GB", "NVIDIA H20"]
)
def test_hopper_is_taken(chip):
    assert why_not(dataclasses.replace(PROBLEM, chip=chip)) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"platform": "cpu"}, "platform cpu is not gpu"),
        ({"platform": "tpu", "named": True}, "platform tpu is not gpu"),
        ({"chip": "NVIDIA A100-SXM4-80GB"}, "chip 'NVIDIA A100-SXM4-80GB' has not compute capability 9.0"),
        ({"chip": "NVIDIA B200"}, "chip 'NVIDIA B200' multiplies by tcgen05"),
        ({"chip": "NVIDIA RTX PRO 6000 Blackwell"}, "Blackwell' has not compute capability 9.0"),
        ({"chip": "AMD Instinct MI300X"}, "chip 'AMD Instinct MI300X' has not"),
        ({"chip": ""}, "chip '' has not"),
        ({"dtype": "float32"}, "dtype float32 is none of"),
        ({"shape": (544, 192)}, "width 192 is not a multiple of 128"),
        ({"expert_width": 320}, "expert width 320 is not a multiple of 128"),
        ({"layout": None}, "the layout of the rows is not known"),
        ({"layout": dataclasses.replace(BLOCK, num_rows=0, rows_per_expert=0)}, "there are no rows"),
        ({"layout": dataclasses.replace(BLOCK, rows_per_expert=136, runs_per_expert=2)}, "runs of 68 rows"),
    ],
)
def test_what_is_refused_says_why_and_goes_to_xla(change, reason):
    problem = dataclasses.replace(PROBLEM, **change)
    assert reason in why_not(problem)
    lines = explain(problem).splitlines()
    assert f"gpu: no, {why_not(problem)}" in lines and "xla: chosen" in lines


def test_a_cpu_runs_kernels_by_name_where_a_simulator_is_installed():
    named = dataclasses.replace(PROBLEM, platform="cpu", chip="cpu", named=True)
    assert why_not(named) is None
    install_simulator(None)
    try:
        with pytest.raises(ValueError, match=r"cpu is not gpu; .* moe_kernels\.backends\.gpu\.install_simulator"):
            choose(named, "gpu")
    finally:
        install_simulator(gpu_simulator.simulate)


def test_equal_problems_get_the_same_span():
    for name, make in GPU.spans.items():
        assert make(dataclasses.replace(PROBLEM, span=name)) is make(dataclasses.replace(PROBLEM, span=name))


@pytest.mark.parametrize("kernel", ["store", "activate", "gated", "gated_erf", "activate_backward", "weight_gradient"])
@pytest.mark.parametrize("columns", [128, 384, 512, 768, 1024, 1280, 5120, 7168])
@pytest.mark.parametrize("bias", [False, True])
def test_blocks_fit_and_divide(kernel, columns, bias):
    chip = find_generation("NVIDIA H200")
    blocks = choose_blocks(kernel, columns, chip, bias=bias)
    assert columns % blocks.columns == 0 and blocks.stages >= 2
    assert shared_memory(kernel, blocks, bias=bias) <= chip.shared_memory
    assert registers(kernel, blocks.columns) <= CONSUMER_REGISTERS
    # wgmma takes up to 256 columns.
    assert blocks.columns <= 256


def test_registers_of_all_warpgroups_fit():
    assert (PRODUCER_REGISTERS + NUM_CONSUMERS * CONSUMER_REGISTERS) * 128 <= 65_536
    assert PRODUCER_REGISTERS % 8 == CONSUMER_REGISTERS % 8 == 0


LAYOUTS = {
    "block": (BLOCK, [(127, 128, 129, 136), (0, 0, 0, 0), (0, 136, 0, 1)]),
    "packed": (Layout(512, 1, 1, 4, 544, None), [(127, 128, 129, 0), (544, 0, 0, 0), (0, 0, 0, 544), (0, 0, 0, 0)]),
    "several runs": (Layout(288, 1, 1, 2, 288, 144, 3), [(48, 0, 7, 8, 0, 47), (0, 0, 0, 48, 48, 48)]),
}


@pytest.mark.parametrize("height", [64, 128])
@pytest.mark.parametrize("name", LAYOUTS)
def test_tiles_cover_every_row_once(name, height):
    layout, sizes = LAYOUTS[name]
    num_runs = layout.num_experts * layout.runs_per_expert
    for size in sizes:
        aligned = -(-np.array(size) // 8) * 8
        if layout.rows_per_expert is None:
            first = np.cumsum(aligned) - aligned
        else:
            first = np.arange(num_runs) * (layout.rows_per_expert // layout.runs_per_expert)
        expert = np.arange(num_runs) // layout.runs_per_expert
        runs = Runs(*(jnp.asarray(a, jnp.int32) for a in (expert, first, size)))
        tiles = row_tiles(runs, layout, height)
        start = np.asarray(tiles.start)
        assert start[-1] <= max_tiles(layout, height) == tiles.expert.shape[0]
        owner = np.full(layout.num_rows, -1)
        for e in range(layout.num_experts):
            for i in range(start[e], start[e + 1]):
                assert tiles.expert[i] == e and 0 < tiles.size[i] <= height and tiles.first[i] % 8 == 0
                own = slice(int(tiles.first[i]), int(tiles.first[i] + tiles.size[i]))
                assert (owner[own] == -1).all()
                owner[own] = e
        want = np.full(layout.num_rows, -1)
        for e, f, s in zip(expert, first, size, strict=True):
            want[f : f + s] = e
        np.testing.assert_array_equal(owner, want)
