"""Run the scalar program of an instruction: count how often each bundle runs, and the copies to and from HBM.

Loops with fixed bounds, pipeline stages and predicated regions are counted exactly. Branches that hang on data, such as
numbers of rows, need the values of the scalar operands. Without them a region that might be skipped counts as run, a
loop counts one trip, and both are reported.
"""

import collections
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from limoe.plan.bundles import Bundle, Code, Copy, Guard, Op, Value

# Operands and allocations get addresses this far apart, so that no two overlap.
_APART = 1 << 40
_MAX_STEPS = 20_000_000


class Ran(NamedTuple):
    """How often each bundle ran, what was copied and called, and how many branches hang on data."""

    counts: np.ndarray
    copies: Counter[tuple[str, int]]
    """Copies by kind and size in granules. A `general` copy from or to HBM is called `general_hbm`."""
    calls: Counter[str]
    unknown_branches: int
    """Branches and copies that hang on values which are not known."""
    streamed_rows: int
    """Rows that the matrix units take in."""
    places: int
    """The sum of the addresses of all copies. It differs between cores that do different work."""
    matmul_bundles: int = 0
    """Bundles that ran in straight pieces of code with a matmul, such as the inside of a matmul loop."""

    @property
    def bundles(self) -> int:
        """Bundles that ran."""
        return int(self.counts.sum())


def _signed(value: int) -> int:
    """Wrap a number to 32 bits. Addresses lie far above and stay as they are."""
    return value if abs(value) >= _APART // 2 else (value + (1 << 31)) % (1 << 32) - (1 << 31)


_COMPARE = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
_ARITHMETIC: dict[str, Callable[..., int | None]] = {
    "sadd": lambda a, b: _signed(a + b),
    "ssub": lambda a, b: _signed(a - b),
    "smul": lambda a, b: _signed(a * b),
    "sand": lambda a, b: _signed(a & b),
    "sor": lambda a, b: _signed(a | b),
    "sxor": lambda a, b: _signed(a ^ b),
    "sshll": lambda a, b: _signed(a << (b & 31)) if abs(a) < _APART // 2 else a,
    "sshrl": lambda a, b: ((a % (1 << 32)) >> (b & 31)) if abs(a) < _APART // 2 else a,
    "sshra": lambda a, b: a >> (b & 31) if abs(a) < _APART // 2 else a,
    "smulhi": lambda a, b: _signed((a % (1 << 32) * (b % (1 << 32))) >> 32),
    "kRem": lambda a, b: (a % (1 << 32)) % (b % (1 << 32)) if b else None,
    "kQuot": lambda a, b: (a % (1 << 32)) // (b % (1 << 32)) if b else None,
    "smin": min,
    "smax": max,
    "smov": lambda a: _signed(a),
    "pmov": lambda a: a,
    "pneg": lambda a: not a,
    "por": lambda a, b: a or b,
    "pand": lambda a, b: a and b,
    "pnand": lambda a, b: not (a and b),
    "pnor": lambda a, b: not (a or b),
    "pxor": lambda a, b: a != b,
}


class Started(NamedTuple):
    """A copy that was started."""

    kind: str
    granules: int
    places: int


class _Machine:
    """The scalar registers and memory of a core. None is a value that is not known."""

    def __init__(self, code: Code, operands: Mapping[int, Sequence[int]], core: int) -> None:
        self.core = core
        self.in_hbm = code.in_hbm
        self.registers: dict[str, int | bool | None] = {}
        self.memory: dict[int, int | bool | None] = {}
        self.bases: dict[str, int] = {}
        self.divided: collections.deque[int | bool | None] = collections.deque()
        self.operands = operands
        for register, index in code.operands.items():
            values = operands.get(index)
            base = (index + 1) * _APART
            self.registers[register] = base
            if values is not None and len(values) == 1:
                self.registers[register] = int(values[0])
            for offset, value in enumerate(values or ()):
                self.memory[base + offset] = int(value)

    def value(self, value: Value) -> int | bool | None:
        if value.register:
            return self.registers.get(value.register)
        if value.allocation:
            return self.bases.setdefault(value.allocation, (1000 + len(self.bases)) * _APART) + value.number
        return value.number

    def address(self, values: Sequence[Value]) -> int | None:
        total = 0
        for value in values:
            part = self.value(value)
            if part is None:
                return None
            total += part
        return total

    def holds(self, guard: Guard | None, unknown: bool) -> bool:
        if guard is None:
            return True
        value = self.registers.get(guard.register)
        return unknown if value is None else bool(value) != guard.negated

    def compute(self, op: Op) -> int | bool | None:
        code = op.code.split(".")[0]
        if code == "core_id":
            return self.core
        if op.code == "spop.drf":
            return self.divided.popleft() if self.divided else None
        if code == "sld":
            address = self.address(op.arguments)
            return None if address is None else self.memory.get(address)
        if code == "scalar_lea":
            return self.address(op.arguments)
        arguments = [self.value(value) for value in op.arguments]
        if code == "scalar_select":
            if arguments[0] is None:
                return arguments[1] if arguments[1] == arguments[2] else None
            return arguments[1 if arguments[0] else 2]
        if None in arguments:
            # One known part can decide the result.
            if code in ("por", "pnor") and True in arguments:
                return code == "por"
            if code in ("pand", "pnand") and False in arguments:
                return code == "pnand"
            return None
        if code == "scmp":
            first, second = (int(value) for value in arguments if value is not None)
            if ".u32" in op.code:
                first, second = first % (1 << 32), second % (1 << 32)
            return _COMPARE[op.code.split(".")[1]](first, second)
        if code in ("smin", "smax") and ".u32" in op.code:
            choose = min if code == "smin" else max
            return choose((int(value) for value in arguments if value is not None), key=lambda value: value % (1 << 32))
        function = _ARITHMETIC.get(code)
        return None if function is None else function(*arguments)

    def step(self, bundle: Bundle) -> list["Started"]:
        """Run the operations of a bundle, all reads before all writes. Return the copies that it starts."""
        started = []
        for copy in bundle.copies:
            if self.holds(copy.guard, unknown=True):
                ends = self.address(copy.source), self.address(copy.target)
                started.append(
                    Started(self._kind(copy, ends), self.address([copy.size]) or 0, sum(end or 0 for end in ends))
                )
                if copy.kind.endswith("_to_smem"):
                    self._load(*ends)
        writes = [(op, self._written(op)) for op in bundle.ops if self.holds(op.guard, unknown=True)]
        for op, value in writes:
            if op.code in ("kRem", "kQuot"):
                self.divided.append(value)
            elif op.target:
                self.registers[op.target] = value
            elif (address := self.address(op.arguments[:-1])) is not None:
                self.memory[address] = value
        return started

    def _written(self, op: Op) -> int | bool | None:
        return self.value(op.arguments[-1]) if op.code == "sst" else self.compute(op)

    def _kind(self, copy: Copy, ends: tuple[int | None, int | None]) -> str:
        if copy.kind != "general":
            return copy.kind
        # An address that is not known counts as HBM.
        near = all(end is not None and end // _APART - 1 not in self.in_hbm for end in ends)
        return "general" if near else "general_hbm"

    def _load(self, source: int | None, target: int | None) -> None:
        """Copy an operand into scalar memory."""
        if source is None or target is None:
            return
        for offset, value in enumerate(self.operands.get(source // _APART - 1, ())):
            self.memory[target + offset] = int(value)


def run(code: Code, delay: int, operands: Mapping[int, Sequence[int]] | None = None, core: int = 0) -> Ran:
    """Run a scalar program on one core.

    Branches take effect `delay` bundles later. `operands` are the known values of operands, by index. Raises
    RuntimeError for a program that does not end.

    >>> from limoe.plan.bundles import parse
    >>> text = '''
    ...      0   :  { %s1_s0 = smov 0 }
    ...    0x1 LB: > { %s2_s0 = sadd.s32 1, %s1_s0  ;;  %s1_s0 = sphi %s1_s0, %s2_s0 } /* Start region 5 */
    ...    0x2   : > { %p3_p0 = scmp.ge.s32.totalorder %s2_s0, 4 }
    ...    0x3   :  { %9 = sbr.rel (!%p3_p0) target = $region5 }
    ...    0x4   : > {}
    ...    0x5   :  {}'''
    >>> run(parse(text), delay=1).counts.tolist()
    [1, 4, 4, 4, 4, 1]
    """
    machine = _Machine(code, operands or {}, core)
    bundles, size = code.bundles, len(code.bundles)
    stops = [i for i, b in enumerate(bundles) if b.ops or b.copies or b.branch or b.call]
    following = np.searchsorted(stops, np.arange(size + 1))
    change = np.zeros(size + 1, np.int64)
    copies: Counter[tuple[str, int]] = Counter()
    calls: Counter[str] = Counter()
    unknown: set[int] = set()
    places = 0
    first, jump, at = 0, None, int(following[0])
    for _ in range(_MAX_STEPS):
        index = stops[at] if at < len(stops) else size
        if jump is not None and index > jump[0]:
            change[first] += 1
            change[jump[0] + 1] -= 1
            first, jump = jump[1], None
            at = int(following[first])
            continue
        if index >= size:
            break
        bundle = bundles[index]
        if bundle.branch:
            target = code.regions[bundle.branch]
            guard = bundle.guard
            if guard is not None and machine.registers.get(guard.register) is None:
                unknown.add(index)
            if machine.holds(guard, unknown=False):
                jump = (min(index + delay, size - 1), target)
        if bundle.call:
            calls[bundle.call] += 1
        for copy in bundle.copies:
            # A copy with an unknown guard counts as made, one of unknown size moves nothing.
            guarded = copy.guard is not None and machine.registers.get(copy.guard.register) is None
            if guarded or machine.address([copy.size]) is None:
                unknown.add(index)
        for copy in machine.step(bundle):
            copies[copy.kind, copy.granules] += 1
            places += copy.places
        at += 1
    else:
        raise RuntimeError(f"a kernel of {size} bundles did not end after {_MAX_STEPS} steps")
    change[first] += 1
    change[size] -= 1
    counts = np.cumsum(change[:size])
    streamed = np.array([bundle.streamed_rows for bundle in bundles])
    return Ran(
        counts,
        copies,
        calls,
        len(unknown),
        int(counts @ streamed),
        places,
        _beside_matmuls(code, delay, counts, streamed),
    )


def _beside_matmuls(code: Code, delay: int, counts: np.ndarray, streamed: np.ndarray) -> int:
    """Count the bundles that ran in straight pieces of code with a matmul."""
    leaves = [index + delay + 1 for index, bundle in enumerate(code.bundles) if bundle.branch]
    cuts = sorted({0, *code.regions.values(), *(index for index in leaves if index < len(counts))})
    pieces = zip(np.add.reduceat(counts, cuts), np.add.reduceat(streamed, cuts), strict=True)
    return int(sum(ran for ran, rows in pieces if rows))
