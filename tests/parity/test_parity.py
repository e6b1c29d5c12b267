"""The layer gives what the public implementation of each family gave: output and gradients, on every back end.

`pytest -s` prints the worst difference of each. Gradients are taken with respect to the tensors as the public
implementation has them. Those of tokens and router are compared whole, those of other tensors by fixed projections.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import gpu_simulator
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import record_parity
from families import FAMILIES, Layer, as_documented
from parity_cases import CASES, HIDDEN, RECORDED, WIDTH, draw, is_of_router, kept_of_gradient, recorded
from sharding_cases import mesh_of

from moe_kernels import GluWeights, JoinedGluWeights, RouterSpec, Routing, WithShared, explain, moe_mlp
from moe_kernels.backends.gpu import install_simulator

install_simulator(gpu_simulator.simulate)

# In parts of the largest entry of a row; for bfloat16 2 eps sqrt(k), where eps is one rounding and k the length of all
# matmuls.
BOUNDS = {"float32": 5e-6, "bfloat16": 2 * 2.0**-8 * np.sqrt(WIDTH)}

# The spans that kernels fill in each family. XLA runs other routers than a softmax whose largest entries are the gates.
# gpt-oss has biases between its matmuls.
GATED = {"dispatch", "expert_glu", "combine"}
PLAIN = {"dispatch", "expert_mlp", "combine"}
KERNELS = {
    "mixtral": GATED,
    "qwen2_moe": GATED | {"route"},
    "qwen3_moe": GATED,
    "olmoe": GATED | {"route"},
    "deepseek_v3": GATED,
    "gpt_oss": {"dispatch", "grouped_matmul", "combine"},
    "llama4": GATED,
    "granite_moe": GATED,
    "phi_moe": GATED,
    "jamba": GATED | {"route"},
    "switch": PLAIN | {"route"},
    "switch_capacity": PLAIN | {"route"},
    "v_moe": PLAIN | {"route"},
}
# One choice of each token, and rows in a block: one kernel of the TPU.
TPU_KERNELS = KERNELS | {"switch_capacity": {"route", "dispatch_mlp_combine"}}

Change = Callable[[Layer], Layer]


def layer_of(name: str, tokens: Any, tensors: Any, backend: str, shards: int) -> Layer:
    """A family's layer for a back end, with at least a group for each shard."""
    found = as_documented(name, tokens, tensors, shards)
    weights = found.weights if backend == "xla" else fused(found.weights)
    return found._replace(weights=weights, spec=dataclasses.replace(found.spec, backend=backend))


def fused(weights: Any) -> Any:
    """Gate and up apart, which kernels multiply and activate at once; but not those of gpt-oss, with biases between."""
    if isinstance(weights, WithShared):
        return weights._replace(routed=fused(weights.routed))
    if isinstance(weights, JoinedGluWeights) and weights.gate_up_bias is None:
        return GluWeights(*jnp.split(weights.gate_up, 2, axis=2), weights.down)
    return weights


def given_to(name: str, dtype: str) -> tuple[Any, Any, dict[str, Any]]:
    """Tokens, cotangent and tensors in a dtype that holds them exactly. A router's stay in float32."""
    given = draw(name)
    tensors = {k: jnp.asarray(v, "float32" if is_of_router(k) else dtype) for k, v in given.tensors.items()}
    return jnp.asarray(given.tokens, dtype), jnp.asarray(given.doutput, dtype), tensors


def computed(name: str, dtype: str, backend: str, mesh: Any = None, change: Change = lambda layer: layer):
    """Output and gradients as they are recorded."""

    @jax.jit
    def run(tokens, doutput, tensors):
        def forward(tokens, tensors):
            layer = change(layer_of(name, tokens, tensors, backend, 1 if mesh is None else mesh.size))
            return moe_mlp(tokens, *layer, mesh=mesh).tokens

        output, pull = jax.vjp(forward, tokens, tensors)
        return output, *pull(doutput)

    output, dtokens, dtensors = run(*given_to(name, dtype))
    return {"output": output, "dtokens": dtokens} | {f"d {k}": kept_of_gradient(k, g) for k, g in dtensors.items()}


def differences(name: str, found: dict[str, Any]) -> dict[str, float]:
    """The largest difference in each row of an array, in parts of the row's largest entry, for the worst row.

    A row of zeros (a token without a place, an expert without tokens) must be exactly zero.
    """
    wanted = recorded(name)
    del wanted["versions"]
    assert {key: np.shape(found[key]) for key in wanted} == {key: array.shape for key, array in wanted.items()}
    # A bias for the choice alone gets no gradient.
    assert found.keys() - wanted.keys() <= {"d gate.e_score_correction_bias"}
    worst = {}
    for key, array in wanted.items():
        rows, mine = (np.atleast_2d(np.asarray(a, np.float64)) for a in (array, found[key]))
        error, size = np.abs(mine - rows).max(axis=1), np.abs(rows).max(axis=1)
        worst[key] = np.divide(error, size, out=np.where(error == 0, 0, np.inf), where=size > 0).max()
    return worst


def check(name: str, dtype: str, backend: str, mesh: Any = None) -> None:
    shards = 1 if mesh is None else mesh.size
    tokens, _, tensors = given_to(name, dtype)
    layer = layer_of(name, tokens, tensors, backend, shards)
    kernels = {"xla": set(), "tpu": TPU_KERNELS.get(name), "gpu": KERNELS.get(name)}[backend]
    assert run_by_kernels(tokens, layer, shards) == kernels
    worst = differences(name, computed(name, dtype, backend, mesh))
    key = max(worst, key=worst.__getitem__)
    print(f"{name}, {dtype}, {backend}, {shards} devices: {worst[key]:.1e} ({key})")
    assert worst[key] <= BOUNDS[dtype], worst


def run_by_kernels(tokens: Any, layer: Layer, shards: int) -> set[str]:
    """The spans of the layer that another back end than XLA fills."""
    spec = dataclasses.replace(layer.spec, num_groups=layer.spec.num_groups // shards)
    told = explain(tokens[: len(tokens) // shards], layer.router, layer.weights, spec, shards=shards).as_json()
    verbs = {"dispatch", "experts", "combine"} if told["layer"]["backend"] is None else {"layer"}
    verbs |= set() if isinstance(layer.router, Routing) else {"route"}
    return {told[verb]["span"] for verb in verbs if told[verb]["backend"] != "xla"}


def sample(*everyday: str) -> list:
    """The families with kernels: some every day, and all of them in the whole matrix."""
    return [pytest.param(name, marks=[] if name in everyday else pytest.mark.full) for name in KERNELS]


@pytest.mark.parametrize("name", FAMILIES)
def test_xla(name):
    check(name, "float32", "xla")


@pytest.mark.devices(4)
@pytest.mark.parametrize("name", FAMILIES)
def test_xla_on_a_mesh(name):
    check(name, "float32", "xla", mesh_of(1, 4))


# Gated experts behind a softmax, and one kernel for a layer.
@pytest.mark.slow
@pytest.mark.parametrize("name", sample("qwen2_moe", "switch_capacity"))
def test_tpu_interpreted(name):
    check(name, "float32", "tpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", sample("mixtral", "switch_capacity"))
def test_gpu_interpreted(name):
    check(name, "bfloat16", "gpu")


def with_spec(layer: Layer, **options: Any) -> Layer:
    return layer._replace(spec=dataclasses.replace(layer.spec, **options))


WRONG: dict[str, tuple[str, Change]] = {
    "gates not renormalised": ("mixtral", lambda layer: with_spec(layer, router=RouterSpec())),
    "gate and up swapped": (
        "mixtral",
        lambda given: given._replace(
            weights=given.weights._replace(gate_up=jnp.roll(given.weights.gate_up, HIDDEN, 2))
        ),
    ),
    "places by order of arrival": ("v_moe", lambda layer: with_spec(layer, priority="arrival")),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_layer_misses_every_bound(wrong):
    name, change = WRONG[wrong]
    worst = differences(name, computed(name, "float32", "xla", change=change))
    assert worst["output"] > max(BOUNDS.values()) and worst["dtokens"] > max(BOUNDS.values()), worst


def test_what_is_recorded_is_small_and_says_what_made_it():
    files = list(RECORDED.iterdir())
    assert {file.name for file in files} == {f"{name}.npz" for name in CASES}
    assert sum(file.stat().st_size for file in files) <= 2e6
    told = " ".join(str(record_parity.__doc__).split())
    assert all(version in told for name in CASES for version in recorded(name)["versions"])
