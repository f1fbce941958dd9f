"""The text of a compiled program (HLO) as data: computations, instructions, shapes, and how often each loop runs.

Only what `perf/cost.py` counts is read. The text is that of one chip's program after partitioning, so every shape in
it is one chip's share.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

BYTES: dict[str, float] = {"pred": 1, "s4": 0.5, "u4": 0.5, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")


@dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    space: int
    """0 is the chip's main memory; TPUs name others (1: the memory beside the cores, 5: the host's)."""

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        """Bytes wherever it lies, padding not counted."""
        known = BYTES.get(self.dtype)
        return self.size * (known if known is not None else int(re.findall(r"\d+", self.dtype)[0]) / 8)

    @property
    def stored(self) -> float:
        """Bytes in the chip's main memory."""
        return self.bytes if self.space == 0 else 0


@dataclass
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    """Its results; several for a tuple."""
    operands: tuple[str, ...]
    arguments: str
    """The text between the parentheses, for constants and parameters."""
    attributes: str
    root: bool

    def called(self, attribute: str) -> str | None:
        """The computation named by `attribute`: calls, body, condition, to_apply."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return match and match[1]


@dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @cached_property
    def root(self) -> Instruction:
        return next(instruction for instruction in self.instructions.values() if instruction.root)

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who reads each instruction's result."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users

    def parameters(self) -> Iterator[tuple[int, Instruction]]:
        """Number and instruction of each parameter."""
        for instruction in self.instructions.values():
            if instruction.opcode == "parameter":
                yield int(instruction.arguments), instruction


@dataclass
class Program:
    """All computations by name."""

    computations: dict[str, Computation]
    entry: Computation
    turns: int = 0
    """Of each loop of the entry without a bound that the compiler noted; 0: none is known."""

    def bounded(self, turns: int) -> Program:
        """With the turns of the entry's loops whose end is no constant."""
        return replace(self, turns=turns)

    def trips(self, loop: Instruction) -> int | None:
        """How often a `while` runs: what the compiler noted, or the bound in its condition; None: unknown."""
        noted = re.search(r'"known_trip_count": ?\{"n": ?"(\d+)"', loop.attributes)
        if noted:
            return int(noted[1])
        if self.turns and loop.name in self.entry.instructions:
            return self.turns
        name = loop.called("condition")
        bounds = self._whole_numbers(self.computations[name]) if name in self.computations else []
        return max(bounds, default=None)

    def _whole_numbers(self, computation: Computation) -> list[int]:
        found = []
        for instruction in computation.instructions.values():
            if instruction.opcode == "constant" and re.fullmatch(r"\d+", instruction.arguments):
                if instruction.arrays[0].dtype in ("s32", "u32", "s64"):
                    found.append(int(instruction.arguments))
            elif instruction.opcode == "fusion":
                found += self._whole_numbers(self.computations[instruction.called("calls") or ""])
        return found


def parse(text: str) -> Program:
    """The program that `compiled.as_text()` gave."""
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in text.splitlines():
        if not line.startswith(" "):
            header = _HEADER.match(line)
            if header and not line.startswith("HloModule"):
                current = computations[header[2]] = Computation(header[2])
                entry = current if header[1] else entry
            elif line.rstrip() == "}":  # a line may also begin so within the attributes of the one before
                current = None
        elif current is not None:
            instruction = _instruction(line)
            if instruction is not None:
                current.instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError("no ENTRY computation in the program's text")
    return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    rest = line[match.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    opcode, _, inner = rest[end:].lstrip().partition("(")
    close = _closing("(" + inner) - 1
    arguments, attributes = inner[:close], inner[close + 1 :]
    operands = tuple(_NAME.findall(arguments)) if opcode not in ("parameter", "constant") else ()
    return Instruction(match[2], opcode, arrays(rest[:end]), operands, arguments, attributes, match[1] is not None)


def inputs(computation: Computation, instruction: Instruction) -> Iterator[tuple[Array, ...]]:
    """The results that `instruction` reads, in the order of its operands."""
    for operand in instruction.operands:
        yield computation.instructions[operand].arrays


def arrays(text: str) -> tuple[Array, ...]:
    """`(f32[2,3]{1,0:S(1)}, s32[])` -> its arrays; a dynamic dimension (`<=8`) counts at its bound."""
    found = []
    for dtype, shape, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size.strip("<=")) for size in shape.split(",") if size)
        found.append(Array(dtype, sizes, int(space[1]) if space else 0))
    return tuple(found)


def _closing(text: str) -> int:
    """Index of the parenthesis that closes the one at 0."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return index
    raise ValueError(f"unbalanced: {text[:80]}")
