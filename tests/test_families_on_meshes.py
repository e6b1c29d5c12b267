"""Every family on a mesh equals one device: searched with Hypothesis over routers, experts, meshes and loads."""

from typing import Any, cast

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from sharding_cases import MESHES, mesh_of
from test_families import (
    BIASES,
    CHOICES,
    EXPERTS,
    KINDS,
    ROUTERS,
    TOKENS,
    arguments,
    assert_near,
    router_of,
    weights_of,
)

from moe_kernels import MoeSpec, RouterWeights, moe_mlp, route

# Gates nearer than this may change places with the rounding of another program.
GAP = 1e-5
# Half a minute of the suite; the long profile tries a hundred.
EXAMPLES = max(3, hypothesis.settings().max_examples // 10)


def without_near_ties(seed: int, skew: float):
    """Tokens [T, D] whose logits are themselves: distances of an expert's tokens are drawn, not left to rounding."""
    rng = np.random.default_rng(seed)
    levels = np.linspace(1.0, -1.0, EXPERTS)
    liked = skew * np.arange(EXPERTS)
    orders = np.argsort(liked + rng.gumbel(size=(TOKENS, EXPERTS)), axis=1)
    scales = rng.permutation(np.linspace(0.5, 3.0, TOKENS))
    tokens = np.zeros((TOKENS, EXPERTS))
    np.put_along_axis(tokens, orders, scales[:, None] * levels, axis=1)
    return jnp.asarray(tokens, jnp.float32)


@pytest.mark.devices(8)
@hypothesis.settings(max_examples=EXAMPLES)
@hypothesis.given(
    mesh=strategies.sampled_from([shape for shape in MESHES if shape != (1, 1)]),
    name=strategies.sampled_from(sorted(ROUTERS)),
    biases=strategies.sampled_from(sorted(BIASES)),
    kind=strategies.sampled_from(("mlp", *KINDS)),
    capacity=strategies.sampled_from((None, 0.5, 1.0)),
    skew=strategies.sampled_from((0.0, 1.0)),
    seed=strategies.integers(0, 2**16),
)
def test_every_family_is_the_same_on_every_mesh(mesh, name, biases, kind, capacity, skew, seed):
    _, random, experts, dy = arguments(seed)
    router = router_of(RouterWeights(jnp.eye(EXPERTS), random.bias, random.choice_bias), biases)
    weights, options = cast(tuple[Any, dict[str, Any]], weights_of(experts, kind))
    spec = MoeSpec(num_choices=CHOICES, num_groups=8, capacity_factor=capacity, router=ROUTERS[name], **options)
    x = without_near_ties(seed, skew)
    first = np.asarray(route(x, router, spec).gate, np.float64)[:, 0].reshape(spec.num_groups, -1)
    hypothesis.assume(capacity is None or np.diff(np.sort(first, axis=1), axis=1).min() > GAP)

    def run(mesh):
        def loss(x, router, weights):
            out = moe_mlp(x, router, weights, spec, mesh=mesh)
            return jnp.sum(out.tokens * dy), (out.tokens, out.sums, out.kept)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(x, router, weights)

    ((_, (y, sums, kept)), gradients), ((_, (twin, twin_sums, twin_kept)), twin_gradients) = (
        run(m) for m in (mesh_of(*mesh), None)
    )
    np.testing.assert_array_equal(kept, twin_kept)
    np.testing.assert_array_equal(sums.wanted, twin_sums.wanted)
    found, wanted = (y, sums, gradients), (twin, twin_sums, twin_gradients)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        assert_near(a, b, jax.tree_util.keystr(path))
