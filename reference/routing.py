"""Routing in float64: every token scores every expert and keeps its best few (paper, section 2)."""

import math
from typing import Literal, NamedTuple

import numpy as np


class RoutingSums(NamedTuple):
    """The sums over tokens that losses and metrics need, per group G and modality M.

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


class Router(NamedTuple):
    """How logits become choices and gates.

    Scores are softmax(A) or sigmoid(A). The K largest are kept; with groups, of the experts in the best groups alone,
    where a group counts by the sum of its `group_best` largest scores (DeepSeek-V3, section 2.1.2). Gates are their
    scores, over their sum if renormalised, times `scale`.

    >>> Router().family
    'softmax'
    """

    family: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = False
    scale: float = 1.0
    expert_groups: int = 1
    groups_chosen: int = 1
    group_best: int = 2


class Routing(NamedTuple):
    """The experts that each token wants, their gates, and the arrays that the gradient needs.

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
    settings: Router = Router()


def softmax(logits: np.ndarray) -> np.ndarray:
    """Compute the softmax over the last axis.

    >>> softmax(np.array([[0.0, 0.0]]))
    array([[0.5, 0.5]])
    """
    logits = np.asarray(logits, np.float64)
    exponential = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponential / exponential.sum(axis=-1, keepdims=True)


def logsumexp(logits: np.ndarray) -> np.ndarray:
    """Compute log(sum(exp(logits))) over the last axis.

    >>> float(np.round(logsumexp(np.zeros(32)) ** 2, 4))
    12.0113
    """
    logits = np.asarray(logits, np.float64)
    largest = logits.max(axis=-1, keepdims=True)
    return (largest + np.log(np.exp(logits - largest).sum(axis=-1, keepdims=True)))[..., 0]


def entropy(probability: np.ndarray) -> np.ndarray:
    """Compute the entropy in nats over the last axis, with 0 log 0 = 0.

    >>> float(np.round(entropy(np.full(32, 1 / 32)), 4))
    3.4657
    """
    probability = np.asarray(probability, np.float64)
    logarithm = np.log(np.where(probability > 0, probability, 1.0))
    return -(probability * logarithm).sum(axis=-1)


def top_k(values: np.ndarray, num_choices: int) -> list[int]:
    """Find the indices of the largest values of a row, largest first. Ties are ordered by index.

    >>> top_k(np.array([1.0, 3.0, 3.0, 2.0]), 3)
    [1, 2, 3]
    """
    return sorted(range(len(values)), key=lambda index: (-values[index], index))[:num_choices]


def scores(logits: np.ndarray, family: str) -> np.ndarray:
    """Softmax, or 1 / (1 + exp(-A)).

    >>> scores(np.array([0.0, 0.0]), "sigmoid")
    array([0.5, 0.5])
    """
    return softmax(logits) if family == "softmax" else np.exp(-np.logaddexp(0.0, -np.asarray(logits, np.float64)))


def choose(logits: np.ndarray, num_choices: int, settings: Router, choice_bias: np.ndarray | None) -> list[int]:
    """Choose the experts of one token, best first: by score plus bias, among those of the best groups.

    >>> choose(np.array([3.0, 0.0, 2.0, 2.0]), 1, Router(expert_groups=2, group_best=2), None)
    [0]
    """
    if choice_bias is None and settings.expert_groups == 1:
        return top_k(logits, num_choices)
    score = scores(logits, settings.family) + (0.0 if choice_bias is None else choice_bias)
    groups = score.reshape(settings.expert_groups, -1)
    merit = np.array([sum(sorted(group)[-settings.group_best :]) for group in groups])
    for group in set(range(settings.expert_groups)) - set(top_k(merit, settings.groups_chosen)):
        groups[group] = -np.inf
    return top_k(groups.reshape(-1), num_choices)


def normal_cdf(value: float) -> float:
    """Compute the cumulative distribution function of the standard normal distribution.

    >>> normal_cdf(0.0)
    0.5
    """
    return 0.5 * (1.0 + math.erf(value / math.sqrt(2.0)))


def smooth_load(clean: np.ndarray, noisy: np.ndarray, num_choices: int, sigma: float) -> np.ndarray:
    """Compute the probability [E] that each expert is in a token's top K with new noise for this expert only.

    p_e = 1 - Phi((eta_K - A_e) / sigma), where eta_K is the K-th largest noisy logit (paper, section 3, load).

    >>> smooth_load(np.array([1.0, 1.0]), np.array([1.0, 1.0]), 1, sigma=0.5)
    array([0.5, 0.5])
    """
    threshold = noisy[top_k(noisy, num_choices)[-1]]
    return np.array([1.0 - normal_cdf((threshold - logit) / sigma) for logit in clean])


def zero_sums(*, num_groups: int, num_modalities: int, num_experts: int) -> RoutingSums:
    """Make sums over no tokens, which are also the cotangent of unused sums.

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
    settings: Router = Router(),  # noqa: B008 (a tuple)
    bias: np.ndarray | None = None,
    choice_bias: np.ndarray | None = None,
    num_groups: int = 1,
    noise: np.ndarray | None = None,
    modality: np.ndarray | None = None,
    num_modalities: int = 1,
    mask: np.ndarray | None = None,
    expert: np.ndarray | None = None,
) -> Routing:
    """Let every token choose its experts: the K largest scores of tokens @ router + bias + noise.

    By default scores are a softmax, and gates are they. `choice_bias` [E] is added to scores for the choice alone.

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
        clean_logits = tokens @ router + (0.0 if bias is None else bias)
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
        clean, noisy = (scores(logits[t], settings.family) for logits in (clean_logits, noisy_logits))
        clean = clean / clean.sum()
        chosen[t] = choose(noisy_logits[t], num_choices, settings, choice_bias) if expert is None else expert[t]
        for k in range(num_choices):
            gate[t, k] = noisy[chosen[t, k]]
            sums.wanted[here][chosen[t, k]] += 1
        gate[t] *= settings.scale / (gate[t].sum() if settings.renormalise else 1.0)
        sums.probability[here] += clean
        sums.entropy[here] += entropy(clean)
        sums.logsumexp_squared[here] += logsumexp(clean_logits[t]) ** 2
        sums.largest_gate[here] += gate[t].max()
        if noise is not None:
            sums.load[here] += smooth_load(clean_logits[t], noisy_logits[t], num_choices, 1.0 / num_experts)
    return Routing(chosen, gate, sums, clean_logits, noisy_logits, group, modality, active, noise is not None, settings)


def route_gradient(routing: Routing, d_gate: np.ndarray, d_sums: RoutingSums) -> np.ndarray:
    """Compute the gradient [T, E] of the clean logits A from those of the gates [T, K] and of the sums.

    With s = scores(A), p = s / sum(s), q = scores(A + noise), L = logsumexp(A), H = -sum(p log p), u the experts of a
    token, c the scale, S the sum of q over u, m the largest gate:
      gates:              dq_{u_k} = c dgate_k;  renormalised: c (dgate_k - sum_i dgate_i q_{u_i} / S) / S
                          softmax: dA_j = q_j (dq_j - sum_i q_i dq_i);  sigmoid: dA_j = q_j (1 - q_j) dq_j
      largest gate:       dgate_m += dlargest
      probability:        softmax: dA_j = p_j (dp_j - sum_i p_i dp_i);  sigmoid: the same times 1 - s_j
      entropy:            dp_j = -(log p_j + 1) dH
      logsumexp squared:  dA_j = 2 L softmax(A)_j d(L^2)
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
    sigma, settings = 1.0 / num_experts, routing.settings
    d_logits = np.zeros_like(routing.clean_logits)
    for t in range(len(d_logits)):
        if not routing.active[t]:
            continue
        here = routing.group[t], routing.modality[t]
        clean_logits, noisy_logits = routing.clean_logits[t], routing.noisy_logits[t]
        s, q = scores(clean_logits, settings.family), scores(noisy_logits, settings.family)
        p = s / s.sum()

        d_gates, own = d_gate[t].copy(), q[routing.expert[t]]
        d_gates[np.argmax(routing.gate[t])] += d_sums.largest_gate[here]
        if settings.renormalise:
            d_gates = (d_gates - d_gates @ own / own.sum()) / own.sum()
        d_q = np.zeros(num_experts)
        for k in range(num_choices):
            d_q[routing.expert[t, k]] += settings.scale * d_gates[k]
        log_p = np.log(s) - np.log(s.sum()) if settings.family == "sigmoid" else clean_logits - logsumexp(clean_logits)
        d_p = d_sums.probability[here] - (log_p + 1.0) * d_sums.entropy[here]
        if settings.family == "softmax":
            d_logits[t] += q * (d_q - q @ d_q) + p * (d_p - p @ d_p)
        else:
            d_logits[t] += q * (1.0 - q) * d_q + p * (1.0 - s) * (d_p - p @ d_p)
        d_square = 2.0 * logsumexp(clean_logits) * d_sums.logsumexp_squared[here]
        d_logits[t] += softmax(clean_logits) * d_square

        if routing.has_noise:
            last = top_k(noisy_logits, num_choices)[-1]
            distance = (noisy_logits[last] - clean_logits) / sigma
            density = np.exp(-0.5 * distance**2) / np.sqrt(2.0 * np.pi)
            slope = density / sigma * d_sums.load[here]
            d_logits[t] += slope
            d_logits[t, last] -= slope.sum()
    return d_logits
