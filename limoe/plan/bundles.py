"""Read the TPU compiler's final bundles of one instruction: its scalar program, its copies and its calls.

The text has one VLIW bundle a line. Kept are branches, copies to and from HBM, calls of the top level, and the
operations on scalar and predicate registers that these depend on. Everything else only counts as a bundle.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_START = re.compile(r"(?m)^ *(?:0x[0-9a-f]+|0) +((?:[A-Z]{2})?) *:[ >]*(?=\{)")
_REGION = re.compile(r"(?:Start|Start/End empty) region (\d+)")
_CORE = re.compile(r"= sld \[smem:\[[^\]]*\]\](?=[^;]*/\* core id \*/)")
# A division puts its quotient or remainder (the comment says which) into a queue; `spop.drf` takes it out.
_DIVISION = re.compile(r"= sdivrem\.u32 ([^;}]*?)/\* (kRem|kQuot\w*) \*/")
_COMMENT = re.compile(r"/\*.*?\*/", re.S)
_OPERAND = re.compile(r"index: (\d+), kind: (input|output)")
_DEFINITION = re.compile(r"%([a-z]*\d+)_([sp]\d+) = (\S+)(.*)", re.S)
_REGISTER = re.compile(r"%([a-z]*\d+)_([sp]\d+)")
_PREDICATE = re.compile(r"\((!?)%([a-z]*\d+)_(p\d+)\)")
_NUMBER = r"\$?(0x[0-9a-f]+|-?\d+)"
_SYMBOL = re.compile(rf"#(allocation\w+)(?: \+ {_NUMBER})?|%([a-z]*\d+)_([sp]\d+)|{_NUMBER}")
# The first type that a matmul names is that of the rows which stream through the matrix unit.
_MATMUL = re.compile(r"= vmatmul[a-z.]*?\.(f32|bf16|[a-z]+8\w*|[su]4)")
_ROWS = {"f32": 8, "bf16": 16}


class Value(NamedTuple):
    """A register, a number, or an address: an allocation and an offset, which is then the number.

    A register has its physical name (`s3`, `p1`) and the compiler's own name of what it holds.
    """

    register: str = ""
    name: str = ""
    number: int = 0
    allocation: str = ""


class Guard(NamedTuple):
    """A predicate register and whether it must be false."""

    register: str
    name: str
    negated: bool


class Op(NamedTuple):
    """`target = code(arguments)` on scalar registers, run if `guard` holds. A store has no `target`."""

    target: str
    name: str
    code: str
    arguments: tuple[Value, ...]
    guard: Guard | None


class Copy(NamedTuple):
    """A DMA: its kind (`hbm_to_vmem`), source, size in granules and destination."""

    kind: str
    source: tuple[Value, ...]
    size: Value
    target: tuple[Value, ...]
    guard: Guard | None


class Bundle(NamedTuple):
    """What is kept of a bundle. `branch` is the region that it jumps to, `call` the instruction that it runs."""

    ops: tuple[Op, ...] = ()
    copies: tuple[Copy, ...] = ()
    branch: str = ""
    guard: Guard | None = None
    call: str = ""
    streamed_rows: int = 0
    """Rows that matrix units take in: 8 for each float32 instruction, 16 for bfloat16, 32 for 8-bit types."""


class Code(NamedTuple):
    """The scalar program of an instruction."""

    bundles: list[Bundle]
    regions: dict[str, int]
    """The first bundle of each region."""
    operands: dict[str, int]
    """The operand that a register holds at the start."""
    integers: dict[int, int]
    """Number of entries of each 32-bit integer operand."""
    in_hbm: set[int]
    """The operands and results that lie in HBM."""
    uses_core_id: bool

    def branch_delay(self) -> int | None:
        """Count the bundles that still run after a branch; None if the text does not show it.

        Code that can be jumped over begins a region right behind those bundles. So the delay is the shortest distance
        from a branch to the next region.
        """
        starts = sorted({*self.regions.values(), *(i for i, b in enumerate(self.bundles) if b.branch)})
        branches = [index for index, bundle in enumerate(self.bundles) if bundle.branch]
        gaps = [next((start - index for start in starts if start > index), None) for index in branches]
        return min((gap - 1 for gap in gaps if gap is not None), default=None)


def parse(text: str) -> Code:
    """Read the text of a `*final_bundles.txt`.

    >>> text = '''
    ...      0   :  { %s1_s0 = smov 0 }
    ...    0x1 LB: > { %s2_s0 = sadd.s32 1, %s1_s0  ;;  %s1_s0 = sphi %s1_s0, %s2_s0 } /* Start region 5 */
    ...    0x2   : > { %p3_p0 = scmp.ge.s32.totalorder %s2_s0, 4 }
    ...    0x3   :  { %9 = sbr.rel (!%p3_p0) target = $region5 }'''
    >>> code = parse(text)
    >>> len(code.bundles), code.regions, code.bundles[3].branch
    (4, {'5': 1}, '5')
    """
    bundles, regions, operands, integers, in_hbm, nameless = [], {}, {}, {}, set(), []
    records = _START.split(text)[1:]
    for index, (label, record) in enumerate(zip(records[::2], records[1::2], strict=True)):
        names = _REGION.findall(record)
        for region in names:
            regions.setdefault(region, index)
        if label == "PF" and not names:
            nameless.append(index)
        if "inlined_call_operand" in record:
            for operand in _operands_of(record):
                operands[operand.register] = operand.number
                if operand.entries is not None:
                    integers[operand.number] = operand.entries
                if operand.in_hbm:
                    in_hbm.add(operand.number)
        call = re.search(r"inlined_call [^/}]*/\* (?:%([\w.-]+) = )?", record)
        plain = _COMMENT.sub("", _DIVISION.sub(r"= \2 \1", _CORE.sub("= core_id", record)))
        bundles.append(_bundle(plain, "" if call is None else call[1] or ""))
    for index, bundle in enumerate(bundles):
        if bundle.branch and bundle.branch not in regions:
            # An empty region at the end has no comment, only the label of a fallthrough.
            behind = [i for i in nameless if i > index]
            if not behind:
                raise ValueError(f"bundle {index} jumps to region {bundle.branch}, which the dump does not have")
            regions[bundle.branch] = behind[0]
    return Code(_slice(bundles), regions, operands, integers, in_hbm, _CORE.search(text) is not None)


class _Operand(NamedTuple):
    register: str
    number: int
    entries: int | None
    """Value of an integer input."""
    in_hbm: bool


def _operands_of(record: str) -> Iterator[_Operand]:
    for part in record.split(";;"):
        found, index = _REGISTER.search(part), _OPERAND.search(part)
        if found and index and "inlined_call_operand" in part:
            shape = re.search(r"shape: s32\[([\d,]*)\]", part) if index[2] == "input" else None
            entries = None if shape is None else math.prod(map(int, filter(None, shape[1].split(","))))
            yield _Operand(found[2], int(index[1]), entries, "inlined_call_operand.hbm" in part)


def _bundle(record: str, call: str) -> Bundle:
    ops, copies, branch, guard = [], [], "", None
    for part in record.strip().strip("{}").split(";;"):
        part = part.strip()
        if " = sbr.rel" in part:
            branch, guard = re.findall(r"target = \$region(\d+)", part)[0], _guard(part)
        elif re.match(r"%\d+ = dma\.(?!done)", part):
            copies.append(_copy(part))
        elif store := re.match(r"%\d+ = sst \[smem:\[(.*?)\]\](.*)", part):
            ops.append(
                Op("", "", "sst", (*_values(store[1]), *_values(_PREDICATE.sub("", store[2]))), _guard(store[2]))
            )
        elif division := re.match(r"%\d+ = (kRem|kQuot)\w*(.*)", part):
            ops.append(Op("", "", division[1], tuple(_values(_PREDICATE.sub("", division[2]))), _guard(division[2])))
        elif found := _DEFINITION.match(part):
            ops.append(_operation(found))
    rows = sum(_ROWS.get(kind, 32) for kind in _MATMUL.findall(record))
    return Bundle(tuple(ops), tuple(copies), branch, guard, call, rows)


def _operation(found: re.Match[str]) -> Op:
    name, register, code, rest = found[1], found[2], found[3], found[4]
    if code == "smov" and (choice := re.match(r" \((!?)%([a-z]*\d+)_(p\d+), (.*?)\), (.*)", rest)):
        predicate = Value(choice[3], choice[2])
        # `smov (p, a), b` is a, overwritten by b where p holds.
        branches = (choice[4], choice[5]) if choice[1] else (choice[5], choice[4])
        return Op(register, name, "scalar_select", (predicate, *_values(branches[0]), *_values(branches[1])), None)
    if code == "sld":
        address = re.search(r"\[smem:\[(.*?)\]\]", rest)
        return Op(register, name, code, () if address is None else tuple(_values(address[1])), _guard(rest))
    arguments = re.sub(r"\[(?:thread|resolvable)\S*\]", "", _PREDICATE.sub("", rest, count=1))
    return Op(register, name, code, tuple(_values(arguments)), _guard(rest))


def _guard(text: str) -> Guard | None:
    found = _PREDICATE.search(text)
    return None if found is None else Guard(found[3], found[2], bool(found[1]))


def _values(text: str) -> Iterator[Value]:
    for allocation, offset, name, register, number in _SYMBOL.findall(text):
        if allocation:
            yield Value(number=_number(offset or "0"), allocation=allocation)
        elif register:
            yield Value(register, name)
        else:
            yield Value(number=_number(number))


def _number(text: str) -> int:
    """A signed number of 32 bits; decimal ones may have leading zeros."""
    value = int(text, 16 if "x" in text else 10)
    return value - (1 << 32) if value >= 1 << 31 else value


def _copy(part: str) -> Copy:
    """Read a copy. Its arguments are source, granules and destination."""
    kind = re.search(r"dma\.(\w+)", part)
    assert kind is not None
    body = _PREDICATE.sub("", re.sub(r"^%\d+ = dma\.\w+(?: \[thread:\$\d+\])?", "", part))
    pieces = [tuple(_values(text)) for text in body.lstrip(" ,").split(",")]
    source, size, target = [*pieces, (), (), ()][:3]
    return Copy(kind[1], source, size[0] if size else Value(), target, _guard(part))


def _names(values: Iterable[Value | Guard | None]) -> Iterator[str]:
    for value in values:
        if value is not None and value.name:
            yield value.name


def _slice(bundles: list[Bundle]) -> list[Bundle]:
    """Keep only the operations that a branch or a copy depends on. Phis and casts change no register and go, too."""
    makers: dict[str, list[Op]] = defaultdict(list)
    stores: dict[str, list[Op]] = defaultdict(list)
    queued: list[Op] = []
    for bundle in bundles:
        for op in bundle.ops:
            if op.code == "sst":
                stores[op.arguments[0].allocation].append(op)
            elif op.code in ("kRem", "kQuot"):
                queued.append(op)
            else:
                makers[op.name].append(op)
    # A value from a queue depends on all that went in or out before, so all of that is kept.
    queued += [op for ops in makers.values() for op in ops if op.code == "spop.drf"]
    needed = {id(op) for op in queued}
    queue = [name for op in queued for name in _names([*op.arguments, op.guard])]
    for bundle in bundles:
        queue += _names([bundle.guard])
        for copy in bundle.copies:
            queue += _names([copy.guard, copy.size, *copy.source, *copy.target])
    seen = set(queue)
    while queue:
        for op in makers[queue.pop()]:
            related = [op]
            if op.code == "sld" and op.arguments:
                related += stores[op.arguments[0].allocation]
            for one in related:
                needed.add(id(one))
                fresh = set(_names([*one.arguments, one.guard])) - seen
                seen |= fresh
                queue += fresh
    silent = ("sphi", "pphi", "int_to_ptr", "inlined_call_operand")
    return [
        b._replace(ops=tuple(op for op in b.ops if id(op) in needed and not op.code.startswith(silent)))
        for b in bundles
    ]
