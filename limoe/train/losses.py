"""Contrastive losses from embeddings, and auxiliary losses from sums over the step's tokens (paper, section 3).

Losses do not depend on how the step was split over devices or chunks. Every term is always computed and always in the
result; a term that is switched off has weight 0 in the total.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from limoe.config.schema import EXTRA_LOSSES, LossConfig, ModelConfig
from limoe.model.moe import IMAGE, TEXT, LayerRouting, RoutingSums, balance, entropy_of_mean

AuxiliaryTerms = dict[str, Float[Array, ""]]
"""Every loss of `AUXILIARY_LOSSES` by name, on or off, summed over MoE layers."""


class LossTerms(NamedTuple):
    """The loss of a step: `total = contrastive + auxiliary_total`, and all auxiliary terms, on or off."""

    total: Float[Array, ""]
    contrastive: Float[Array, ""]
    auxiliary_total: Float[Array, ""]
    auxiliary: AuxiliaryTerms


class Compared(NamedTuple):
    """Where the pairs of a batch are compared, and the token ids of their captions for `loss.mask_equal_captions`."""

    mesh: Mesh | None = None
    captions: Int[Array, "B T"] | None = None


def softmax_contrastive(
    image: Float[Array, "B P"],
    text: Float[Array, "B P"],
    scale: Float[Array, ""],
    *,
    mesh: Mesh | None = None,
    captions: Int[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    """Compute the mean cross-entropy of each pair against the whole batch, both ways, in float32 (paper, section 3).

    `L_j = -1/2 log softmax_k(s <i_j, t_k>)_j - 1/2 log softmax_k(s <i_k, t_j>)_j`; embeddings are L2-normalised. On a
    mesh, each device compares its own rows with all others, in a matrix `[B / devices, B]`. With the token ids of the
    `captions`, an image is not compared with those of other pairs that equal its own, nor they with it.

    >>> import jax.numpy as jnp
    >>> round(float(softmax_contrastive(jnp.eye(2), jnp.eye(2), jnp.float32(0.0))), 4)
    0.6931
    """
    return jnp.mean(_by_rows(_softmax_terms, mesh, captions, image, text, scale))


def sigmoid_contrastive(
    image: Float[Array, "B P"],
    text: Float[Array, "B P"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    *,
    mesh: Mesh | None = None,
    captions: Int[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    """Treat each of the B² pairs as one decision: `-1/B sum_jk log sigmoid(±(s <i_j, t_k> + b))` (Zhai et al. 2023).

    `mesh` and `captions` are as in `softmax_contrastive`.

    >>> import jax.numpy as jnp
    >>> round(float(sigmoid_contrastive(jnp.eye(2), jnp.eye(2), jnp.float32(0.0), jnp.float32(0.0))), 4)
    1.3863
    """
    return jnp.mean(_by_rows(_sigmoid_terms, mesh, captions, image, text, scale, bias))


class _Rows(NamedTuple):
    """The rows that one device compares with all rows of the batch."""

    image: Float[Array, "N P"]
    text: Float[Array, "N P"]
    all_image: Float[Array, "B P"]
    all_text: Float[Array, "B P"]
    is_pair: Bool[Array, "N B"]
    left_out: Bool[Array, "N B"] | None
    """Other pairs with an equal caption, if they are masked."""


def _by_rows(
    terms: Callable[..., Float[Array, " N"]],
    mesh: Mesh | None,
    captions: Int[Array, "B T"] | None,
    image: Float[Array, "B P"],
    text: Float[Array, "B P"],
    *scalars: Float[Array, ""],
) -> Float[Array, " B"]:
    """Compute the term of every row on the device that has the row. The gradient of the gather is a reduce-scatter."""
    if mesh is None:
        is_pair = jnp.eye(image.shape[0], dtype=bool)
        return terms(_Rows(image, text, image, text, is_pair, _left_out(captions, captions, is_pair)), *scalars)
    axes = tuple(mesh.axis_names)

    def here(image: Array, text: Array, captions: Array | None, *scalars: Array) -> Array:
        all_image, all_text = (jax.lax.all_gather(rows, axes, tiled=True) for rows in (image, text))
        all_captions = None if captions is None else jax.lax.all_gather(captions, axes, tiled=True)
        own = image.shape[0] * jax.lax.axis_index(axes) + jnp.arange(image.shape[0])
        is_pair = own[:, None] == jnp.arange(all_image.shape[0])
        left_out = _left_out(captions, all_captions, is_pair)
        return terms(_Rows(image, text, all_image, all_text, is_pair, left_out), *scalars)

    rows, whole = PartitionSpec(axes), PartitionSpec()
    # No psum in here, because its gradient would depend on check_vma. The mean is taken outside.
    sharded = jax.shard_map(
        here, mesh=mesh, in_specs=(rows, rows, rows, *[whole] * len(scalars)), out_specs=rows, check_vma=False
    )
    return sharded(image, text, captions, *scalars)


def _left_out(
    own: Int[Array, "N T"] | None, every: Int[Array, "B T"] | None, is_pair: Bool[Array, "N B"]
) -> Bool[Array, "N B"] | None:
    if own is None or every is None:
        return None
    return (own[:, None] == every[None]).all(axis=2) & ~is_pair


def _softmax_terms(rows: _Rows, scale: Float[Array, ""]) -> Float[Array, " N"]:
    to_text = _cross_entropy(scale * _similarity(rows.image, rows.all_text), rows)
    to_image = _cross_entropy(scale * _similarity(rows.text, rows.all_image), rows)
    return (to_text + to_image) / 2


def _cross_entropy(logits: Float[Array, "N B"], rows: _Rows) -> Float[Array, " N"]:
    """Compute `-log softmax` of each row's own pair as `log(1 + sum exp(gap))` over the other pairs of the row.

    The gap is a pair's logit minus that of the own pair. `logsumexp(logits) - own` would round a small loss to a
    multiple of the logits' last digit, also below 0.
    """
    own = jnp.sum(logits, axis=1, keepdims=True, where=rows.is_pair)
    absent = rows.is_pair if rows.left_out is None else rows.is_pair | rows.left_out
    gap = jnp.where(absent, -jnp.inf, logits - own)
    # exp of a large gap would overflow, so the largest is taken out: L + log(exp(-L) + sum exp(gap - L)), L >= 0.
    largest = jax.lax.stop_gradient(jnp.max(gap, axis=1, initial=0.0))
    others = jnp.sum(jnp.exp(gap - largest[:, None]), axis=1)
    return largest + jnp.log1p(jnp.expm1(-largest) + others)


def _sigmoid_terms(rows: _Rows, scale: Float[Array, ""], bias: Float[Array, ""]) -> Float[Array, " N"]:
    logits = scale * _similarity(rows.image, rows.all_text) + bias
    decided = jax.nn.log_sigmoid(jnp.where(rows.is_pair, logits, -logits))
    return -jnp.sum(decided if rows.left_out is None else jnp.where(rows.left_out, 0.0, decided), axis=1)


def _similarity(image: Float[Array, "N P"], text: Float[Array, "B P"]) -> Float[Array, "N B"]:
    # HIGHEST, because by default a float32 dot uses bfloat16 on TPUs and tf32 on GPUs.
    return jnp.dot(image, text.T, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


AuxiliaryLoss = Callable[[RoutingSums, LossConfig, ModelConfig], Float[Array, "L G"]]
"""A loss of the router from its sums `[L, G, M, ...]`; with `loss.aux_scope=batch` there is one group, the batch."""


def _importance(sums: RoutingSums, loss: LossConfig, model: ModelConfig) -> Float[Array, "L G"]:
    return balance.importance_loss(sums)


def _load(sums: RoutingSums, loss: LossConfig, model: ModelConfig) -> Float[Array, "L G"]:
    return balance.load_loss(sums)


def _z(sums: RoutingSums, loss: LossConfig, model: ModelConfig) -> Float[Array, "L G"]:
    return balance.z_loss(sums)


def _local(modality: int) -> AuxiliaryLoss:
    def local(sums: RoutingSums, loss: LossConfig, model: ModelConfig) -> Float[Array, "L G"]:
        return sums.entropy[:, :, modality] / jnp.maximum(sums.tokens[:, :, modality], 1.0)

    return local


def _global(modality: int, name: Literal["text", "image"]) -> AuxiliaryLoss:
    def thresholded(sums: RoutingSums, loss: LossConfig, model: ModelConfig) -> Float[Array, "L G"]:
        count = sums.tokens[:, :, modality]
        entropy = entropy_of_mean(sums.probability[:, :, modality], jnp.maximum(count, 1.0))
        threshold = loss.threshold(name, model.num_experts)
        return jnp.where(count > 0, jnp.maximum(threshold - entropy, 0.0), 0.0)

    return thresholded


AUXILIARY_LOSSES: dict[str, AuxiliaryLoss] = {
    "importance": _importance,
    "load": _load,
    "z": _z,
    "local_text": _local(TEXT),
    "local_image": _local(IMAGE),
    "global_text": _global(TEXT, "text"),
    "global_image": _global(IMAGE, "image"),
}
"""Every auxiliary loss: those of the paper, which have settings of the same names, and registered ones."""


def register(name: str, function: AuxiliaryLoss) -> None:
    """Add an auxiliary loss of your own; `loss.extra=name=weight` switches it on.

    Its weight counts like those of other losses: active losses are averaged, then multiplied by `loss.aux_weight`.
    Raises ValueError if a loss has that name already.
    """
    if name in AUXILIARY_LOSSES:
        raise ValueError(f"there is an auxiliary loss {name!r} already; take another name")
    EXTRA_LOSSES.append(name)
    AUXILIARY_LOSSES[name] = function


def unregister(name: str) -> None:
    """Remove a registered loss."""
    EXTRA_LOSSES.remove(name)
    del AUXILIARY_LOSSES[name]


def auxiliary_terms(sums: RoutingSums, loss: LossConfig, model: ModelConfig) -> AuxiliaryTerms:
    """Compute all auxiliary losses from sums stacked by layer, `[L, G, M, ...]`, and add them over layers (section 3).

    With `loss.aux_scope=batch` the sums of all groups are added first. With `group` each group has its own loss, and
    the result is the mean over groups. Entropies are in nats. A modality without tokens in a group adds 0.

    >>> from limoe.config.presets import preset
    >>> one, even = jnp.ones((1, 1, 2)), jnp.ones((1, 1, 2, 8))  # a layer, a group, both modalities, eight experts
    >>> sums, tiny = RoutingSums(8 * one, even, even, one, one, even, one), preset("tiny")
    >>> terms = auxiliary_terms(sums, tiny.loss, tiny.model)
    >>> [float(terms[name]) for name in ("importance", "z", "local_text", "global_image")]
    [0.0, 0.125, 0.125, 0.0]
    """
    if loss.aux_scope == "batch":
        sums = RoutingSums(*(values.sum(axis=1, keepdims=True) for values in sums))
    by_group = {name: function(sums, loss, model) for name, function in AUXILIARY_LOSSES.items()}
    return {name: jnp.sum(jnp.mean(term, axis=1)) for name, term in by_group.items()}


def auxiliary_weights(loss: LossConfig) -> dict[str, float]:
    """Compute the weight of each term in the total: its own weight over the number of active terms, times `aux_weight`.

    The paper averages the active losses and multiplies by 0.04 (section 3). A term that is off has weight 0.

    >>> from limoe.config.presets import preset
    >>> weights = auxiliary_weights(preset("b16").loss)
    >>> round(weights["z"] * 6, 4), weights["local_image"]
    (0.04, 0.0)
    """
    paper = [name for name in AUXILIARY_LOSSES if name not in EXTRA_LOSSES]
    own = {name: getattr(loss, f"{name}_weight") for name in paper if getattr(loss, name)}
    active = {**own, **loss.extra_weights}
    share = loss.aux_weight / max(len(active), 1)
    return {name: share * active[name] if name in active else 0.0 for name in AUXILIARY_LOSSES}


def total_loss(
    image: Float[Array, "B P"],
    text: Float[Array, "B P"],
    routing: LayerRouting | None,
    scale: Float[Array, ""],
    bias: Float[Array, ""] | None,
    loss: LossConfig,
    model: ModelConfig,
    compared: Compared | None = None,
) -> LossTerms:
    """Compute the loss of the whole step from its embeddings and routing sums. A dense model has auxiliary terms of 0.

    With a mesh to be `compared` on, the rows of the embeddings are split over all its devices.

    >>> from limoe.config.presets import preset
    >>> dense = preset("tiny-dense")
    >>> terms = total_loss(jnp.eye(2), jnp.eye(2), None, jnp.float32(0.0), None, dense.loss, dense.model)
    >>> round(float(terms.total), 4), float(terms.auxiliary_total)
    (0.6931, 0.0)
    """
    mesh, captions = compared or Compared()
    captions = captions if loss.mask_equal_captions else None
    if loss.contrastive == "sigmoid":
        assert bias is not None
        contrastive = sigmoid_contrastive(image, text, scale, bias, mesh=mesh, captions=captions)
    else:
        contrastive = softmax_contrastive(image, text, scale, mesh=mesh, captions=captions)
    if routing is None:
        auxiliary = {name: jnp.float32(0) for name in AUXILIARY_LOSSES}
    else:
        auxiliary = auxiliary_terms(routing.sums, loss, model)
    # Select instead of multiplying: a NaN of a term that is off must not reach the total.
    weights = auxiliary_weights(loss)
    auxiliary_total = jnp.zeros((), jnp.float32)
    for name, term in auxiliary.items():
        if weights[name] != 0:
            auxiliary_total += weights[name] * term
    return LossTerms(contrastive + auxiliary_total, contrastive, auxiliary_total, auxiliary)


def by_name(terms: LossTerms) -> dict[str, float]:
    """Convert the terms to plain numbers for the log: total, contrastive, auxiliary_total and each auxiliary term."""
    auxiliary = {name: terms.auxiliary[name] for name in AUXILIARY_LOSSES}  # JAX sorts the names of a dict
    flat = {**terms._asdict(), **auxiliary}
    return {name: float(value) for name, value in flat.items() if name != "auxiliary"}
