"""Losses against the reference: from logits through the router's sums, values and gradients."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limoe.config.presets import preset
from limoe.config.settings import override
from limoe.model.moe import IMAGE, TEXT, LayerRouting
from limoe.train import losses as product
from limoe.train.losses import (
    AUXILIARY_LOSSES,
    LossTerms,
    auxiliary_weights,
    by_name,
    sigmoid_contrastive,
    softmax_contrastive,
)
from moe_kernels import MoeSpec, RouteInputs, route
from reference import losses

pytestmark = pytest.mark.compat

LAYERS, GROUPS, TOKENS, EXPERTS = 2, 3, 24, 4
GROUP = TOKENS // GROUPS
# Thresholds as high as they go, so that both global losses are active for any logits.
BASE = ["num_experts=4", "local_image=true", "threshold_experts_text=4", "threshold_experts_image=4", "batch_size=6"]
NAMES = tuple(AUXILIARY_LOSSES)


def config(*settings: str):
    latest = dict(setting.split("=", 1) for setting in (*BASE, *settings))
    return override(preset("tiny"), [f"{name}={value}" for name, value in latest.items()])


def auxiliary_terms(sums, config):
    return product.auxiliary_terms(sums, config.loss, config.model)


def total_loss(image, text, routing, scale, bias, config) -> LossTerms:
    return product.total_loss(image, text, routing, scale, bias, config.loss, config.model)


@functools.partial(jax.jit, static_argnames=("num_choices", "num_groups", "sigma"))
def sums_of(logits, noise, modality, mask, *, num_choices=1, num_groups=GROUPS, sigma=None):
    """Sums [L, G, ...] of every layer, through the product's router with the logits as tokens."""

    def of_layer(logits, noise):
        identity = jnp.eye(logits.shape[1], dtype=jnp.float32)
        return route(
            logits,
            identity,
            MoeSpec(num_choices=num_choices, num_groups=num_groups, num_modalities=2, noise_std=sigma),
            RouteInputs(noise, modality, mask),
        ).sums

    layers = [of_layer(logits[n], None if noise is None else noise[n]) for n in range(len(logits))]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def random_case(seed: int):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(LAYERS, TOKENS, EXPERTS)).astype(np.float32) * 2
    noise = (rng.normal(size=logits.shape) / EXPERTS).astype(np.float32)
    # Every group has some of both modalities that count.
    modality = np.tile(np.arange(GROUP) % 2, GROUPS).astype(np.int32)
    mask = rng.random(TOKENS) < 0.8
    mask.reshape(GROUPS, GROUP)[:, :2] = True
    return logits, noise, modality, mask


@functools.partial(jax.jit, static_argnums=(0, 1))
def terms_and_gradients(scope, num_choices, logits, noise, modality, mask):
    """Each auxiliary term [7], and its gradient with respect to the logits [7, L, T, E]."""

    def terms(logits):
        sums = sums_of(logits, noise, modality, mask, num_choices=num_choices)
        return jnp.stack([*auxiliary_terms(sums, config(f"aux_scope={scope}")).values()])

    value, pull = jax.vjp(terms, logits)
    return value, jax.vmap(lambda row: pull(row)[0])(jnp.eye(len(NAMES), dtype=jnp.float32))


def expected_gradient(name: str, clean, noisy, modality, num_choices: int):
    """The reference's hand-derived gradient of one term for the tokens of one scope, [N, E]."""
    gradient = np.zeros(clean.shape)
    kind = TEXT if name.endswith("text") else IMAGE
    mine = modality == kind
    if name == "importance":
        return losses.importance_loss_gradient(clean)
    if name == "load":
        return losses.load_loss_gradient(clean, noisy, num_choices)
    if name == "z":
        return losses.z_loss_gradient(clean)
    if name.startswith("local"):
        gradient[mine] = losses.local_entropy_loss_gradient(clean[mine])
    else:
        gradient[mine] = losses.thresholded_global_entropy_loss_gradient(clean[mine], 4)
    return gradient


@given(st.sampled_from(["batch", "group"]), st.sampled_from([1, 2]), st.integers(0, 10**6))
def test_every_term_and_its_gradient(scope, num_choices, seed):
    logits, noise, modality, mask = random_case(seed)
    value, gradient = terms_and_gradients(scope, num_choices, logits, noise, modality, mask)
    clean = logits.astype(np.float64)
    noisy = clean + noise
    scopes = [slice(None)] if scope == "batch" else [slice(g * GROUP, (g + 1) * GROUP) for g in range(GROUPS)]
    expected, slopes = np.zeros(len(NAMES)), np.zeros(gradient.shape)
    for layer in range(LAYERS):
        for part in scopes:
            counted = np.arange(TOKENS)[part][mask[part]]
            arguments = clean[layer, counted], noisy[layer, counted], modality[counted]
            by_definition = losses.auxiliary_losses(
                *arguments, num_choices=num_choices, threshold_experts_text=4, threshold_experts_image=4
            )
            expected += np.array(by_definition) / len(scopes)
            for i, name in enumerate(NAMES):
                slopes[i, layer, counted] += expected_gradient(name, *arguments, num_choices) / len(scopes)
    # 2 eps sqrt(number of terms), a few such sums in a row; thresholded entropies are differences near log 4.
    bound = 8 * 2 * 2.0**-23 * math.sqrt(TOKENS * EXPERTS)
    for i, name in enumerate(NAMES):
        assert abs(value[i] - expected[i]) <= bound * max(expected[i], LAYERS * math.log(4)), name
        # Slopes of the load and of the z-loss grow with 1/sigma and with the logits.
        size = max(np.abs(slopes[i]).max(), 1 / TOKENS)
        np.testing.assert_allclose(gradient[i], slopes[i], rtol=0, atol=8 * bound * size, err_msg=name)
        assert (slopes[i] != 0).any(), name
        assert (np.asarray(gradient[i])[:, ~mask] == 0).all(), name


def test_the_batch_s_statistics_do_not_depend_on_the_groups():
    logits, noise, modality, mask = random_case(1)
    by_groups = [
        auxiliary_terms(sums_of(logits, noise, modality, mask, num_groups=groups), config()) for groups in (1, 3)
    ]
    for other in by_groups[1:]:
        np.testing.assert_allclose([*other.values()], [*by_groups[0].values()], rtol=1e-5)
    apart = auxiliary_terms(sums_of(logits, noise, modality, mask), config("aux_scope=group"))
    assert abs(float(apart["importance"] - by_groups[0]["importance"])) > 1e-3


def test_the_load_follows_the_noise_s_deviation():
    logits, noise, modality, mask = random_case(2)
    sums = sums_of(logits[:1], noise[:1] / 2, modality, mask, sigma=0.5 / EXPERTS)
    load = auxiliary_terms(sums, config("router_noise=0.5"))["load"]
    clean = logits[0, mask].astype(np.float64)
    expected = losses.load_loss(clean, clean + noise[0, mask] / 2, sigma=0.5 / EXPERTS)
    np.testing.assert_allclose(load, expected, rtol=1e-5)
    quiet = config("router_noise=0", "load=false")
    assert float(auxiliary_terms(sums_of(logits, None, modality, mask), quiet)["load"]) == 0


@pytest.mark.parametrize("scope", ["batch", "group"])
def test_a_modality_without_tokens_costs_nothing(scope):
    logits, noise, modality, mask = random_case(3)

    def terms(logits, modality):
        found = auxiliary_terms(sums_of(logits, noise, modality, mask), config(f"aux_scope={scope}"))
        return jnp.stack([*found.values()])

    images = jnp.zeros_like(modality)
    value, gradient = jax.jit(
        lambda logits: (terms(logits, images), jax.grad(lambda x: terms(x, images).sum())(logits))
    )(logits)
    found = dict(zip(NAMES, value, strict=True))
    assert float(found["local_text"]) == float(found["global_text"]) == 0
    assert float(found["local_image"]) > 0
    assert np.isfinite(gradient).all()


# Paper, section 3.
IMAGE_LOGITS = [[2, 0.5, -1, 0], [1.5, 1, 0, -0.5], [-0.5, 2.5, 0.5, 0], [0, 0.2, 1.8, -1]]
TEXT_LOGITS = [[0.9, 1, 0.8, 0.7], [0.3, 0.1, 0.2, 0.6]]


def test_the_paper_s_six_tokens():
    logits = jnp.array([IMAGE_LOGITS + TEXT_LOGITS], jnp.float32)
    modality = jnp.array([IMAGE] * 4 + [TEXT] * 2, jnp.int32)
    sums = sums_of(logits, jnp.zeros_like(logits), modality, None, num_groups=1)
    np.testing.assert_allclose(sums.probability.sum((0, 1, 2)), [1.8807, 1.8873, 1.4144, 0.8176], atol=5e-5)
    np.testing.assert_allclose(sums.load.sum((0, 1, 2)) / 6, [0.2433, 0.1743, 0.1278, 0.1025], atol=5e-5)
    terms = auxiliary_terms(sums, config())
    found = {name: round(float(value), 6) for name, value in terms.items()}
    assert found == pytest.approx(
        {
            "importance": 0.085332,
            "load": 0.109286,
            "z": 5.048882,
            "local_image": 0.914121,
            "local_text": 1.373776,
            "global_image": math.log(4) - 1.259481,
            "global_text": math.log(4) - 1.384338,
        },
        abs=2e-6,
    )


def oracle_config():
    return override(preset("b16"), ["local_image=true"])  # E = 32, thresholds log 9 and log 20


def test_the_paper_s_uniform_gates():
    logits = jnp.zeros((1, 64, 32), jnp.float32)
    modality = jnp.arange(64, dtype=jnp.int32) % 2
    sums = sums_of(logits, logits, modality, None, num_groups=1)
    terms = auxiliary_terms(sums, oracle_config())
    assert float(terms["importance"]) == pytest.approx(0, abs=1e-6)
    assert float(terms["z"]) == pytest.approx(12.0113, abs=5e-5)
    assert float(terms["local_image"]) == pytest.approx(3.4657, abs=5e-5)
    assert float(terms["local_text"]) == pytest.approx(3.4657, abs=5e-5)
    assert float(terms["global_image"]) == float(terms["global_text"]) == 0


def test_the_paper_s_single_expert():
    logits = jnp.zeros((1, 64, 32), jnp.float32).at[:, :, 7].set(200.0)
    modality = jnp.arange(64, dtype=jnp.int32) % 2
    terms = auxiliary_terms(sums_of(logits, None, modality, None, num_groups=1), oracle_config())
    assert float(terms["importance"]) == pytest.approx(31, rel=1e-6)
    assert float(terms["local_image"]) == float(terms["local_text"]) == 0
    assert float(terms["global_text"]) == pytest.approx(2.1972, abs=5e-5)
    assert float(terms["global_image"]) == pytest.approx(2.9957, abs=5e-5)


@given(st.integers(0, 10**6), st.floats(-1, 3), st.floats(-10, 0), st.integers(0, 7))
def test_contrastive_losses(seed, log_scale, bias, num_captions):
    """With 7 pairs and so many captions, whose equal ones are masked; with none all pairs are compared."""
    rng = np.random.default_rng(seed)
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, 7, 5)))
    scale = np.exp(log_scale)
    arguments = [jnp.asarray(x, jnp.float32) for x in (image, text, scale, bias)]
    captions = jnp.asarray(rng.integers(0, 3, (7, 2))[rng.integers(0, num_captions, 7)]) if num_captions else None
    cases = [
        (softmax_contrastive, arguments[:3], losses.softmax_contrastive_loss, losses.softmax_contrastive_gradient, 0),
        (sigmoid_contrastive, arguments, losses.sigmoid_contrastive_loss, losses.sigmoid_contrastive_gradient, bias),
    ]
    for mine, given_, theirs, slope, shift in cases:
        value, gradient = jax.value_and_grad(
            functools.partial(mine, captions=captions), argnums=tuple(range(len(given_)))
        )(*given_)
        logits = losses.contrastive_logits(image, text, log_scale, shift)
        if captions is not None:
            logits = losses.without_equal_captions(logits, np.asarray(captions))
        dlogits = slope(logits)
        # A logit as large as scale carries an error of eps times that.
        bound = 16 * 2.0**-23 * max(scale, abs(bias), 1.0) * math.sqrt(7)
        assert abs(value - theirs(logits)) <= bound * max(1.0, theirs(logits))
        expected = [
            scale * dlogits @ text,
            scale * dlogits.T @ image,
            (dlogits * (image @ text.T)).sum(),
            dlogits.sum(),
        ]
        for got, want in zip(gradient, expected, strict=False):
            np.testing.assert_allclose(got, want, rtol=0, atol=bound * max(scale, 1.0))


PAIRS = jnp.eye(3, dtype=jnp.float32)


def loss_of(sums, *settings: str) -> LossTerms:
    """The loss of three matching pairs and the given sums of the router."""
    return total_loss(
        PAIRS, PAIRS, LayerRouting(sums, sums.wanted), jnp.float32(10), jnp.float32(-10), config(*settings)
    )


@pytest.mark.parametrize("contrastive", ["softmax", "sigmoid"])
def test_the_total_is_the_weighted_mean_of_what_is_active(contrastive):
    weights = {"importance": 0.5, "z": 2.0, "global_text": 3.0}
    off = [f"{name}=false" for name in NAMES if name not in weights]
    settings = [f"contrastive={contrastive}", *off, *(f"{name}_weight={value}" for name, value in weights.items())]
    terms = loss_of(sums_of(*random_case(4)), *settings, "aux_weight=0.08")
    mean = np.mean([weight * float(terms.auxiliary[name]) for name, weight in weights.items()])
    assert float(terms.auxiliary_total) == pytest.approx(0.08 * mean, rel=1e-5)
    assert float(terms.total) == pytest.approx(float(terms.contrastive) + 0.08 * mean, rel=1e-5)
    # What is off is still told.
    assert float(terms.auxiliary["local_text"]) > 0
    assert set(by_name(terms)) == {"total", "contrastive", "auxiliary_total", *NAMES}


def test_weights_of_the_paper():
    weights = auxiliary_weights(preset("b16").loss)
    assert weights == pytest.approx(dict.fromkeys(NAMES, 0.04 / 6) | {"local_image": 0.0})


def test_a_term_that_is_off_does_not_spoil_the_total():
    sums = sums_of(*random_case(4))
    sums = sums._replace(logsumexp_squared=sums.logsumexp_squared * np.nan)
    off, on = loss_of(sums, "z=false"), loss_of(sums)
    assert math.isfinite(off.total) and math.isnan(off.auxiliary["z"]) and math.isnan(on.total)


def test_a_dense_model_has_no_auxiliary_loss():
    terms = total_loss(PAIRS, PAIRS, None, jnp.float32(10), None, config("moe_layers=()"))
    assert float(terms.total) == float(terms.contrastive) and not any(terms.auxiliary.values())


@pytest.mark.parametrize(("setting", "loss"), [("false", math.log1p(2 * math.exp(-10))), ("true", 0.0)])
def test_equal_captions_are_masked_only_if_that_is_set(setting, loss):
    chosen = config("moe_layers=()", f"mask_equal_captions={setting}")
    compared = product.Compared(captions=jnp.zeros((3, 2), jnp.int32))
    terms = product.total_loss(PAIRS, PAIRS, None, jnp.float32(10), None, chosen.loss, chosen.model, compared)
    assert float(terms.contrastive) == pytest.approx(loss, rel=1e-5)


@jax.jit
def sums_and_router_gradient(dsums):
    """Sums of tokens whose logits are shifted by a router's row [E], and the pull of their cotangents to that row."""
    logits, noise, modality, mask = random_case(4)
    shift = jnp.zeros(EXPERTS, jnp.float32)
    sums, pull = jax.vjp(lambda shift: sums_of(logits + shift, noise, modality, mask), shift)
    return sums, pull(sums if dsums is None else dsums)[0]


@functools.cache
def router_gradient(*settings: str) -> np.ndarray:
    sums, _ = sums_and_router_gradient(None)
    dsums = jax.grad(lambda sums: loss_of(sums, *settings).total)(sums)
    return np.asarray(sums_and_router_gradient(dsums)[1])


@pytest.mark.parametrize("name", NAMES)
def test_the_router_s_gradient_moves_with_each_weight(name):
    before, after, off = router_gradient(), router_gradient(f"{name}_weight=3"), router_gradient(f"{name}=false")
    assert np.abs(after - before).max() > 1e-6
    assert np.abs(off - before).max() > 1e-6
    # Three times the weight adds twice the term's own gradient.
    alone = router_gradient(*(f"{other}=false" for other in NAMES if other != name))
    np.testing.assert_allclose(after - before, 2 / len(NAMES) * alone, atol=1e-7, rtol=1e-4)
