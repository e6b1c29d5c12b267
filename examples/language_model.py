"""A tiny language model of bytes with experts like a published model's, trained on Python's own standard library.

    python examples/language_model.py --family=deepseek_v3

The first steps are trained again with the experts written as a loop in plain JAX, in which every token goes through
every expert. Both curves must be the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from moe_kernels import (
    ClampedSwiglu,
    JoinedGluWeights,
    MoeSpec,
    RouterSpec,
    RouterWeights,
    WithShared,
    balance,
    balance_bias,
    moe_mlp,
)


@dataclasses.dataclass(frozen=True)
class Family:
    """The layer of a published model, and which weights it has beside those that all have."""

    spec: MoeSpec
    shared: bool = False
    """An expert for every token."""
    biases: bool = False
    """Of router and experts."""
    choice_bias: bool = False
    """Experts are balanced by a bias for the choice; else a loss does it."""


FAMILIES = {
    "mixtral": Family(MoeSpec(num_choices=2, router=RouterSpec(renormalise=True))),
    "deepseek_v3": Family(
        MoeSpec(num_choices=2, router=RouterSpec("sigmoid", renormalise=True, scale=2.5)), shared=True, choice_bias=True
    ),
    "gpt_oss": Family(
        MoeSpec(num_choices=2, router=RouterSpec(renormalise=True), activation=ClampedSwiglu(), interleaved=True),
        biases=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large model and batch are."""

    depth: int = 2
    width: int = 64
    heads: int = 4
    experts: int = 8
    hidden: int = 64
    length: int = 64
    batch: int = 16


class Block(NamedTuple):
    """Attention, then a mixture of experts."""

    qkv: Float[Array, "D 3*D"]
    out: Float[Array, "D D"]
    router: RouterWeights
    experts: JoinedGluWeights | WithShared


class Model(NamedTuple):
    """A decoder that reads and predicts bytes."""

    embedding: Float[Array, "256 D"]
    position: Float[Array, "S D"]
    blocks: tuple[Block, ...]


def new_model(family: Family, sizes: Sizes) -> Model:
    """Draw a model; biases begin at 0."""
    keys = iter(jax.random.split(jax.random.key(0), 100))
    d, f, e = sizes.width, sizes.hidden, sizes.experts

    def draw(*shape: int) -> Array:
        return jax.random.normal(next(keys), shape) / shape[-2] ** 0.5

    def experts(*lead: int) -> JoinedGluWeights:
        biases = (jnp.zeros((*lead, 2 * f)), jnp.zeros((*lead, d))) if family.biases else (None, None)
        return JoinedGluWeights(draw(*lead, d, 2 * f), draw(*lead, f, d), *biases)

    def block() -> Block:
        router = RouterWeights(
            draw(d, e), jnp.zeros(e) if family.biases else None, jnp.zeros(e) if family.choice_bias else None
        )
        routed = experts(e)
        return Block(draw(d, 3 * d), draw(d, d), router, WithShared(routed, experts()) if family.shared else routed)

    return Model(draw(256, d), draw(sizes.length, d), tuple(block() for _ in range(sizes.depth)))


class Mixed(NamedTuple):
    """What a mixture of experts gives: tokens, choices of each expert, and the balance loss."""

    tokens: Float[Array, "T D"]
    wanted: Float[Array, " E"]
    balance: Float[Array, ""]


Mix = Callable[[Float[Array, "T D"], Block, MoeSpec], Mixed]


def by_layer(x: Float[Array, "T D"], block: Block, spec: MoeSpec) -> Mixed:
    """Work the experts by the layer of moe_kernels."""
    moe = moe_mlp(x, block.router, block.experts, spec)
    return Mixed(moe.tokens, moe.sums.wanted.sum(axis=(0, 1)), balance.balance_loss(moe.sums)[0])


def by_loop(x: Float[Array, "T D"], block: Block, spec: MoeSpec) -> Mixed:
    """Send every token through every expert, and weight the results by gates that are mostly 0."""
    (kernel, bias, choice_bias), experts = block.router, block.experts
    logits = x @ kernel + (0 if bias is None else bias)
    score = jax.nn.sigmoid(logits) if spec.router.family == "sigmoid" else jax.nn.softmax(logits)
    _, chosen = jax.lax.top_k(score if choice_bias is None else score + choice_bias, spec.num_choices)
    hit = jax.nn.one_hot(chosen, kernel.shape[1]).sum(axis=1)
    gate = hit * score
    if spec.router.renormalise:
        gate = gate / gate.sum(axis=1, keepdims=True)
    gate = spec.router.scale * gate
    routed, y = experts, jnp.zeros_like(x)
    if isinstance(experts, WithShared):
        assert isinstance(experts.shared, JoinedGluWeights)
        routed, y = experts.routed, one_expert(x, experts.shared, spec)
    for e in range(kernel.shape[1]):
        y += gate[:, e, None] * one_expert(x, jax.tree.map(lambda w, e=e: w[e], routed), spec)
    share = hit.mean(axis=0) * jax.nn.softmax(logits).mean(axis=0)
    return Mixed(y, hit.sum(axis=0), len(share) * share.sum())


def one_expert(x: Float[Array, "T D"], weights: JoinedGluWeights, spec: MoeSpec) -> Float[Array, "T D"]:
    """Compute a gated MLP."""
    both = x @ weights.gate_up + (0 if weights.gate_up_bias is None else weights.gate_up_bias)
    gate, up = (both[:, ::2], both[:, 1::2]) if spec.interleaved else jnp.split(both, 2, axis=1)
    act = spec.activation
    if isinstance(act, ClampedSwiglu):
        gate, up = jnp.minimum(gate, act.limit), jnp.clip(up, -act.limit, act.limit)
        hidden = gate * jax.nn.sigmoid(act.alpha * gate) * (up + act.shift)
    else:
        hidden = jax.nn.silu(gate) * up
    return hidden @ weights.down + (0 if weights.down_bias is None else weights.down_bias)


def normed(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Scale every token to a mean square of 1."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


class Losses(NamedTuple):
    """Of a batch: the cross entropy in nats a byte, and of each block the choices of its experts."""

    entropy: Float[Array, ""]
    wanted: list[Float[Array, " E"]]


def loss_of(
    model: Model, text: Int[Array, "B L"], family: Family, heads: int, mix: Mix
) -> tuple[Float[Array, ""], Losses]:
    """Compute what is minimised: the entropy of each byte after those before it, and the balance of the experts."""
    x = model.embedding[text[:, :-1]] + model.position
    total, wanted = jnp.zeros(()), []
    for block in model.blocks:
        q, k, v = jnp.split((normed(x) @ block.qkv).reshape(*x.shape[:2], 3 * heads, -1), 3, axis=2)
        x += jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ block.out
        mixed = mix(normed(x).reshape(-1, x.shape[-1]), block, family.spec)
        x += mixed.tokens.reshape(x.shape)
        wanted.append(mixed.wanted)
        total += 0.0 if family.choice_bias else 0.01 * mixed.balance
    entropy = optax.softmax_cross_entropy_with_integer_labels(normed(x) @ model.embedding.T, text[:, 1:]).mean()
    return entropy + total, Losses(entropy, wanted)


def library_text(size: int = 2**20) -> np.ndarray:
    """Read the first bytes of the modules of the standard library, in order of name."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return np.frombuffer(b"".join(file.read_bytes() for file in files)[:size], np.uint8)


def train(name: str, mix: Mix, steps: int, sizes: Sizes = Sizes()) -> Iterator[float]:
    """Train a family's model, and give the entropy of each step's batch before its update."""
    family, text, random = FAMILIES[name], library_text(), np.random.default_rng(0)
    model, optimizer = new_model(family, sizes), optax.adam(optax.linear_schedule(0.0, 3e-3, 20))
    gradient_of = jax.grad(functools.partial(loss_of, family=family, heads=sizes.heads, mix=mix), has_aux=True)

    @jax.jit
    def step(model: Model, state: optax.OptState, batch: Int[Array, "B L"]) -> tuple[Model, optax.OptState, Array]:
        gradient, losses = gradient_of(model, batch)
        updates, state = optimizer.update(gradient, state)
        model = jax.tree.map(jnp.add, model, updates)
        blocks = tuple(map(rebalanced, model.blocks, losses.wanted))
        return model._replace(blocks=blocks), state, losses.entropy

    state = optimizer.init(model)
    for _ in range(steps):
        starts = random.integers(0, len(text) - sizes.length, size=(sizes.batch, 1))
        model, state, entropy = step(model, state, text[starts + np.arange(sizes.length + 1)].astype(np.int32))
        yield float(entropy)


def rebalanced(block: Block, wanted: Float[Array, " E"]) -> Block:
    """Move the bias for the choice, if there is one; it has no gradient."""
    bias = block.router.choice_bias
    if bias is None:
        return block
    return block._replace(router=block.router._replace(choice_bias=balance_bias(bias, wanted, rate=0.001)))


def main() -> None:
    """Train by the layer, then the first steps by the loop, and say how far the curves are apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="mixtral")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--loop-steps", type=int, default=20, help="steps that are trained again by the loop")
    options = parser.parse_args()
    start, curve = time.monotonic(), []
    for number, entropy in enumerate(train(options.family, by_layer, options.steps), 1):
        curve.append(entropy)
        if number % 20 == 0 or number in (1, options.steps):
            print(f"{options.family}, step {number:3d}: {entropy:.3f} nats a byte", flush=True)
    print(f"{options.family}: {options.steps} steps in {time.monotonic() - start:.0f} s")
    loop = list(train(options.family, by_loop, min(options.loop_steps, options.steps)))
    apart = max((abs(a - b) for a, b in zip(curve, loop, strict=False)), default=0.0)
    print(f"{options.family}: the first {len(loop)} steps by a dense loop are at most {apart:.1e} nats away")


if __name__ == "__main__":
    main()
