"""The GPU kernels through the real compiler, for an H200: tensor cores, wide accesses, no spills, estimates right."""

import gpu_aot
import pytest
from sharding_cases import collectives

from moe_kernels.backends.gpu.common.launch import CONSUMER_REGISTERS
from moe_kernels.backends.gpu.permute.gather import ROWS_AT_ONCE
from moe_kernels.backends.gpu.permute.tiles import GATHER_ROWS, gather_blocks, gather_shared_memory
from moe_kernels.backends.gpu.sm90.tiling import (
    choose_blocks,
    route_blocks,
    route_shared_memory,
    shared_memory,
)
from moe_kernels.chips import find_generation

H200 = find_generation("NVIDIA H200")
MATMULS = {
    # Without gradients the hidden layer is not kept.
    "forward": {"moe_rows_activate_alone", "moe_rows_store"},
    "backward": {"moe_rows_activate", "moe_rows_activate_backward", "moe_rows_store", "moe_weight_gradient"},
}
# The exact GELU, and weights of 16 bits in the backward pass; what is the same kernel again is not compiled again.
MATMULS |= {
    "forward-erf": {"moe_rows_activate_alone"},
    "backward-erf": {"moe_rows_activate", "moe_rows_activate_backward", "moe_weight_gradient"},
}
# A grouped matmul with a bias and an activation, or a gate; its dX and dW are kernels like any other.
EPILOGUES = {"pointwise": "activate", "gated": "gated", "gated-erf": "gated_erf", "gated-relu": "gated"}
MATMULS |= {name: {f"moe_rows_{kernel}", f"moe_rows_{kernel}_alone"} for name, kernel in EPILOGUES.items()}
GATHERS = {
    "moe_gather": (False, False),
    "moe_gather_weighed": (True, False),
    "moe_gather_weighed_products": (True, True),
}
ITEMSIZES = {f"permute-{dtype}": {"bfloat16": 2, "float32": 4}[dtype] for dtype in gpu_aot.GATHERED}


def estimate(kernel, columns, bias=False):
    return shared_memory(kernel, choose_blocks(kernel, columns, H200, bias=bias), bias=bias)


def check(widths):
    found = gpu_aot.report(widths)
    gathers = {(width, name): itemsize for width in widths for name, itemsize in ITEMSIZES.items()}
    routes = {(width, "route") for width in widths}
    assert set(found) == {(width, name) for width in widths for name in MATMULS} | set(gathers) | routes
    for key in routes:
        check_route(key[0], found.pop(key))
    for key, itemsize in gathers.items():
        check_gathers(key[0], itemsize, found.pop(key))
    for (width, name), compiled in found.items():
        assert MATMULS[name] <= set(compiled.kernels), f"{width} {name}: {sorted(compiled.kernels)}"
        for kernel, made in compiled.kernels.items():
            where = f"{kernel} at width {width}"
            assert made.spills == 0 and made.stack == 0, f"{where}: {made}"
            # 65,536 registers for three warpgroups; consumers then take up to CONSUMER_REGISTERS of them.
            assert made.registers <= 65_536 // 384 // 8 * 8 <= CONSUMER_REGISTERS, f"{where}: {made}"
            assert (made.wgmmas > 0) == (kernel != "moe_column_sums"), f"{where}: {made}"
        assert compiled.shared_memory == expected_memory(width, 4 * width, name), f"{name} at width {width}"
        assert max(compiled.shared_memory) <= H200.shared_memory


def expected_memory(width, hidden, name):
    back = {estimate("store", width), estimate("column_sums", hidden)}
    if name == "pointwise":
        return back | {estimate("activate", hidden, bias=True), estimate("weight_gradient", hidden)}
    if name in EPILOGUES:
        # Of two matrices, and no bias.
        return {
            estimate(EPILOGUES[name], 2 * hidden),
            estimate("store", width),
            estimate("weight_gradient", 2 * hidden),
        }
    mlp = {estimate("activate", hidden, bias=True), estimate("store", width, bias=True)}
    if name.startswith("forward"):
        return mlp
    gradients = {estimate(kernel, hidden) for kernel in ("activate_backward", "weight_gradient")}
    return mlp | back | gradients | {estimate("weight_gradient", width)}


def check_route(width, compiled):
    assert set(compiled.kernels) == {"moe_route", "moe_rows_store", "moe_weight_gradient"}
    for kernel, made in compiled.kernels.items():
        assert made.wgmmas > 0 and made.spills == 0 and made.stack == 0, f"{kernel}: {made}"
        assert made.registers <= 65_536 // 384 // 8 * 8, f"{kernel}: {made}"
    columns = 3 * gpu_aot.EXPERTS
    assert compiled.shared_memory == {
        route_shared_memory(columns, route_blocks(columns, H200).stages),
        estimate("store", width),
        estimate("weight_gradient", 128),
    }
    assert max(compiled.shared_memory) <= H200.shared_memory


def check_gathers(width, itemsize, compiled):
    assert set(compiled.kernels) == set(GATHERS)
    expected = set()
    for kernel, (weighed, products) in GATHERS.items():
        made, blocks = compiled.kernels[kernel], gather_blocks(width, itemsize, H200, products=products)
        where = f"{kernel} of {itemsize} bytes at width {width}: {made}"
        assert made.spills == 0 and made.stack == 0 and made.wgmmas == 0, where
        assert made.registers <= 65_536 // 384 // 8 * 8, where
        # Rows come in plain copies of whole pieces and leave by 16 bytes a thread; loops may be unrolled.
        assert made.fetches >= ROWS_AT_ONCE * (2 if products else 1) + 1 + weighed and made.tensors == 0, where
        assert made.stores >= GATHER_ROWS * blocks.columns * itemsize // (16 * 128) and made.narrow == 0, where
        expected.add(gather_shared_memory(blocks, itemsize, weighed=weighed, products=products))
    assert compiled.shared_memory == expected
    assert max(compiled.shared_memory) <= H200.shared_memory


@pytest.mark.aot
def test_kernels_compile_for_an_h200():
    check([768])


@pytest.mark.aot
def test_the_ragged_exchange_compiles_for_four_h200s():
    text = gpu_aot.run("gpu_exchange_aot.py", timeout=400)
    found = [one for one in collectives(text) if one.kind == "ragged-all-to-all"]
    # Rows there and back, forward and backward, among all four and in bfloat16.
    assert len(found) == 4 and all("bf16" in one.dtypes and one.groups == ((0, 1, 2, 3),) for one in found)
    assert "mosaic_gpu" in text


@pytest.mark.aot
@pytest.mark.full
def test_kernels_compile_for_an_h200_at_every_width():
    check([512, 768, 1024, 1280])


@pytest.mark.aot
@pytest.mark.full
def test_gathers_compile_for_a_b200():
    found = gpu_aot.report([768], "B200")
    assert set(found) == {(768, name) for name in ITEMSIZES}
    for (width, name), compiled in found.items():
        check_gathers(width, ITEMSIZES[name], compiled)
