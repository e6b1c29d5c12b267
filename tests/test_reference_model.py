"""The reference model: against a vectorised twin, and what may and may not influence what."""

from typing import Any

import numpy as np
import pytest

from reference import losses, model, softmax
from reference.activations import Activation, gelu

B, D, F, E, P, PATCH, NI, NT, V, HEADS = 4, 8, 6, 3, 5, 2, 6, 4, 11, 2


def make_parameters(seed: int = 0, moe_layers: tuple[int, ...] = (1,), depth: int = 3) -> dict[str, Any]:
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape) * 0.5

    def norm() -> dict[str, np.ndarray]:
        return {"scale": 1.0 + normal(D), "bias": normal(D)}

    def linear(inputs: int, outputs: int) -> dict[str, np.ndarray]:
        return {"kernel": normal(inputs, outputs), "bias": normal(outputs)}

    blocks = []
    for index in range(depth):
        names = ("query", "key", "value", "out")
        block: dict[str, Any] = {"norm1": norm(), "attention": {n: linear(D, D) for n in names}, "norm2": norm()}
        if index in moe_layers:
            block["moe"] = {"router": normal(D, E), "w1": normal(E, D, F), "b1": normal(E, F)}
            block["moe"] |= {"w2": normal(E, F, D), "b2": normal(E, D)}
        else:
            block["mlp"] = {"w1": normal(D, F), "b1": normal(F), "w2": normal(F, D), "b2": normal(D)}
        blocks.append(block)
    return {
        "patch": linear(PATCH * PATCH * 3, D),
        "token_table": normal(V, D),
        "image_position": normal(NI, D),
        "text_position": normal(NT, D),
        "blocks": blocks,
        "norm": norm(),
        "image_projection": normal(D, P),
        "text_projection": normal(D, P),
    }


def make_batch(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    text = random.integers(1, V, size=(B, NT))
    text[1, 2:] = 0
    text[3, 1:] = 0
    return random.normal(size=(B, 4, 6, 3)), text


def run(parameters: dict[str, Any], image: np.ndarray, text: np.ndarray, **settings: Any) -> model.ModelOutput:
    return model.forward(parameters, image, text, num_heads=HEADS, patch_size=PATCH, **settings)


def twin(
    parameters: dict[str, Any], image: np.ndarray, text: np.ndarray, mask_padding: bool, activation: Activation
) -> list[np.ndarray]:
    """The same function for K = E and no capacity: whole tensors, every expert on every token, masks by -inf."""

    def norm(x: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    cut = image.reshape(B, 2, PATCH, 3, PATCH, 3).transpose(0, 1, 3, 2, 4, 5).reshape(B, NI, -1)
    x = np.concatenate(
        [
            cut @ parameters["patch"]["kernel"] + parameters["patch"]["bias"] + parameters["image_position"],
            parameters["token_table"][text] + parameters["text_position"],
        ],
        axis=1,
    )
    read = text != 0 if mask_padding else np.ones_like(text, bool)
    valid = np.concatenate([np.ones((B, NI), bool), read], axis=1)
    kind = np.arange(NI + NT) >= NI
    seen = (kind[:, None] == kind[None, :]) & valid[:, None, :]
    for block in parameters["blocks"]:
        y = norm(x, block["norm1"])
        q, k, v = (
            (y @ block["attention"][n]["kernel"] + block["attention"][n]["bias"]).reshape(B, -1, HEADS, D // HEADS)
            for n in ("query", "key", "value")
        )
        score = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(D / HEADS)
        weight = softmax(np.where(seen[:, None], score, -np.inf))
        mixed = np.einsum("bhnm,bmhd->bnhd", weight, v).reshape(x.shape)
        x = x + mixed @ block["attention"]["out"]["kernel"] + block["attention"]["out"]["bias"]
        y = norm(x, block["norm2"])
        if "mlp" in block:
            x = (
                x
                + gelu(y @ block["mlp"]["w1"] + block["mlp"]["b1"], activation) @ block["mlp"]["w2"]
                + block["mlp"]["b2"]
            )
        else:
            moe = block["moe"]
            hidden = gelu(np.einsum("bnd,edf->bnef", y, moe["w1"]) + moe["b1"], activation)
            each = np.einsum("bnef,efd->bned", hidden, moe["w2"]) + moe["b2"]
            x = x + np.einsum("bne,bned->bnd", softmax(y @ moe["router"]), each) * valid[..., None]
    x = norm(x, parameters["norm"])
    out = []
    for span, name in ((slice(0, NI), "image_projection"), (slice(NI, None), "text_projection")):
        weight = valid[:, span, None].astype(float)
        pooled = (x[:, span] * weight).sum(1) / weight.sum(1) @ parameters[name]
        out.append(pooled / np.linalg.norm(pooled, axis=-1, keepdims=True))
    return out


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu_erf"])
@pytest.mark.parametrize("text_padding", ["keep", "mask"])
def test_equals_a_vectorised_twin(text_padding: str, activation: Activation) -> None:
    parameters, (image, text) = make_parameters(moe_layers=(0, 2)), make_batch()
    found = run(parameters, image, text, num_choices=E, text_padding=text_padding, activation=activation)
    expected = twin(parameters, image, text, text_padding == "mask", activation)
    np.testing.assert_allclose(found.image, expected[0], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.text, expected[1], rtol=1e-10, atol=1e-12)
    assert len(found.layers) == 2


def test_embeddings_have_unit_length_and_layers_have_sums_per_modality() -> None:
    parameters, (image, text) = make_parameters(), make_batch()
    kept = run(parameters, image, text, group_examples=2)
    np.testing.assert_allclose((kept.image**2).sum(axis=1), 1.0, rtol=1e-14)
    np.testing.assert_allclose((kept.text**2).sum(axis=1), 1.0, rtol=1e-14)
    assert kept.layers[0].sums.tokens.tolist() == [[2 * NI, 2 * NT]] * 2
    masked = run(parameters, image, text, group_examples=2, text_padding="mask")
    assert masked.layers[0].sums.tokens.tolist() == [[2 * NI, 6], [2 * NI, 5]]
    loss = losses.softmax_contrastive_loss(losses.contrastive_logits(kept.image, kept.text, np.log(10.0)))
    assert 0.0 < loss < 20.0


def test_modalities_meet_only_in_the_capacity_of_the_experts() -> None:
    parameters, (image, text) = make_parameters(), make_batch()
    other = text % (V - 1) + 1
    assert (run(parameters, image, text).image == run(parameters, image, other).image).all()
    assert (run(parameters, image, text).text != run(parameters, image, other).text).any()
    tight: dict[str, Any] = {"capacity_factor": 0.7, "priority": "modality", "first_modality": 1}
    assert (run(parameters, image, text, **tight).image != run(parameters, image, other, **tight).image).any()
    tight["first_modality"] = 0
    assert (run(parameters, image, text, **tight).image == run(parameters, image, other, **tight).image).all()


def test_groups_are_whole_examples_and_independent() -> None:
    parameters, (image, text) = make_parameters(), make_batch()
    alone = run(parameters, image[2:], text[2:], capacity_factor=0.6)
    both = run(parameters, image, text, capacity_factor=0.6, group_examples=2)
    np.testing.assert_allclose(both.image[2:], alone.image, rtol=1e-13)
    np.testing.assert_array_equal(both.layers[0].kept[1], alone.layers[0].kept[0])
    together = run(parameters, image, text, capacity_factor=0.6)
    assert (together.layers[0].kept.sum(axis=0) != both.layers[0].kept.sum(axis=0)).any()


def test_masked_padding_influences_nothing() -> None:
    parameters, (image, text) = make_parameters(), make_batch()
    settings: dict[str, Any] = {"capacity_factor": 0.6, "text_padding": "mask"}
    before = run(parameters, image, text, **settings)
    parameters["token_table"][0] += 1.0
    after = run(parameters, image, text, **settings)
    assert (before.image == after.image).all() and (before.text == after.text).all()
    keep = {**settings, "text_padding": "keep"}
    kept = run(parameters, image, text, **keep)
    parameters["token_table"][0] += 1.0
    assert (kept.text != run(parameters, image, text, **keep).text).any()


def test_every_moe_layer_takes_its_own_noise_and_priority() -> None:
    parameters, (image, text) = make_parameters(moe_layers=(0, 2)), make_batch()
    num_tokens = B * (NI + NT)
    noise = [np.zeros((num_tokens, E)), np.zeros((num_tokens, E))]
    noise[1][:, 2] = 1e3
    found = run(parameters, image, text, noise=noise)
    assert (found.layers[1].routing.expert == 2).all() and (found.layers[0].routing.expert != 2).any()
    values = [np.arange(num_tokens, dtype=float), -np.arange(num_tokens, dtype=float)]
    found = run(parameters, image, text, noise=noise, priority="random", priority_values=values, capacity_factor=1)
    assert np.flatnonzero(found.layers[1].plan.position[:, 0] >= 0).tolist() == list(range(14))
    lowest = [np.flatnonzero(found.layers[0].routing.expert[:, 0] == e)[0] for e in range(E)]
    crowded = found.layers[0].sums.wanted[0].sum(axis=0) > 14
    assert crowded.any()
    for e in np.flatnonzero(crowded):
        assert found.layers[0].plan.position[lowest[e], 0] == -1


def test_bad_arguments_are_refused() -> None:
    parameters, (image, text) = make_parameters(), make_batch()
    with pytest.raises(ValueError, match="4 examples cannot be cut into groups of 3"):
        run(parameters, image, text, group_examples=3)
    with pytest.raises(ValueError, match="4 x 5 cannot be cut into patches of 2"):
        run(parameters, image[:, :, :5], text)
    text[2] = 0
    with pytest.raises(ValueError, match="only pad tokens"):
        run(parameters, image, text, text_padding="mask")
