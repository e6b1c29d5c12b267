"""Metrics of routing and retrieval, from their definitions (paper, sections 2, 6 and 7)."""

import math

import numpy as np

from reference.plan import Plan
from reference.routing import entropy, top_k


def success_rate(plan: Plan, modality: int) -> float:
    """Compute the share of a modality's tokens with room for at least one choice; NaN without such tokens.

    >>> from reference.plan import make_plan
    >>> success_rate(make_plan(np.array([[0], [0]]), np.array([[0.5], [0.6]]), num_experts=1, capacity=1), 0)
    0.5
    """
    tokens = plan.active_tokens[:, modality].sum()
    return float(plan.placed_tokens[:, modality].sum() / tokens) if tokens else math.nan


def success_rate_bound(tokens_per_group: int, num_experts: int, capacity: int) -> float:
    """Compute the share of tokens that an ideal router keeps: E/S E[min(X, C)], X binomial with S and 1/E.

    Each token has one choice, tokens are independent, and all experts are equally likely (paper, section 2).

    >>> round(success_rate_bound(2, 2, 1), 9)
    0.75
    """
    size, share = tokens_per_group, 1.0 / num_experts
    if num_experts == 1:
        return min(1.0, capacity / size)
    kept = 0.0
    for count in range(1, size + 1):
        log_ways = math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)
        log_chance = log_ways + count * math.log(share) + (size - count) * math.log1p(-share)
        kept += min(count, capacity) * math.exp(log_chance)
    return kept * num_experts / size


def effective_experts(probability: np.ndarray) -> float:
    """Compute exp(H(p~)) for probabilities [N, E]: the effective number of experts that share the tokens.

    >>> round(effective_experts(np.eye(4)), 9)
    4.0
    """
    return float(np.exp(entropy(probability.mean(axis=0))))


def recall_at(similarity: np.ndarray, hit: np.ndarray, k: int) -> float:
    """Compute the share of queries (rows) with a hit among their k most similar candidates.

    Similarity is [Q, N], hit is [Q, N] bool; a query may have several hits. Ties go to the lower index. With classes as
    candidates it is the top-k accuracy.

    >>> recall_at(np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]), np.array([[0, 1, 0], [0, 0, 1]], bool), 1)
    0.5
    """
    found = 0
    for query in range(len(similarity)):
        found += any(hit[query, candidate] for candidate in top_k(similarity[query], k))
    return found / len(similarity)
