"""The nasty cases of expert rows, for every back end's kernels: data, builders and the oracle, no back end.

Sizes of runs are traced values, so a test compiles one function for a `Rows` and gives it every pattern.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from moe_cases import assert_within

import reference
from moe_kernels import GluWeights, MlpWeights
from moe_kernels.backends.base import MatmulWeights, epilogue_of
from moe_kernels.types import ROW_ALIGNMENT, Activation, Epilogue, Layout, MatmulActivation, Runs


@dataclasses.dataclass(frozen=True)
class Rows:
    """What is static about a case; `rows_per_run` is None where runs are packed one after the other."""

    experts: int
    rows_per_run: int | None
    width: int
    hidden: int
    runs_per_expert: int = 1
    packed_rows: int = 0

    @property
    def num_runs(self) -> int:
        return self.experts * self.runs_per_expert

    @property
    def num_rows(self) -> int:
        return self.packed_rows if self.rows_per_run is None else self.num_runs * self.rows_per_run

    @property
    def layout(self) -> Layout:
        return Layout(
            num_tokens=self.num_rows,
            num_choices=1,
            num_groups=1,
            num_experts=self.experts,
            num_rows=self.num_rows,
            rows_per_expert=None if self.rows_per_run is None else self.rows_per_run * self.runs_per_expert,
            runs_per_expert=self.runs_per_expert,
        )

    def runs(self, size: jax.Array) -> Runs:
        """The runs with `size` [runs] rows each; traceable."""
        size = jnp.asarray(size, jnp.int32)
        expert = jnp.arange(self.num_runs, dtype=jnp.int32) // self.runs_per_expert
        if self.rows_per_run is not None:
            return Runs(expert, jnp.arange(self.num_runs, dtype=jnp.int32) * self.rows_per_run, size)
        aligned = (size + ROW_ALIGNMENT - 1) // ROW_ALIGNMENT * ROW_ALIGNMENT
        return Runs(expert, jnp.cumsum(aligned, dtype=jnp.int32) - aligned, size)

    def used(self, size: np.ndarray) -> np.ndarray:
        """Which rows hold something, [rows] bool."""
        runs = self.runs(np.asarray(size))
        used = np.zeros(self.num_rows, bool)
        for first, count in zip(np.asarray(runs.first), size, strict=True):
            used[first : first + count] = True
        return used


TINY = Rows(experts=1, rows_per_run=8, width=1, hidden=1)
EMPTY = Rows(experts=3, rows_per_run=0, width=8, hidden=16)
PATTERNS_BLOCK = Rows(experts=8, rows_per_run=16, width=8, hidden=16)
PATTERNS_PACKED = Rows(experts=8, rows_per_run=None, width=8, hidden=16, packed_rows=96)
TILES_BLOCK = Rows(experts=4, rows_per_run=136, width=8, hidden=16)
TILES_PACKED = Rows(experts=4, rows_per_run=None, width=8, hidden=16, packed_rows=544)
ODD_BLOCK = Rows(experts=3, rows_per_run=24, width=130, hidden=257)
ODD_PACKED = Rows(experts=3, rows_per_run=None, width=130, hidden=257, packed_rows=72)
# 2880 = 22.5 x 128, as in published models; here 1.5 and 2.5 lanes' widths.
HALF_BLOCK = Rows(experts=2, rows_per_run=16, width=192, hidden=320)
SEVERAL_RUNS = Rows(experts=3, rows_per_run=24, width=16, hidden=32, runs_per_expert=4)

# One off a sublane (8), two of bfloat16 (16) and a tile (128), exactly full, all to one, one row, none at all.
SIZES: dict[Rows, list[tuple[int, ...]]] = {
    TINY: [(1,), (0,), (8,)],
    EMPTY: [(0, 0, 0)],
    PATTERNS_BLOCK: [(16,) * 8, (15, 16, 1, 0, 7, 8, 9, 0)],
    PATTERNS_PACKED: [(8,) * 8, (1, 7, 8, 9, 0, 0, 16, 17), (0,) * 7 + (96,)],
    TILES_BLOCK: [(127, 128, 129, 136), (7, 8, 9, 0), (15, 16, 17, 1), (0, 136, 0, 0), (0, 0, 0, 0), (136,) * 4],
    TILES_PACKED: [(127, 128, 129, 0), (7, 8, 9, 0), (15, 16, 17, 1), (0, 544, 0, 0), (544, 0, 0, 0), (136,) * 4],
    ODD_BLOCK: [(23, 24, 1), (0, 17, 9)],
    ODD_PACKED: [(23, 24, 1), (0, 72, 0)],
    HALF_BLOCK: [(15, 16), (0, 1)],
    SEVERAL_RUNS: [(24, 0, 7, 8, 0, 0, 0, 0, 1, 24, 24, 23), (0, 0, 0, 1) * 3],
}
DTYPES = [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")]  # of rows and of weights
Weights = TypeVar("Weights", MlpWeights, GluWeights, MatmulWeights)
POISONS = [np.nan, np.inf, -np.inf]
# The most that one rounding to a dtype is off, as a share; and near 0, where float16 has fewer digits.
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
NEAR_ZERO = {"bfloat16": 2.0**-134, "float16": 2.0**-25}


def empty_patterns(rows: Rows, seed: int = 0) -> np.ndarray:
    """Sizes [2^E, E] for every pattern of empty experts, the others at random from 1 up."""
    assert rows.runs_per_expert == 1
    most = rows.rows_per_run or rows.packed_rows // rows.experts // ROW_ALIGNMENT * ROW_ALIGNMENT
    filled = np.array(list(itertools.product((0, 1), repeat=rows.experts)), np.int32)
    return filled * np.random.default_rng(seed).integers(1, most + 1, filled.shape).astype(np.int32)


class Operands(NamedTuple):
    """What an expert MLP and its gradient are computed from."""

    rows: jax.Array
    weights: MlpWeights | GluWeights
    dout: jax.Array


def operands(
    rows: Rows, *, dtype: str = "float32", weight_dtype: str = "float32", gated: bool = False, seed: int = 0
) -> Operands:
    """Random operands, of size one after every matmul; all rows hold numbers, used or not."""
    rng = np.random.default_rng(seed)
    e, d, f = rows.experts, rows.width, rows.hidden
    x, dout = rng.normal(size=(2, rows.num_rows, d))
    shapes = ((e, d, f), (e, d, f), (e, f, d)) if gated else ((e, d, f), (e, f), (e, f, d), (e, d))
    draws = [rng.normal(size=s) / (np.sqrt(s[1]) if len(s) == 3 else 1) for s in shapes]
    weights = (GluWeights if gated else MlpWeights)(*(jnp.asarray(w, weight_dtype) for w in draws))
    return Operands(jnp.asarray(x, dtype), weights, jnp.asarray(dout, dtype))


def as_multiplied(weights: Weights, dtype: jnp.dtype | str) -> Weights:
    """Weights as kernels take them: matrices rounded to the dtype of the rows, biases as they are."""
    return jax.tree.map(lambda w: w.astype(dtype).astype(w.dtype) if w.ndim == 3 else w, weights)


class Expected(NamedTuple):
    """Output and gradients in float64; gradients of the weights are summed over the runs of an expert."""

    out: np.ndarray
    drows: np.ndarray
    dweights: MlpWeights | GluWeights


class _Runs(NamedTuple):
    """The part of a reference plan that its expert MLP reads."""

    first: np.ndarray
    size: np.ndarray


def expected_mlp(
    rows: Rows, given: Operands, size: np.ndarray | tuple[int, ...], activation: Activation = "gelu_tanh"
) -> Expected:
    """The oracle: `reference`, with every run as an expert of its own that repeats its expert's weights."""
    x, dout = (np.asarray(a, np.float64) for a in (given.rows, given.dout))
    repeated = reference.MlpWeights(
        *(
            np.zeros((rows.num_runs, n)) if w is None else np.asarray(w, np.float64).repeat(rows.runs_per_expert, 0)
            for w, n in zip(given.weights, (0, rows.hidden, 0, rows.width), strict=True)
        )
    )
    plan = _Runs(np.asarray(rows.runs(np.asarray(size)).first), np.asarray(size))
    out = reference.expert_mlp(x, repeated, plan, activation)
    gradient = reference.expert_mlp_gradient(x, repeated, dout, plan, activation)
    summed = (g.reshape(rows.experts, rows.runs_per_expert, *g.shape[1:]).sum(axis=1) for g in gradient.weights)
    return Expected(out, gradient.rows, MlpWeights(*summed))


def mlp_magnitudes(rows: Rows, given: Operands, size: np.ndarray | tuple[int, ...]) -> Expected:
    """What each entry of `expected_mlp` is a sum of, all terms as absolute values: what rounding is measured against.

    `|gelu(h)| <= |h|`, its slope is at most 1.13 and errs by at most its argument's error.
    """
    x, dout = (np.abs(np.asarray(a, np.float64)) for a in (given.rows, given.dout))
    w = [
        np.zeros((rows.experts, n)) if a is None else np.abs(np.asarray(a, np.float64))
        for a, n in zip(given.weights, (0, rows.hidden, 0, rows.width), strict=True)
    ]
    out, dx, dw = np.zeros(x.shape), np.zeros(x.shape), MlpWeights(*(np.zeros(a.shape) for a in w))
    for n, (first, count) in enumerate(zip(np.asarray(rows.runs(np.asarray(size)).first), size, strict=True)):
        own, e = slice(first, first + count), n // rows.runs_per_expert
        w1, b1, w2, b2 = (a[e] for a in w)
        hidden = x[own] @ w1 + b1
        dhidden = 1.13 * (dout[own] @ w2.T) * (1 + hidden)
        out[own], dx[own] = hidden @ w2 + b2, dhidden @ w1.T
        parts = x[own].T @ dhidden, dhidden.sum(axis=0), hidden.T @ dout[own], dout[own].sum(axis=0)
        for total, part in zip(dw, parts, strict=True):
            total[e] += part
    return Expected(out, dx, dw)


def compare(
    found: tuple[jax.Array, jax.Array, Weights],
    wanted: Expected | ExpectedMatmul,
    behind: Expected | ExpectedMatmul,
    *,
    used: np.ndarray,
    longest: int,
    earlier: dict[str, float],
) -> None:
    """Compare output and gradients with float64, entry by entry; `behind` is what each is a sum of, in absolute values.

    Sums of up to `longest` terms are in float32. In 16 bits terms (of factors below 4) were rounded `earlier` times,
    and an entry once to its own dtype.
    """
    (out, drows, dweights), dtype = found, str(found[0].dtype)
    arrays = {"out": (out, wanted.out, behind.out), "drows": (drows, wanted.drows, behind.drows)}
    arrays = {name: tuple(np.asarray(a)[used] for a in three) for name, three in arrays.items()}
    for name, *three in zip(dweights._fields, dweights, wanted.dweights, behind.dweights, strict=True):
        if three[0] is not None:
            arrays[f"d{name}"] = three
    for name, (mine, theirs, terms) in arrays.items():
        allowed = (2.0**-22 if dtype == "float32" else 2.0**-24) * np.sqrt(longest) * terms
        if dtype != "float32":
            allowed = allowed + earlier[name] * (ROUNDING[dtype] * terms + 4 * longest * NEAR_ZERO[dtype])
            if mine.dtype != jnp.float32:
                allowed = allowed + ROUNDING[str(mine.dtype)] * np.abs(theirs) + NEAR_ZERO[str(mine.dtype)]
            # What was rounded is rounded again, up to four times.
            allowed = allowed * (1 + 4 * ROUNDING[dtype])
        assert_within(mine, theirs, allowed, name=name)


def expected_glu(rows: Rows, given: Operands, size: np.ndarray | tuple[int, ...], activation: Activation) -> Expected:
    """The oracle for gated experts: two grouped matmuls of `reference`, with the runs as above."""
    x, dout = (np.asarray(a, np.float64) for a in (given.rows, given.dout))
    gate, up, down = (np.asarray(w, np.float64).repeat(rows.runs_per_expert, 0) for w in given.weights[:3])
    plan, first = _Runs(np.asarray(rows.runs(np.asarray(size)).first), np.asarray(size)), {"activation": activation}
    hidden = reference.grouped_matmul(x, gate, plan, up=up, **first)
    back = reference.grouped_matmul_gradient(hidden, down, dout, plan)
    gradient = reference.grouped_matmul_gradient(x, gate, back.rows, plan, up=up, **first)
    of_runs = gradient.weight, gradient.up, back.weight
    summed = (g.reshape(rows.experts, rows.runs_per_expert, *g.shape[1:]).sum(axis=1) for g in of_runs)
    return Expected(reference.grouped_matmul(hidden, down, plan), gradient.rows, GluWeights(*summed))


def glu_magnitudes(rows: Rows, given: Operands, size: np.ndarray | tuple[int, ...]) -> Expected:
    """What each entry of `expected_glu` is a sum of, as for `expected_mlp`; SiLU has the same bounds."""
    x, dout = (np.abs(np.asarray(a, np.float64)) for a in (given.rows, given.dout))
    weights = [np.abs(np.asarray(a, np.float64)) for a in given.weights[:3]]
    out, dx, dw = np.zeros(x.shape), np.zeros(x.shape), GluWeights(*(np.zeros(a.shape) for a in weights))
    for n, (first, count) in enumerate(zip(np.asarray(rows.runs(np.asarray(size)).first), size, strict=True)):
        own, e = slice(first, first + count), n // rows.runs_per_expert
        gate, up, down = (a[e] for a in weights)
        before, let = x[own] @ gate, x[own] @ up
        dhidden = dout[own] @ down.T
        dbefore, dlet = 1.13 * dhidden * let * (1 + before), dhidden * before
        out[own], dx[own] = (before * let) @ down, dbefore @ gate.T + dlet @ up.T
        parts = x[own].T @ dbefore, x[own].T @ dlet, (before * let).T @ dout[own]
        for total, part in zip(dw[:3], parts, strict=True):
            total[e] += part
    return Expected(out, dx, dw)


# How often what an entry is a sum of was rounded: the hidden layer before (1.13 of that pass) and after the activation;
# or its gradient, where the slope's error is part of the magnitudes.
MLP_ROUNDED = {"out": 2.13, "drows": 1, "dw1": 1, "db1": 1, "dw2": 2.13, "db2": 0}
# Gated: what lets pass is rounded too. Two kernels also round the gradient of the hidden layer between them.
GLU_ROUNDED = {"out": 3.13, "drows": 2.13, "dgate": 2, "dup": 2.13, "ddown": 3.13}
GLU_IN_TWO_ROUNDED = {"out": 3.13, "drows": 3.13, "dgate": 3, "dup": 3.13, "ddown": 3.13}


def check_mlp(
    rows: Rows,
    given: Operands,
    size: np.ndarray | tuple[int, ...],
    found: tuple[jax.Array, jax.Array, MlpWeights | GluWeights],
    activation: Activation = "gelu_tanh",
    *,
    in_two: bool = False,
) -> None:
    """Compare output and gradients with the oracle; `in_two` kernels, between which gradients are rounded."""
    (out, drows, dweights), dtype = found, given.rows.dtype
    assert out.dtype == drows.dtype == dtype
    assert jax.tree.map(lambda w: w.dtype, dweights) == jax.tree.map(lambda w: w.dtype, given.weights)
    given, gated = given._replace(weights=as_multiplied(given.weights, dtype)), isinstance(given.weights, GluWeights)
    expected, magnitudes = (expected_glu, glu_magnitudes) if gated else (expected_mlp, mlp_magnitudes)
    compare(
        found,
        expected(rows, given, size, activation),
        magnitudes(rows, given, size),
        used=rows.used(np.asarray(size)),
        longest=rows.width + rows.hidden + max(size, default=0),
        earlier=(GLU_IN_TWO_ROUNDED if in_two else GLU_ROUNDED) if gated else MLP_ROUNDED,
    )


def matmul_operands(
    rows: Rows, *, dtype: str = "float32", weight_dtype: str = "float32", epilogue: Epilogue = "none", seed: int = 0
) -> tuple[jax.Array, MatmulWeights, jax.Array]:
    """Rows, weights and gradient of the output for a grouped matmul; all rows hold numbers, used or not."""
    rng = np.random.default_rng(seed)
    x, dout = rng.normal(size=(rows.num_rows, rows.width)), rng.normal(size=(rows.num_rows, rows.hidden))
    weight, up = rng.normal(size=(2, rows.experts, rows.width, rows.hidden)) / np.sqrt(rows.width)
    weights = MatmulWeights(
        jnp.asarray(weight, weight_dtype),
        jnp.asarray(rng.normal(size=(rows.experts, rows.hidden)), weight_dtype) if epilogue == "pointwise" else None,
        jnp.asarray(up, weight_dtype) if epilogue == "gated" else None,
    )
    return jnp.asarray(x, dtype), weights, jnp.asarray(dout, dtype)


class ExpectedMatmul(NamedTuple):
    """Output and gradients in float64."""

    out: np.ndarray
    drows: np.ndarray
    dweights: MatmulWeights


def expected_matmul(
    runs: Runs, x: jax.Array, weights: MatmulWeights, dout: jax.Array, activation: MatmulActivation | None = None
) -> ExpectedMatmul:
    """The oracle: `reference`, with every run as an expert of its own that repeats its expert's weights."""
    x64, dout64 = (np.asarray(a, np.float64) for a in (x, dout))
    expert, plan = np.asarray(runs.expert), _Runs(np.asarray(runs.first), np.asarray(runs.size))
    weight, bias, up = (None if w is None else np.asarray(w, np.float64)[expert] for w in weights)
    assert weight is not None
    more = {"bias": bias, "up": up, "activation": activation}
    gradient = reference.grouped_matmul_gradient(x64, weight, dout64, plan, **more)
    total = jax.tree.map(lambda w: np.zeros(w.shape), weights)
    for mine, parts in zip(total, gradient[1:], strict=True):
        if mine is not None:
            np.add.at(mine, expert, parts)
    return ExpectedMatmul(reference.grouped_matmul(x64, weight, plan, **more), gradient.rows, total)


def matmul_magnitudes(
    runs: Runs, x: jax.Array, weights: MatmulWeights, dout: jax.Array, activation: MatmulActivation | None = None
) -> ExpectedMatmul:
    """What each entry of `expected_matmul` is a sum of, all terms as absolute values.

    No activation is larger than its argument, and no slope than 1.13; it errs by at most its argument's error.
    """
    x, dout = (np.abs(np.asarray(a, np.float64)) for a in (x, dout))
    weights = jax.tree.map(lambda w: np.abs(np.asarray(w, np.float64)), weights)
    out, dx, total = np.zeros(dout.shape), np.zeros(x.shape), jax.tree.map(np.zeros_like, weights)
    for e, first, count in zip(*map(np.asarray, runs), strict=True):
        own = slice(first, first + count)
        before = x[own] @ weights.weight[e] + (0 if weights.bias is None else weights.bias[e])
        up = 1 if weights.up is None else x[own] @ weights.up[e]
        dbefore = dout[own] * up * (1 if activation is None else 1.13 * (1 + before))
        out[own], dx[own] = before * up, dbefore @ weights.weight[e].T
        total.weight[e] += x[own].T @ dbefore
        if weights.bias is not None:
            total.bias[e] += dbefore.sum(axis=0)
        if weights.up is not None:
            dx[own] += (dout[own] * before) @ weights.up[e].T
            total.up[e] += x[own].T @ (dout[own] * before)
    return ExpectedMatmul(out, dx, total)


# The same, of what an activation is of; with a gate, of what that lets pass too.
MATMUL_ROUNDED: dict[Epilogue, dict[str, float]] = {
    "none": {"out": 0, "drows": 0, "dweight": 0, "dbias": 0},
    "pointwise": {"out": 1.13, "drows": 1, "dweight": 1, "dbias": 1},
    "gated": {"out": 2.13, "drows": 2.13, "dweight": 2, "dup": 2.13},
}


def check_matmul(
    runs: Runs,
    given: tuple[jax.Array, MatmulWeights, jax.Array],
    found: tuple[jax.Array, jax.Array, MatmulWeights],
    activation: MatmulActivation | None = None,
) -> None:
    """Compare output and gradients with the oracle."""
    (x, weights, dout), (out, drows, dweights) = given, found
    assert out.dtype == drows.dtype == x.dtype
    assert jax.tree.map(lambda w: w.dtype, dweights) == jax.tree.map(lambda w: w.dtype, weights)
    given = x, as_multiplied(weights, x.dtype), dout
    used = np.zeros(len(x), bool)
    for first, count in zip(np.asarray(runs.first), np.asarray(runs.size), strict=True):
        used[first : first + count] = True
    compare(
        found,
        expected_matmul(runs, *given, activation),
        matmul_magnitudes(runs, *given, activation),
        used=used,
        longest=max(*weights.weight.shape[1:], int(np.max(runs.size, initial=1))),
        earlier=MATMUL_ROUNDED["none" if activation is None else epilogue_of(weights, activation)],
    )
