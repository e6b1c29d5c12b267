"""LIMoE's forward pass from a plain dict of arrays, one example and one head at a time (paper, section 1)."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np

from reference.activations import Activation, gelu
from reference.moe import MlpWeights, MoeOutput, moe_layer
from reference.plan import Priority
from reference.routing import softmax

IMAGE, TEXT, PAD = 0, 1, 0
Parameters = Mapping[str, Any]
TextPadding = Literal["keep", "mask"]


class ModelOutput(NamedTuple):
    """Embeddings of unit length, the pooled representations before projection, and the results of all MoE layers.

    >>> ModelOutput._fields[:2]
    ('image', 'text')
    """

    image: np.ndarray  # [B, P]
    text: np.ndarray  # [B, P]
    image_representation: np.ndarray  # [B, D]
    text_representation: np.ndarray  # [B, D]
    layers: list[MoeOutput]


def array(value: Any) -> np.ndarray:
    """Convert a value to float64.

    >>> array([1, 2]).dtype
    dtype('float64')
    """
    return np.asarray(value, np.float64)


def layer_norm(x: np.ndarray, parameters: Parameters, epsilon: float = 1e-6) -> np.ndarray:
    """Compute (x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis.

    >>> layer_norm(np.array([1.0, 3.0]), {"scale": [1.0, 1.0], "bias": [0.0, 5.0]}).round(4).tolist()
    [-1.0, 6.0]
    """
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * array(parameters["scale"]) + array(parameters["bias"])


def patches(image: np.ndarray, patch_size: int) -> np.ndarray:
    """Cut one image [H, W, 3] into patches, row by row, each flattened as (row, column, colour): [N, p*p*3].

    Raises ValueError if the patch does not divide the image.

    >>> patches(np.arange(24).reshape(2, 4, 3), 2)[1].tolist()
    [6, 7, 8, 9, 10, 11, 18, 19, 20, 21, 22, 23]
    """
    height, width, _ = image.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"an image of {height} x {width} cannot be cut into patches of {patch_size}; use a divisor")
    rows = []
    for top in range(0, height, patch_size):
        for left in range(0, width, patch_size):
            rows.append(image[top : top + patch_size, left : left + patch_size].reshape(-1))
    return np.stack(rows)


def attention(x: np.ndarray, mask: np.ndarray, parameters: Parameters, num_heads: int) -> np.ndarray:
    """Compute self-attention of one sequence [N, D] to the tokens with mask [N] True. Heads are slices of D.

    >>> linear = {"kernel": np.eye(2), "bias": np.zeros(2)}
    >>> parameters = {"query": linear, "key": linear, "value": linear, "out": linear}
    >>> attention(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([True, True]), parameters, 1).tolist()
    [[1.0, 0.0], [1.0, 0.0]]
    """
    query, key, value = (
        x @ array(parameters[name]["kernel"]) + array(parameters[name]["bias"]) for name in ("query", "key", "value")
    )
    size = x.shape[1] // num_heads
    mixed = np.zeros(x.shape)
    for head in range(num_heads):
        part = slice(head * size, (head + 1) * size)
        for n in range(len(x)):
            score = key[mask, part] @ query[n, part] / np.sqrt(size)
            mixed[n, part] = softmax(score) @ value[mask, part]
    return mixed @ array(parameters["out"]["kernel"]) + array(parameters["out"]["bias"])


def embed(image: np.ndarray, text: np.ndarray, parameters: Parameters, patch_size: int) -> np.ndarray:
    """Tokens [Ni + Nt, D] of one example: image [H, W, 3] first, then token ids [Nt], with their positions added.

    >>> parameters = {"patch": {"kernel": np.ones((3, 1)), "bias": [0.0]}, "token_table": [[5.0], [6.0]],
    ...               "image_position": [[0.5]], "text_position": [[0.25]]}
    >>> embed(np.ones((1, 1, 3)), np.array([1]), parameters, patch_size=1).tolist()
    [[3.5], [6.25]]
    """
    linear = parameters["patch"]
    seen = patches(array(image), patch_size) @ array(linear["kernel"]) + array(linear["bias"])
    read = array(parameters["token_table"])[text]
    return np.concatenate([seen + array(parameters["image_position"]), read + array(parameters["text_position"])])


def project(representation: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Compute representation [B, D] @ kernel [D, P], and divide each row by its length.

    >>> project(np.array([[3.0, 4.0]]), np.eye(2)).tolist()
    [[0.6, 0.8]]
    """
    projected = representation @ array(kernel)
    return projected / np.sqrt((projected**2).sum(axis=-1, keepdims=True))


def attend(
    x: np.ndarray, mask: np.ndarray, block: Parameters, *, num_image_tokens: int, num_heads: int, epsilon: float
) -> np.ndarray:
    """Compute the first half of a block: add the attention within image tokens and within text tokens to x [B, N, D].

    >>> zero = {"kernel": np.zeros((2, 2)), "bias": np.ones(2)}
    >>> block = {"norm1": {"scale": np.ones(2), "bias": np.zeros(2)},
    ...          "attention": {"query": zero, "key": zero, "value": zero, "out": zero}}
    >>> attend(np.zeros((1, 2, 2)), np.ones((1, 2), bool), block, num_image_tokens=1, num_heads=1, epsilon=1.0).tolist()
    [[[1.0, 1.0], [1.0, 1.0]]]
    """
    normed = layer_norm(x, block["norm1"], epsilon)
    for b in range(len(x)):
        for span in (slice(0, num_image_tokens), slice(num_image_tokens, x.shape[1])):
            x[b, span] += attention(normed[b, span], mask[b, span], block["attention"], num_heads)
    return x


def dense_mlp(x: np.ndarray, parameters: Parameters, activation: Activation) -> np.ndarray:
    """Compute activation(x w1 + b1) w2 + b2 of x [..., D].

    >>> one = {"w1": np.eye(1), "b1": [0.0], "w2": np.eye(1), "b2": [3.0]}
    >>> dense_mlp(np.zeros((2, 1)), one, "gelu_erf").tolist()
    [[3.0], [3.0]]
    """
    w1, b1, w2, b2 = (array(parameters[name]) for name in ("w1", "b1", "w2", "b2"))
    return gelu(x @ w1 + b1, activation) @ w2 + b2


def text_mask(text: np.ndarray, text_padding: TextPadding) -> np.ndarray:
    """Mark the tokens [B, Nt] that count: all for "keep", all but pad tokens for "mask".

    Raises ValueError for a caption of which nothing is left.

    >>> text_mask(np.array([[5, PAD]]), "mask").tolist(), text_mask(np.array([[5, PAD]]), "keep").tolist()
    ([[True, False]], [[True, True]])
    """
    read = text != PAD if text_padding == "mask" else np.ones(text.shape, bool)
    if not read.any(axis=1).all():
        raise ValueError("a caption has only pad tokens, so nothing is left to pool; give it at least one token")
    return read


def pool(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Compute the mean [B, D] of each example's tokens [B, N, D] with mask [B, N] True.

    >>> pool(np.array([[[1.0], [3.0], [9.0]]]), np.array([[True, True, False]])).tolist()
    [[2.0]]
    """
    return np.stack([x[b][mask[b]].mean(axis=0) for b in range(len(x))])


def forward(
    parameters: Parameters,
    image: np.ndarray,
    text: np.ndarray,
    *,
    num_heads: int,
    patch_size: int,
    num_choices: int = 1,
    capacity_factor: float | str | Fraction | None = None,
    group_examples: int = 0,
    priority: Priority = "bpr",
    first_modality: int = IMAGE,
    priority_values: Sequence[np.ndarray] | None = None,
    noise: Sequence[np.ndarray] | None = None,
    activation: Activation = "gelu_tanh",
    epsilon: float = 1e-6,
    text_padding: TextPadding = "keep",
) -> ModelOutput:
    """Embed images [B, H, W, 3] and token ids [B, Nt] with one tower and pre-LayerNorm blocks.

    The parameters, as nested dicts: patch {kernel [p*p*3, D], bias [D]}, token_table [V, D], image_position [Ni, D],
    text_position [Nt, D], blocks (a list), norm {scale [D], bias [D]}, image_projection [D, P], text_projection [D, P].
    A block has norm1, norm2, attention {query, key, value, out: each {kernel [D, D], bias [D]}}, and either mlp
    {w1 [D, F], b1 [F], w2 [F, D], b2 [D]} or moe {router [D, E], w1 [E, D, F], b1 [E, F], w2 [E, F, D], b2 [E, D]}.

    An example has its image tokens before its text tokens. A group has `group_examples` whole examples (0: the whole
    batch). `noise` and `priority_values` have one array for each MoE layer, [T, E] and [T]. `text_padding="mask"` keeps
    pad tokens (id 0) out of attention, pooling and routing. Raises ValueError for a batch that cannot be cut into
    groups and, with "mask", for a caption with only pad tokens. Paper, section 1.

    >>> parameters = {
    ...     "patch": {"kernel": np.ones((3, 2)), "bias": np.arange(2)}, "token_table": np.eye(2),
    ...     "image_position": np.zeros((1, 2)), "text_position": np.zeros((1, 2)), "blocks": [],
    ...     "norm": {"scale": np.ones(2), "bias": np.zeros(2)},
    ...     "image_projection": np.eye(2), "text_projection": np.eye(2)}
    >>> output = forward(parameters, np.ones((1, 1, 1, 3)), np.array([[1]]), num_heads=1, patch_size=1)
    >>> output.text.round(4).tolist()
    [[-0.7071, 0.7071]]
    """
    image, text = array(image), np.asarray(text)
    num_examples = len(image)
    group_examples = group_examples or num_examples
    if num_examples % group_examples:
        raise ValueError(f"{num_examples} examples cannot be cut into groups of {group_examples}; use a divisor")
    read = text_mask(text, text_padding)

    x = np.stack([embed(image[b], text[b], parameters, patch_size) for b in range(num_examples)])
    num_image_tokens = x.shape[1] - text.shape[1]
    mask = np.concatenate([np.ones((num_examples, num_image_tokens), bool), read], axis=1)
    modality = np.where(np.arange(x.shape[1]) < num_image_tokens, IMAGE, TEXT)

    layers: list[MoeOutput] = []
    for block in parameters["blocks"]:
        x = attend(x, mask, block, num_image_tokens=num_image_tokens, num_heads=num_heads, epsilon=epsilon)
        normed = layer_norm(x, block["norm2"], epsilon)
        if "mlp" in block:
            x = x + dense_mlp(normed, block["mlp"], activation)
            continue
        moe, index = block["moe"], len(layers)
        layer = moe_layer(
            normed.reshape(-1, x.shape[2]),
            array(moe["router"]),
            MlpWeights(*(array(moe[name]) for name in MlpWeights._fields)),
            num_choices=num_choices,
            capacity_factor=capacity_factor,
            num_groups=num_examples // group_examples,
            priority=priority,
            noise=None if noise is None else noise[index],
            mask=mask.reshape(-1),
            modality=np.tile(modality, num_examples),
            num_modalities=2,
            activation=activation,
            first_modality=first_modality,
            priority_values=None if priority_values is None else priority_values[index],
        )
        layers.append(layer)
        x = x + layer.tokens.reshape(x.shape)

    x = layer_norm(x, parameters["norm"], epsilon)
    seen = pool(x[:, :num_image_tokens], mask[:, :num_image_tokens])
    said = pool(x[:, num_image_tokens:], mask[:, num_image_tokens:])
    image_embedding = project(seen, parameters["image_projection"])
    text_embedding = project(said, parameters["text_projection"])
    return ModelOutput(image_embedding, text_embedding, seen, said, layers)
