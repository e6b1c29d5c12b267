"""Each family in the lines of docs/families.md, which are taken from that page."""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax.traverse_util import unflatten_dict
from parity_cases import BATCH, CASES, EXPERTS, LENGTH

from moe_kernels import MoeSpec, RouteInputs, RouterWeights, Routing, make_routing

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"


class Family(NamedTuple):
    """A function of the page, the settings that were recorded, and what the recorded block has otherwise."""

    function: str
    settings: Mapping[str, Any]
    otherwise: Mapping[str, Any] = {}


FAMILIES = {
    "mixtral": Family("mixtral", {"num_choices": 2}),
    "qwen2_moe": Family("qwen2_moe", {"num_choices": 2}),
    "qwen3_moe": Family("qwen3_moe", {"num_choices": 4}),
    "olmoe": Family("qwen3_moe", {"num_choices": 3, "norm_topk_prob": False}),
    "deepseek_v3": Family("deepseek_v3", {"num_choices": 3, "n_group": 4, "topk_group": 2, "scale": 2.5}),
    "gpt_oss": Family("gpt_oss", {"num_choices": 2, "limit": 7.0}),
    "llama4": Family("llama4", {"num_choices": 1}),
    "granite_moe": Family("granite_moe", {"num_choices": 2}),
    "phi_moe": Family("phi_moe", {"jitter": 0.25}),
    "jamba": Family("jamba", {"num_choices": 2}),
    "switch": Family("switch", {"sequences": BATCH, "expert_capacity": LENGTH}),
    "switch_capacity": Family("switch", {"sequences": BATCH, "expert_capacity": 1}, {"activation": "gelu_tanh"}),
    "v_moe": Family("v_moe", {"groups": BATCH, "capacity_factor": 1, "key": None}),
}


class Layer(NamedTuple):
    """What a function of the page gives `moe_mlp` beside the tokens."""

    router: jax.Array | RouterWeights | Routing
    weights: Any
    spec: MoeSpec

    @property
    def tokens(self) -> Layer:
        """Functions of the page take the tokens of what `moe_mlp` returns."""
        return self


def as_documented(name: str, tokens: Any, tensors: Mapping[str, Any], groups: int) -> Layer:
    """Call a family's function with tensors by their public names, for a call of at least `groups` groups."""
    family = FAMILIES[name]
    if not CASES[name].of_hugging_face:
        tensors = unflatten_dict(tensors, sep=".")
    found = functions(groups)[family.function](tokens, tensors, **family.settings)
    groups = max(groups, found.spec.num_groups)
    return found._replace(spec=dataclasses.replace(found.spec, num_groups=groups, **family.otherwise))


@functools.cache
def functions(groups: int) -> dict[str, Callable[..., Any]]:
    """Run what the page imports and defines; tests/test_docs.py runs all of it.

    `moe_mlp` gives back what it is given. Routings have the call's groups, which the page's have not, and there is no
    noise.
    """
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        kept = [n for n in ast.parse(block).body if isinstance(n, ast.Import | ast.ImportFrom | ast.FunctionDef)]
        exec(compile(ast.Module(kept, []), str(PAGE), "exec"), names)
    names |= {"E": EXPERTS, "moe_mlp": _given, "router_noise": lambda *key, **sizes: None}
    names["make_routing"] = functools.partial(make_routing, spec=MoeSpec(num_groups=groups))
    return names


def _given(tokens: Any, router: Any, weights: Any, spec: MoeSpec, inputs: RouteInputs | None = None) -> Layer:
    assert inputs in (None, RouteInputs())
    return Layer(router, weights, spec)
