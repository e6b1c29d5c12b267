"""Read the matmuls, kernels and exchanges in single instructions of a compiled program."""

from __future__ import annotations

import itertools
import math
import re
from typing import NamedTuple

import numpy as np

from limoe.plan.hlo import Computation, HloError, Instruction, Program, Shape, kernel_name

_FLOATS = frozenset({"bf16", "f16", "f32", "f8e4m3fn", "f8e5m2"})
# The parts of bfloat16 that a float32 factor is split into, by precision.
_PARTS = {"default": 1, "high": 2, "highest": 3}
# Our kernels whose weights are always float32, whatever the dtype of their rows.
FLOAT32_WEIGHTS = frozenset({"route_forward", "route_backward"})
COLLECTIVES = ("all-to-all", "all-reduce", "all-gather", "reduce-scatter", "collective-permute", "ragged-all-to-all")


class Matmul(NamedTuple):
    """`copies` products of [rows, depth] and [depth, columns], with the dtypes of both factors and their precisions."""

    copies: int
    rows: int
    columns: int
    depth: int
    dtypes: tuple[str, str] = ("bf16", "bf16")
    precision: tuple[str, str] = ("default", "default")

    @property
    def flops(self) -> int:
        """Two for each multiply-add."""
        return 2 * self.copies * self.rows * self.columns * self.depth

    def on_array(self, side: int) -> int:
        """Compute the FLOPs that a systolic array of this side spends. Depth, and rows or columns, are padded to it.

        >>> Matmul(1, 4096, 64, 64).on_array(128) // Matmul(1, 4096, 64, 64).flops
        2
        """
        rows, columns, depth = (-(-size // side) * side for size in (self.rows, self.columns, self.depth))
        held = min(self.rows * columns, rows * self.columns)
        return 2 * self.copies * held * depth

    @property
    def passes(self) -> int:
        """The number of bfloat16 products that it takes on a TPU.

        A float32 factor is split into 1, 2 or 3 parts of bfloat16, by its precision. Products of the smallest parts are
        left out.

        >>> [Matmul(1, 8, 8, 8, ("f32", "f32"), (name, name)).passes for name in ("default", "high", "highest")]
        [1, 3, 6]
        """
        left, right = (
            _PARTS[precision] if dtype == "f32" else 1
            for dtype, precision in zip(self.dtypes, self.precision, strict=True)
        )
        return sum(i + j < max(left, right) for i in range(left) for j in range(right))


def matmuls(program: Program, instruction: Instruction, computation: Computation) -> list[Matmul]:
    """Find the matmuls of an instruction, also inside a fusion. On TPUs they may be convolutions."""
    found = []
    for part, home in [(instruction, computation), *program.inside(instruction)]:
        if part.opcode == "convolution":
            found.append(_convolution(part, home))
        elif part.opcode == "dot":
            found.append(_dot(part, home))
    return found


class Kernel(NamedTuple):
    """The FLOPs of a Pallas kernel, and the bfloat16 products that each of its products takes."""

    flops: int
    passes: int


def kernels(program: Program, instruction: Instruction, computation: Computation) -> list[Kernel]:
    """Find the Pallas kernels of an instruction, with their own cost estimates.

    Ours multiply float32 rows at the highest precision and other rows once, whatever the dtype of the weights. Those in
    FLOAT32_WEIGHTS always use the highest precision. Raises HloError for a kernel without an estimate, because nothing
    else in the program says what is inside.
    """
    found = []
    for part, home in [(instruction, computation), *program.inside(instruction)]:
        if 'custom_call_target="tpu_custom_call"' not in part.rest:
            continue
        estimate = re.search(r'"cost_estimate":\{"flops":"?(\d+)', part.rest)
        if estimate is None:
            raise HloError(f"the kernel {part.name} has no cost estimate; give its pallas_call one")
        dtypes = {shape.dtype for name in part.operands for shape in home.by_name[name].shapes}
        rows = "f32" if dtypes & _FLOATS == {"f32"} else "bf16"
        weights = "f32" if kernel_name(part.name) in FLOAT32_WEIGHTS else rows
        passes = Matmul(1, 1, 1, 1, (rows, weights), ("highest", "highest")).passes
        found.append(Kernel(int(estimate[1]), passes))
    return found


def _dot(instruction: Instruction, computation: Computation) -> Matmul:
    left, right = (computation.by_name[name].shapes[0] for name in instruction.operands[:2])
    axes = {
        name: [int(axis) for axis in dims.split(",") if axis]
        for name, dims in re.findall(r"([lr]hs_(?:batch|contracting)_dims)=\{([\d,]*)\}", instruction.rest)
    }
    sizes = lambda shape, names: math.prod(shape.sizes[axis] for name in names for axis in axes.get(name, []))  # noqa: E731
    copies, depth = sizes(left, ["lhs_batch_dims"]), sizes(left, ["lhs_contracting_dims"])
    return Matmul(
        copies,
        math.prod(left.sizes) // (copies * depth),
        math.prod(right.sizes) // (copies * depth),
        depth,
        *_factors(instruction, left, right),
    )


def _factors(instruction: Instruction, left: Shape, right: Shape) -> tuple[tuple[str, str], tuple[str, str]]:
    """Read the dtypes of both factors of a matmul, and their precisions."""
    found = re.search(r"operand_precision=\{(\w+),(\w+)\}", instruction.rest)
    if found and not {found[1], found[2]} <= _PARTS.keys():
        raise HloError(f"the matmul {instruction.name} has a precision other than {', '.join(_PARTS)}: {found[0]}")
    return (left.dtype, right.dtype), (found[1], found[2]) if found else ("default", "default")


def _convolution(instruction: Instruction, computation: Computation) -> Matmul:
    """Count a convolution as matmuls.

    XLA writes a batch axis as a window in which each place of the result meets one tap (stride and dilation differ by
    one). Such an axis counts as copies. Taps of other axes add to the depth.
    """
    left, right = (computation.by_name[name].shapes[0] for name in instruction.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    if labels is None:
        raise HloError(f"the convolution {instruction.name} has no dim_labels")
    left_of, right_of, out_of = (dict(zip(text, range(9), strict=False)) for text in labels.groups())
    out = instruction.shapes[0]
    places = sorted(name for name in out_of if name.isdigit())
    copies, rows, depth = 1, out.sizes[out_of["b"]], right.sizes[right_of["i"]]
    for number, name in enumerate(places):
        size = out.sizes[out_of[name]]
        taps = _taps(instruction, number, left.sizes[left_of[name]], right.sizes[right_of[name]], size)
        if right.sizes[right_of[name]] > 1 and taps == size:
            copies *= size
        else:
            rows, depth = rows * size, depth * max(round(taps / size), 1)
    # Groups of either kind divide the features of the result. Its batch is already that of one group.
    groups = math.prod(int(n) for n in re.findall(r"(?:batch|feature)_group_count=(\d+)", instruction.rest))
    columns = out.sizes[out_of["f"]] // groups
    return Matmul(copies * groups, rows, columns, depth, *_factors(instruction, left, right))


def _taps(instruction: Instruction, number: int, size: int, window: int, out: int) -> int:
    """Count the pairs of a place of the result and a tap that meet an element of the input, along one axis."""
    text = re.search(r"window=\{([^}]*)\}", instruction.rest)
    settings = dict(item.split("=") for item in text[1].split()) if text else {}

    def value(name: str, default: int) -> int:
        return int(settings[name].split("x")[number]) if name in settings else default

    stride, dilate, spread = value("stride", 1), value("lhs_dilate", 1), value("rhs_dilate", 1)
    low = int(settings["pad"].split("x")[number].split("_")[0]) if "pad" in settings else 0
    place = np.arange(out)[:, None] * stride + np.arange(window)[None] * spread - low
    meets = (place >= 0) & (place % dilate == 0) & (place // dilate < size)
    return int(meets.sum())


class Collective(NamedTuple):
    """An exchange between devices: its kind, its groups of devices, and the bytes of a device.

    `bytes` is the larger of a device's input and output: the result of an all-gather, the input of a reduce-scatter,
    what an all-to-all ships (the device's own share included). An exchange between slices has no groups.
    """

    kind: str
    groups: tuple[tuple[int, ...], ...]
    bytes: int


def collectives(program: Program, instruction: Instruction, computation: Computation) -> list[Collective]:
    """Find the exchanges of an instruction, also inside a fusion or an asynchronous start."""
    found = []
    for part, home in [(instruction, computation), *program.inside(instruction)]:
        kind = part.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            operands = sum(home.by_name[name].bytes for name in part.operands)
            results = sum(shape.bytes for shape in part.results)
            found.append(Collective(kind, groups_of(part.rest), max(operands, results)))
        elif part.opcode == "recv":
            found.append(_between_slices(part, home))
    return found


def _between_slices(received: Instruction, computation: Computation) -> Collective:
    """Read an exchange between slices. Each device sends its part to its host, and the hosts exchange and add up."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', received.rest)
    name = kind[1].lower().replace("_", "-") if kind else ""
    meeting = re.search(r'_xla_host_transfer_rendezvous="[^"]+"', received.rest)
    sends = [i for i in computation.instructions if i.opcode == "send" and meeting and meeting[0] in i.rest]
    if name not in COLLECTIVES or len(sends) != 1:
        raise HloError(f"{received.name} receives something from a host that is no exchange between slices")
    return Collective(name, (), max(sends[0].shapes[0].bytes, received.shapes[0].bytes))


def groups_of(text: str) -> tuple[tuple[int, ...], ...]:
    """Read the groups of devices of a collective, in any of the forms that XLA prints.

    >>> groups_of("replica_groups={{0,1},{2,3}}, x"), groups_of("replica_groups=[2,2]<=[2,2]T(1,0), x")
    (((0, 1), (2, 3)), ((0, 2), (1, 3)))
    >>> groups_of("replica_groups=mesh['a'=2,'b'=2] {'a'}, x")
    ((0, 2), (1, 3))
    """
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", text):
        return tuple(tuple(int(n) for n in group.split(",") if n) for group in re.findall(r"\{([\d,]*)\}", found[1]))
    if found := re.search(r"replica_groups=(\[[\d,]+\]<=\S+?)(?:, |$)", text):
        groups = _iota(found[1])
        return tuple(map(tuple, groups.tolist()))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))? \{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        ids = _transposed(found[2]).reshape(-1) if found[2] else np.arange(math.prod(sizes.values()))
        over = re.findall(r"'([^']+)'", found[3])
        axes = [number for number, name in enumerate(sizes) if name in over]
        moved = np.moveaxis(ids.reshape(list(sizes.values())), axes, range(-len(axes), 0))
        return tuple(map(tuple, moved.reshape(-1, math.prod(sizes[name] for name in over)).tolist()))
    raise HloError(f"the groups of devices cannot be read from {text[:300]!r}")


def _iota(text: str) -> np.ndarray:
    """Read `[groups,size]<=[dims]`, or `[groups,size]<=[dims]T(1,0)` with a transposition."""
    shape, _, source = text.partition("<=")
    return _transposed(source).reshape([int(n) for n in shape.strip("[]").split(",")])


def _transposed(text: str) -> np.ndarray:
    found = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if found is None:
        raise HloError(f"a list of devices cannot be read from {text!r}")
    sizes = [int(n) for n in found[1].split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose([int(n) for n in found[2].split(",")]) if found[2] else ids


def axes_of(groups: tuple[tuple[int, ...], ...], shape: dict[str, int]) -> str:
    """Find the mesh axes that a group of devices spans, joined by `+`; "none" if each device is alone.

    >>> axes_of(((0, 1), (2, 3)), {"data": 2, "expert": 2}), axes_of(((0, 1, 2, 3),), {"data": 2, "expert": 2})
    ('expert', 'data+expert')
    """
    spanned = set()
    for group in itertools.islice(groups, 4):
        places = np.unravel_index(np.array(group), list(shape.values()))
        spanned |= {name for name, place in zip(shape, places, strict=True) if len(set(place.tolist())) > 1}
    return "+".join(name for name in shape if name in spanned) or "none"
