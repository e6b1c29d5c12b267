"""Every loss from its definition, as a function of logits, with its gradient (paper, section 3).

The auxiliary losses take the logits [N, E] of the tokens that count: the caller removes padding and selects the
modality. A loss over no tokens is zero. The result is one number in nats (or nats squared, or a ratio), not weighted
and not summed over layers. The gradients are with respect to the clean logits.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from reference.routing import entropy, logsumexp, smooth_load, softmax, top_k


class AuxiliaryLosses(NamedTuple):
    """All auxiliary losses of one MoE layer. The global ones have their thresholds.

    >>> AuxiliaryLosses(*[0.0] * 7).z
    0.0
    """

    importance: float
    load: float
    z: float
    local_text: float
    local_image: float
    global_text: float
    global_image: float


def contrastive_logits(image: np.ndarray, text: np.ndarray, log_scale: float, bias: float = 0.0) -> np.ndarray:
    """Compute the logits [B, B] of image i (row) with text j (column): exp(log_scale) <image_i, text_j> + bias.

    >>> contrastive_logits(np.eye(2), np.eye(2), float(np.log(10))).round(9).tolist()
    [[10.0, 0.0], [0.0, 10.0]]
    """
    logits = np.zeros((len(image), len(text)))
    for i in range(len(image)):
        for j in range(len(text)):
            logits[i, j] = np.exp(log_scale) * (image[i] @ text[j]) + bias
    return logits


def without_equal_captions(logits: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """Set to -inf what pairs image i with the caption of another pair j that equals its own; `captions` is [B, T].

    A pair of probability 0 adds nothing to the losses, and nothing to their gradients.

    >>> without_equal_captions(np.ones((3, 3)), np.array([[5], [6], [5]])).tolist()
    [[1.0, 1.0, -inf], [1.0, 1.0, 1.0], [-inf, 1.0, 1.0]]
    """
    masked = logits.copy()
    for i in range(len(logits)):
        for j in range(len(logits)):
            if i != j and np.array_equal(captions[i], captions[j]):
                masked[i, j] = -np.inf
    return masked


def softmax_contrastive_loss(logits: np.ndarray) -> float:
    """Compute the mean over the pairs of L_j: half finds the text of an image, half the image of a text.

    Paper, section 3 (L_j).

    >>> round(softmax_contrastive_loss(np.zeros((8, 8))), 6) == round(float(np.log(8)), 6)
    True
    """
    total = 0.0
    for j in range(len(logits)):
        image_to_text = logits[j, j] - logsumexp(logits[j, :])
        text_to_image = logits[j, j] - logsumexp(logits[:, j])
        total += -0.5 * image_to_text - 0.5 * text_to_image
    return float(total) / len(logits)


def softmax_contrastive_gradient(logits: np.ndarray) -> np.ndarray:
    """Compute the gradient [B, B]: (softmax over each row + softmax over each column - 2 [i = j]) / 2B.

    >>> softmax_contrastive_gradient(np.zeros((2, 2))).tolist()
    [[-0.25, 0.25], [0.25, -0.25]]
    """
    return (softmax(logits) + softmax(logits.T).T - 2.0 * np.eye(len(logits))) / (2.0 * len(logits))


def sigmoid_contrastive_loss(logits: np.ndarray) -> float:
    """Compute -1/B sum over i, j of log sigmoid(z_ij logits_ij), with z = 1 for pairs and -1 for all others (SigLIP).

    >>> round(sigmoid_contrastive_loss(np.zeros((8, 8))), 6) == round(float(8 * np.log(2)), 6)
    True
    """
    total = 0.0
    for i in range(len(logits)):
        for j in range(len(logits)):
            sign = 1.0 if i == j else -1.0
            total += np.logaddexp(0.0, -sign * logits[i, j])
    return float(total) / len(logits)


def sigmoid_contrastive_gradient(logits: np.ndarray) -> np.ndarray:
    """Compute the gradient [B, B]: (sigmoid(logits) - [i = j]) / B.

    >>> sigmoid_contrastive_gradient(np.zeros((2, 2))).tolist()
    [[-0.25, 0.25], [0.25, -0.25]]
    """
    return (np.exp(-np.logaddexp(0.0, -logits)) - np.eye(len(logits))) / len(logits)


def squared_variation(values: np.ndarray) -> float:
    """Compute (std / mean)^2 with the population's standard deviation.

    >>> squared_variation(np.array([2.0, 0.0]))
    1.0
    """
    return float((np.std(values) / np.mean(values)) ** 2)


def squared_variation_gradient(values: np.ndarray) -> np.ndarray:
    """Compute, for mean m and variance v of n values, d/dx_e = 2 (x_e - m) / (n m^2) - 2 v / (n m^3).

    >>> squared_variation_gradient(np.array([1.0, 1.0])).tolist()
    [0.0, 0.0]
    """
    mean, variance = np.mean(values), np.var(values)
    return 2.0 * (values - mean) / (len(values) * mean**2) - 2.0 * variance / (len(values) * mean**3)


def softmax_gradient(logits: np.ndarray, d_probability: np.ndarray) -> np.ndarray:
    """Compute dA_j = p_j (dp_j - sum_i p_i dp_i) for each row of logits [N, E].

    >>> softmax_gradient(np.zeros((1, 2)), np.array([[1.0, 0.0]])).tolist()
    [[0.25, -0.25]]
    """
    probability = softmax(logits)
    return probability * (d_probability - (probability * d_probability).sum(axis=-1, keepdims=True))


def importance_loss(logits: np.ndarray) -> float:
    """Compute the squared variation of imp_e, the sum of the tokens' probabilities of expert e.

    >>> round(importance_loss(np.array([[99.0, 0.0, 0.0], [99.0, 0.0, 0.0]])), 6)
    2.0
    """
    return squared_variation(softmax(logits).sum(axis=0)) if len(logits) else 0.0


def importance_loss_gradient(logits: np.ndarray) -> np.ndarray:
    """Compute the gradient [N, E]: the squared variation's gradient goes through the softmax of each token.

    >>> importance_loss_gradient(np.zeros((3, 2))).tolist()
    [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    """
    d_importance = squared_variation_gradient(softmax(logits).sum(axis=0))
    return softmax_gradient(logits, np.tile(d_importance, (len(logits), 1)))


def load_loss(clean: np.ndarray, noisy: np.ndarray, num_choices: int = 1, sigma: float | None = None) -> float:
    """Compute the squared variation of load_e, the sum of the tokens' chances of choosing expert e with new noise.

    The logits are [N, E]; sigma is the noise's standard deviation (None: 1/E). See `smooth_load`.

    >>> load_loss(np.zeros((1, 4)), np.zeros((1, 4)))
    0.0
    """
    if not len(clean):
        return 0.0
    deviation = 1.0 / clean.shape[1] if sigma is None else sigma
    load = np.zeros(clean.shape[1])
    for t in range(len(clean)):
        load += smooth_load(clean[t], noisy[t], num_choices, deviation)
    return squared_variation(load)


def load_loss_gradient(
    clean: np.ndarray, noisy: np.ndarray, num_choices: int = 1, sigma: float | None = None
) -> np.ndarray:
    """Compute the gradient [N, E] for fixed noise, so that the threshold eta = A_i + noise_i moves with A_i.

    With phi_e = phi((eta - A_e) / sigma) / sigma:  dA_e += phi_e dload_e,  dA_i -= sum over e of phi_e dload_e.

    >>> float(load_loss_gradient(np.zeros((1, 2)), np.array([[0.5, 0.0]]))[0].sum())
    0.0
    """
    deviation = 1.0 / clean.shape[1] if sigma is None else sigma
    load = sum(smooth_load(clean[t], noisy[t], num_choices, deviation) for t in range(len(clean)))
    d_load = squared_variation_gradient(np.asarray(load))
    gradient = np.zeros(clean.shape)
    for t in range(len(clean)):
        last = top_k(noisy[t], num_choices)[-1]
        for e in range(clean.shape[1]):
            distance = (noisy[t, last] - clean[t, e]) / deviation
            slope = np.exp(-0.5 * distance**2) / np.sqrt(2.0 * np.pi) / deviation
            gradient[t, e] += slope * d_load[e]
            gradient[t, last] -= slope * d_load[e]
    return gradient


def z_loss(logits: np.ndarray) -> float:
    """Compute the mean over the tokens of logsumexp(logits)^2.

    >>> round(z_loss(np.zeros((5, 32))), 4)
    12.0113
    """
    return float(np.mean([logsumexp(row) ** 2 for row in logits])) if len(logits) else 0.0


def z_loss_gradient(logits: np.ndarray) -> np.ndarray:
    """Compute the gradient [N, E]: 2 logsumexp(A) softmax(A) / N.

    >>> z_loss_gradient(np.array([[0.0, 0.0]])).round(4).tolist()
    [[0.6931, 0.6931]]
    """
    return 2.0 * logsumexp(logits)[:, None] * softmax(logits) / len(logits)


def local_entropy_loss(logits: np.ndarray) -> float:
    """Compute the mean over the tokens of the entropy of their probabilities.

    >>> round(local_entropy_loss(np.zeros((5, 32))), 4)
    3.4657
    """
    return float(np.mean([entropy(softmax(row)) for row in logits])) if len(logits) else 0.0


def local_entropy_loss_gradient(logits: np.ndarray) -> np.ndarray:
    """Compute the gradient [N, E]: -p_j (log p_j + H) / N.

    >>> float(abs(local_entropy_loss_gradient(np.zeros((1, 2)))).max().round(12))
    0.0
    """
    probability = softmax(logits)
    log_probability = logits - logsumexp(logits)[:, None]
    return -probability * (log_probability + entropy(probability)[:, None]) / len(logits)


def global_entropy_loss(logits: np.ndarray) -> float:
    """Compute -H of the mean over the tokens of their probabilities.

    >>> round(global_entropy_loss(np.array([[99.0, 0.0], [0.0, 99.0]])), 4)
    -0.6931
    """
    return -float(entropy(softmax(logits).mean(axis=0))) if len(logits) else 0.0


def global_entropy_loss_gradient(logits: np.ndarray) -> np.ndarray:
    """Compute the gradient [N, E]: dp~_e = log p~_e + 1, of which 1/N goes through the softmax of each token.

    >>> float(abs(global_entropy_loss_gradient(np.zeros((1, 2)))).max().round(12))
    0.0
    """
    mean = softmax(logits).mean(axis=0)
    return softmax_gradient(logits, np.tile((np.log(mean) + 1.0) / len(logits), (len(logits), 1)))


def thresholded_global_entropy_loss(logits: np.ndarray, threshold_experts: float) -> float:
    """Compute max(0, log S - H(mean probabilities)): 0 with at least S = `threshold_experts` experts (paper, Eq. 2).

    >>> round(thresholded_global_entropy_loss(np.array([[99.0] + [0.0] * 31]), 9), 4)
    2.1972
    """
    return max(0.0, float(np.log(threshold_experts)) + global_entropy_loss(logits)) if len(logits) else 0.0


def thresholded_global_entropy_loss_gradient(logits: np.ndarray, threshold_experts: float) -> np.ndarray:
    """Compute the gradient [N, E]: that of `global_entropy_loss` if the loss is above zero, else zero.

    >>> thresholded_global_entropy_loss_gradient(np.zeros((1, 2)), 1.5).tolist()
    [[0.0, 0.0]]
    """
    if thresholded_global_entropy_loss(logits, threshold_experts) > 0.0:
        return global_entropy_loss_gradient(logits)
    return np.zeros(logits.shape)


def auxiliary_losses(
    clean: np.ndarray,
    noisy: np.ndarray | None,
    modality: np.ndarray,
    *,
    num_choices: int = 1,
    threshold_experts_text: float,
    threshold_experts_image: float,
) -> AuxiliaryLosses:
    """Compute all auxiliary losses of a layer from logits [N, E] without padding; modality [N], 0 = image, 1 = text.

    Without noise the load loss is zero.

    >>> auxiliary_losses(np.zeros((2, 4)), None, np.array([0, 1]), threshold_experts_text=2,
    ...                  threshold_experts_image=2).importance
    0.0
    """
    image, text = clean[modality == 0], clean[modality == 1]
    return AuxiliaryLosses(
        importance=importance_loss(clean),
        load=0.0 if noisy is None else load_loss(clean, noisy, num_choices),
        z=z_loss(clean),
        local_text=local_entropy_loss(text),
        local_image=local_entropy_loss(image),
        global_text=thresholded_global_entropy_loss(text, threshold_experts_text),
        global_image=thresholded_global_entropy_loss(image, threshold_experts_image),
    )


def total_auxiliary_loss(
    layers: Sequence[AuxiliaryLosses], weights: Mapping[str, float], auxiliary_weight: float = 0.04
) -> float:
    """What is added to the contrastive loss: 0.04 times the mean of the weighted active losses, summed over the layers.

    `weights` names the active losses. Raises AttributeError for a name that is none.

    >>> layer = AuxiliaryLosses(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
    >>> round(total_auxiliary_loss([layer, layer], {"importance": 1.0, "z": 2.0}), 6)
    0.28
    """
    total = 0.0
    for losses in layers:
        total += float(np.mean([weight * getattr(losses, name) for name, weight in weights.items()]))
    return auxiliary_weight * total
