"""The routing kernels through the real TPU compiler: accepted on every chip, within the VMEM that was computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tpu_aot import TOPOLOGIES, WIDTHS, kernel_vmem

from moe_kernels import RouterWeights, Routing, RoutingSums
from moe_kernels.backends import choose, problem_of
from moe_kernels.backends.base import RouteInputs, RouteStatic
from moe_kernels.backends.tpu.route.tiles import backward_tiles, forward_tiles
from moe_kernels.chips import MIB, find_tpu

pytestmark = pytest.mark.aot

# Tokens, groups, experts, choices, modalities; noise and a mask.
PROBLEMS = {
    "one group": (16384, 1, 32, 1, 2, True, False),
    "eight groups": (16384, 8, 32, 1, 2, True, True),
    "64k tokens": (65536, 8, 32, 1, 1, False, False),
    # 8 examples of 212 tokens are no multiple of a tile.
    "ragged": (1696 * 2, 2, 8, 2, 2, True, True),
    "many experts": (8192, 1, 128, 8, 1, False, True),
    "odd": (17 * 3, 3, 130, 2, 3, True, True),
    "one token": (1, 1, 1, 1, 1, False, False),
}


# Where tokens are passed on, as by a layer: their other cotangent comes back.
PASSING = ("one group", "64k tokens", "ragged")


def compile_both(chip: str, width: int, problem: str, dtype):
    """The compiled forward and backward pass, as the table of back ends gives them, and their computed VMEM."""
    num_tokens, groups, experts, choices, modalities, noisy, masked = PROBLEMS[problem]
    passes = problem in PASSING
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    static = RouteStatic(choices, groups, modalities, 1 / experts)

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    tokens, router = array((num_tokens, width), dtype), array((width, experts), jnp.float32)
    inputs = RouteInputs(
        array((num_tokens, experts), jnp.float32) if noisy else None,
        array((num_tokens,), jnp.int32) if modalities > 1 else None,
        array((num_tokens,), jnp.bool_) if masked else None,
    )
    by_group, by_expert = array((groups, modalities), jnp.float32), array((groups, modalities, experts), jnp.float32)
    dsums = RoutingSums(by_group, by_expert, by_expert, by_group, by_group, by_expert, by_group)
    cotangent = Routing(array((num_tokens, choices), jnp.int32), array((num_tokens, choices), jnp.float32), dsums)
    chosen = []

    def both(tokens, router, inputs, cotangent):
        found = problem_of("route", tokens, experts, route=static)
        chosen.append(found)
        span = choose(found)
        routing, saved = span.forward(static, tokens, RouterWeights(router), inputs)
        return routing, span.backward(static, saved, cotangent, tokens if passes else None)

    mapped = jax.shard_map(both, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    lowered = jax.jit(mapped).trace(tokens, router, inputs, cotangent).lower(lowering_platforms=("tpu",))
    sizes = (static, num_tokens, width, experts, tokens.dtype.itemsize, find_tpu(chosen[0].chip), chosen[0].num_cores)
    return lowered.compile(), (forward_tiles(*sizes).vmem, backward_tiles(*sizes, passes=passes).vmem)


def check(chip: str, width: int, problem: str, dtype) -> None:
    compiled, computed = compile_both(chip, width, problem, dtype)
    for name, estimate in zip(("forward", "backward"), computed, strict=True):
        real = kernel_vmem(compiled.as_text(), f"route_{name}")
        assert real <= estimate, f"{name}: computed {estimate / MIB:.2f} MiB, real {real / MIB:.2f}"
        # Less is used where XLA lays operands into VMEM by itself, which it cannot with tokens of 134 MB; and by chips
        # that keep fewer values between the products than v4.
        if problem == "64k tokens" and width >= 1024 and dtype == jnp.bfloat16:
            assert estimate <= 1.3 * real + 3 * MIB, f"{name}: computed {estimate / MIB:.2f} MiB, real {real / MIB:.2f}"


@pytest.mark.parametrize(
    ("chip", "width", "problem", "dtype"),
    [
        ("v4", 1280, "one group", jnp.float32),
        ("v5e", 130, "odd", jnp.bfloat16),
        ("v5p", 768, "ragged", jnp.bfloat16),
        ("v6e", 768, "eight groups", jnp.float32),
        ("v6e", 1280, "64k tokens", jnp.bfloat16),
        ("7x", 512, "many experts", jnp.bfloat16),
    ],
)
def test_a_sample_compiles_within_its_vmem(chip, width, problem, dtype):
    check(chip, width, problem, dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_all_compile_within_their_vmem(chip, width, problem, dtype):
    check(chip, width, problem, dtype)
