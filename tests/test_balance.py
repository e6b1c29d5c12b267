"""Losses for balance against their formulas, written for each token; padding is left out, groups and layers stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_cases import assert_close

from moe_kernels import MoeSpec, RouteInputs, RouterSpec, RouterWeights, balance, route

TOKENS, WIDTH, EXPERTS, CHOICES, GROUPS = 24, 5, 6, 2, 3
MASK = np.arange(TOKENS) % 5 != 3
SPEC = MoeSpec(num_choices=CHOICES, num_groups=GROUPS)


def draw():
    rng = np.random.default_rng(0)
    tokens, kernel = rng.normal(size=(TOKENS, WIDTH)), rng.normal(size=(WIDTH, EXPERTS))
    tokens[~MASK] = np.nan
    return jnp.asarray(tokens, jnp.float32), jnp.asarray(kernel, jnp.float32)


def by_formula(name, tokens, kernel, family, members):
    """A loss over the tokens `members`, from logits."""
    logits = jnp.dot(tokens[members], kernel, precision=jax.lax.Precision.HIGHEST)
    scores = jax.nn.softmax(logits) if family == "softmax" else jax.nn.sigmoid(logits)
    share = scores / scores.sum(axis=1, keepdims=True)
    if name == "z_loss":
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) ** 2)
    if name == "importance_loss":
        return (share.sum(axis=0).std() / share.sum(axis=0).mean()) ** 2
    chosen = jax.nn.one_hot(jax.lax.top_k(logits, CHOICES)[1], EXPERTS)
    if name == "balance_loss":  # as Hugging Face's Mixtral has it, choice by choice
        return EXPERTS * jnp.sum(chosen.mean(axis=0) * share.mean(axis=0))
    fraction = EXPERTS / (CHOICES * len(logits)) * chosen.sum(axis=(0, 1))
    return jnp.sum(fraction * share.mean(axis=0))


@pytest.mark.parametrize("family", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", ["balance_loss", "sequence_balance_loss", "importance_loss", "z_loss"])
def test_value_and_gradient_by_group_and_over_the_batch(name, family):
    tokens, kernel = draw()
    spec, loss = MoeSpec(CHOICES, GROUPS, router=RouterSpec(family)), getattr(balance, name)

    def mine(kernel):
        sums = route(tokens, kernel, spec, RouteInputs(mask=jnp.asarray(MASK))).sums
        return jnp.append(loss(sums), loss(balance.whole_batch(sums)))

    parts = [np.flatnonzero(MASK & (np.arange(TOKENS) // (TOKENS // GROUPS) == g)) for g in range(GROUPS)]
    parts.append(np.flatnonzero(MASK))

    def twin(kernel):
        return jnp.stack([by_formula(name, tokens, kernel, family, members) for members in parts])

    assert_close(jax.jit(mine)(kernel), jax.jit(twin)(kernel), length=TOKENS * EXPERTS, name=name)
    found, wanted = jax.jit(jax.jacrev(mine))(kernel), jax.jit(jax.jacrev(twin))(kernel)
    scale = np.full(wanted.shape[:-1], np.abs(wanted).max())
    assert_close(found, wanted, length=TOKENS * EXPERTS, name=f"gradient of {name}", scale=scale)


def test_the_load_follows_the_noise():
    tokens, kernel = draw()
    noise = jnp.asarray(np.random.default_rng(1).normal(size=(TOKENS, EXPERTS)) / EXPERTS, jnp.float32)
    sums = route(tokens, kernel, SPEC, RouteInputs(mask=jnp.asarray(MASK), noise=noise)).sums
    load = np.asarray(sums.load, np.float64).sum(axis=1)
    wanted = (load.std(axis=1) / load.mean(axis=1)) ** 2
    np.testing.assert_allclose(balance.load_loss(sums), wanted, rtol=1e-5)


def test_layers_stay_and_groups_without_tokens_add_nothing():
    tokens, kernel = draw()
    mask = jnp.asarray(MASK & (np.arange(TOKENS) >= TOKENS // GROUPS))
    sums = route(tokens, RouterWeights(kernel), SPEC, RouteInputs(mask=mask)).sums
    layers = jax.tree.map(lambda a: jnp.stack([a, a]), sums)
    for loss in (balance.balance_loss, balance.sequence_balance_loss, balance.importance_loss, balance.z_loss):
        one, two = loss(sums), loss(layers)
        assert one[0] == 0 and (one[1:] > 0).all() and two.shape == (2, GROUPS)
        np.testing.assert_array_equal(two, np.stack([one, one]))
        assert np.isfinite(jax.grad(lambda s, loss=loss: loss(s).sum())(sums).probability).all()
