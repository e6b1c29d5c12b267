"""LIMoE: one Transformer encoder for images and text (paper, section 1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt8

from limoe.config.schema import PAD_ID, Lengths, LossConfig, ModelConfig
from limoe.model.attention import attend
from limoe.model.moe import (
    Assignment,
    LayerReport,
    LayerRouting,
    MoeLayer,
    RoutingChoice,
    RoutingContext,
    function_of,
    saved_names,
)
from limoe.model.segments import Segment, cut
from limoe.parallel.mesh import Placement, by_rows, gathered
from limoe.parallel.parameters import KERNEL, NORM, TABLE, VECTOR, kinds_of, mark_stacked

# Kinds of the parameters of nnx.Linear.
_LINEAR: dict[str, Any] = {"kernel_metadata": {"kind": KERNEL}, "bias_metadata": {"kind": VECTOR}}


class Embeddings(NamedTuple):
    """L2-normalised embeddings of a batch, float32."""

    image: Float[Array, "B P"]
    text: Float[Array, "B P"]


class Encoded(NamedTuple):
    """The results of the tower: embeddings, and routing and choices of all MoE layers, stacked along L (both None in a
    dense model)."""

    embeddings: Embeddings
    routing: LayerRouting | None
    choice: RoutingChoice | None


def scale_images(images: UInt8[Array, "B H W 3"] | UInt8[np.ndarray, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Map bytes 0..255 to -1..1 (paper, section 4).

    >>> import numpy as np
    >>> scale_images(np.full((1, 1, 1, 3), 255, np.uint8)).ravel().tolist()
    [1.0, 1.0, 1.0]
    """
    return jnp.asarray(images).astype(jnp.float32) / 127.5 - 1.0


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """Choose the dtype of matmuls: the configured one; for "auto", float32 on CPUs and bfloat16 elsewhere."""
    if config.compute_dtype != "auto":
        return jnp.dtype(config.compute_dtype)
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def _linear(config: ModelConfig, size: int, out: int, rngs: nnx.Rngs) -> nnx.Linear:
    initial = nnx.initializers.xavier_uniform()
    return nnx.Linear(size, out, dtype=compute_dtype(config), kernel_init=initial, rngs=rngs, **_LINEAR)


def _layer_norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    kind = {"kind": NORM}
    return nnx.LayerNorm(
        config.width,
        epsilon=config.layer_norm_epsilon,
        dtype=compute_dtype(config),
        scale_metadata=kind,
        bias_metadata=kind,
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Multi-head self-attention within each modality. Both modalities share the weights."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, placement: Placement | None = None) -> None:
        self.config, self.placement = config, placement
        width = config.width
        self.query = _linear(config, width, width, rngs)
        self.key = _linear(config, width, width, rngs)
        self.value = _linear(config, width, width, rngs)
        self.out = _linear(config, width, width, rngs)

    def __call__(
        self, x: Float[Array, "T D"], present: Bool[Array, "B S"] | None, lengths: Lengths
    ) -> Float[Array, "T D"]:
        """Attend within each modality; other tokens do not see a token with `present` False."""
        query, key, value = (project(x) for project in (self.query, self.key, self.value))
        return self.out(attend(query, key, value, present, self.config, self.placement, lengths))


class Mlp(nnx.Module):
    """The dense MLP of a block without experts."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.activation = config.activation
        self.w1 = _linear(config, config.width, config.mlp_width, rngs)
        self.w2 = _linear(config, config.mlp_width, config.width, rngs)

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """Compute `activation(x w1 + b1) w2 + b2`."""
        return self.w2(_recomputed(function_of(self.activation), self.w1(x)))


class Block(nnx.Module):
    """A pre-LayerNorm Transformer block, with a dense MLP or with experts."""

    def __init__(
        self, config: ModelConfig, *, experts: bool, rngs: nnx.Rngs, placement: Placement | None = None
    ) -> None:
        self.norm1 = _layer_norm(config, rngs)
        self.attention = Attention(config, rngs=rngs, placement=placement)
        self.norm2 = _layer_norm(config, rngs)
        self.experts = experts
        if experts:
            self.moe = MoeLayer(config, rngs=rngs, placement=placement)
        else:
            self.mlp = Mlp(config, rngs=rngs)

    def attend(
        self, x: Float[Array, "T D"], present: Bool[Array, "B S"] | None, lengths: Lengths
    ) -> Float[Array, "T D"]:
        """Run the first half of the block: attention with its residual connection."""
        return x + self.attention(_recomputed(self.norm1, x), present, lengths)

    def __call__(
        self,
        x: Float[Array, "T D"],
        present: Bool[Array, "B S"] | None,
        context: RoutingContext | None,
        layer: Int[Array, ""],
        lengths: Lengths,
    ) -> tuple[Float[Array, "T D"], LayerReport | None]:
        """Run the block. `layer` is the index of its MoE layer among those of the tower."""
        x = self.attend(x, present, lengths)
        normed = _recomputed(self.norm2, x)
        if not self.experts:
            return x + self.mlp(normed), None
        y, report = self.moe(normed, present, context, layer, lengths)
        return x + y, report


class Period(nnx.Module):
    """One repeat of a segment's pattern: a few blocks in a row."""

    def __init__(
        self, config: ModelConfig, pattern: tuple[bool, ...], *, rngs: nnx.Rngs, placement: Placement | None = None
    ) -> None:
        self.blocks = nnx.List([Block(config, experts=experts, rngs=rngs, placement=placement) for experts in pattern])

    def __call__(
        self,
        x: Float[Array, "T D"],
        present: Bool[Array, "B S"] | None,
        context: RoutingContext | None,
        layer: Int[Array, ""],
        lengths: Lengths,
    ) -> tuple[Float[Array, "T D"], list[LayerReport]]:
        """Run the blocks, and collect the reports of their MoE layers in order."""
        reports = []
        for block in self.blocks:
            x, report = block(x, present, context, layer + len(reports), lengths)
            if report is not None:
                reports.append(report)
        return x, reports


class Limoe(nnx.Module):
    """The Language-Image Mixture of Experts.

    Patches and text tokens pass through one tower as one array `[T, D]`, ordered by example. Attention stays within a
    modality; both modalities share the experts. Mean pooling, a projection for each modality and L2 normalisation give
    the embeddings. Parameters are float32. The loss's scalars (`log_scale`, and `logit_bias` of the sigmoid loss) are
    parameters too. With a placement, examples are split over all devices and experts over one axis of the mesh (see
    `limoe.parallel.mesh`).
    """

    def __init__(
        self, model: ModelConfig, loss: LossConfig, *, rngs: nnx.Rngs, placement: Placement | None = None
    ) -> None:
        self.config = model
        self.placement = placement
        self.segments_cut: tuple[Segment, ...] = cut(model.depth, model.moe_layers)
        dtype = compute_dtype(model)
        position = nnx.initializers.normal(0.02)
        linear = {"dtype": dtype, "rngs": rngs, **_LINEAR}
        self.patch = nnx.Linear(3 * model.patch_size**2, model.width, **linear)

        def table(num_rows: int) -> nnx.Param:
            return nnx.Param(position(rngs.params(), (num_rows, model.width), jnp.float32), kind=TABLE)

        self.token_table = table(model.vocab_size)
        self.image_position, self.text_position = table(model.num_image_tokens), table(model.text_length)
        self.segments = nnx.List([_stacked(model, segment, rngs, placement) for segment in self.segments_cut])
        self.norm = _layer_norm(model, rngs)
        self.image_projection = nnx.Linear(model.width, model.width, use_bias=False, **linear)
        self.text_projection = nnx.Linear(model.width, model.width, use_bias=False, **linear)
        self.log_scale = nnx.Param(jnp.log(jnp.float32(loss.initial_scale)), kind=VECTOR)
        if loss.contrastive == "sigmoid":
            self.logit_bias = nnx.Param(jnp.float32(loss.initial_bias), kind=VECTOR)

    def __call__(
        self, images: Float[Array, "B H W 3"], text: Int[Array, "B N"], context: RoutingContext | None
    ) -> Encoded:
        """Encode pairs of images in -1..1 and token ids (0 is padding). Without a context it works as in
        evaluation."""
        (image, words), reports = self._means(images, text, context)
        embeddings = Embeddings(_normalise(self.image_projection(image)), _normalise(self.text_projection(words)))
        if not reports:
            return Encoded(embeddings, None, None)
        return Encoded(embeddings, *jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *reports))

    def image_features(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """Encode images alone, as in evaluation, and return the L2-normalised mean of their tokens: the features before
        the projection of `encode_image`."""
        (image,), _ = self._means(images, None, None)
        return _normalise(image)

    def encode_image(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B P"]:
        """Embed images alone, as in evaluation. The embeddings are those of `__call__`."""
        (image,), _ = self._means(images, None, None)
        return _normalise(self.image_projection(image))

    def encode_text(self, text: Int[Array, "B N"]) -> Float[Array, "B P"]:
        """Embed text alone, as in evaluation. The embeddings are those of `__call__`."""
        (words,), _ = self._means(None, text, None)
        return _normalise(self.text_projection(words))

    def assignments(self, images: Float[Array, "B H W 3"] | None, text: Int[Array, "B N"] | None) -> Assignment:
        """Find the first choice of every token in every MoE layer, for both modalities or one of them.

        Raises ValueError for a dense model.
        """
        if not self.config.moe_layers:
            raise ValueError("this model is dense (model.moe_layers=()), so its tokens have no experts")
        x, present, lengths = self._tokens(images, text)
        experts, gates = [], []
        for segment, period in zip(self.segments_cut, self.segments, strict=True):
            graph, state = nnx.split(period)
            for repeat in range(segment.repeats):
                one = state if segment.repeats == 1 else jax.tree.map(lambda leaf, i=repeat: leaf[i], state)
                for block in nnx.merge(graph, one).blocks:
                    if block.experts:
                        expert, gate = block.moe.first_choice(
                            block.norm2(block.attend(x, present, lengths)), present, lengths
                        )
                        experts.append(expert)
                        gates.append(gate)
                    x, _ = block(x, present, None, jnp.int32(0), lengths)
        return Assignment(jnp.stack(experts), jnp.stack(gates))

    def _tokens(
        self, images: Float[Array, "B H W 3"] | None, text: Int[Array, "B N"] | None
    ) -> tuple[Float[Array, "T D"], Bool[Array, "B S"] | None, Lengths]:
        """Make the tokens of the given modalities, a mask of padding (None: no mask), and their lengths."""
        p, dtype = self.config.patch_size, compute_dtype(self.config)
        parts, present = [], []
        if images is not None:
            patches = rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)
            parts.append(self.patch(patches) + self.image_position[...].astype(dtype))
            present.append(jnp.ones(parts[0].shape[:2], bool))
        if text is not None:
            parts.append(self.token_table[...].astype(dtype)[text] + self.text_position[...].astype(dtype))
            present.append(text != PAD_ID)
        # Flatten: with an axis for examples, kernels would pad or copy the 212 tokens of each to whole tiles.
        tokens = by_rows(rearrange(jnp.concatenate(parts, axis=1), "b s d -> (b s) d"), self.placement)
        masked = self.config.text_padding == "mask" and text is not None
        lengths = Lengths(0 if images is None else parts[0].shape[1], 0 if text is None else parts[-1].shape[1])
        return tokens, jnp.concatenate(present, axis=1) if masked else None, lengths

    def _means(
        self,
        images: Float[Array, "B H W 3"] | None,
        text: Int[Array, "B N"] | None,
        context: RoutingContext | None,
    ) -> tuple[list[Float[Array, "B D"]], list[LayerReport]]:
        """Compute the mean token of each given modality, in float32, and the reports of the MoE layers."""
        x, present, lengths = self._tokens(images, text)
        reports: list[LayerReport] = []
        layer = 0
        for segment, period in zip(self.segments_cut, self.segments, strict=True):
            x, found = self._run(segment, period, x, present, context, layer, lengths)
            layer += sum(segment.pattern) * segment.repeats
            reports += found
        return _pool(_recomputed(self.norm, x), present, lengths), reports

    def _run(
        self,
        segment: Segment,
        period: Period,
        x: Float[Array, "T D"],
        present: Bool[Array, "B S"] | None,
        context: RoutingContext | None,
        layer: int,
        lengths: Lengths,
    ) -> tuple[Float[Array, "T D"], list[LayerReport]]:
        graph, state = nnx.split(period)
        kinds = kinds_of(period)

        def once(x: Array, state: PyTree, layer: Array) -> tuple[Array, list[LayerReport]]:
            # Gather inside the loop, so that only one period at a time is whole.
            state = gathered(state, kinds, self.placement)
            return nnx.merge(graph, state)(x, present, context, layer, lengths)

        if self.config.remat == "blocks":
            names = saved_names(self.placement)
            once = jax.checkpoint(once, policy=jax.checkpoint_policies.save_only_these_names(*names))
        if segment.repeats == 1:
            x, reports = once(x, state, jnp.int32(layer))
            return x, [jax.tree.map(lambda leaf: leaf[None], report) for report in reports]
        layers = layer + sum(segment.pattern) * jnp.arange(segment.repeats, dtype=jnp.int32)
        # A scan copies what the backward pass needs into stacks. On a CPU that took a fifth of a step (tiny, 2 repeats,
        # 2026-11).
        unroll = min(self.config.scan_unroll, segment.repeats)
        x, reports = jax.lax.scan(lambda x, step: once(x, *step), x, (state, layers), unroll=unroll)
        if not reports:
            return x, []
        # From layers of a period, each [repeats, ...], to layers in the order of the tower.
        ordered = jax.tree.map(lambda *leaves: rearrange(jnp.stack(leaves), "p r ... -> (r p) ..."), *reports)
        return x, [ordered]


def _pool(x: Float[Array, "T D"], present: Bool[Array, "B S"] | None, lengths: Lengths) -> list[Float[Array, "B D"]]:
    """Compute the mean token of each modality that is present."""
    x = rearrange(x, "(b s) d -> b s d", s=lengths.total).astype(jnp.float32)
    weight = jnp.ones(x.shape[:2], jnp.float32) if present is None else present.astype(jnp.float32)

    def mean(span: slice) -> Float[Array, "B D"]:
        total = jnp.sum(x[:, span] * weight[:, span, None], axis=1)
        return total / jnp.maximum(jnp.sum(weight[:, span], axis=1, keepdims=True), 1.0)

    return [mean(slice(*span)) for span in lengths.spans]


def _recomputed(function: Callable[[Array], Array], x: Float[Array, "T N"]) -> Float[Array, "T N"]:
    """Apply a pointwise function or a norm; for bfloat16, save only its argument for the backward pass.

    These functions work in float32, and JAX would save several float32 values: at B/16 a tenth of a step's traffic. For
    a float32 argument, on CPUs, saving a few arrays of its size costs less than recomputing them.
    """
    if x.dtype == jnp.float32:
        return function(x)
    # CSE does not undo it: forward and backward pass are in different loops or far apart.
    return jax.checkpoint(lambda x: function(x), prevent_cse=False)(x)


def _stacked(config: ModelConfig, segment: Segment, rngs: nnx.Rngs, placement: Placement | None) -> Period:
    """Make a period whose parameters have a leading axis of repeats (none for a single repeat)."""
    if segment.repeats == 1:
        return Period(config, segment.pattern, rngs=rngs, placement=placement)

    @nnx.split_rngs(splits=segment.repeats)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def create(rngs: nnx.Rngs) -> Period:
        return Period(config, segment.pattern, rngs=rngs, placement=placement)

    period = create(rngs)
    mark_stacked(period)
    return period


def _normalise(x: Float[Array, "B P"]) -> Float[Array, "B P"]:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)
