"""The blocks of published models that were recorded: their settings, the names of their tensors, and what is drawn.

Only NumPy is needed here: the recorder (record_parity.py) and the test (test_parity.py) draw the same numbers, so these
are not stored. Every number is a power of two times a whole number up to 128, which bfloat16 holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

RECORDED = Path(__file__).with_name("recorded")
# Widths of one tile of a GPU's and of a TPU's kernels; the number of experts is a multiple of the mesh's four devices.
BATCH, LENGTH, WIDTH, HIDDEN, EXPERTS = 4, 8, 128, 128, 8
PROJECTIONS = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """A block: the module that has it, its class, its configuration, and all its tensors by name.

    Tensors are drawn below 1/8 in magnitude, which keeps the size of what they multiply; `larger` are multiplied by 8.
    """

    module: str
    block: str
    settings: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]
    config: str | None = None
    larger: tuple[str, ...] = ()

    @property
    def of_hugging_face(self) -> bool:
        return self.config is not None


def _glu() -> dict[str, tuple[int, ...]]:
    return {"experts.gate_up_proj": (EXPERTS, 2 * HIDDEN, WIDTH), "experts.down_proj": (EXPERTS, WIDTH, HIDDEN)}


def _shared(name: str) -> dict[str, tuple[int, ...]]:
    first = (HIDDEN, WIDTH)
    return {f"{name}.gate_proj.weight": first, f"{name}.up_proj.weight": first, f"{name}.down_proj.weight": first[::-1]}


def _switch(**settings: Any) -> Case:
    tensors = {"router.classifier.weight": (EXPERTS, WIDTH)}
    for expert in range(EXPERTS):
        tensors[f"experts.expert_{expert}.wi.weight"] = (HIDDEN, WIDTH)
        tensors[f"experts.expert_{expert}.wo.weight"] = (WIDTH, HIDDEN)
    sizes = {"d_model": WIDTH, "d_ff": HIDDEN, "num_experts": EXPERTS}
    return Case(
        "switch_transformers",
        "SwitchTransformersSparseMLP",
        sizes | settings,
        tensors,
        config="SwitchTransformersConfig",
    )


_SIZES = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_experts_per_tok": 2}
_LOCAL = _SIZES | {"num_local_experts": EXPERTS}
_ALL = _SIZES | {"num_experts": EXPERTS, "moe_intermediate_size": HIDDEN}
_GATE = {"gate.weight": (EXPERTS, WIDTH)}
_ROUTER = {"router.weight": (EXPERTS, WIDTH)}

CASES = {
    "mixtral": Case("mixtral", "MixtralSparseMoeBlock", _LOCAL, _GATE | _glu(), config="MixtralConfig"),
    "qwen2_moe": Case(
        "qwen2_moe",
        "Qwen2MoeSparseMoeBlock",
        _ALL | {"shared_expert_intermediate_size": HIDDEN, "norm_topk_prob": False},
        _GATE | _glu() | _shared("shared_expert") | {"shared_expert_gate.weight": (1, WIDTH)},
        config="Qwen2MoeConfig",
    ),
    "qwen3_moe": Case(
        "qwen3_moe",
        "Qwen3MoeSparseMoeBlock",
        _ALL | {"num_experts_per_tok": 4, "norm_topk_prob": True},
        _GATE | _glu(),
        config="Qwen3MoeConfig",
    ),
    "olmoe": Case(
        "olmoe",
        "OlmoeSparseMoeBlock",
        _SIZES | {"num_experts": EXPERTS, "num_experts_per_tok": 3, "norm_topk_prob": False},
        _GATE | _glu(),
        config="OlmoeConfig",
    ),
    "deepseek_v3": Case(
        "deepseek_v3",
        "DeepseekV3MoE",
        {"hidden_size": WIDTH, "moe_intermediate_size": HIDDEN, "n_routed_experts": EXPERTS, "n_shared_experts": 1}
        | {"num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
        _GATE | {"gate.e_score_correction_bias": (EXPERTS,)} | _glu() | _shared("shared_experts"),
        config="DeepseekV3Config",
    ),
    # The weights are so large that the clamp at 7 acts on many entries.
    "gpt_oss": Case(
        "gpt_oss",
        "GptOssMLP",
        _LOCAL,
        {
            **_ROUTER,
            "router.bias": (EXPERTS,),
            "experts.gate_up_proj": (EXPERTS, WIDTH, 2 * HIDDEN),
            "experts.gate_up_proj_bias": (EXPERTS, 2 * HIDDEN),
            "experts.down_proj": (EXPERTS, HIDDEN, WIDTH),
            "experts.down_proj_bias": (EXPERTS, WIDTH),
        },
        config="GptOssConfig",
        larger=("experts.gate_up_proj", "experts.gate_up_proj_bias"),
    ),
    "llama4": Case(
        "llama4",
        "Llama4TextMoe",
        _LOCAL | {"num_experts_per_tok": 1},
        {
            **_ROUTER,
            "experts.gate_up_proj": (EXPERTS, WIDTH, 2 * HIDDEN),
            "experts.down_proj": (EXPERTS, HIDDEN, WIDTH),
            **_shared("shared_expert"),
        },
        config="Llama4TextConfig",
    ),
    "granite_moe": Case("granitemoe", "GraniteMoeMoE", _LOCAL, _ROUTER | _glu(), config="GraniteMoeConfig"),
    # By default a second expert shares in a gate within 2% of the best logit, which hardly one does: gates would be 1.
    "phi_moe": Case(
        "phimoe",
        "PhimoeSparseMoeBlock",
        _LOCAL | {"router_jitter_noise": 0.25},
        _ROUTER | _glu(),
        config="PhimoeConfig",
    ),
    "jamba": Case(
        "jamba", "JambaSparseMoeBlock", _SIZES | {"num_experts": EXPERTS}, _ROUTER | _glu(), config="JambaConfig"
    ),
    "switch": _switch(dense_act_fn="relu", expert_capacity=LENGTH),
    "switch_capacity": _switch(dense_act_fn="gelu_new", expert_capacity=1),
    "v_moe": Case(
        "vmoe.nn.vit_moe",
        "MlpMoeBlock",
        {
            "mlp_dim": HIDDEN,
            "num_experts": EXPERTS,
            "group_size": LENGTH,
            "deterministic": True,
            "router": {
                "num_selected_experts": 2,
                "dispatcher": {"name": "indices", "capacity": 2, "batch_priority": True},
            },
        },
        {
            "Router.dense.kernel": (WIDTH, EXPERTS),
            "Mlp.Dense_0.kernel": (EXPERTS, WIDTH, HIDDEN),
            "Mlp.Dense_0.bias": (EXPERTS, HIDDEN),
            "Mlp.Dense_1.kernel": (EXPERTS, HIDDEN, WIDTH),
            "Mlp.Dense_1.bias": (EXPERTS, WIDTH),
        },
    ),
}


class Drawn(NamedTuple):
    """Tokens, cotangent of the output, and the block's tensors, in float64."""

    tokens: np.ndarray
    doutput: np.ndarray
    tensors: dict[str, np.ndarray]


def draw(name: str) -> Drawn:
    """Draw what a block is given, from its place in the table."""
    case, random = CASES[name], np.random.RandomState(list(CASES).index(name))

    def uniform(shape: tuple[int, ...], largest: float) -> np.ndarray:
        return random.randint(-128, 129, size=shape) * (largest / 128)

    tokens, doutput = uniform((2, BATCH * LENGTH, WIDTH), 2.0)
    sizes = {tensor: 1.0 if tensor in case.larger else 1 / 8 for tensor in case.tensors}
    return Drawn(tokens, doutput, {tensor: uniform(case.tensors[tensor], size) for tensor, size in sizes.items()})


def is_of_router(tensor: str) -> bool:
    """Say whether a tensor belongs to a router. Its gradient is stored as it is; those of others are projected."""
    return tensor.lower().startswith(("gate.", "router."))


def kept_of_gradient(tensor: str, gradient: np.ndarray) -> np.ndarray:
    """What is stored of a tensor's gradient: for others than routers' its products with fixed vectors of signs.

    A stack of matrices has them matrix by matrix, anything else has them as a whole.
    """
    gradient = np.asarray(gradient, np.float64)
    if is_of_router(tensor):
        return gradient
    rows = gradient.reshape(len(gradient) if gradient.ndim == 3 else 1, -1)
    return rows @ (np.random.RandomState(0).randint(0, 2, size=(rows.shape[1], PROJECTIONS)) * 2 - 1)


def recorded(name: str) -> dict[str, np.ndarray]:
    """What the public implementation gave: `output`, `dtokens`, `d NAME` of each tensor; and the `versions` of it."""
    with np.load(RECORDED / f"{name}.npz") as file:
        return dict(file)
