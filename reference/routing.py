"""Routing in float64: every token scores every expert and keeps its best few (paper, section 2)."""

import math
from typing import NamedTuple

import numpy as np


class RoutingSums(NamedTuple):
    """What the losses and figures need to know about routing: sums over tokens, per group G and modality M.

    `wanted` counts (token, choice) pairs, before any capacity. `probability`, `entropy` and `logsumexp_squared` are
    of the clean logits, `largest_gate` is of the noisy ones; `load` is zero where no noise was given.

    >>> zero_sums(num_groups=2, num_modalities=1, num_experts=3).wanted.shape
    (2, 1, 3)
    """

    tokens: np.ndarray  # [G, M]
    wanted: np.ndarray  # [G, M, E]
    probability: np.ndarray  # [G, M, E]
    entropy: np.ndarray  # [G, M]
    logsumexp_squared: np.ndarray  # [G, M]
    load: np.ndarray  # [G, M, E]
    largest_gate: np.ndarray  # [G, M]


class Routing(NamedTuple):
    """Which experts each token wants, and how much; the arrays that the derivative needs come along.

    `expert` is E (no expert) for tokens that are masked or whose logits are not finite; `gate` is 0 for the former
    and NaN for the latter. `active` marks all others.

    >>> route(np.eye(2), np.eye(2), num_choices=1).expert
    array([[0],
           [1]])
    """

    expert: np.ndarray  # [T, K] int
    gate: np.ndarray  # [T, K]
    sums: RoutingSums
    clean_logits: np.ndarray  # [T, E]
    noisy_logits: np.ndarray  # [T, E]
    group: np.ndarray  # [T] int
    modality: np.ndarray  # [T] int
    active: np.ndarray  # [T] bool
    has_noise: bool


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis.

    >>> softmax(np.array([[0.0, 0.0]]))
    array([[0.5, 0.5]])
    """
    logits = np.asarray(logits, np.float64)
    exponential = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponential / exponential.sum(axis=-1, keepdims=True)


def logsumexp(logits: np.ndarray) -> np.ndarray:
    """log(sum(exp(logits))) over the last axis.

    >>> float(np.round(logsumexp(np.zeros(32)) ** 2, 4))
    12.0113
    """
    logits = np.asarray(logits, np.float64)
    largest = logits.max(axis=-1, keepdims=True)
    return (largest + np.log(np.exp(logits - largest).sum(axis=-1, keepdims=True)))[..., 0]


def entropy(probability: np.ndarray) -> np.ndarray:
    """Entropy in nats over the last axis, with 0 log 0 = 0.

    >>> float(np.round(entropy(np.full(32, 1 / 32)), 4))
    3.4657
    """
    probability = np.asarray(probability, np.float64)
    logarithm = np.log(np.where(probability > 0, probability, 1.0))
    return -(probability * logarithm).sum(axis=-1)


def top_k(values: np.ndarray, num_choices: int) -> list[int]:
    """Indices of the largest values of one row, largest first; equal values in the order of their index.

    >>> top_k(np.array([1.0, 3.0, 3.0, 2.0]), 3)
    [1, 2, 3]
    """
    return sorted(range(len(values)), key=lambda index: (-values[index], index))[:num_choices]


def normal_cdf(value: float) -> float:
    """Cumulative distribution function of the standard normal distribution.

    >>> normal_cdf(0.0)
    0.5
    """
    return 0.5 * (1.0 + math.erf(value / math.sqrt(2.0)))


def smooth_load(clean: np.ndarray, noisy: np.ndarray, num_choices: int, sigma: float) -> np.ndarray:
    """Probability [E] that each expert is among one token's top K if only its own noise were drawn again.

    p_e = 1 - Phi((eta_K - A_e) / sigma), where eta_K is the K-th largest noisy logit (paper, section 3, load).

    >>> smooth_load(np.array([1.0, 1.0]), np.array([1.0, 1.0]), 1, sigma=0.5)
    array([0.5, 0.5])
    """
    threshold = noisy[top_k(noisy, num_choices)[-1]]
    return np.array([1.0 - normal_cdf((threshold - logit) / sigma) for logit in clean])


def zero_sums(*, num_groups: int, num_modalities: int, num_experts: int) -> RoutingSums:
    """Sums over no tokens at all; also the cotangent of sums that nobody used.

    >>> float(zero_sums(num_groups=1, num_modalities=2, num_experts=3).load.sum())
    0.0
    """
    per_modality, per_expert = (num_groups, num_modalities), (num_groups, num_modalities, num_experts)
    return RoutingSums(
        tokens=np.zeros(per_modality),
        wanted=np.zeros(per_expert),
        probability=np.zeros(per_expert),
        entropy=np.zeros(per_modality),
        logsumexp_squared=np.zeros(per_modality),
        load=np.zeros(per_expert),
        largest_gate=np.zeros(per_modality),
    )


def route(
    tokens: np.ndarray,
    router: np.ndarray,
    *,
    num_choices: int,
    num_groups: int = 1,
    noise: np.ndarray | None = None,
    modality: np.ndarray | None = None,
    num_modalities: int = 1,
    mask: np.ndarray | None = None,
    expert: np.ndarray | None = None,
) -> Routing:
    """Let every token choose its experts: the K largest of softmax(tokens @ router + noise), not renormalised.

    Tokens [T, D], router [D, E], noise [T, E] (already scaled), modality [T], mask [T] (False = padding). Group g is
    the contiguous block of tokens g*S to (g+1)*S. Experts are ranked by noisy logit, equal ones by index. A token with
    non-finite logits counts as a token, wants no expert, has NaN gates, and makes the other sums of its group and
    modality NaN. `expert` [T, K] replaces the ranking: for a comparison with a router that saw a near tie in float32.
    Raises ValueError if T is not a multiple of the number of groups. Paper, section 2.

    >>> routing = route(np.array([[0.0, 1.0], [3.0, 3.0]]), np.eye(2), num_choices=1)
    >>> routing.expert.tolist(), routing.gate.round(4).tolist()
    ([[1], [0]], [[0.7311], [0.5]])
    """
    tokens, router = np.asarray(tokens, np.float64), np.asarray(router, np.float64)
    num_tokens, num_experts = tokens.shape[0], router.shape[1]
    if num_tokens % num_groups:
        raise ValueError(f"{num_tokens} tokens cannot be cut into {num_groups} equal groups; use a divisor")
    group = np.repeat(np.arange(num_groups), num_tokens // num_groups)
    modality = np.zeros(num_tokens, int) if modality is None else np.asarray(modality)
    counted = np.ones(num_tokens, bool) if mask is None else np.asarray(mask, bool)

    # Infinities and NaN are values here, not accidents.
    with np.errstate(invalid="ignore", over="ignore"):
        clean_logits = tokens @ router
        noisy_logits = clean_logits if noise is None else clean_logits + np.asarray(noise, np.float64)
    active = counted & np.isfinite(clean_logits).all(axis=1) & np.isfinite(noisy_logits).all(axis=1)

    chosen = np.full((num_tokens, num_choices), num_experts)
    gate = np.zeros((num_tokens, num_choices))
    sums = zero_sums(num_groups=num_groups, num_modalities=num_modalities, num_experts=num_experts)
    for t in range(num_tokens):
        here = group[t], modality[t]
        if not counted[t]:
            continue
        sums.tokens[here] += 1
        if not active[t]:
            gate[t] = np.nan
            for total in (sums.probability, sums.entropy, sums.logsumexp_squared, sums.largest_gate):
                total[here] += np.nan
            if noise is not None:
                sums.load[here] += np.nan
            continue
        clean, noisy = softmax(clean_logits[t]), softmax(noisy_logits[t])
        chosen[t] = top_k(noisy_logits[t], num_choices) if expert is None else expert[t]
        for k in range(num_choices):
            gate[t, k] = noisy[chosen[t, k]]
            sums.wanted[here][chosen[t, k]] += 1
        sums.probability[here] += clean
        sums.entropy[here] += entropy(clean)
        sums.logsumexp_squared[here] += logsumexp(clean_logits[t]) ** 2
        sums.largest_gate[here] += noisy.max()
        if noise is not None:
            sums.load[here] += smooth_load(clean_logits[t], noisy_logits[t], num_choices, 1.0 / num_experts)
    return Routing(chosen, gate, sums, clean_logits, noisy_logits, group, modality, active, noise is not None)


def route_gradient(routing: Routing, d_gate: np.ndarray, d_sums: RoutingSums) -> np.ndarray:
    """Gradient [T, E] with respect to the clean logits A, given those of the gates [T, K] and of the sums.

    With p = softmax(A), q = softmax(A + noise), L = logsumexp(A), H = -sum(p log p), u the experts of a token:
      gates:              dA_j = q_j (dq_j - sum_i q_i dq_i),  dq_{u_k} = dgate_k;  largest gate: dq_{u_1} += dlargest
      probability:        dA_j = p_j (dp_j - sum_i p_i dp_i)
      entropy:            dA_j = -p_j (log p_j + H) dH
      logsumexp squared:  dA_j = 2 L p_j d(L^2)
      load:               s_e = phi((eta - A_e) / sigma) / sigma dload_e,  eta = A_i + noise_i,  i = u_K
                          dA_j = s_j - [j = i] sum_e s_e
    Counts are piecewise constant. Masked tokens, and tokens whose logits are not finite (their output is the constant
    NaN), get zero. The noise has the same gradient as the noisy part of A; it is not returned.

    >>> routing = route(np.eye(2), np.eye(2), num_choices=1)
    >>> nothing = zero_sums(num_groups=1, num_modalities=1, num_experts=2)
    >>> float(route_gradient(routing, np.zeros((2, 1)), nothing).max())
    0.0
    """
    num_experts, num_choices = routing.clean_logits.shape[1], routing.expert.shape[1]
    sigma = 1.0 / num_experts
    d_logits = np.zeros_like(routing.clean_logits)
    for t in range(len(d_logits)):
        if not routing.active[t]:
            continue
        here = routing.group[t], routing.modality[t]
        clean_logits, noisy_logits = routing.clean_logits[t], routing.noisy_logits[t]
        p, q = softmax(clean_logits), softmax(noisy_logits)

        d_q = np.zeros(num_experts)
        for k in range(num_choices):
            d_q[routing.expert[t, k]] += d_gate[t, k]
        d_q[top_k(noisy_logits, 1)[0]] += d_sums.largest_gate[here]
        d_logits[t] += q * (d_q - q @ d_q)

        d_p = d_sums.probability[here]
        d_logits[t] += p * (d_p - p @ d_p)
        log_p = clean_logits - logsumexp(clean_logits)
        d_logits[t] += -p * (log_p + entropy(p)) * d_sums.entropy[here]
        d_logits[t] += 2.0 * logsumexp(clean_logits) * p * d_sums.logsumexp_squared[here]

        if routing.has_noise:
            last = top_k(noisy_logits, num_choices)[-1]
            distance = (noisy_logits[last] - clean_logits) / sigma
            density = np.exp(-0.5 * distance**2) / np.sqrt(2.0 * np.pi)
            slope = density / sigma * d_sums.load[here]
            d_logits[t] += slope
            d_logits[t, last] -= slope.sum()
    return d_logits
