"""The whole model against the reference, and what it promises about attention, depth and size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend import core
from model_cases import draws, reference_parameters, scaled, small_batch, small_config, small_model

import reference
from limoe.config.presets import preset
from limoe.model.build import abstract_model
from limoe.model.describe import describe
from limoe.model.moe import RoutingContext
from limoe.model.tower import Block, scale_images
from limoe.train.gradient import gradient

PRIORITIES = {"image_first": ("modality", 0), "text_first": ("modality", 1)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def encode(graph, training, parameters, images, text, context):
    return nnx.merge(graph, parameters)(scale_images(images), text, context if training else None)


def context_of(seed: int = 0) -> RoutingContext:
    return RoutingContext(jax.random.key(seed), jnp.int32(0), group_stride=0)


def twin(config, parameters, images, text, context):
    """The reference's output for the same parameters and draws; in evaluation without a context."""
    model = config.model
    priority, first = PRIORITIES.get(model.priority, (model.priority, 0))
    settings = {}
    if context is not None:
        noise, order = draws(config, context)
        settings = {
            "capacity_factor": model.capacity_factor,
            "group_examples": model.group_examples,
            "noise": noise if model.router_noise else None,
            "priority": priority,
            "priority_values": order if priority == "random" else None,
            "first_modality": first,
        }
    return reference.model.forward(
        reference_parameters(config, parameters),
        scaled(images),
        text,
        num_heads=model.num_heads,
        patch_size=model.patch_size,
        num_choices=model.num_choices,
        activation=model.activation,
        text_padding=model.text_padding,
        **settings,
    )


# Towers: dense, cut into two segments, a scan with repeats, a scan after single blocks, written out.
TOWERS = {
    "dense": ("depth=2", "moe_layers=()"),
    "one layer, padding kept": ("moe_layers=1", "text_padding=keep"),
    "scan of two repeats, K=2": ("depth=4", "moe_layers=1,3", "num_choices=2"),
    "single blocks, then a scan": ("depth=5", "moe_layers=0,3,4", "priority=random", "text_padding=keep"),
    "a period of two layers, unrolled": ("depth=6", "moe_layers=0,1,3,4", "scan_unroll=2", "priority=text_first"),
    "erf, arrival, no noise": (
        "moe_layers=0,2",
        "activation=gelu_erf",
        "priority=arrival",
        "router_noise=0",
        "load=false",
    ),
}


@pytest.mark.parametrize("name", TOWERS)
def test_the_model_is_the_reference_s(name):
    config = small_config(*TOWERS[name])
    graph, parameters = small_model(config)
    images, text = small_batch(config)
    contexts = [None] if not config.model.moe_layers else [None, context_of()]
    for context in contexts:
        mine = encode(graph, context is not None, parameters, images, text, context)
        theirs = twin(config, parameters, images, text, context)
        # Embeddings have length 1; each block adds a few sums over its width.
        bound = 8 * config.model.depth * 2 * 2.0**-23 * np.sqrt(config.model.mlp_width)
        np.testing.assert_allclose(mine.embeddings.image, theirs.image, rtol=0, atol=bound)
        np.testing.assert_allclose(mine.embeddings.text, theirs.text, rtol=0, atol=bound)
        if not config.model.moe_layers:
            assert mine.routing is None
            continue
        for layer, expected in enumerate(theirs.layers):
            np.testing.assert_array_equal(mine.routing.kept[layer], expected.kept, err_msg=f"kept in layer {layer}")
            for field, values, wanted in zip(mine.routing.sums._fields, mine.routing.sums, expected.sums, strict=True):
                size = max(1.0, np.abs(wanted).max())
                np.testing.assert_allclose(values[layer], wanted, rtol=0, atol=64 * bound * size, err_msg=field)
        if context is None:
            np.testing.assert_array_equal(mine.routing.kept, mine.routing.sums.wanted)


def test_something_is_dropped_in_training():
    config = small_config(*TOWERS["scan of two repeats, K=2"])
    graph, parameters = small_model(config)
    routing = encode(graph, True, parameters, *small_batch(config), context_of()).routing
    assert (routing.kept.sum((1, 2, 3)) < routing.sums.wanted.sum((1, 2, 3))).all()


@functools.partial(jax.jit, static_argnums=0)
def assignments(graph, parameters, images, text):
    return nnx.merge(graph, parameters).assignments(scale_images(images), text)


@pytest.mark.parametrize("padding", ["keep", "mask"])
def test_a_modality_alone_has_the_embeddings_and_experts_of_both(padding):
    config = small_config(*TOWERS["single blocks, then a scan"][:2], f"text_padding={padding}")
    graph, parameters = small_model(config)
    images, text = small_batch(config)

    @jax.jit
    def alone(parameters, images, text):
        model, scaled = nnx.merge(graph, parameters), scale_images(images)
        parts = model.assignments(scaled, None), model.assignments(None, text)
        return model.encode_image(scaled), model.encode_text(text), parts

    image, words, parts = alone(parameters, images, text)
    both = encode(graph, False, parameters, images, text, None).embeddings
    # Sums of the same terms, in an order that may depend on the number of rows.
    bound = 8 * np.finfo(np.float32).eps * np.sqrt(config.model.width)
    np.testing.assert_allclose(image, both.image, atol=bound)
    np.testing.assert_allclose(words, both.text, atol=bound)
    expert = np.concatenate([part.expert for part in parts], axis=2)
    np.testing.assert_array_equal(expert, assignments(graph, parameters, images, text).expert)


def test_text_alone_costs_what_text_costs():
    model = preset("b16").model
    graph, parameters = abstract_model(preset("b16"))
    text = jax.ShapeDtypeStruct((8, model.text_length), jnp.int32)
    images = jax.ShapeDtypeStruct((8, model.image_size, model.image_size, 3), jnp.float32)

    def flops(method, *inputs):
        run = jax.jit(lambda parameters, *inputs: getattr(nnx.merge(graph, parameters), method)(*inputs))
        return run.lower(parameters, *inputs).cost_analysis()["flops"]

    both = jax.jit(lambda parameters, *inputs: nnx.merge(graph, parameters)(*inputs, None).embeddings.text)
    assert both.lower(parameters, images, text).cost_analysis()["flops"] > 8 * flops("encode_text", text)


def test_assignments_are_the_first_choices_of_an_evaluation():
    config = small_config(*TOWERS["single blocks, then a scan"][:2], "text_padding=mask", "num_choices=2")
    graph, parameters = small_model(config)
    images, text = small_batch(config)
    found = assignments(graph, parameters, images, text)
    theirs = twin(config, parameters, images, text, None)
    present = np.concatenate([np.ones((4, config.model.num_image_tokens), bool), text != 0], axis=1)
    assert found.expert.shape == found.gate.shape == (3, 4, config.model.tokens_per_example)
    assert not present.all()
    for layer, expected in enumerate(theirs.layers):
        routing = expected.routing
        np.testing.assert_array_equal(
            np.asarray(found.expert[layer])[present], routing.expert[:, 0].reshape(present.shape)[present]
        )
        np.testing.assert_allclose(found.gate[layer], routing.gate[:, 0].reshape(present.shape), atol=1e-5)
        assert (np.asarray(found.gate[layer])[~present] == 0).all()


def test_assignments_of_a_dense_model_are_refused():
    config = small_config(*TOWERS["dense"])
    graph, parameters = small_model(config)
    with pytest.raises(ValueError, match="dense"):
        assignments(graph, parameters, *small_batch(config))


def test_attention_never_mixes_modalities():
    config = small_config(*TOWERS["dense"])
    graph, parameters = small_model(config)
    images, text = small_batch(config)
    other_images, other_text = small_batch(config, seed=1)
    base = encode(graph, False, parameters, images, text, None).embeddings
    texts = encode(graph, False, parameters, images, other_text, None).embeddings
    pictures = encode(graph, False, parameters, other_images, text, None).embeddings
    np.testing.assert_array_equal(texts.image, base.image)
    np.testing.assert_array_equal(pictures.text, base.text)
    assert (np.asarray(texts.text) != base.text).any() and (np.asarray(pictures.image) != base.image).any()


@pytest.mark.parametrize("padding", ["mask", "keep"])
def test_padding_counts_only_where_it_is_kept(padding):
    config = small_config(*TOWERS["dense"], f"text_padding={padding}")
    graph, parameters = small_model(config)
    images, text = small_batch(config)
    base = encode(graph, False, parameters, images, text, None).embeddings
    # What the table holds for padding, and where padding stands.
    changed = {**parameters, "token_table": parameters["token_table"].at[0].add(3.0)}
    after = encode(graph, False, changed, images, text, None).embeddings
    padded = (text == 0).any(axis=1)
    assert padded.any() and not padded.all()
    same = (np.asarray(after.text) == base.text).all(axis=1)
    np.testing.assert_array_equal(same, ~padded if padding == "keep" else np.ones_like(padded))


@pytest.mark.parametrize("changed", ["remat=blocks", "scan_unroll=2"])
def test_remat_and_unrolling_change_no_number(changed):
    base = small_config(*TOWERS["scan of two repeats, K=2"])
    graph, parameters = small_model(base)
    images, text = small_batch(base)
    expected, terms, routing = jitted_gradient(graph, base)(parameters, images, text)
    config = small_config(*TOWERS["scan of two repeats, K=2"], changed)
    graph, _ = small_model(config)
    found, other_terms, other_routing = jitted_gradient(graph, config)(parameters, images, text)
    np.testing.assert_allclose(other_terms.total, terms.total, rtol=1e-6)
    np.testing.assert_array_equal(other_routing.kept, routing.kept)
    norm = float(jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(expected))))
    # 2 eps sqrt(tokens of the batch) of the whole gradient, a few sums in a row.
    bound = 8 * 2 * 2.0**-23 * np.sqrt(4 * base.model.tokens_per_example) * norm
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=bound), found, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_of_bfloat16_nothing_as_large_as_the_tokens_is_kept_in_float32(dtype):
    config = small_config("moe_layers=()", "remat=attention", "text_padding=keep", f"compute_dtype={dtype}")
    graph, parameters = abstract_model(config)

    def kept(parameters, images, text):
        tower = lambda parameters: nnx.merge(graph, parameters)(scale_images(images), text, None).embeddings  # noqa: E731
        return jax.tree.leaves(jax.vjp(tower, parameters)[1])

    images, text = small_batch(config)
    tokens = len(text) * config.model.tokens_per_example
    # What is kept of equal layers is stacked.
    large = [leaf.dtype for leaf in jax.eval_shape(kept, parameters, images, text) if tokens in leaf.shape[:2]]
    assert large.count(jnp.dtype(dtype)) >= 8  # of each layer norms, projections, MLP
    assert dtype == "float32" or jnp.dtype("float32") not in large


def jitted_gradient(graph, config):
    step = jnp.int32(0)
    function = lambda parameters, images, text: gradient(graph, parameters, images, text, step, config)  # noqa: E731
    return jax.jit(function)


def equations(jaxpr) -> int:
    """All equations of a program, those of loops and calls included once."""
    total = 0
    for equation in jaxpr.eqns:
        total += 1
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, core.ClosedJaxpr):
                    total += equations(inner.jaxpr)
                elif isinstance(inner, core.Jaxpr):
                    total += equations(inner)
    return total


def program_size(depth: int) -> int:
    moe_layers = ",".join(str(layer) for layer in range(1, depth, 2))
    config = small_config(f"depth={depth}", f"moe_layers={moe_layers}")
    graph, parameters = abstract_model(config)
    images, text = small_batch(config)

    def run(parameters):
        return gradient(graph, parameters, jnp.asarray(images), jnp.asarray(text), jnp.int32(0), config)

    return equations(jax.make_jaxpr(run)(parameters).jaxpr)


def test_a_deep_model_is_as_small_a_program_as_a_shallow_one():
    assert program_size(32) == program_size(8) > 1000


def test_an_expert_starts_like_the_dense_mlp():
    model = small_config("depth=2", "moe_layers=1", "width=64", "mlp_width=128", "num_experts=3").model
    dense, experts = (Block(model, experts=experts, rngs=nnx.Rngs(0)) for experts in (False, True))
    # Xavier's uniform distribution, whose fourth moment is 1.8 times its squared variance.
    std, error = np.sqrt(2 / (64 + 128)), np.sqrt((1.8 - 1) / 4 / (64 * 128))
    for name in ("w1", "w2"):
        kernel, stack = np.asarray(getattr(dense.mlp, name).kernel[...]), np.asarray(getattr(experts.moe, name)[...])
        for weight in (kernel, *stack):
            assert np.std(weight) == pytest.approx(std, rel=5 * error), name
            assert np.abs(weight).max() <= np.sqrt(3) * std
        assert len(np.unique(stack[:, 0, 0])) == 3


# Paper, section 1: parameters of the dense one-tower models; H also with experts.
DENSE = {"s32-dense": 43.7e6, "b32-dense": 113.2e6, "b16-dense": 111.6e6, "l16-dense": 338.2e6, "h14-dense": 675.0e6}


@pytest.mark.parametrize("name", DENSE)
def test_dense_models_have_the_paper_s_size(name):
    found = describe(preset(name))
    assert found.parameters_total == pytest.approx(DENSE[name], rel=0.005)
    assert found.parameters_total == found.parameters_per_token == found.parameters_dense_twin
    assert found.parameters_experts == found.parameters_routers == 0


def test_h14_has_the_paper_s_size():
    found = describe(preset("h14"))
    assert found.parameters_total == pytest.approx(5.554e9, rel=0.005)
    assert found.parameters_per_token == pytest.approx(675.0e6, rel=0.005)
    assert found.parameters_dense_twin == pytest.approx(675.0e6, rel=0.005)
    assert found.parameters_routers == 12 * 1280 * 32


@pytest.mark.parametrize("name", ["tiny", "s32", "b32", "b16", "l16", "h14"])
def test_experts_and_routers_are_all_that_a_dense_twin_lacks(name):
    config = preset(name)
    model, sparse, dense = config.model, describe(config), describe(preset(f"{name}-dense"))
    mlp = 2 * model.width * model.mlp_width + model.width + model.mlp_width
    layers = len(model.moe_layers)
    routers = layers * model.width * model.num_experts
    extra = layers * (model.num_experts - 1) * mlp
    assert sparse.parameters_total == dense.parameters_total + extra + routers
    assert sparse.parameters_per_token == dense.parameters_total + routers
    assert sparse.parameters_dense_twin == dense.parameters_total
    assert sparse.parameters_routers == routers


@pytest.mark.parametrize("name", ["b16", "b16-dense"])
def test_training_flops_are_six_a_weight_and_token_and_attention(name):
    """From the shapes of the weights: each multiplies a token once forward, for dX and for dW, two FLOPs each."""
    config = preset(name)
    model = config.model
    images, texts = (224 // 16) ** 2, 16
    only = {"patch": images, "image_projection": 1, "text_projection": 1}  # projections see the mean of the tokens
    met = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_model(config)[1]):
        first, last = path[0].key, path[-1].key
        if last == "kernel" or last == "router":
            met += leaf.size * only.get(first, images + texts)
        elif last in ("w1", "w2"):
            met += leaf.size * model.num_choices // model.num_experts * (images + texts)
        else:
            assert last in ("bias", "b1", "b2", "scale", "token_table", "log_scale") or last.endswith("_position")
    # Scores and their sums of values: two products forward and four backward, in twelve blocks of width 768.
    attention = 12 * 12 * 768 * (images**2 + texts**2)
    assert describe(config).flops_per_example == 6 * met + attention
