"""Cost of a compiled program on one chip: operations, bytes to and from memory, bytes over the network.

Each instruction is counted from the shapes in the program's text, times the trip counts of the loops around it. (The
compiler's own `cost_analysis` counts a loop's body once, and is not available for GPUs.)

- Operations are those of matrix products, 2 per multiply-add, including recomputation; elementwise work is not counted.
- Bytes moved are what each fused kernel reads from and writes to the chip's main memory; a slice counts its own size.
- Bytes over the network are what one chip receives when the collective runs as a ring.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from lsp_jax.perf.hlo import Computation, Instruction, Program, inputs
from lsp_jax.perf.matmul_flops import flops

COLLECTIVES: dict[str, Callable[[float, float, int], float]] = {
    "all-gather": lambda given, made, n: made * (n - 1) / n,
    "all-reduce": lambda given, made, n: 2 * made * (n - 1) / n,
    "reduce-scatter": lambda given, made, n: given * (n - 1) / n,
    "all-to-all": lambda given, made, n: made * (n - 1) / n,
    "ragged-all-to-all": lambda given, made, n: made * (n - 1) / n,
    "collective-permute": lambda given, made, n: made,
    "collective-broadcast": lambda given, made, n: made,
}
"""Bytes received by one of `n` chips, from the bytes of its operands (`given`) and results (`made`)."""

_FREE = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
        "iota",
        "opt-barrier",
        "domain",
        "get-dimension-size",
        "add-dependency",
    ]
)
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclass
class Work:
    """Operations and bytes of one program on one chip."""

    flops: float = 0
    bytes: float = 0
    collectives: dict[str, float] = field(default_factory=dict)
    """Bytes received by kind."""
    unknown_loops: int = 0
    """Loops with an unknown trip count, whose bodies are counted once."""

    @property
    def network(self) -> float:
        """Total bytes received."""
        return sum(self.collectives.values())

    def add(self, other: Work, times: float = 1) -> None:
        """Adds `other`, `times` times."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        for kind, amount in other.collectives.items():
            self.collectives[kind] = self.collectives.get(kind, 0) + times * amount
        self.unknown_loops += other.unknown_loops


def count(program: Program, chips: int, turns: int = 0) -> Work:
    """Returns the work of one execution of `program`, partitioned over `chips`, with loops at their maximum; a loop of
    the entry computation without a constant bound counts `turns` times."""
    if turns:
        program = program.bounded(turns)
    done: dict[str, Work] = {}

    def work_of(name: str) -> Work:
        if name not in done:
            done[name] = total = Work()
            computation, seen = program.computations[name], set()
            for instruction in computation.instructions.values():
                total.add(_work(program, computation, instruction, chips, work_of, seen))
        return done[name]

    return work_of(program.entry.name)


def _work(
    program: Program,
    computation: Computation,
    instruction: Instruction,
    chips: int,
    work_of: Callable[[str], Work],
    seen: set[str],
) -> Work:
    """Returns the work of one instruction. `seen` are the channels of collectives already counted in this computation:
    TPUs spread a collective over many kernels."""
    opcode, work = instruction.opcode, Work()
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return work
    if opcode == "while":
        trips = program.trips(instruction)
        work.unknown_loops = int(trips is None)
        for part in ("body", "condition"):
            work.add(work_of(instruction.called(part) or ""), trips or 1)
    elif opcode in ("call", "async-start"):
        work.add(work_of(instruction.called("to_apply" if opcode == "call" else "calls") or ""))
    elif opcode == "conditional":
        branches = [work_of(name) for name in _branches(instruction)]
        work.add(max(branches, key=lambda branch: (branch.flops, branch.bytes)))
    elif _collective(instruction):
        _add_collective(work, opcode.removesuffix("-start"), computation, instruction, chips)
        work.bytes = _moved(computation, instruction)
    elif opcode == "fusion":
        inside = program.computations[instruction.called("calls") or ""]
        work.flops = _fused_flops(program, inside)
        for part in inside.instructions.values():
            channel = re.search(r"channel_id=(\d+)", part.attributes)
            if _collective(part) and not (channel and channel[1] in seen):
                seen.update(channel.groups() if channel else ())
                _add_collective(work, _fused_kind(inside, part), inside, part, chips)
                work.bytes += _moved(inside, part)
        work.bytes += _fusion_bytes(computation, instruction, inside)
    else:
        work.flops = flops(computation, instruction)
        work.bytes = _moved(computation, instruction)
    return work


def _collective(instruction: Instruction) -> bool:
    return instruction.opcode.removesuffix("-start") in COLLECTIVES


def _ends_collective(instruction: Instruction) -> bool:
    """Whether this is the last of the kernels that a collective is spread over."""
    return 'custom_call_target="AsyncCollectiveDone"' in instruction.attributes


def _fused_kind(inside: Computation, part: Instruction) -> str:
    """Kind of a fused collective: an all-reduce of which each chip keeps only its slice is a reduce-scatter."""
    if part.opcode == "all-reduce" and any(user.opcode == "dynamic-slice" for user in inside.users[part.name]):
        return "reduce-scatter"
    return part.opcode.removesuffix("-start")


def _fused_flops(program: Program, inside: Computation) -> float:
    """Operations of a fused kernel, including nested ones."""
    total = 0.0
    for part in inside.instructions.values():
        total += flops(inside, part)
        if part.opcode == "fusion":
            total += _fused_flops(program, program.computations[part.called("calls") or ""])
    return total


def _branches(instruction: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if listed:
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    return [name for key in ("true_computation", "false_computation") if (name := instruction.called(key))]


# --- bytes ---------------------------------------------------------------------------------------------------------


def _moved(computation: Computation, instruction: Instruction) -> float:
    """Bytes that one kernel reads from and writes to main memory."""
    given = list(inputs(computation, instruction))
    made = instruction.arrays
    opcode = instruction.opcode
    if opcode.endswith("-start"):  # its results also contain its operands, and flags
        opcode = opcode.removesuffix("-start")
        source = len(instruction.operands)
        made = made[:source] if opcode == "copy" else made[source : 2 * source]
    if opcode in _SLICES:
        return made[0].stored + (made[0].bytes if given[0][0].space == 0 else 0)
    if opcode in ("dynamic-update-slice", "scatter"):
        update = given[1 if opcode == "dynamic-update-slice" else 2][0]
        return update.stored + (update.bytes if made[0].space == 0 else 0)
    return sum(array.stored for array in made) + sum(array.stored for arrays in given for array in arrays)


def _fusion_bytes(computation: Computation, instruction: Instruction, inside: Computation) -> float:
    """As `_moved` for a fused kernel; arrays that it only slices or updates in place count as the slice."""
    given = list(inputs(computation, instruction))
    moved = 0.0
    for number, parameter in inside.parameters():
        arrays = given[number] if number < len(given) else ()
        whole = sum(array.stored for array in arrays)
        moved += min(whole, _read(inside, parameter)) if whole else 0
    roots = [inside.root]
    if inside.root.opcode == "tuple":
        roots = [inside.instructions[name] for name in inside.root.operands]
    for made, root in zip(instruction.arrays, roots, strict=False):
        if made.stored:
            moved += min(made.stored, _written(inside, root))
    return moved


def _read(inside: Computation, source: Instruction) -> float:
    """Bytes that a fused kernel reads of one parameter."""
    total = 0.0
    for user in inside.users[source.name]:
        if user.opcode == "bitcast":
            total += _read(inside, user)
        elif user.opcode in _SLICES and user.operands[0] == source.name:
            total += user.arrays[0].bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == source.name:
            continue  # updated in place
        elif _collective(user) or _ends_collective(user) or (user.opcode == "tuple" and user.root):
            continue  # counted with the collective, or passed through
        else:
            return sum(array.bytes for array in source.arrays)
    return total


def _written(inside: Computation, root: Instruction) -> float:
    while root.opcode == "bitcast":
        root = inside.instructions[root.operands[0]]
    if root.opcode == "parameter" or _collective(root) or _ends_collective(root):
        return 0
    if root.opcode == "dynamic-update-slice":
        return inside.instructions[root.operands[1]].arrays[0].bytes
    return sum(array.bytes for array in root.arrays)


# --- network -------------------------------------------------------------------------------------------------------


def _add_collective(work: Work, kind: str, computation: Computation, instruction: Instruction, chips: int) -> None:
    given = sum(array.bytes for arrays in inputs(computation, instruction) for array in arrays)
    made = sum(array.bytes for array in instruction.arrays)
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        # its results are (operands, results, ...)
        half = len(instruction.operands)
        made = sum(array.bytes for array in instruction.arrays[half : 2 * half])
    members = group_size(instruction.attributes, chips)
    if members > 1:
        work.collectives[kind] = work.collectives.get(kind, 0) + COLLECTIVES[kind](given, made, members)


def group_size(attributes: str, chips: int) -> int:
    """Number of chips in each group of a collective; parses every notation of replica groups."""
    if "source_target_pairs=" in attributes:
        return chips
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh[2]))
    tiled = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes)
    if tiled:
        return int(tiled[2])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    return len(listed[1].split(",")) if listed else chips
