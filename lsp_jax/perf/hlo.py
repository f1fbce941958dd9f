"""Parser of the text of a compiled program (HLO): computations, instructions, shapes, and trip counts of loops.

Only what `perf/cost.py` needs is parsed. The program is that of one chip after partitioning: all shapes are per chip.
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
    """Memory space: 0 is the chip's main memory; on TPUs 1 is on-chip memory and 5 the host's."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        """Bytes in any memory space, without padding."""
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
    """Results; several for a tuple."""
    operands: tuple[str, ...]
    arguments: str
    """The text between the parentheses, for constants and parameters."""
    attributes: str
    root: bool

    def called(self, attribute: str) -> str | None:
        """Returns the computation named by `attribute`: calls, body, condition, to_apply."""
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
        """Instructions that read the result of each instruction."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users

    def parameters(self) -> Iterator[tuple[int, Instruction]]:
        """Yields the number and instruction of each parameter."""
        for instruction in self.instructions.values():
            if instruction.opcode == "parameter":
                yield int(instruction.arguments), instruction


@dataclass
class Program:
    """All computations by name."""

    computations: dict[str, Computation]
    entry: Computation
    turns: int = 0
    """Trip count of entry loops for which the compiler recorded none; 0: unknown."""

    def bounded(self, turns: int) -> Program:
        """Returns the program with `turns` as the trip count of entry loops without a constant bound."""
        return replace(self, turns=turns)

    def trips(self, loop: Instruction) -> int | None:
        """Returns the trip count of a `while` loop: the recorded one, or the bound in its condition; None: unknown."""
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
    """Parses the text returned by `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in text.splitlines():
        if not line.startswith(" "):
            header = _HEADER.match(line)
            if header and not line.startswith("HloModule"):
                current = computations[header[2]] = Computation(header[2])
                entry = current if header[1] else entry
            elif line.rstrip() == "}":  # attributes may continue on lines that begin with a brace
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
    """Yields the results that `instruction` reads, in the order of its operands."""
    for operand in instruction.operands:
        yield computation.instructions[operand].arrays


def arrays(text: str) -> tuple[Array, ...]:
    """Parses arrays such as `(f32[2,3]{1,0:S(1)}, s32[])`; a dynamic dimension (`<=8`) counts as its bound."""
    found = []
    for dtype, shape, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size.strip("<=")) for size in shape.split(",") if size)
        found.append(Array(dtype, sizes, int(space[1]) if space else 0))
    return tuple(found)


def _closing(text: str) -> int:
    """Index of the parenthesis that closes the one at index 0."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return index
    raise ValueError(f"unbalanced: {text[:80]}")
