"""A layer of gated experts without a capacity beside one dense gated MLP of the same rows, forward and backward.

    python benchmarks/gated.py [--repetitions=9]

4,096 tokens, D 512, F 1,024, E 32, K 4, float32, balanced. The dense MLP takes every token four times, once for each
choice. Both run in turns, each with its last result as a donated argument (see timing.py); the ratio is that of the
medians. Before anything is timed, the layer's output for some tokens is compared with float64.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jaxtyping import Array, Float

from benchmarks.cases import Case, draw_experts, imposing_noise
from benchmarks.timing import Program, compile_program, time_programs
from moe_kernels import GluWeights, MoeSpec, RouteInputs, moe_mlp, route

CASE = Case("gated", 4_096, 1, 512, 1_024, 32, 4, None)
_CHECKED = 16
_REPETITIONS = flags.DEFINE_integer("repetitions", 9, "Rounds in which both run.", lower_bound=1)


def inputs_of(case: Case, seed: int = 0) -> tuple[Array, Array, GluWeights, RouteInputs]:
    """Tokens, router, experts, and noise that spreads the tokens evenly over the experts."""
    rng = np.random.default_rng(seed)
    d, f, e = case.width, case.expert_width, case.experts

    def normal(*shape: int) -> Array:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2] if len(shape) == 3 else 1), jnp.float32)

    noise = imposing_noise(case, draw_experts(case, "balanced", seed), seed)
    weights = GluWeights(normal(e, d, f), normal(e, d, f), normal(e, f, d))
    return normal(case.tokens, d), 0.05 * normal(d, e) / np.sqrt(d), weights, RouteInputs(noise=jnp.asarray(noise))


def layer_of(case: Case) -> Program:
    """The layer with all its gradients."""
    tokens, router, weights, inputs = inputs_of(case)
    spec = MoeSpec(num_choices=case.choices)

    def call(tokens: Array, router: Array, weights: GluWeights, dout: Array) -> object:
        out, pull = jax.vjp(lambda t, r, w: moe_mlp(t, r, w, spec, inputs).tokens, tokens, router, weights)
        return out, pull(dout)

    program = compile_program("layer", call, (tokens, router, weights, jnp.ones_like(tokens)), "float32")
    program.warm_up = program.run()
    routing = route(tokens, router, spec, inputs)
    wanted = exact(np.asarray(tokens[:_CHECKED]), weights, np.asarray(routing.expert), np.asarray(routing.gate))
    np.testing.assert_allclose(program.last[0][:_CHECKED], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    return program


def dense_of(case: Case) -> Program:
    """One gated MLP with the weights of the first expert, its own [D, F] and [F, D], on every token K times."""
    tokens, _, weights, _ = inputs_of(case)
    one = jax.tree.map(lambda weight: weight[0], weights)

    def mlp(tokens: Array, weights: GluWeights) -> Float[Array, "R D"]:
        rows = jnp.repeat(tokens, case.choices, axis=0)
        return (jax.nn.silu(rows @ weights.gate) * (rows @ weights.up)) @ weights.down

    def call(tokens: Array, weights: GluWeights, dout: Array) -> object:
        out, pull = jax.vjp(mlp, tokens, weights)
        return out, pull(dout)

    dout = jnp.ones((case.tokens * case.choices, case.width), jnp.float32)
    return compile_program("dense", call, (tokens, one, dout), "float32")


def exact(tokens: np.ndarray, weights: GluWeights, expert: np.ndarray, gate: np.ndarray) -> np.ndarray:
    """The layer's output for some tokens in float64."""
    out = np.zeros(tokens.shape)
    for t, x in enumerate(tokens.astype(np.float64)):
        for e, g in zip(expert[t], gate[t], strict=True):
            first, up, down = (np.asarray(weight[e], np.float64) for weight in weights[:3])
            before = x @ first
            out[t] += g * (before / (1 + np.exp(-before)) * (x @ up)) @ down
    return out


def main(argv: Sequence[str]) -> None:
    """Print both medians and their ratio."""
    del argv
    programs = [layer_of(CASE), dense_of(CASE)]
    time_programs(programs, _REPETITIONS.value, slow=_REPETITIONS.value)
    layer, dense = (float(np.median(list(program.seconds.values()))) for program in programs)
    print(f"layer {1e3 * layer:.0f} ms, dense {1e3 * dense:.0f} ms, ratio of medians {layer / dense:.2f}")


if __name__ == "__main__":
    app.run(main)
