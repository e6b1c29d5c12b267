"""The problems of the dispatch benchmark: named sizes, how tokens spread over experts, and the arrays of one problem.

Axes: T tokens, G groups, S tokens in a group, D width, F expert width, E experts, K choices, C capacity; M = T K.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe_kernels import MlpWeights, expert_capacity

DISTRIBUTIONS = ("balanced", "zipf", "hot", "empty")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem size. `tokens` counts those of one device; a capacity factor of None means dropless."""

    name: str
    tokens: int
    groups: int
    width: int
    expert_width: int
    experts: int
    choices: int
    capacity_factor: float | None

    @property
    def group_size(self) -> int:
        """Number of tokens in a group."""
        return self.tokens // self.groups

    @property
    def capacity(self) -> int:
        """The capacity of an expert in a group. Without a limit it is S: a token chooses an expert at most once."""
        if self.capacity_factor is None:
            return self.group_size
        return expert_capacity(self.group_size, self.choices, self.experts, self.capacity_factor)


# Sizes of language models, without the third matrix of their gated MLPs: 8,192 tokens of a device. DeepSeek-V3 is on 32
# devices: a device has 8 of the 256 experts, and as many rows as its tokens have choices.
_MODELS = [
    Case("mixtral-8x7b", 8_192, 1, 4_096, 14_336, 8, 2, None),
    Case("qwen3-30b", 8_192, 1, 2_048, 768, 128, 8, None),
    Case("olmoe", 8_192, 1, 2_048, 1_024, 64, 8, None),
    Case("deepseek-v3-ep32", 8_192, 1, 7_168, 2_048, 8, 8, None),
]


def _narrowed(case: Case) -> Case:
    """Make the case whose tokens and widths are an eighth, which a CPU runs in seconds."""
    eighths = {name: getattr(case, name) // 8 for name in ("tokens", "width", "expert_width")}
    return dataclasses.replace(case, name=f"{case.name}-eighth", **eighths)


_ALL = [
    Case("tiny", 6_656, 1, 128, 512, 8, 1, 1.05),
    Case("issue", 4_096, 1, 512, 2_048, 32, 1, 1.05),
    Case("issue-8groups", 4_096, 8, 512, 2_048, 32, 1, 1.05),
    # LIMoE's sizes, as one group (C 538) and as 8 groups (C 68).
    *(
        Case(name + suffix, 16_384, groups, width, 4 * width, 32, 1, 1.05)
        for name, width in {"s32": 512, "b32": 768, "b16": 768, "l16": 1_024, "h14": 1_280}.items()
        for suffix, groups in (("", 1), ("-8groups", 8))
    ),
    # What one chip of B/16's pod gets, 64 of v5p at the paper's batch; and B/16 with two choices.
    Case("b16-pod", 54_272, 8, 768, 3_072, 32, 1, 1.05),
    Case("b16-k2", 16_384, 1, 768, 3_072, 32, 2, 1.05),
    *_MODELS,
    *(_narrowed(case) for case in _MODELS),
    # Only for single operations: its inputs take 27 GB.
    Case("llm-256x2048", 262_144, 1, 7_168, 2_048, 256, 1, None),
]
CASES = {case.name: case for case in _ALL}


def small_twin(case: Case, *, narrow: bool = True) -> Case:
    """Shrink a case for the loops of `reference`. Kernels of accelerators need the wider one.

    >>> small_twin(CASES["issue-8groups"]).tokens, small_twin(CASES["issue-8groups"]).capacity
    (256, 5)
    """
    experts = min(case.experts, max(8, 2 * case.choices))
    width, expert_width = (8, 24) if narrow else (128, 256)
    tokens = 32 * case.groups
    return dataclasses.replace(
        case, name="small", tokens=tokens, width=width, expert_width=expert_width, experts=experts
    )


class Inputs(NamedTuple):
    """The arrays of a problem, the same for every implementation. Router and noise are float32."""

    tokens: Float[Array, "T D"]
    router: Float[Array, "D E"]
    noise: Float[Array, "T E"]
    """Added to the logits. It makes the router choose `expert`, and keeps the gates apart from each other."""
    weights: MlpWeights
    rows: Float[Array, "M D"]
    """Input of expert_mlp, grouped_matmul and combine, in the order of choices (t * K + k)."""
    d_tokens: Float[Array, "T D"]
    """Cotangent of a result with one row for each token."""
    d_rows: Float[Array, "M D"]
    d_hidden: Float[Array, "M F"]
    d_gate: Float[Array, "T K"]
    expert: np.ndarray
    """[T, K], the experts that the router will choose."""


def draw_experts(case: Case, distribution: str, seed: int = 0) -> np.ndarray:
    """Draw distinct experts [T, K] for every token, with a named distribution in each group.

    balanced: every expert gets the same number, up to rounding. zipf: an expert's first choices are proportional to
    1 / rank. hot: half of the first choices go to one expert. empty: three quarters of the experts get no token. Raises
    ValueError for another name.

    >>> case = Case("x", 8, 1, 1, 1, 4, 1, None)
    >>> np.bincount(draw_experts(case, "balanced")[:, 0]).tolist(), np.bincount(draw_experts(case, "hot")[:, 0]).max()
    ([2, 2, 2, 2], np.int64(4))
    """
    share = _shares(case, distribution)
    rng = np.random.default_rng(seed)
    # Permute the experts, so that the popular ones are not neighbours.
    names = np.random.default_rng(1).permutation(case.experts)
    groups = []
    for _ in range(case.groups):
        ends = np.round(np.cumsum(share) * case.group_size).astype(int)
        first = rng.permutation(np.repeat(np.arange(case.experts), np.diff(ends, prepend=0)))
        if distribution == "balanced":
            ranks = (first[:, None] + np.arange(case.choices)) % case.experts
        else:
            # Gumbel trick: the K largest of log(share) + noise are a draw without replacement.
            score = np.log(np.maximum(share, 1e-30)) + rng.gumbel(size=(case.group_size, case.experts))
            score[np.arange(case.group_size), first] = np.inf
            ranks = np.argsort(-score, axis=1, kind="stable")[:, : case.choices]
        groups.append(names[ranks])
    return np.concatenate(groups).astype(np.int32)


def _shares(case: Case, distribution: str) -> np.ndarray:
    """Compute the share [E] of the first choices for each rank of expert."""
    share = np.ones(case.experts)
    if distribution == "zipf":
        share = 1 / np.arange(1, case.experts + 1)
    elif distribution == "hot":
        share[0] = max(1, case.experts - 1)
    elif distribution == "empty":
        share[max(case.choices, case.experts // 4) :] = 0
    elif distribution != "balanced":
        raise ValueError(f"distribution {distribution!r} is not one of {', '.join(DISTRIBUTIONS)}")
    return share / share.sum()


def imposing_noise(case: Case, expert: np.ndarray, seed: int = 0) -> Float[np.ndarray, "T E"]:
    """Make noise with which a router with small logits chooses these experts, with pairwise different gates."""
    # Each choice gets 2 less than the one before; the tokens of a choice differ by up to 1.
    spread = np.random.default_rng(seed).permutation(case.tokens) / case.tokens
    noise = np.zeros((case.tokens, case.experts), np.float32)
    values = 2 * (case.choices - np.arange(case.choices)) + spread[:, None]
    np.put_along_axis(noise, expert, values.astype(np.float32), axis=1)
    return noise


def make_inputs(case: Case, distribution: str, dtype: str, seed: int = 0) -> Inputs:
    """Draw the arrays of a problem. The router's logits are small, so the noise decides.

    >>> inputs = make_inputs(small_twin(CASES["issue"]), "zipf", "bfloat16")
    >>> inputs.tokens.dtype.name, inputs.router.dtype.name, inputs.weights.w1.shape
    ('bfloat16', 'float32', (8, 8, 24))
    """
    t, d, f, e, k = case.tokens, case.width, case.expert_width, case.experts, case.choices
    expert = draw_experts(case, distribution, seed)
    keys = iter(jax.random.split(jax.random.key(seed), 16))

    def normal(*shape: int, scale: float = 1.0, kind: str = dtype) -> Array:
        return jax.random.normal(next(keys), shape, jnp.dtype(kind)) * jnp.asarray(scale, kind)

    weights = MlpWeights(
        w1=normal(e, d, f, scale=d**-0.5),
        b1=normal(e, f, scale=0.1),
        w2=normal(e, f, d, scale=f**-0.5),
        b2=normal(e, d, scale=0.1),
    )
    return Inputs(
        tokens=normal(t, d),
        router=normal(d, e, scale=0.05 * d**-0.5, kind="float32"),
        noise=jnp.asarray(imposing_noise(case, expert, seed)),
        weights=weights,
        rows=normal(t * k, d),
        d_tokens=normal(t, d),
        d_rows=normal(t * k, d),
        d_hidden=normal(t * k, f),
        d_gate=normal(t, k, kind="float32"),
        expert=expert,
    )
