"""Reads the text of an optimized HLO module: its computations, their instructions, and how often each runs.

The compiler's own cost analysis counts the body of a loop once. Here every computation is weighted by the trip counts
of the loops around it, which come from running the loop's own counter (`Module.trips`).
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

# Bytes of an element; below 1 where several share a byte.
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
MOST_TRIPS = 1_000_000  # of a loop whose counter is run

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
    """An operation of a computation: `%NAME = SHAPE OPCODE(OPERANDS), ATTRIBUTES`."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of its result; several for a tuple
    operands: tuple[str, ...]
    rest: str  # the attributes, as text
    literal: str  # the text between the brackets: operands, or the value of a constant
    is_root: bool

    def attribute(self, pattern: str) -> str | None:
        """The group that `pattern` captures in the attributes; None where it does not occur."""
        match = re.search(pattern, self.rest)
        return match[1] if match else None

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
        return next(instruction for instruction in self.instructions.values() if instruction.is_root)

    def parameter(self, number: int) -> Instruction:
        parameters = (i for i in self.instructions.values() if i.opcode == "parameter")
        return next(parameter for parameter in parameters if parameter.literal == str(number))


class UnknownCount(Exception):
    """A loop whose counter this reader cannot compute."""


@dataclass
class Module:
    computations: dict[str, Computation]
    entry: str
    unknown_loops: list[str] = field(default_factory=list)  # loops without a known trip count, counted once

    def walk(self, name: str | None = None, times: int = 1) -> Iterator[tuple[Instruction, Computation, int]]:
        """(instruction, its computation, how often it runs), for every instruction and those in what it calls.

        name: of the computation to begin with, which runs `times` times; the module's entry where it is None.

        All branches of a conditional count, though one runs: in this project's programs the others are nearly empty
        (chunks of a batch without trained tokens).
        """
        computation = self.computations[self.entry if name is None else name]
        for instruction in computation.instructions.values():
            yield instruction, computation, times
            if instruction.opcode == "while":
                yield from self.walk(instruction.called["body"], times * self.trips(instruction, computation))
            elif instruction.opcode in ("call", "conditional", "async-start", "fusion"):
                for called in instruction.called.values():
                    yield from self.walk(called, times)

    def trips(self, loop: Instruction, outside: Computation) -> int:
        """How often a loop runs: as the compiler states it, or else by running its counter; 1 if that fails."""
        if stated := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(stated)
        try:
            return self._count(loop, outside)
        except UnknownCount:
            if loop.name not in self.unknown_loops:
                self.unknown_loops.append(loop.name)
            return 1

    def _count(self, loop: Instruction, outside: Computation) -> int:
        condition, body = self.computations[loop.called["condition"]], self.computations[loop.called["body"]]
        start = outside.instructions[loop.operands[0]]
        if start.opcode != "tuple":
            raise UnknownCount
        state: dict[int, int] = {}  # {index in the loop's tuple: value}, of the elements that the condition needs

        def element(index: int) -> int:
            if index not in state:
                state[index] = self._scalar(outside, start.operands[index], _no_parameter)
            return state[index]

        def argument_value(instruction: Instruction, computation: Computation) -> int:
            if instruction.opcode != "get-tuple-element":
                raise UnknownCount
            return element(int(instruction.attribute(r"index=(\d+)")))

        trips = 0
        while self._scalar(condition, condition.root.name, argument_value):
            trips += 1
            if trips > MOST_TRIPS:
                raise UnknownCount
            # The body computes the next values; elements that these need in turn join the state with their value now.
            update = {index: self._scalar(body, body.root.operands[index], argument_value) for index in list(state)}
            if update == state:
                raise UnknownCount
            while missing := [index for index in state if index not in update]:
                update |= {index: self._scalar(body, body.root.operands[index], argument_value) for index in missing}
            state = update
        return trips

    def _scalar(self, computation: Computation, name: str, argument_value: Callable) -> int:
        """The value of an integer scalar; `argument_value` (instruction, computation) gives those of arguments."""
        instruction = computation.instructions[name]
        if instruction.opcode == "constant":
            if instruction.literal in ("true", "false"):
                return int(instruction.literal == "true")
            if not re.fullmatch(r"-?\d+", instruction.literal):
                raise UnknownCount
            return int(instruction.literal)
        if instruction.opcode == "parameter" or instruction.opcode == "get-tuple-element":
            return argument_value(instruction, computation)
        values = [self._scalar(computation, operand, argument_value) for operand in instruction.operands]
        if instruction.opcode == "fusion":
            inner = self.computations[instruction.called["calls"]]
            return self._scalar(inner, inner.root.name, lambda parameter, _: values[int(parameter.literal)])
        if instruction.opcode in ("copy", "bitcast", "convert", "reshape"):
            return values[0]
        if instruction.opcode == "compare":
            left, right = values
            direction = instruction.attribute(r"direction=(\w+)")
            results = {"LT": left < right, "LE": left <= right, "GT": left > right, "GE": left >= right}
            return int((results | {"EQ": left == right, "NE": left != right})[direction])
        if instruction.opcode in ("add", "subtract", "multiply") and len(values) == 2:
            left, right = values
            return {"add": left + right, "subtract": left - right, "multiply": left * right}[instruction.opcode]
        raise UnknownCount


def _no_parameter(instruction: Instruction, computation: Computation) -> int:
    """For a counter that begins with an argument of the computation around the loop: its value is not known."""
    raise UnknownCount


def parse(text: str) -> Module:
    """The module of `jax.stages.Compiled.as_text()`."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if not line or line.startswith("HloModule"):
            continue
        if line == "}":
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            instruction = _instruction(match[2], match[3], bool(match[1]))
            current.instructions[instruction.name] = instruction
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
    """(the result's shape, which comes first, the rest of the text)"""
    if text.startswith("("):
        inside, rest = _until_bracket(text[1:])
        return inside, rest.lstrip()
    shape, _, rest = text.partition(" ")
    return shape, rest


def _until_bracket(text: str) -> tuple[str, str]:
    """(the text before the bracket that closes an open one, the text after it); brackets in quotes do not count."""
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
    raise ValueError(f"HLO with a bracket that is not closed: {text[:80]}")


def arrays_of(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape as HLO writes it: one, or those of a tuple."""
    arrays = []
    for dtype, sides, layout in _ARRAY.findall(shape):
        if dtype in BYTES:
            space = re.search(r"S\((\d+)\)", layout or "")
            sides = tuple(int(side) for side in sides.split(",")) if sides else ()
            arrays.append(Array(dtype, sides, int(space[1]) if space else 0))
    return tuple(arrays)
