"""Read a compiled program as XLA prints it: its instructions, how often each runs, and its memory traffic.

XLA's own totals count the body of a loop once. Here it counts as often as the loop runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

_BITS = {"pred": 8, "token": 0, "opaque": 0, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?(\S+) \(.*\{$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)")
# These move no bytes by themselves. Anything asynchronous counts at its start, and what is sent to other slices is an
# exchange.
_FREE = frozenset(
    {
        *("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
        *("async-update", "after-all", "opt-barrier", "add-dependency", "partition-id", "replica-id", "call-start"),
        *("send", "recv"),
    }
)
COPIES = ("copy-start", "slice-start")
"""Asynchronous copies between the main memory and the one on the chip."""
# Custom calls that only reserve memory or order others.
_NOTHING_DONE = re.compile(r'custom_call_target="(AllocateBuffer|PrepareAsyncCall\w+|Sharding)"')
_DESCEND = {"while", "call", "call-start", "conditional"}


class HloError(ValueError):
    """The text of a program is not as expected. The message says what was found."""


class Shape(NamedTuple):
    """An array: dtype, sizes, bytes with the padding of its tiles, and whether it is in the chip's main memory."""

    dtype: str
    sizes: tuple[int, ...]
    bytes: int
    in_hbm: bool


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str = field(repr=False)
    """The text between the parentheses, and then the attributes."""
    is_root: bool = False

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it names, in the order of the text."""
        return tuple(name for found in _CALLED.findall(self.rest) for name in _NAME.findall(found))

    def attribute(self, name: str) -> str | None:
        """Read an attribute. Its text has no blanks."""
        found = re.search(rf"[ ,]{name}=([^ ,]+(?:,[^ =]+)*)", self.rest)
        return found[1].rstrip(",") if found else None

    @property
    def results(self) -> tuple[Shape, ...]:
        """The arrays that it computes. The start of an exchange lists its operands before them, except that of an
        all-reduce."""
        count = len(self.operands)
        if self.opcode.endswith("-start") and len(self.shapes) >= 2 * count:
            return self.shapes[count : 2 * count]
        return self.shapes

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        return sum(shape.bytes for shape in self.shapes)

    @property
    def hbm_bytes(self) -> int:
        """Bytes of the parts of the result that are in the chip's main memory."""
        return sum(shape.bytes for shape in self.shapes if shape.in_hbm)


class Run(NamedTuple):
    """An instruction that runs, and how often the program runs it."""

    instruction: Instruction
    computation: Computation
    trips: int


@dataclass
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: list[Instruction]

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        """The instructions by their names."""
        return {instruction.name: instruction for instruction in self.instructions}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that use each instruction's result."""
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users

    @cached_property
    def parameters(self) -> list[Instruction]:
        """Its parameters by number."""
        found = [i for i in self.instructions if i.opcode == "parameter"]
        return sorted(found, key=_number)

    @property
    def root(self) -> Instruction:
        """The instruction whose result it returns."""
        return next(i for i in self.instructions if i.is_root)


class Program:
    """A compiled program.

    >>> program = Program('''
    ... ENTRY %main (x: f32[8,4]) -> f32[8,4] {
    ...   %x = f32[8,4]{1,0} parameter(0)
    ...   ROOT %y = f32[8,4]{1,0} negate(%x)
    ... }
    ... ''')
    >>> [(run.instruction.opcode, program.traffic(run)) for run in program.runs() if program.traffic(run)]
    [('negate', 256)]
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
        entry = ""
        lines: list[Instruction] | None = None
        for line in text.splitlines():
            if header := _HEADER.match(line):
                lines = []
                self.computations[header[2]] = Computation(header[2], lines)
                entry = header[2] if header[1] else entry
            elif lines is not None and line.startswith("  ") and " = " in line:
                lines.append(_instruction(line))
        if not entry:
            raise HloError("the text has no ENTRY computation; is it that of a compiled program?")
        self.entry = self.computations[entry]

    def runs(self) -> Iterator[Run]:
        """List the instructions that run, in order, with the trips of their loops.

        A fusion or an asynchronous computation is one instruction. All branches of a conditional are listed.
        """
        yield from self._runs(self.entry, 1)

    def _runs(self, computation: Computation, trips: int) -> Iterator[Run]:
        for instruction in computation.instructions:
            yield Run(instruction, computation, trips)
            if instruction.opcode not in _DESCEND:
                continue
            if instruction.opcode == "while":
                _, body = self._condition_and_body(instruction)
                yield from self._runs(body, trips * self.trips(instruction, computation))
            else:
                for name in instruction.called:
                    yield from self._runs(self.computations[name], trips)

    def _condition_and_body(self, loop: Instruction) -> tuple[Computation, Computation]:
        names = [re.search(rf"{key}=%([\w.\-]+)", loop.rest) for key in ("condition", "body")]
        assert names[0] and names[1], loop.name
        return self.computations[names[0][1]], self.computations[names[1][1]]

    def trips(self, loop: Instruction, computation: Computation) -> int:
        """Read how often a loop runs: from `known_trip_count` or, if XLA does not say it, from its counter.

        The counter must start at a constant, go up by 1, and be compared with a constant by `counter < limit`. Raises
        HloError for any other loop (none of ours is).
        """
        if known := re.search(r'known_trip_count"?:\{"n":"?(\d+)', loop.rest):
            return int(known[1])
        condition, body = self._condition_and_body(loop)
        parts = self._parts(condition, condition.root)
        if parts.opcode != "compare" or "direction=LT" not in parts.attributes:
            raise HloError(
                f"the loop {loop.name} runs while {parts.opcode}({', '.join(condition.root.operands)}), which is not "
                "counter < constant, so its trips are not known"
            )
        counter, limit = parts.operands
        where, end = _element(counter, condition), _constant(limit)
        if where is None or end is None:
            raise HloError(
                f"the loop {loop.name} compares {_words(counter)} with {_words(limit)}, not its counter with a "
                "constant on the right, so its trips are not known"
            )
        before = _origin(loop.operands[0], computation)
        start = _constant(_origin(before.operands[where], computation)) if before.opcode == "tuple" else None
        if start is None:
            raise HloError(f"the counter of the loop {loop.name} starts at no constant, so its trips are not known")
        if not self._counts_up(body, where):
            raise HloError(f"the counter of the loop {loop.name} does not go up by 1, so its trips are not known")
        return max(end - start, 0)

    def _counts_up(self, body: Computation, where: int) -> bool:
        """Check that a loop's body adds 1 to this element of its tuple."""
        after = _origin(body.root.operands[where], body) if body.root.opcode == "tuple" else body.root
        parts = self._parts(body, after)
        if parts.opcode != "add":
            return False
        one, other = parts.operands
        return (_element(one, body), _constant(other)) == (where, 1) or (
            (_constant(one), _element(other, body)) == (1, where)
        )

    def _parts(self, computation: Computation, instruction: Instruction) -> _Parts:
        """Find an instruction's operation and the origins of its operands, also if it is the root of a fusion."""
        if instruction.opcode != "fusion":
            origins = tuple(_origin(name, computation) for name in instruction.operands)
            return _Parts(instruction.opcode, origins, instruction.rest)
        fused = self.computations[instruction.called[0]]
        inner = [_origin(name, fused) for name in fused.root.operands]
        outer = [_origin(name, computation) for name in instruction.operands]
        origins = tuple(outer[_number(one)] if one.opcode == "parameter" else one for one in inner)
        return _Parts(fused.root.opcode, origins, fused.root.rest)

    def inside(self, instruction: Instruction) -> Iterator[tuple[Instruction, Computation]]:
        """List the parts of a fusion or of an asynchronous start. Other instructions have none."""
        for name in instruction.called if instruction.opcode in ("fusion", "async-start") else ():
            fused = self.computations[name]
            for part in fused.instructions:
                yield part, fused
                yield from self.inside(part)

    def traffic(self, run: Run) -> int:
        """Compute the bytes that one run of an instruction reads from and writes to the chip's main memory.

        Of a slice or an update in place only the slice counts, also inside a fusion.
        """
        instruction, computation = run.instruction, run.computation
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith("-done") or _NOTHING_DONE.search(instruction.rest):
            return 0
        operands = [computation.by_name[name] for name in instruction.operands]
        if opcode in COPIES:
            # Its result names target and source. The source of a slice counts as the slice.
            pair = instruction.shapes[:2]
            return sum(shape.in_hbm for shape in pair) * min(shape.bytes for shape in pair)
        if opcode == "async-start":
            started = self.computations[instruction.called[0]]
            return sum(self.traffic(Run(part, started, run.trips)) for part in started.instructions)
        if opcode == "fusion":
            fused = self.computations[instruction.called[0]]
            read = sum(self._read(fused, number) for number, operand in enumerate(operands) if operand.hbm_bytes)
            return read + self._written(fused, instruction.shapes)
        if opcode in ("dynamic-slice", "gather", "slice"):
            sides = operands[0].shapes[0].in_hbm + instruction.shapes[0].in_hbm
            return sides * instruction.bytes
        if opcode in ("dynamic-update-slice", "scatter"):
            # The operands of a scatter are n arrays, the indices, and n updates.
            updates = operands[1:2] if opcode == "dynamic-update-slice" else operands[len(operands) // 2 + 1 :]
            return sum(
                update.bytes * (update.shapes[0].in_hbm + target.in_hbm)
                for update, target in zip(updates, instruction.shapes, strict=True)
            )
        written = sum(shape.bytes for shape in instruction.results if shape.in_hbm)
        return sum(operand.hbm_bytes for operand in operands) + written

    def _read(self, fused: Computation, number: int) -> int:
        """Compute the bytes of one operand that a fusion reads."""
        parameter = fused.parameters[number]
        total = 0
        for user in fused.users.get(parameter.name, []):
            if user.opcode in ("dynamic-slice", "slice") or (
                user.opcode == "gather" and user.operands[0] == parameter.name
            ):
                total += user.bytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
                pass
            elif user.opcode == "bitcast" and user.name in fused.users:
                total += self._read_through(fused, user, parameter.bytes)
            elif user.opcode == "fusion":
                nested = self.computations[user.called[0]]
                total += max(
                    self._read(nested, place) for place, name in enumerate(user.operands) if name == parameter.name
                )
            else:
                return parameter.bytes
        return min(total, parameter.bytes)

    def _read_through(self, fused: Computation, view: Instruction, whole: int) -> int:
        users = fused.users[view.name]
        if all(user.opcode == "dynamic-slice" for user in users):
            return sum(user.bytes for user in users)
        if all(user.opcode == "dynamic-update-slice" and user.operands[0] == view.name for user in users):
            return 0
        return whole

    def _written(self, fused: Computation, shapes: tuple[Shape, ...]) -> int:
        """Compute the bytes that a fusion writes. Of an update in place only the update counts."""
        root = fused.root
        results = [fused.by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
        if sum(len(result.shapes) for result in results) != len(shapes):
            raise HloError(f"{fused.name} returns {len(shapes)} arrays, but its root {root.name} names others")
        total = place = 0
        for result in results:
            own = shapes[place : place + len(result.shapes)]
            place += len(own)
            while result.opcode == "bitcast":
                result = fused.by_name[result.operands[0]]
            if result.opcode == "fusion":
                total += self._written(self.computations[result.called[0]], own)
            elif result.opcode == "dynamic-update-slice":
                total += own[0].in_hbm * min(fused.by_name[result.operands[1]].bytes, own[0].bytes)
            else:
                total += sum(shape.bytes for shape in own if shape.in_hbm)
        return total


class _Parts(NamedTuple):
    """An operation and the origins of its operands."""

    opcode: str
    operands: tuple[Instruction, ...]
    attributes: str


def kernel_name(instruction: str) -> str:
    """Find the name that a kernel was given. The compiler appends a number and may append an operand's name.

    >>> kernel_name("gather_rows.12.refs_10_")
    'gather_rows'
    """
    return instruction.partition(".")[0]


def _origin(name: str, computation: Computation) -> Instruction:
    """Find the instruction that made a value, before copies."""
    found = computation.by_name[name]
    while found.opcode in ("copy", "copy-start", "copy-done", "bitcast"):
        found = computation.by_name[found.operands[0]]
    return found


def _element(instruction: Instruction, computation: Computation) -> int | None:
    """Find which element of the computation's parameter this is; None for anything else."""
    index = instruction.attribute("index")
    if instruction.opcode != "get-tuple-element" or index is None:
        return None
    return int(index) if computation.by_name[instruction.operands[0]].opcode == "parameter" else None


def _constant(instruction: Instruction) -> int | None:
    """Read an integer constant; None for anything else."""
    found = re.match(r"(-?\d+)\)", instruction.rest) if instruction.opcode == "constant" else None
    return int(found[1]) if found else None


def _number(parameter: Instruction) -> int:
    return int(parameter.rest[: parameter.rest.index(")")])


def _words(instruction: Instruction) -> str:
    return f"{instruction.opcode}({instruction.rest.partition(')')[0]})"


def _instruction(line: str) -> Instruction:
    left, _, right = line.strip().partition(" = ")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    kind, right = right[:end], right[end:].lstrip()
    opcode, _, rest = right.partition("(")
    operands = rest[: _closing("(" + rest, 0) - 1]
    return Instruction(
        name=left.removeprefix("ROOT ").removeprefix("%"),
        opcode=opcode,
        shapes=tuple(_shape(*found) for found in _SHAPE.findall(kind)),
        operands=tuple(_NAME.findall(operands)),
        rest=rest,
        is_root=left.startswith("ROOT "),
    )


def _closing(text: str, start: int) -> int:
    """Find where the parenthesis that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place
    raise HloError(f"a parenthesis does not close in {text[:80]!r}")


def _shape(dtype: str, sizes: str, layout: str) -> Shape:
    """Read an array such as `bf16[8,100]{1,0:T(8,128)(2,1)S(1)}`."""
    dims = tuple(int(size) for size in sizes.split(",") if size)
    order, _, tiling = layout.partition(":")
    padded = [dims[int(axis)] for axis in order.split(",") if axis]  # from the fastest axis on
    if tile := re.match(r"T\(([\d,]+)\)", tiling):
        for place, multiple in enumerate(reversed([int(size) for size in tile[1].split(",")])):
            if place < len(padded):
                padded[place] = -(-padded[place] // multiple) * multiple
    digits = re.search(r"\d+", dtype)
    bits = _BITS[dtype] if dtype in _BITS else int(digits[0]) if digits else 0
    memory = re.search(r"S\((\d+)\)", tiling)
    return Shape(dtype, dims, math.prod(padded if padded else dims) * bits // 8, memory is None or memory[1] == "0")
