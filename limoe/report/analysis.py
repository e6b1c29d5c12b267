"""Analysis of routing: shares of experts, what a perfect router keeps, and the favourites of each expert (section 6).

The functions use NumPy on sums and choices of a model. Letters: L MoE layers, M modalities (0 image, 1 text), E
experts, T tokens. Counts may be floats, because sums over devices are.
"""

import math
from typing import NamedTuple

import numpy as np

from limoe.model.moe import TEXT, expert_capacity

# Preference for a modality from which on an expert counts as its own.
_PURE = 0.9


class ExpertShares(NamedTuple):
    """Shares of all tokens of a layer that each expert got, by modality, before and after capacity."""

    wanted: np.ndarray  # [L, M, E], sums to 1 over a layer
    kept: np.ndarray  # [L, M, E], sums to the success rate of the layer


class TopPatches(NamedTuple):
    """Image patches with the largest gates of each expert, best first; -1 and gate 0 if an expert has no more."""

    example: np.ndarray  # [E, count] int64
    patch: np.ndarray  # [E, count] int64, row by row from the top left corner
    gate: np.ndarray  # [E, count] float32


def expert_shares(wanted: np.ndarray, kept: np.ndarray) -> ExpertShares:
    """Compute shares of each layer from counts [L, M, E] of tokens that chose an expert, and of those that found room.

    Raises ValueError for shapes that do not fit, negative counts, more kept than wanted, or a layer without tokens.

    >>> shares = expert_shares(np.array([[[6.0, 2.0], [0.0, 2.0]]]), np.array([[[5.0, 2.0], [0.0, 2.0]]]))
    >>> shares.wanted.tolist(), shares.kept.tolist()
    ([[[0.6, 0.2], [0.0, 0.2]]], [[[0.5, 0.2], [0.0, 0.2]]])
    """
    wanted, kept = _counts("wanted", wanted), _counts("kept", kept)
    if wanted.shape != kept.shape:
        raise ValueError(f"wanted has shape {list(wanted.shape)} and kept {list(kept.shape)}; they must be equal")
    # Means of float32 sums have rounding errors.
    more = kept > wanted * (1 + 1e-5)
    if np.any(more):
        layer, modality, expert = (int(i[0]) for i in np.nonzero(more))
        raise ValueError(f"layer {layer}, modality {modality}, expert {expert}: more tokens kept than wanted")
    total = wanted.sum(axis=(1, 2), keepdims=True)
    if np.any(total == 0):
        raise ValueError(
            f"MoE layer {int(np.flatnonzero(total == 0)[0])} routed no tokens; pass sums of at least one step"
        )
    return ExpertShares(wanted / total, kept / total)


def text_preference(wanted: np.ndarray) -> np.ndarray:
    """Compute how much each expert prefers text, [L, E], from counts [L, 2, E]: 0 is image only, 1 is text only.

    The preference is t / (i + t), where the expert gets the share t of all text tokens and i of all image tokens. Plain
    counts would mislead: an image has up to 16 times as many tokens as its caption, so every shared expert would look
    like an image expert. An expert that no token chose has NaN.

    >>> text_preference(np.array([[[90.0, 10.0, 0.0], [0.0, 10.0, 0.0]]]))
    array([[0.        , 0.90909091,        nan]])
    """
    wanted = _counts("wanted", wanted)
    if wanted.shape[1] != 2:
        raise ValueError(f"wanted has {wanted.shape[1]} modalities; the preference is between 2, image and text")
    share = wanted / np.maximum(wanted.sum(axis=2, keepdims=True), np.finfo(np.float64).tiny)
    both = share.sum(axis=1)
    return np.divide(share[:, TEXT], both, out=np.full(both.shape, np.nan), where=both > 0)


def expert_modality(wanted: np.ndarray) -> tuple[tuple[str, ...], ...]:
    """Name each expert of each layer, from counts [L, 2, E]: "image", "text", "shared" or "unused".

    An expert is "text" if its `text_preference` is at least 0.9, and "image" if it is at most 0.1. It is "unused" if it
    got at most a tenth of an even share of each modality.

    >>> expert_modality(np.array([[[60.0, 40.0, 0.0, 0.0], [0.0, 10.0, 30.0, 0.1]]]))
    (('image', 'shared', 'text', 'unused'),)
    """
    preference = text_preference(wanted)
    wanted = np.asarray(wanted, np.float64)
    even = wanted.sum(axis=2, keepdims=True) / wanted.shape[2]
    unused = np.all(wanted <= even / 10, axis=1)

    def name(preference: float, unused: bool) -> str:
        if unused:
            return "unused"
        if preference >= _PURE:
            return "text"
        return "image" if preference <= 1 - _PURE else "shared"

    return tuple(tuple(map(name, *layer)) for layer in zip(preference.tolist(), unused.tolist(), strict=True))


def success_rate_bound(num_experts: int, tokens_per_group: int, num_choices: int, capacity_factor: float) -> float:
    """Compute the share of choices that a perfect router with independent tokens keeps on average (paper, section 2).

    Each of S tokens chooses K of E experts evenly and independently. So X ~ Binomial(S, K/E) tokens want an expert, and
    it has C = ceil(S K c / E) places. The share is E * mean(min(X, C)) / (S K). A router can do better only if its
    tokens depend on each other. Raises ValueError for sizes below 1, K > E, or a capacity factor that is not above 0.

    >>> round(success_rate_bound(32, 8 * 212, 1, 1.05), 3)
    0.969
    """
    if min(num_experts, tokens_per_group, num_choices) < 1 or num_choices > num_experts:
        raise ValueError(
            f"num_experts={num_experts}, tokens_per_group={tokens_per_group} and num_choices={num_choices} must be at "
            "least 1, and no more choices than experts"
        )
    tokens, p = tokens_per_group, num_choices / num_experts
    capacity = expert_capacity(tokens, num_choices, num_experts, capacity_factor)
    mean = tokens * p
    if num_choices == num_experts or capacity >= tokens:
        return min(capacity / mean, 1.0)
    # All but 1e-100 of the mass is within 40 standard deviations of the mean (and 50 more, for small means).
    reach = 40 * math.sqrt(mean * (1 - p)) + 50
    counts = np.arange(max(0, math.floor(mean - reach)), min(tokens, math.ceil(mean + reach)) + 1)
    log_choose = [-math.lgamma(n + 1) - math.lgamma(tokens - n + 1) for n in counts.tolist()]
    log_mass = np.array(log_choose) + counts * math.log(p) + (tokens - counts) * math.log1p(-p)
    mass = np.exp(log_mass - log_mass.max())
    return float(np.sum(mass * np.minimum(counts, capacity)) / np.sum(mass * counts))


def top_patches(
    gate: np.ndarray,
    expert: np.ndarray,
    *,
    num_experts: int,
    patches_per_image: int,
    count: int = 8,
    per_image: int = 2,
) -> TopPatches:
    """Find the patches with the `count` largest gates of each expert, at most `per_image` of one image (section 6).

    `gate` and `expert` [T] or [T, K] are those of the image tokens of one MoE layer, image after image, with
    `patches_per_image` tokens each. Gates that are not above 0 (masked tokens) are left out. Of equal gates, the token
    with the lower index comes first. Raises ValueError for shapes that do not fit, or experts outside 0 to
    `num_experts` - 1.

    >>> gate, expert = np.array([0.5, 0.9, 0.8, 0.7]), np.array([0, 1, 1, 1])
    >>> top = top_patches(gate, expert, num_experts=2, patches_per_image=2, count=2, per_image=1)
    >>> top.example.tolist(), top.patch.tolist()
    ([[0, -1], [0, 1]], [[0, -1], [1, 0]])
    """
    gate, expert = _choices(gate, expert, num_experts)
    if min(patches_per_image, count, per_image) < 1 or len(gate) % patches_per_image:
        raise ValueError(
            f"{len(gate)} tokens, patches_per_image={patches_per_image}, count={count} and "
            f"per_image={per_image}: all must be at least 1, and the tokens whole images"
        )
    row, choice = np.nonzero(gate > 0)
    gate, expert = gate[row, choice], expert[row, choice]
    image = row // patches_per_image
    order = np.lexsort((row, -gate, image, expert))
    order = order[_place_in_run(expert[order], image[order]) < per_image]
    order = order[np.lexsort((row[order], -gate[order], expert[order]))]
    place = _place_in_run(expert[order])
    order, place = order[place < count], place[place < count]
    result = TopPatches(
        np.full((num_experts, count), -1), np.full((num_experts, count), -1), np.zeros((num_experts, count), np.float32)
    )
    where = expert[order], place
    result.example[where] = image[order]
    result.patch[where] = row[order] % patches_per_image
    result.gate[where] = gate[order]
    return result


def top_tokens(
    gate: np.ndarray, expert: np.ndarray, token_id: np.ndarray, *, num_experts: int, count: int = 8
) -> np.ndarray:
    """Find the token ids [E, count] with the largest sums of gates of each expert, best first; -1 if it has no more.

    `gate` and `expert` [T] or [T, K] and `token_id` [T] are those of the text tokens of one MoE layer. Give padding a
    gate of 0 to leave it out. Of equal sums, the lower id comes first. Raises ValueError as `top_patches` does, and for
    ids below 0.

    >>> top_tokens(np.array([.5, .4, .3]), np.array([0, 0, 0]), np.array([7, 5, 5]), num_experts=2, count=2).tolist()
    [[5, 7], [-1, -1]]
    """
    gate, expert = _choices(gate, expert, num_experts)
    token_id = np.asarray(token_id)
    if token_id.shape != gate.shape[:1] or token_id.dtype.kind not in "iu" or count < 1:
        raise ValueError(
            f"token_id must be {len(gate)} integers, not {token_id.dtype} {list(token_id.shape)}, and count={count} at "
            "least 1"
        )
    if np.any(token_id < 0):
        raise ValueError(f"token_id must be at least 0, but goes down to {token_id.min()}")
    row, choice = np.nonzero(gate > 0)
    size = int(token_id.max(initial=0)) + 1
    key, inverse = np.unique(expert[row, choice] * size + token_id[row], return_inverse=True)
    total = np.bincount(inverse, weights=gate[row, choice], minlength=len(key))
    order = np.lexsort((key, -total, key // size))
    place = _place_in_run(key[order] // size)
    order, place = order[place < count], place[place < count]
    result = np.full((num_experts, count), -1)
    result[key[order] // size, place] = key[order] % size
    return result


def cut_patches(
    images: np.ndarray, example: np.ndarray, patch: np.ndarray, *, patch_size: int, context: int = 1
) -> np.ndarray:
    """Cut patches, with `context` patches around them, out of uint8 images [N, height, width, 3].

    `example` and `patch` [...] are as in `TopPatches`. Cuts are [..., side, side, 3], where side is (2 context + 1)
    patch_size; the patch is in the middle. A cut is white outside of the image, and completely white if `example` is
    -1. Raises ValueError for shapes or numbers that do not fit.

    >>> image = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1).repeat(3, axis=3)
    >>> cut_patches(image, np.array(0), np.array(1), patch_size=2, context=0)[..., 0].tolist()
    [[2, 3], [6, 7]]
    """
    images, example, patch = np.asarray(images), np.asarray(example), np.asarray(patch)
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise ValueError(
            f"images must be uint8 [N, height, width, 3], not {images.dtype} {list(images.shape)}; "
            "values in -1 to 1 become pixels by np.round((x + 1) * 127.5).astype(np.uint8)"
        )
    if patch_size < 1 or context < 0 or images.shape[1] % patch_size or images.shape[2] % patch_size:
        raise ValueError(f"images of {images.shape[1]} x {images.shape[2]} cannot be cut into patches of {patch_size}")
    if example.shape != patch.shape:
        raise ValueError(f"example {list(example.shape)} and patch {list(patch.shape)} must have one shape")
    columns = images.shape[2] // patch_size
    num_patches = columns * (images.shape[1] // patch_size)
    pointless = (example >= len(images)) | (example >= 0) & ((patch < 0) | (patch >= num_patches))
    if np.any(pointless):
        raise ValueError(f"example and patch must point into {len(images)} images of {num_patches} patches")
    side, margin = (2 * context + 1) * patch_size, 2 * [context * patch_size]
    cuts = np.full((*example.shape, side, side, 3), 255, np.uint8)
    for place in np.ndindex(example.shape):
        if example[place] >= 0:
            framed = np.pad(images[example[place]], (margin, margin, (0, 0)), constant_values=255)
            top, left = (patch_size * i for i in divmod(int(patch[place]), columns))
            cuts[place] = framed[top : top + side, left : left + side]
    return cuts


def _place_in_run(*keys: np.ndarray) -> np.ndarray:
    """Number the entries of each run of equal keys, from 0."""
    index = np.arange(len(keys[0]))
    starts = np.zeros(len(index), bool)
    starts[:1] = True
    for key in keys:
        starts[1:] |= key[1:] != key[:-1]
    return index - np.maximum.accumulate(np.where(starts, index, 0))


def _counts(name: str, value: np.ndarray) -> np.ndarray:
    array = np.asarray(value)
    if array.ndim != 3 or 0 in array.shape or array.dtype.kind not in "fiu":
        raise ValueError(f"{name} must be counts [layers, modalities, experts], not {array.dtype} {list(array.shape)}")
    array = array.astype(np.float64)
    if not np.all(np.isfinite(array)) or array.min() < 0:
        raise ValueError(f"{name} must be finite and at least 0, but ranges from {array.min()} to {array.max()}")
    return array


def _choices(gate: np.ndarray, expert: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    gate, expert = np.asarray(gate), np.asarray(expert)
    if gate.shape != expert.shape or gate.ndim not in (1, 2) or expert.dtype.kind not in "iu":
        raise ValueError(
            f"gate and integer expert must both be [T] or [T, K], not {gate.dtype} {list(gate.shape)} and "
            f"{expert.dtype} {list(expert.shape)}"
        )
    if expert.size and (expert.min() < 0 or expert.max() >= num_experts):
        raise ValueError(f"expert must lie in 0 to {num_experts - 1}, but ranges from {expert.min()} to {expert.max()}")
    if gate.ndim == 1:
        gate, expert = gate[:, None], expert[:, None]
    return gate.astype(np.float64), expert.astype(np.int64)
