"""Dispatch and combine of the GPU back end: interpreted on a CPU with race detection, or on a GPU, against XLA's."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from gpu_cases import require_gpu
from moe_cases import Shape
from nasty_cases import POISONS
from test_tpu_permute import both, compare, operands

from moe_kernels.backends import choose, explain, problem_of
from moe_kernels.backends.base import Problem
from moe_kernels.backends.gpu.permute.tiles import WIDTH_ALIGNMENT, gather_blocks, gather_shared_memory
from moe_kernels.backends.gpu.permute.verbs import combine_backward, dispatch_forward
from moe_kernels.chips import find_generation
from moe_kernels.types import Layout

# One row; dropped choices in several groups; two choices and rows in pieces (two of bfloat16, five of float32); packed
# runs and tokens that 8 does not divide; more tiles than blocks; many experts of one row, all choices.
CASES = {
    "one row": Shape(1, 1, 128, 1, 1, 1, None),
    "groups": Shape(24, 2, 128, 1, 4, 1, 0.5),
    "two choices": Shape(18, 2, 1280, 1, 4, 2, 1.05),
    "dropless": Shape(30, 3, 256, 1, 5, 2, None),
    "several tiles": Shape(264, 1, 384, 1, 2, 1, 1.0),
    "all choices": Shape(9, 1, 128, 1, 8, 8, None),
}
DTYPES = ["float32", "bfloat16", "float16"]


@pytest.fixture(autouse=True)
def _no_races(capsys):
    """The interpreter of JAX 0.10.2 prints races, later ones raise."""
    yield
    assert "RACE DETECTED" not in capsys.readouterr().out


def check(name, dtype, pattern="uniform"):
    given = operands(CASES[name], dtype, pattern)
    compare(given, both("gpu", *given), both("xla", *given), dtype)


@pytest.mark.compat
def test_values_and_gradients():
    check("groups", "bfloat16", "zipf")


@pytest.mark.slow
def test_values_and_gradients_of_rows_in_pieces():
    check("two choices", "bfloat16")


@pytest.mark.full
@pytest.mark.parametrize("pattern", ["uniform", "one expert"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_of_all(name, dtype, pattern):
    check(name, dtype, pattern)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["uniform", "one expert"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_on_a_gpu(name, dtype, pattern):
    require_gpu()
    check(name, dtype, pattern)


def check_poison(poison):
    """What stands in unused rows, in tokens and cotangents of dropped choices, reaches nobody; a gate its own token."""
    plan, tokens, rows, gate, dy, drows = operands(CASES["groups"], "bfloat16", "zipf")
    unused = np.asarray(plan.source) == plan.row.size
    dropped = np.asarray(plan.row[:, 0]) == plan.layout.num_rows
    # The last row and the last token are what indices past the end fetch.
    assert unused[-1] and dropped.any() and not dropped.all()
    clean = both("gpu", plan, tokens, rows, gate, dy, drows)
    assert not np.asarray(clean[0], np.float32)[unused].any() and not np.asarray(clean[3], np.float32)[unused].any()
    rows, drows = (jnp.where(unused[:, None], poison, array).astype(array.dtype) for array in (rows, drows))
    tokens, dy = (jnp.where(dropped[:, None], poison, array).astype(array.dtype) for array in (tokens, dy))
    for found, wanted in zip(both("gpu", plan, tokens, rows, gate, dy, drows), clean, strict=True):
        np.testing.assert_array_equal(found, wanted)
    lost = np.array([np.flatnonzero(dropped)[0], np.flatnonzero(~dropped)[0]])
    y = both("gpu", plan, tokens, rows, gate.at[lost].set(poison), dy, drows)[2]
    assert np.isnan(np.asarray(y, np.float32)[lost]).all()
    np.testing.assert_array_equal(np.delete(y, lost, axis=0), np.delete(clean[2], lost, axis=0))


def test_nan_stays_where_it_belongs():
    check_poison(np.nan)


@pytest.mark.full
@pytest.mark.parametrize("poison", POISONS)
def test_what_is_not_finite_stays_where_it_belongs(poison):
    check_poison(poison)


@pytest.mark.gpu
@pytest.mark.parametrize("poison", POISONS)
def test_what_is_not_finite_stays_where_it_belongs_on_a_gpu(poison):
    require_gpu()
    check_poison(poison)


LAYOUT = Layout(16384, 1, 1, 32, 17408, 544)
PROBLEM = Problem("dispatch", "gpu", "bfloat16", (16384, 768), 32, layout=LAYOUT, chip="NVIDIA H200", num_cores=132)


@pytest.mark.parametrize("span", ["dispatch", "combine"])
def test_hopper_and_blackwell_gather_in_every_float(span):
    for dtype in DTYPES:
        assert "gpu: chosen" in explain(dataclasses.replace(PROBLEM, span=span, dtype=dtype)).splitlines()
    for chip in ("NVIDIA B200", "NVIDIA GB200", "NVIDIA GH200 480GB"):
        assert "gpu: chosen" in explain(dataclasses.replace(PROBLEM, span=span, chip=chip)).splitlines()
    # Runs that start anywhere are no hindrance: rows are copied one by one.
    odd = dataclasses.replace(LAYOUT, num_rows=12, rows_per_expert=4)
    assert "gpu: chosen" in explain(dataclasses.replace(PROBLEM, layout=odd))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"platform": "cpu"}, "platform cpu is not gpu; kernels run there only by name, in a simulator"),
        ({"chip": "NVIDIA A100-SXM4-80GB"}, "has not compute capability 9.0"),
        ({"shape": (16384, 192)}, "width 192 is not a multiple of 128"),
        ({"dtype": "int8"}, "dtype int8 is none of"),
        ({"layout": None}, "the layout of the rows is not known"),
        ({"layout": dataclasses.replace(LAYOUT, num_tokens=0)}, "there are no rows"),
    ],
)
def test_what_is_refused_says_why(change, reason):
    (line,) = [line for line in explain(dataclasses.replace(PROBLEM, **change)).splitlines() if line.startswith("gpu:")]
    assert line.startswith("gpu: no, ") and reason in line


def test_a_named_back_end_leaves_odd_widths_to_others():
    layout = dataclasses.replace(LAYOUT, num_tokens=8)
    for width, module in ((128, dispatch_forward.__module__), (12, "moe_kernels.backends.xla.permute")):
        span = choose(problem_of("dispatch", jnp.ones((8, width)), 32, layout=layout), "gpu")
        assert getattr(span.forward, "func", span.forward).__module__ == module
    assert combine_backward.__module__ == dispatch_forward.__module__


@pytest.mark.parametrize("width", [128, 384, 512, 768, 1024, 1280, 1408, 5120, 7168])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("products", [False, True])
def test_pieces_fit_and_divide(width, itemsize, products):
    chip = find_generation("NVIDIA H200")
    blocks = gather_blocks(width, itemsize, chip, products=products)
    assert width % blocks.columns == 0 and blocks.columns % WIDTH_ALIGNMENT == 0 and blocks.stages >= 2
    assert gather_shared_memory(blocks, itemsize, weighed=True, products=products) <= chip.shared_memory
