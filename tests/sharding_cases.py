"""Problems, meshes and readings of compiled programs that the tests of sharded code share."""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path
from moe_cases import assert_close
from spec_cases import spec_and_inputs

from moe_kernels import (
    GluWeights,
    JoinedGluWeights,
    MlpWeights,
    MoeOutput,
    RouterWeights,
    RoutingSums,
    WithShared,
    moe_mlp,
)
from moe_kernels.types import ExpertWeights

MODALITIES = 2
# (data, expert): every way to arrange 1, 2, 4 and 8 devices.
MESHES = [(data, count // data) for count in (1, 2, 4, 8) for data in (1, 2, 4, 8) if count % data == 0]
COLLECTIVES = (
    "all-to-all",
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)


def mesh_of(*shape: int, names: tuple[str, ...] = ("data", "expert")) -> jax.sharding.Mesh:
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    return jax.sharding.Mesh(devices, names)


class Arguments(NamedTuple):
    """All traced arguments of a layer and the cotangents of its results."""

    tokens: jax.Array
    router: jax.Array | RouterWeights
    weights: ExpertWeights
    noise: jax.Array
    modality: jax.Array
    mask: jax.Array
    dtokens: jax.Array
    dsums: RoutingSums


class Result(NamedTuple):
    """A layer's output and its gradients."""

    output: MoeOutput
    dtokens: jax.Array
    drouter: jax.Array | RouterWeights
    dweights: ExpertWeights


def arguments(
    seed: int,
    *,
    tokens: int,
    groups: int,
    experts: int,
    width: int = 12,
    hidden: int = 20,
    wanted: tuple[int, ...] | None = None,
) -> Arguments:
    """A random problem; `wanted` names the experts that nearly all choices fall on."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    x, router = normal(tokens, width), normal(width, experts)
    if wanted is not None:
        # A feature that is 1 in every token and lifts the logits of those experts above the others.
        x = x.at[:, 0].set(1.0)
        router = router.at[0].set(jnp.zeros(experts).at[np.array(wanted)].set(20.0))
    e, d, f = experts, width, hidden
    by_group = {"tokens", "entropy", "logsumexp_squared", "largest_gate"}
    shapes = {n: (groups, MODALITIES) + (() if n in by_group else (experts,)) for n in RoutingSums._fields}
    return Arguments(
        tokens=x,
        router=router,
        weights=MlpWeights(normal(e, d, f), normal(e, f), normal(e, f, d), normal(e, d)),
        noise=normal(tokens, experts) / experts,
        modality=jnp.asarray(rng.integers(0, MODALITIES, tokens), jnp.int32),
        mask=jnp.asarray(rng.random(tokens) < 0.9),
        dtokens=normal(tokens, width),
        dsums=RoutingSums(**{name: normal(*shape) for name, shape in shapes.items()}),
    )


def weights_of(kind: str, w: MlpWeights) -> ExpertWeights:
    """Experts of a kind, made of the arrays of plain ones."""
    up, glu = w.w1[::-1], GluWeights(w.w1, w.w1[::-1], w.w2)
    one = GluWeights(w.w1[0], up[0], w.w2[0])
    return {
        "mlp": w,
        "glu": glu,
        "biased": GluWeights(w.w1, up, w.w2, w.b1, w.b1[::-1], w.b2),
        "interleaved": JoinedGluWeights(jnp.stack([w.w1, up], 3).reshape(len(up), up.shape[1], -1), w.w2),
        "joined": JoinedGluWeights(jnp.concatenate([w.w1, up], 2), w.w2),
        "shared": WithShared(glu, one, one.gate[:, 0]),
    }[kind]


def run(layer, a: Arguments, **options) -> Result:
    """A layer (sharded or not) and all its gradients; random order draws from the key of 7, groups counted from 3."""

    def forward(tokens, router, weights):
        inputs = {"noise": a.noise, "modality": a.modality, "mask": a.mask, "key": jax.random.key(7), "first_group": 3}
        spec = {"num_modalities": MODALITIES, "first_modality": 1}
        output = layer(tokens, router, weights, *spec_and_inputs(**inputs, **spec, **options))
        return (output.tokens, output.sums), output

    _, pull, output = jax.vjp(forward, a.tokens, a.router, a.weights, has_aux=True)
    return Result(output, *pull((a.dtokens, a.dsums)))


def unsharded(**options):
    return functools.partial(run, moe_mlp, **options)


def sharded(mesh: jax.sharding.Mesh, **options):
    return functools.partial(run, functools.partial(moe_mlp, mesh=mesh), **options)


def assert_same_layer(mine: Result, twin: Result, wanted=None) -> None:
    """Drops and counts to the last one; values within the rounding of sums taken in another order.

    `wanted` names the experts that nearly all choices fall on.
    """
    np.testing.assert_array_equal(mine.output.kept, twin.output.kept)
    for name in ("tokens", "wanted"):
        np.testing.assert_array_equal(getattr(mine.output.sums, name), getattr(twin.output.sums, name))
    # A token is dropped here if and only if it is dropped there.
    np.testing.assert_array_equal(np.any(mine.output.tokens != 0, 1), np.any(twin.output.tokens != 0, 1))
    close_in_rows(mine.output.tokens, twin.output.tokens, length=20, name="y")
    tokens = len(twin.dtokens)
    same_sums(mine.output.sums, twin.output.sums, tokens)
    roundings = gate_roundings(wanted)
    assert_close(np.ravel(mine.dtokens)[None], np.ravel(twin.dtokens)[None], length=20, name="dx", roundings=roundings)
    for a, b in zip(jax.tree.leaves(mine.drouter), jax.tree.leaves(twin.drouter), strict=True):
        assert_close(np.ravel(a)[None], np.ravel(b)[None], length=tokens, name="dr", roundings=roundings)
    for (path, a), b in zip(tree_leaves_with_path(mine.dweights), jax.tree.leaves(twin.dweights), strict=True):
        as_rows = (np.asarray(x).reshape(len(x), -1) for x in (a, b))
        close_in_rows(*as_rows, length=tokens, name=f"d{keystr(path)}")


def same_sums(mine: RoutingSums, twin: RoutingSums, tokens: int) -> None:
    for name, a, b in zip(RoutingSums._fields, mine, twin, strict=True):
        assert_close(np.ravel(a)[None], np.ravel(b)[None], length=tokens, name=name)


def gate_roundings(wanted) -> int:
    """A lifted logit of 20 is known to 20 eps, and gates and their gradients no better than that."""
    return 8 if wanted is None else 64


def close_in_rows(mine, twin, *, length: int, name: str) -> None:
    """Within what rounds off the largest entry of all rows, which are alike; a row of zeros is one here too."""
    scale = np.full(len(twin), np.abs(twin).max())
    assert_close(mine, twin, length=length, name=name, roundings=8, scale=scale)


class Collective(NamedTuple):
    """A collective of a compiled program: its kind, the shapes of one device's operands and who takes part."""

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    groups: tuple[tuple[int, ...], ...]

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for _, shape in self.shapes)

    @property
    def dtypes(self) -> set[str]:
        return {dtype for dtype, _ in self.shapes}


def collectives(text: str) -> list[Collective]:
    """The collectives in the text of a compiled program; those among one device each are left out."""
    found = []
    kinds = "|".join(COLLECTIVES)
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line)
        if match is None:
            continue
        shapes = tuple(
            (dtype, tuple(int(n) for n in size.split(",") if n))
            for dtype, size in re.findall(r"(\w+)\[([\d,]*)\]", match[1])
        )
        groups = members(line)
        if any(len(group) > 1 for group in groups):
            found.append(Collective(match[2], shapes, groups))
    return found


def members(line: str) -> tuple[tuple[int, ...], ...]:
    """Who takes part in a collective, in each of the ways that XLA writes it."""
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    if axes is not None:  # mesh['a'=2,'b'=4] {'b'}
        sizes = {name: int(size) for name, size in re.findall(r"'([\w.]+)'=(\d+)", axes[1])}
        names = [name.strip("' ") for name in axes[2].split(",")]
        assert set(names) <= set(sizes), f"parts of axes are not read here: {line}"
        inside = [list(sizes).index(name) for name in names]
        outside = [n for n in range(len(sizes)) if n not in inside]
        ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values())).transpose(outside + inside)
        return tuple(map(tuple, ids.reshape(-1, math.prod(sizes[name] for name in names)).tolist()))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota is not None:  # [2,4]<=[4,2]T(1,0)
        shape, source, order = ([int(n) for n in part.split(",")] if part else None for part in iota.groups())
        assert shape is not None and source is not None
        ids = np.arange(math.prod(source)).reshape(source)
        return tuple(map(tuple, (ids if order is None else ids.transpose(order)).reshape(shape).tolist()))
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", line)
    assert listed is not None, f"no groups in {line}"
    return tuple(tuple(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
