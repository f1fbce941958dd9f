"""Ahead-of-time compilation of all programs of a run, from shapes alone and without the target devices.

`Planner` compiles stages instead of running them: as the backend of `stages.iteration` it gets the programs that a run
executes, in the same order. Arrays are shapes with shardings; an array counts as resident while the iteration holds a
reference to it. The memory of a program is the compiler's analysis plus all other arrays resident at that moment; its
work is counted from its HLO (`perf/cost.py`).
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lsp_jax.model.sharding import Layout, shardings
from lsp_jax.perf import hlo
from lsp_jax.perf.chips import GIB, Topology
from lsp_jax.perf.cost import Work, count
from lsp_jax.play.chunked_decode import decode_chunk, drop_finished, none_finished, row_counts

Say = Callable[[str], None]

# Without a device there is no autotuning, and the default tiles of Triton's matrix products can be invalid.
_OPTIONS = {"cuda": {"xla_gpu_enable_triton_gemm": False}}
LABELS = {
    "cast_for_decoding": "weight_sync",
    "reference_logprobs": "reference",
    "learn_batch": "advantages",
    "with_old_logprobs": "old log-probabilities",
    "update": "update",
}
"""Names of stages in the plan that are not made of their phase and function name."""


@dataclass(frozen=True)
class Phase:
    """One compiled program; bytes are per chip."""

    name: str
    arguments: int
    outputs: int
    aliased: int
    """Outputs that reuse the memory of donated arguments."""
    temporaries: int
    held: int
    """Maximum bytes of other arrays resident while it runs."""
    work: Work
    times: int
    """Executions per iteration; 0: once per run, or only for some lengths."""
    compile_seconds: float
    failure: str = ""
    """The compiler's error message; memory and work are unknown then. Empty if it compiled."""

    @property
    def peak(self) -> int:
        """Peak bytes while it runs."""
        return self.held + self.arguments + self.temporaries + self.outputs - self.aliased


class _Resident(jax.ShapeDtypeStruct):
    """Shape and sharding of an array on the devices; resident while it is referenced."""

    __slots__ = ("__weakref__",)

    @property
    def device_bytes(self) -> int:
        """Bytes on one device."""
        return math.prod(self.sharding.shard_shape(self.shape)) * self.dtype.itemsize


class Planner:
    """Compiles programs one after another and tracks which arrays are resident. To be used within `use_mesh(mesh)`,
    where programs can be traced but not run."""

    def __init__(self, topology: Topology, mesh: Mesh, say: Say) -> None:
        self._topology, self._mesh, self._say = topology, mesh, say
        self._phase, self._times = "iteration", 1
        self._resident: dict[int, tuple[weakref.ref[_Resident], int]] = {}
        self._offloaded: set[int] = set()
        self._results: dict[Any, tuple[str, Any]] = {}
        self._found: dict[str, Phase] = {}

    @property
    def phases(self) -> tuple[Phase, ...]:
        """All compiled programs, in the order of their first call."""
        return tuple(self._found.values())

    @contextmanager
    def phase(self, name: str, times: int = 1) -> Iterator[None]:
        """Names the programs called within; each call stands for `times` executions per iteration."""
        before = self._phase, self._times
        self._phase, self._times = name, times
        try:
            yield
        finally:
            self._phase, self._times = before

    def put(self, tree: Any, layout: Layout | None = None) -> Any:
        """Makes shapes resident: parameters sharded by `layout`, anything else replicated."""
        if layout is not None:
            return self._placed(tree, shardings(tree, self._mesh, layout))
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        return self._placed(tree, jax.tree.map(lambda _: everywhere, tree))

    def offload(self, tree: Any) -> Any:
        """Counts `tree` as resident only while a program reads it."""
        self._offloaded |= {id(leaf) for leaf in jax.tree.leaves(tree)}
        return tree

    def call(self, stage: Any, *arrays: Any, **static: Any) -> Any:
        """Compiles a stage for `arrays`; returns shapes and shardings of its result (a `core.stage.Call`)."""
        name, leaves = self._label(stage, arrays), jax.tree.leaves(arrays)
        held = self._held(leaves)
        # compilers return equal placements as different shardings: compare the shapes of their shards
        signature = tuple((leaf.shape, leaf.dtype, leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
        key = name, jax.tree.structure(arrays), signature, tuple(sorted(static.items(), key=lambda item: item[0]))
        if key in self._results:
            found = self._found[self._results[key][0]]
            self._found[found.name] = replace(found, times=found.times + self._times, held=max(found.held, held))
        else:
            lowered = stage.lower(*arrays, **static)
            name = name if name not in self._found else f"{name} ({len(self._found)})"
            turns = static["spec"].chunk if stage is decode_chunk else 0
            phase, placed = self._compile(name, lowered, held, turns)
            # unused arguments are dropped from the compiled program, but stay resident
            given = sum(leaf.device_bytes for leaf in {id(leaf): leaf for leaf in leaves}.values())
            self._found[name] = replace(phase, held=held + (0 if phase.failure else max(given - phase.arguments, 0)))
            donated = [info.donated for info in jax.tree.leaves(lowered.args_info)]
            self._results[key] = name, (lowered.out_info, placed, donated)
        shapes, places, donated = self._results[key][1]
        for leaf, given_away in zip(leaves, donated, strict=True):
            if given_away:
                self._resident.pop(id(leaf), None)
        result = self._placed(shapes, places)
        if stage is decode_chunk:
            self._drop_rows(arrays[2], result[0], static["spec"].max_new_tokens)
        return result

    def _drop_rows(self, prefix: Any, rows: Any, longest: int) -> None:
        """Compiles the first program that drops finished rows, at the longest cache: no later one needs more memory.
        Whether a run executes it depends on the lengths."""
        counts = row_counts(rows.token.shape[0])
        if rows.cache.columns == longest and len(counts) > 1:
            with self.phase(self._phase, times=0):
                self.call(drop_finished, prefix, rows, self.call(none_finished, rows), number=counts[1])

    def _label(self, stage: Any, arrays: Any) -> str:
        name = LABELS.get(stage.__name__)
        if name is None:
            own = stage.__name__ in ("rollout", "score_component", "write_judgements", self._phase)
            name = self._phase if own else f"{self._phase}: {stage.__name__}"
        return f"{name} at {arrays[3].cache.columns} columns" if stage is decode_chunk else name

    def _held(self, read: list[Any]) -> int:
        """Resident bytes of arrays that are not `read`."""
        without = {id(leaf) for leaf in read} | self._offloaded
        return sum(size for place, (_, size) in self._resident.items() if place not in without)

    def _placed(self, shapes: Any, places: Any) -> Any:
        def resident(shape: Any, place: Any) -> _Resident:
            made = _Resident(shape.shape, shape.dtype, sharding=place)
            identity = id(made)
            gone = weakref.ref(made, lambda _: self._resident.pop(identity, None))
            self._resident[identity] = gone, made.device_bytes
            return made

        return jax.tree.map(resident, shapes, places)

    def _compile(self, name: str, lowered: Any, held: int, turns: int) -> tuple[Phase, Any]:
        start = time.perf_counter()
        try:
            compiled = lowered.compile(_OPTIONS.get(self._topology.chip.platform))
        except jax.errors.JaxRuntimeError as error:
            words = " ".join(line.strip() for line in str(error).splitlines()[:2])
            self._say(f"{name}: refused by the compiler: {words}")
            everywhere = NamedSharding(self._mesh, PartitionSpec())
            places = jax.tree.map(lambda _: everywhere, lowered.out_info)
            return Phase(name, 0, 0, 0, 0, held, Work(), self._times, time.perf_counter() - start, words), places
        spent = time.perf_counter() - start
        memory = compiled.memory_analysis()
        kinds = ("argument", "output", "alias", "temp")
        arguments, outputs, aliased, temporaries = (getattr(memory, f"{kind}_size_in_bytes") for kind in kinds)
        work = count(hlo.parse(compiled.as_text()), len(self._topology.devices), turns)
        phase = Phase(name, arguments, outputs, aliased, temporaries, held, work, self._times, spent)
        self._say(f"{name}: compiled in {spent:.1f} s, {phase.peak / GIB:.2f} GiB per chip")
        return phase, compiled.output_shardings


def device_bytes(tree: Any) -> int:
    """Returns the bytes of `tree` on one device."""
    return sum(leaf.device_bytes for leaf in jax.tree.leaves(tree))
