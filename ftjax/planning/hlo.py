"""Reads the text of an optimized HLO module: its computations, how often each runs, and what their operations move.

The compiler's own cost analysis counts the body of a loop once. Here every computation is weighted by the trip counts
of the loops around it, which are found by running the loop's own counter (`Module.trips`).
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2", "f8e4m3b11fnuz", "f8e8m0fnu"), 1),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
    **dict.fromkeys(("s4", "u4", "f4e2m1fn"), 0.5),
    **dict.fromkeys(("s2", "u2"), 0.25),
    "c128": 16,
    "token": 0,
    "opaque": 0,
}
MOST_TRIPS = 1_000_000

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?")
_COMMENT = re.compile(r"/\*.*?\*/")
_CALLED = re.compile(r"\b(condition|body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Array:
    """One array of a shape: `bf16[4,8]{1,0:T(8,128)S(1)}`; `space` 0 is HBM, 1 the vector memory, 5 the host's."""

    dtype: str
    sides: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> float:
        return BYTES[self.dtype] * math.prod(self.sides)


@dataclass
class Instruction:
    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of its result; several for a tuple
    operands: tuple[str, ...]
    rest: str  # the attributes, as text
    literal: str  # what stands between the brackets
    is_root: bool

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.rest)
        return found[1] if found else None

    @functools.cached_property
    def called(self) -> dict[str, str]:
        """{condition, body, calls, ...: computation}; branches are numbered."""
        called = dict(_CALLED.findall(self.rest))
        if branches := _BRANCHES.search(self.rest):
            called |= {f"branch {i}": name.strip(" %") for i, name in enumerate(branches[1].split(","))}
        return called


@dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        return next(one for one in self.instructions.values() if one.is_root)

    def parameter(self, number: int) -> Instruction:
        every = self.instructions.values()
        return next(one for one in every if one.opcode == "parameter" and one.literal == str(number))


class Unknown(Exception):
    """A loop's counter that this reader cannot follow."""


@dataclass
class Module:
    computations: dict[str, Computation]
    entry: str
    unknown_loops: list[str] = field(default_factory=list)  # counted once, for want of a trip count

    def walk(self) -> Iterator[tuple[Instruction, Computation, int]]:
        """Every instruction outside fusions, with its computation and how often it runs; of branches the costlier.

        Branches of a conditional all count once: one of them is the real one and the others are nearly empty where
        this project has them (chunks of a batch without trained tokens).
        """
        yield from self._walk(self.entry, 1)

    def _walk(self, name: str, times: int) -> Iterator[tuple[Instruction, Computation, int]]:
        computation = self.computations[name]
        for one in computation.instructions.values():
            yield one, computation, times
            if one.opcode == "while":
                yield from self._walk(one.called["body"], times * self.trips(one, computation))
            elif one.opcode in ("call", "conditional", "async-start") or one.opcode == "fusion":
                for called in one.called.values():
                    yield from self._walk(called, times)

    def trips(self, loop: Instruction, outside: Computation) -> int:
        """How often a loop runs: stated by the compiler, or by running its counter."""
        if stated := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(stated)
        try:
            return self._count(loop, outside)
        except Unknown:
            if loop.name not in self.unknown_loops:
                self.unknown_loops.append(loop.name)
            return 1

    def _count(self, loop: Instruction, outside: Computation) -> int:
        condition, body = self.computations[loop.called["condition"]], self.computations[loop.called["body"]]
        start = outside.instructions[loop.operands[0]]
        if start.opcode != "tuple":
            raise Unknown
        state: dict[int, int] = {}  # the elements of the loop's tuple that were looked at

        def element(index: int) -> int:
            if index not in state:
                state[index] = self._scalar(outside, start.operands[index], _no_parameter)
            return state[index]

        def of_parameter(one: Instruction, computation: Computation) -> int:
            if one.opcode != "get-tuple-element":
                raise Unknown
            return element(int(one.attribute(r"index=(\d+)")))

        trips = 0
        while self._scalar(condition, condition.root.name, of_parameter):
            trips += 1
            if trips > MOST_TRIPS:
                raise Unknown
            # Those that the condition read move on; what they need in turn is read as it is now.
            update = {index: self._scalar(body, body.root.operands[index], of_parameter) for index in list(state)}
            if update == state:
                raise Unknown
            while missing := [index for index in state if index not in update]:
                update |= {index: self._scalar(body, body.root.operands[index], of_parameter) for index in missing}
            state = update
        return trips

    def _scalar(self, computation: Computation, name: str, of_parameter) -> int:
        """The value of an integer scalar; `of_parameter` gives those that come from outside."""
        one = computation.instructions[name]
        if one.opcode == "constant":
            if one.literal in ("true", "false"):
                return int(one.literal == "true")
            if not re.fullmatch(r"-?\d+", one.literal):
                raise Unknown
            return int(one.literal)
        if one.opcode == "parameter" or one.opcode == "get-tuple-element":
            return of_parameter(one, computation)
        values = [self._scalar(computation, operand, of_parameter) for operand in one.operands]
        if one.opcode == "fusion":
            inner = self.computations[one.called["calls"]]
            return self._scalar(inner, inner.root.name, lambda parameter, _: values[int(parameter.literal)])
        if one.opcode in ("copy", "bitcast", "convert", "reshape"):
            return values[0]
        if one.opcode == "compare":
            left, right = values
            direction = one.attribute(r"direction=(\w+)")
            results = {"LT": left < right, "LE": left <= right, "GT": left > right, "GE": left >= right}
            return int((results | {"EQ": left == right, "NE": left != right})[direction])
        if one.opcode in ("add", "subtract", "multiply") and len(values) == 2:
            left, right = values
            return {"add": left + right, "subtract": left - right, "multiply": left * right}[one.opcode]
        raise Unknown


def _no_parameter(one: Instruction, computation: Computation) -> int:
    """A loop's first counter that is itself an argument of the computation around the loop."""
    raise Unknown


def parse(text: str) -> Module:
    """The module that `jax.stages.Compiled.as_text()` gives."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if not line or line.startswith("HloModule"):
            continue
        if line == "}":
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            one = _instruction(found[2], found[3], bool(found[1]))
            current.instructions[one.name] = one
        elif header := _HEADER.match(line):
            current = computations[header[1]] = Computation(header[1])
            if line.startswith("ENTRY"):
                entry = header[1]
    if entry is None:
        raise ValueError("not the text of an HLO module: it has no ENTRY")
    return Module(computations, entry)


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    text = _COMMENT.sub("", text)
    shape, text = _shape(text)
    opcode, _, text = text.partition("(")
    inside, rest = _until_bracket(text)
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, opcode.strip(), arrays_of(shape), operands, rest, inside.strip(), is_root)


def _shape(text: str) -> tuple[str, str]:
    """The result's shape in front of the operation, and what follows it."""
    if text.startswith("("):
        inside, rest = _until_bracket(text[1:])
        return inside, rest.lstrip()
    shape, _, rest = text.partition(" ")
    return shape, rest


def _until_bracket(text: str) -> tuple[str, str]:
    """What stands before the bracket that closes one already open, and what after it; quoted text is passed over."""
    depth, quoted = 1, False
    for index, character in enumerate(text):
        if character == '"' and (index == 0 or text[index - 1] != "\\"):
            quoted = not quoted
        elif not quoted and character == "(":
            depth += 1
        elif not quoted and character == ")":
            depth -= 1
            if depth == 0:
                return text[:index], text[index + 1 :]
    raise ValueError(f"HLO with an open bracket: {text[:80]}")


def arrays_of(shape: str) -> tuple[Array, ...]:
    found = []
    for dtype, sides, layout in _ARRAY.findall(shape):
        if dtype in BYTES:
            space = re.search(r"S\((\d+)\)", layout or "")
            sides = tuple(int(side) for side in sides.split(",")) if sides else ()
            found.append(Array(dtype, sides, int(space[1]) if space else 0))
    return tuple(found)
