"""The parameters that a run begins with: new ones, or those of a trained model as far as they fit.

Blocks are matched by their place in the tower, whatever the scans are. What the source does not have in the same shape
starts anew, with two exceptions: positions of images are interpolated, and of text positions the first ones are taken.

Sparse upcycling (Komatsuzaki et al. 2023, https://arxiv.org/abs/2212.05055; CLIP-UP, https://arxiv.org/abs/2502.00965)
makes every expert a copy of the dense MLP in its place. A gate is the router's softmax probability, so a copy alone
would be too weak. Here the new router begins so small (`_ROUTER`) that all gates are nearly 1/E, and the experts' last
matrix and bias are multiplied by E/K: K gates of 1/E times E/K are 1, and the layer computes what the MLP did. No
setting and no kernel differs afterwards. Renormalised gates would be exact too, but with K = 1 they are always 1, and
the router would learn nothing from the contrastive loss.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from limoe.config.schema import Config, ModelConfig
from limoe.data import files
from limoe.errors import LimoeError
from limoe.evaluate.restore import finite
from limoe.model.build import Parameters, placed_model
from limoe.model.segments import cut
from limoe.parallel import processes
from limoe.parallel.mesh import Placement
from limoe.train.step import Training, TrainState, new_state
from limoe.workdir.folder import Workdir
from limoe.workdir.metrics import write_json
from limoe.workdir.weights import TOKENIZER, by_name, config_of, read_weights

TAKEN, INTERPOLATED, FIRST_ROWS, EXPERTS, ANEW = "taken", "interpolated", "first_rows", "experts", "anew"
# The share of its usual size that the router of an upcycled layer begins with: it gives logits a standard deviation of
# about 0.01, less than the training noise (1/E), so that no gate is further than some percent from 1/E.
_ROUTER = 0.01
# Settings by which equal parameters would be another function.
_SAME = ("width", "num_heads", "activation")
_NAMES_SHOWN = 4
_OF_MLP = {"w1": "w1.kernel", "b1": "w1.bias", "w2": "w2.kernel", "b2": "w2.bias"}
"""Parameters of experts, and those of a dense MLP that become them."""


class InitError(LimoeError, RuntimeError):
    """A run cannot begin with the given parameters; the message says why, and what to do."""


class Begun(NamedTuple):
    """Where the parameters of a run come from: names of parameters by what became of them. The content of init.json."""

    source: str
    digest: str
    step: int
    parameters: dict[str, list[str]]


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a parameter of one block lies: in which array, and in which of its repeats if that is a stack of them."""

    array: str
    repeat: int | None
    shape: tuple[int, ...]

    def of(self, arrays: Mapping[str, Array]) -> Array:
        return arrays[self.array] if self.repeat is None else arrays[self.array][self.repeat]


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What becomes of a parameter, and from which one of the source it is made."""

    how: str
    source: _Place | None = None


def take_tokenizer(config: Config, workdir: Workdir) -> None:
    """Begin with the tokenizer of the source, if its vocabulary is as large and no other one is configured."""
    init = config.init
    if not init.source or config.data.tokenizer or files.exists(workdir.tokenizer):
        return
    if config_of(init.source).model.vocab_size == config.model.vocab_size:
        files.write_bytes(workdir.tokenizer, files.read_bytes(Path(init.source) / TOKENIZER))


def first_state(
    workdir: Workdir, training: Training, placement: Placement | None, say: Callable[[str], None]
) -> TrainState:
    """Make the state before the first step: with new parameters, or with those of `init.source` as far as they fit.

    What was taken is said and written to init.json, and the digest of the source to config.json. Raises InitError for a
    source that does not fit, or has changed since the run began, and the errors of reading it.
    """
    config = workdir.config
    state = new_state(config, training, placement)
    if not config.init.source:
        return state
    theirs = config_of(config.init.source)
    rules = _rules(config, theirs, training, placement, same_words=_same_tokenizer(config, workdir))
    shapes = by_name(placed_model(theirs, placement)[1])
    used = dict.fromkeys(rule.source.array for rule in rules.values() if rule.source is not None)
    weights = read_weights(config.init.source, {name: shapes[name] for name in used})
    for message in weights.skipped:
        say(message)
    if config.init.digest not in ("", weights.digest):
        raise InitError(
            f"{config.init.source} has other weights (SHA-256 {weights.digest}) than init.digest={config.init.digest}; "
            "put the right ones back, or start a new run with --workdir=DIR"
        )
    finite(weights.arrays, f"{config.init.source}, step {weights.step}")
    parameters = _built(config, state.parameters, weights.arrays, rules)
    by_how = {how: [name for name, rule in rules.items() if rule.how == how] for how in _WORDS}
    begun = Begun(config.init.source, weights.digest, weights.step, by_how)
    if processes.is_first():
        write_json(workdir.init, begun._asdict())
        workdir.record(dataclasses.replace(config, init=dataclasses.replace(config.init, digest=weights.digest)))
    say(in_words(begun))
    return state._replace(parameters=parameters)


_WORDS = {
    TAKEN: "taken",
    INTERPOLATED: "interpolated",
    FIRST_ROWS: "the first rows taken",
    EXPERTS: "made of dense MLPs",
    ANEW: "starting anew",
}


def in_words(begun: Begun) -> str:
    """Say in a line what a run begins with.

    >>> print(in_words(Begun("runs/tiny", "ab", 500, {TAKEN: ["norm.bias"], ANEW: ["token_table"]})))
    beginning with the parameters of runs/tiny, step 500: 1 taken; starting anew: token_table (another tokenizer or
    vocabulary)
    """
    parts = [f"{len(begun.parameters[TAKEN])} taken"]
    for how, names in begun.parameters.items():
        if how != TAKEN and names:
            listed = [name + " (another tokenizer or vocabulary)" * (name == "token_table") for name in names]
            more = f" and {len(names) - _NAMES_SHOWN} more" * (len(names) > _NAMES_SHOWN)
            parts.append(f"{_WORDS[how]}: {', '.join(listed[:_NAMES_SHOWN])}{more}")
    return f"beginning with the parameters of {begun.source}, step {begun.step}: {'; '.join(parts)}"


def _same_tokenizer(config: Config, workdir: Workdir) -> bool:
    return files.read_bytes(Path(config.init.source) / TOKENIZER) == files.read_bytes(workdir.tokenizer)


def _rules(
    config: Config, theirs: Config, training: Training, placement: Placement | None, *, same_words: bool
) -> dict[str, _Rule]:
    """Decide what becomes of every parameter of the run."""
    source, here, there = config.init.source, config.model, theirs.model
    if other := [name for name in _SAME if getattr(here, name) != getattr(there, name)]:
        listed = ", ".join(f"model.{name} ({getattr(there, name)} there, {getattr(here, name)} here)" for name in other)
        raise InitError(f"the parameters of {source} do not fit, because {listed}; start from a model of equal ones")
    if config.init.upcycle:
        _check_upcycling(source, here, there)
    ours = _places(here, by_name(training.abstract.parameters))
    of_source = _places(there, by_name(placed_model(theirs, placement)[1]))
    return {name: _rule(name, place, of_source, config, same_words) for name, place in ours.items()}


def _check_upcycling(source: str, here: ModelConfig, there: ModelConfig) -> None:
    if not here.moe_layers:
        raise InitError("--upcycle makes experts, but the run is dense (model.moe_layers=()); choose another preset")
    absent = [block for block in here.moe_layers if block in there.moe_layers or block >= there.depth]
    if absent or here.mlp_width != there.mlp_width:
        why = f"it has no dense MLP in block {absent[0]}" if absent else f"its MLPs have width {there.mlp_width}"
        raise InitError(
            f"--upcycle cannot make experts of width {here.mlp_width} in blocks {list(here.moe_layers)} from {source}: "
            f"{why}; give a dense model of the same size"
        )


def _places(model: ModelConfig, arrays: Mapping[str, Any]) -> dict[str, _Place]:
    """Find every parameter by its block, such as `blocks.3.norm1.scale`, whichever scan the block is in."""
    segments, found = cut(model.depth, model.moe_layers), {}
    for array, value in arrays.items():
        inside = re.fullmatch(r"segments\.(\d+)\.blocks\.(\d+)\.(.+)", array)
        if inside is None:
            found[array] = _Place(array, None, value.shape)
            continue
        segment = segments[int(inside[1])]
        stacked = segment.repeats > 1
        for repeat in range(segment.repeats):
            block = segment.first_block + repeat * len(segment.pattern) + int(inside[2])
            place = _Place(array, repeat if stacked else None, value.shape[stacked:])
            found[f"blocks.{block}.{inside[3]}"] = place
    return found


def _rule(name: str, place: _Place, theirs: Mapping[str, _Place], config: Config, same_words: bool) -> _Rule:
    block, moe, part = name.partition(".moe.")
    if config.init.upcycle and moe:
        return _Rule(ANEW) if part == "router" else _Rule(EXPERTS, theirs[f"{block}.mlp.{_OF_MLP[part]}"])
    if name not in theirs or (name == "token_table" and not same_words):
        return _Rule(ANEW)
    if place.shape == theirs[name].shape:
        return _Rule(TAKEN, theirs[name])
    how = {"image_position": INTERPOLATED, "text_position": FIRST_ROWS}.get(name, ANEW)
    return _Rule(how, None if how == ANEW else theirs[name])


def _built(config: Config, new: Parameters, source: Mapping[str, Array], rules: Mapping[str, _Rule]) -> Parameters:
    """Make the parameters by their rules, each with the sharding of the new one."""
    places: dict[str, list[tuple[str, _Place]]] = {}
    for name, place in _places(config.model, by_name(new)).items():
        places.setdefault(place.array, []).append((name, place))
    keys = dict(zip(rules, jax.random.split(jax.random.key(config.train.seed), len(rules)), strict=True))

    def build(new: Parameters, source: dict[str, Array]) -> Parameters:
        arrays, built = by_name(new), []
        for array in arrays:
            copies = [
                _value(name, rules[name], place.of(arrays), source, config, keys[name]) for name, place in places[array]
            ]
            built.append(copies[0] if places[array][0][1].repeat is None else jnp.stack(copies))
        return jax.tree.unflatten(jax.tree.structure(new), built)

    return jax.jit(build, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, new))(new, dict(source))


def _value(
    name: str, rule: _Rule, new: Array, source: Mapping[str, Array], config: Config, key: Key[Array, ""]
) -> Float[Array, "..."]:
    """Make a parameter of one block."""
    if rule.source is None:
        small = config.init.upcycle and name.endswith(".moe.router")
        return _ROUTER * new if small else new
    given = rule.source.of(source)
    if rule.how == INTERPOLATED:
        before, after = (math.isqrt(len(table)) for table in (given, new))
        grid = given.reshape(before, before, -1)
        return jax.image.resize(grid, (after, after, grid.shape[-1]), "bilinear").reshape(new.shape)
    if rule.how == FIRST_ROWS:
        rows = min(len(given), len(new))
        return new.at[:rows].set(given[:rows])
    if rule.how == EXPERTS:
        copies = jnp.broadcast_to(given, new.shape)
        if given.ndim == 2:
            copies += config.init.noise * jnp.std(given) * jax.random.normal(key, new.shape)
        last = name.endswith((".w2", ".b2"))
        return copies * (config.model.num_experts / config.model.num_choices if last else 1.0)
    return given
