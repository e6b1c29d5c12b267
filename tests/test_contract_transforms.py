"""The contract under JAX's transformations: what composes, what is refused, and what a compiled layer may hold."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jax.sharding import AxisType, PartitionSpec
from moe_cases import assert_close

from moe_kernels import SAVED_NAMES, MlpWeights, MoeSpec, moe_mlp, route

pytestmark = pytest.mark.compat

TOKENS, WIDTH, HIDDEN, EXPERTS, CHOICES, GROUPS = 64, 8, 16, 8, 2, 2
BLOCK, DROPLESS = 1.0, None  # capacity factors: rows in an [E, rows] block, and in runs one after the other
LAYOUTS = [BLOCK, DROPLESS]


def arguments(seed=0, *, tokens=TOKENS, width=WIDTH, hidden=HIDDEN, experts=EXPERTS):
    rng = np.random.default_rng(seed)
    sizes = ((experts, width, hidden), (experts, hidden), (experts, hidden, width), (experts, width))
    values = [rng.normal(size=size).astype(np.float32) / 2 for size in ((tokens, width), (width, experts), *sizes)]
    return jnp.asarray(values[0]), jnp.asarray(values[1]), MlpWeights(*map(jnp.asarray, values[2:]))


def layer(factor, tokens, router, weights):
    return moe_mlp(tokens, router, weights, MoeSpec(num_choices=CHOICES, num_groups=GROUPS, capacity_factor=factor))


def loss(function, tokens, router, weights):
    output = function(tokens, router, weights)
    return jnp.sum(jnp.square(output.tokens)) + jnp.sum(output.sums.logsumexp_squared)


def gradient_of(function):
    return jax.grad(functools.partial(loss, function), argnums=(0, 1, 2))


@functools.cache
def expected(factor):
    """Outputs and gradients of the plain, compiled layer for two seeds."""
    function = functools.partial(layer, factor)
    both = jax.jit(lambda *args: (function(*args), gradient_of(function)(*args)))
    return [both(*arguments(seed)) for seed in (0, 1)]


def assert_like(actual, wanted) -> None:
    """Another program for the same numbers: equal within a few roundings of each array's largest entry."""

    def compare(path, mine, theirs):
        name = jax.tree_util.keystr(path)
        assert_close(np.ravel(mine)[None], np.ravel(theirs)[None], length=TOKENS * CHOICES, name=name)

    jax.tree_util.tree_map_with_path(compare, actual, wanted)


@pytest.mark.parametrize("factor", LAYOUTS)
def test_vmap(factor):
    function = functools.partial(layer, factor)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), arguments(0), arguments(1))
    found = jax.jit(jax.vmap(lambda *args: (function(*args), gradient_of(function)(*args))))(*stacked)
    for i, wanted in enumerate(expected(factor)):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], found)
        np.testing.assert_array_equal(one[0].kept, wanted[0].kept)
        assert_like(one, wanted)


def stack_loss(step, tokens, routers, weights):
    """Two layers in a row with residuals, in a scan."""
    tokens, outputs = jax.lax.scan(lambda x, args: step(x, *args), tokens, (routers, weights))
    return jnp.sum(jnp.square(tokens)) + jnp.sum(outputs.sums.logsumexp_squared)


def residual(factor):
    def step(tokens, router, weights):
        output = layer(factor, tokens, router, weights)
        return tokens + output.tokens, output

    return step


@pytest.mark.parametrize("factor", LAYOUTS)
def test_scan_with_and_without_remat(factor):
    step = residual(factor)
    tokens, *_ = arguments(0)
    routers, weights = jax.tree.map(lambda *leaves: jnp.stack(leaves), arguments(0)[1:], arguments(1)[1:])

    def unrolled(tokens, routers, weights):
        total = jnp.float32(0)
        for i in range(2):
            tokens, output = step(tokens, routers[i], jax.tree.map(lambda leaf, i=i: leaf[i], weights))
            total += jnp.sum(output.sums.logsumexp_squared)
        return total + jnp.sum(jnp.square(tokens))

    wanted = jax.jit(jax.value_and_grad(unrolled, argnums=(0, 1, 2)))(tokens, routers, weights)
    saved = jax.checkpoint(step, policy=jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES))
    for function in (step, saved):
        scanned = jax.value_and_grad(functools.partial(stack_loss, function), argnums=(0, 1, 2))
        assert_like(jax.jit(scanned)(tokens, routers, weights), wanted)
        # The forward scan decides; the backward scan reads.
        assert decisions(scanned, tokens, routers, weights) == {"top_k": 1, "sort": 1}


def equations(jaxpr, platform="cpu"):
    """All of a program that a platform runs: of what depends on it, its own branch."""
    for equation in jaxpr.eqns:
        yield equation
        platforms = equation.params.get("branches_platforms")
        if platforms is not None:
            mine = next(n for n, names in enumerate(platforms) if names is None or platform in names)
            yield from equations(equation.params["branches"][mine].jaxpr, platform)
            continue
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, core.ClosedJaxpr):
                    yield from equations(inner.jaxpr, platform)
                elif isinstance(inner, core.Jaxpr):
                    yield from equations(inner, platform)


def decisions(function, *args) -> dict[str, int]:
    names = [equation.primitive.name for equation in equations(jax.make_jaxpr(function)(*args).jaxpr)]
    return {name: names.count(name) for name in ("top_k", "sort")}


@pytest.mark.parametrize("factor", LAYOUTS)
def test_remat_that_saves_the_names_decides_once(factor):
    function = functools.partial(layer, factor)
    saved = jax.checkpoint(function, policy=jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES))
    gradient = jax.jit(gradient_of(saved))
    args = arguments(0)
    assert_like(gradient(*args), expected(factor)[0][1])
    assert decisions(gradient, *args) == {"top_k": 1, "sort": 1}
    # Without the names it would decide again: the count above can fail.
    assert decisions(gradient_of(jax.checkpoint(function)), *args) == {"top_k": 2, "sort": 2}
    assert gradient.lower(*args).as_text().count("stablehlo.sort") == 1


@pytest.mark.parametrize("factor", LAYOUTS)
def test_donation(factor):
    function = functools.partial(layer, factor)
    args = arguments(0)
    step = jax.jit(lambda *args: (function(*args), gradient_of(function)(*args)), donate_argnums=(0, 1, 2))
    assert_like(step(*args), expected(factor)[0])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(args))


@pytest.mark.parametrize("factor", LAYOUTS)
def test_shard_map_on_one_device(factor):
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1], axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec("data"), PartitionSpec()
    function = jax.shard_map(
        functools.partial(layer, factor),
        mesh=mesh,
        in_specs=(split, whole, whole),
        out_specs=split,
        check_vma=False,
    )
    # The gradient is taken outside of it.
    found = jax.jit(lambda *args: (function(*args), gradient_of(function)(*args)))(*arguments(0))
    assert_like(found, expected(factor)[0])


def scalar_loss(tokens):
    _, router, weights = arguments(0)
    return loss(functools.partial(layer, BLOCK), tokens, router, weights)


def gates(tokens):
    return jnp.sum(route(tokens, arguments(0)[1]).gate)


@pytest.mark.parametrize("function", [scalar_loss, gates])
def test_forward_mode_is_refused(function):
    tokens, *_ = arguments(0)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jit(lambda x: jax.jvp(function, (x,), (x,))).lower(tokens)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jit(jax.jacfwd(function)).lower(tokens)


@pytest.mark.parametrize("function", [scalar_loss, gates])
def test_second_derivatives_are_refused(function):
    tokens, *_ = arguments(0)
    with pytest.raises(TypeError, match="first derivatives only"):
        jax.eval_shape(jax.grad(lambda x: jnp.sum(jnp.square(jax.grad(function)(x)))), tokens)
    with pytest.raises(TypeError, match="first derivatives only"):
        jax.eval_shape(jax.hessian(function), tokens)


@pytest.mark.parametrize("factor", LAYOUTS)
def test_float32_is_multiplied_as_float32_unless_another_precision_is_asked_for(factor):
    def precisions():
        run = jax.jit(jax.value_and_grad(functools.partial(loss, functools.partial(layer, factor)), argnums=(0, 1, 2)))
        text = run.trace(*arguments(0)).lower(lowering_platforms=("cuda",)).as_text()
        return collections.Counter(re.findall(r"dot_general.*?precision = \[(\w+), \w+\]", text))

    usual = precisions()
    assert set(usual) == {"HIGHEST"}
    with jax.default_matmul_precision("tensorfloat32"):
        # The experts', forward and back, but not the router's product and its two gradients.
        assert precisions() == {"HIGH": usual["HIGHEST"] - 3, "HIGHEST": 3}


# More experts than width: an [R, E] array or an [T, E, C] one would stand out.
LARGE = {"tokens": 512, "width": 8, "hidden": 8, "experts": 64}


def materialised(hlo: str) -> dict[str, int]:
    """The elements of the largest array of each operation outside of fusions, where every result is a buffer."""
    found: dict[str, int] = {}
    fused = False
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            fused = "fused" in line.split("(")[0]
        match = re.match(r"\s+(?:ROOT )?%?\S+ = (.*?) ([\w-]+)\(", line)
        if match and not fused:
            for dimensions in re.findall(r"\w+\[([\d,]+)\]", match[1]):
                elements = int(np.prod([int(size) for size in dimensions.split(",")]))
                found[match[2]] = max(found.get(match[2], 0), elements)
    return found


@pytest.mark.parametrize("factor", LAYOUTS)
def test_nothing_is_expanded_over_experts(factor):
    args = arguments(0, **LARGE)
    gradient = jax.jit(gradient_of(functools.partial(layer, factor)))
    tokens, experts, width = LARGE["tokens"], LARGE["experts"], LARGE["width"]
    logits, routed = tokens * experts, tokens * CHOICES * width
    rows = tokens * CHOICES + 15 * experts + 128  # every run rounded up to 16 rows, and the overhang of a tile
    allowed = max(logits, routed, rows * LARGE["hidden"], experts * width * LARGE["hidden"])
    assert allowed < rows * experts, "an [R, E] array must not fit under the limit"
    sizes = materialised(gradient.lower(*args).compile().as_text())
    assert sizes and max(sizes.values()) >= routed
    assert max(sizes.values()) <= allowed, {name: size for name, size in sizes.items() if size > allowed}
    # As written, before any fusion: comparisons of choices with experts at most.
    program = list(equations(jax.make_jaxpr(gradient)(*args).jaxpr))
    largest = max(program, key=lambda equation: max(variable.aval.size for variable in equation.outvars))
    assert max(variable.aval.size for variable in largest.outvars) <= tokens * CHOICES * experts, largest


@pytest.mark.parametrize("factor", [*LAYOUTS, 8.0])
def test_no_scatter_but_that_of_the_plan(factor):
    gradient = gradient_of(functools.partial(layer, factor))
    program = equations(jax.make_jaxpr(gradient)(*arguments(0)).jaxpr)
    scatters = [equation for equation in program if equation.primitive.name.startswith("scatter")]
    # The claim order both ways: the row of every choice, and the choice of every row. Nothing as wide as a token.
    assert [equation.primitive.name for equation in scatters] == ["scatter", "scatter"]
    results = [equation.outvars[0].aval for equation in scatters]
    assert all(result.ndim == 1 and result.dtype == jnp.int32 for result in results)
    assert TOKENS * CHOICES in [result.size for result in results]
    # A TPU, where scatters are slow, has none.
    program = equations(jax.make_jaxpr(gradient)(*arguments(0)).jaxpr, "tpu")
    assert not [equation for equation in program if equation.primitive.name.startswith("scatter")]
