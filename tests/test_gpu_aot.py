"""The GPU kernels through the real compiler, for an H200: tensor cores, no spills, limits kept, estimates right."""

import gpu_aot
import pytest

from moe_kernels.backends.gpu.tiling import CONSUMER_REGISTERS, chip_of, choose_blocks, shared_memory

H200 = chip_of("NVIDIA H200")
MATMULS = {
    "forward": {"moe_rows_gelu", "moe_rows_store"},
    # The first kernel is that of the forward pass, compiled already.
    "backward": {"moe_rows_gelu_backward", "moe_rows_store", "moe_weight_gradient"},
}
# The exact GELU, and weights of 16 bits in the backward pass; what is the same kernel again is not compiled again.
MATMULS |= {"forward-erf": {"moe_rows_gelu"}, "backward-erf": {"moe_rows_gelu_backward", "moe_weight_gradient"}}


def estimate(kernel, columns, bias=False):
    return shared_memory(kernel, choose_blocks(kernel, columns, H200, bias=bias), bias=bias)


def check(widths):
    found = gpu_aot.report(widths)
    assert set(found) == {(width, name) for width in widths for name in MATMULS}
    for (width, name), compiled in found.items():
        assert MATMULS[name] <= set(compiled.kernels), f"{width} {name}: {sorted(compiled.kernels)}"
        for kernel, made in compiled.kernels.items():
            where = f"{kernel} at width {width}"
            assert made.spills == 0 and made.stack == 0, f"{where}: {made}"
            # 65,536 registers for three warpgroups; consumers then take up to CONSUMER_REGISTERS of them.
            assert made.registers <= 65_536 // 384 // 8 * 8 <= CONSUMER_REGISTERS, f"{where}: {made}"
            assert (made.wgmmas > 0) == (kernel in MATMULS[name]), f"{where}: {made}"
        hidden = 4 * width
        expected = {estimate("gelu", hidden, bias=True), estimate("store", width, bias=True)}
        if name.startswith("backward"):
            expected |= {estimate("gelu_backward", hidden), estimate("store", width), estimate("column_sums", hidden)}
            expected |= {estimate("weight_gradient", hidden), estimate("weight_gradient", width)}
        assert compiled.shared_memory == expected, f"{name} at width {width}"
        assert max(compiled.shared_memory) <= H200.shared_memory


@pytest.mark.aot
def test_kernels_compile_for_an_h200():
    check([768])


@pytest.mark.aot
@pytest.mark.full
def test_kernels_compile_for_an_h200_at_every_width():
    check([512, 768, 1024, 1280])
