"""`lsp-jax plan`: whether a run fits given hardware and what bounds its speed, from ahead-of-time compilation.

No weights, tokenizer or device are needed (`perf/aot.py`, `perf/chips.py`). The time of a stage is the largest of its
operations, bytes to and from memory, and bytes over the network, each at the chip's published peak rate. It is a lower
bound; most runs are slower. All queries and answers are assumed to have the maximum length of the configuration.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from jax.sharding import AxisType, Mesh

from lsp_jax.config import TrainConfig
from lsp_jax.core.errors import InputError
from lsp_jax.core.files import user_path
from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.known_models import shape_of
from lsp_jax.model.sharding import AXES, check_model, make_mesh
from lsp_jax.perf import placeholders
from lsp_jax.perf.aot import Phase, Say
from lsp_jax.perf.chips import GIB, Chip, Topology
from lsp_jax.perf.memory import with_micro_batch_size
from lsp_jax.perf.planned_run import compile_run
from lsp_jax.play.prompt_data import widest


@dataclass(frozen=True)
class Plan:
    """The result of `lsp-jax plan`. Bytes are per chip unless stated otherwise."""

    model: str
    reward_model: str
    topology: str
    chip: Chip
    mesh: dict[str, int]
    """Devices along each axis."""
    sizes: dict[str, int]
    """Sizes of an iteration, and the number of tokens that it generates."""
    resident: dict[str, int]
    """Bytes that are always resident, by name."""
    phases: tuple[Phase, ...]
    checkpoint: int
    """Bytes of one checkpoint, over all chips."""
    verdict: str
    versions: dict[str, str]

    @property
    def peak(self) -> int:
        """Peak bytes of the worst stage."""
        return max(phase.peak for phase in self.phases)

    @property
    def fits(self) -> bool:
        """Whether all stages compile and fit into memory."""
        return self.peak <= self.chip.memory and not any(phase.failure for phase in self.phases)

    @property
    def seconds(self) -> float:
        """Lower bound of the seconds of one iteration."""
        return sum(bound(phase, self.chip)[1] * phase.times for phase in self.phases)

    def to_json(self) -> str:
        """Returns all fields, with the bound and time of each stage, as JSON."""
        data = dataclasses.asdict(self)
        for entry, phase in zip(data["phases"], self.phases, strict=True):
            limit, seconds = bound(phase, self.chip)
            entry |= {"peak": phase.peak, "network_bytes": phase.work.network, "bound": limit, "seconds": seconds}
        data |= {"fits": self.fits, "peak": self.peak, "programs": len(self.phases), "seconds": self.seconds}
        data["tokens_per_second"] = self.sizes["generated_tokens"] / self.seconds if self.seconds else 0.0
        return json.dumps(data, indent=2) + "\n"


def plan(config: TrainConfig, topology: Topology, say: Say = lambda line: None) -> Plan:
    """Compiles every stage of the run `config` for `topology`; calls `say` after each.

    Only the shapes of `config.model` and of the reward model are read: names or directories as in `shape_of`. Raises
    InputError for settings that cannot be used.
    """
    config.check()
    model = shape_of(config.model)
    mesh, reward_model = _mesh(config, model, topology), _reward_model(config)
    if reward_model is not None:
        check_model(tuple(mesh.shape.values()), reward_model, "reward model")
    width = widest(config.data) if config.data.source else 0
    game = with_micro_batch_size(
        placeholders.game(config, model), config, reward_model, mesh, topology.chip.memory, width
    )
    compiled, play = compile_run(config, game, reward_model, topology, mesh, say), config.play
    sampled = 0 if config.data.source else play.num_queries * play.max_query_length
    answers = play.num_queries * play.num_generations * play.max_completion_length
    return Plan(
        model=config.model,
        reward_model=config.reward.preference_model if reward_model else "",
        topology=topology.name,
        chip=topology.chip,
        mesh=dict(mesh.shape),
        sizes=dataclasses.asdict(play)
        | {"micro_batch_size": game.learner.micro_batch_size, "generated_tokens": sampled + answers},
        resident=compiled.resident,
        phases=compiled.phases,
        checkpoint=compiled.checkpoint,
        verdict=_verdict(compiled.phases, compiled.resident, topology.chip),
        versions={name: version(name) for name in ("jax", "jaxlib", "flax", topology.compiler)},
    )


def _mesh(config: TrainConfig, model: LlamaConfig, topology: Topology) -> Mesh:
    """The run's mesh; also one for a single device, because only a mesh tells the tracer the target platform."""
    made = make_mesh(config.mesh, model, topology.devices)
    if made is not None:
        return made
    return Mesh(np.reshape(topology.devices, (1, 1, 1)), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _reward_model(config: TrainConfig) -> LlamaConfig | None:
    if not (config.reward.preference_model and config.reward.preference_weight):
        return None
    shape = shape_of(config.reward.preference_model, "reward.preference_model")
    return dataclasses.replace(shape, head="score")


def bound(phase: Phase, chip: Chip) -> tuple[str, float]:
    """Returns which of compute, memory and network bounds the phase at the chip's published rates, and its seconds."""
    work = phase.work
    times = {
        "compute": work.flops / chip.flops,
        "memory": work.bytes / chip.bandwidth,
        "network": work.network / chip.network,
    }
    longest = max(times, key=lambda name: times[name])
    return longest, times[longest]


def _verdict(phases: Sequence[Phase], resident: dict[str, int], chip: Chip) -> str:
    """Whether the run fits, and what to change if it does not."""
    worst = max(phases, key=lambda phase: (bool(phase.failure), phase.peak))
    if worst.failure:
        return f"does not fit: the compiler refuses {worst.name}: {worst.failure}. {_advice(worst, resident)}"
    share = f"{worst.peak / GIB:.2f} of {chip.memory / GIB:.2f} GiB per chip, at most, in {worst.name}"
    if worst.peak <= chip.memory:
        return f"fits: {share}"
    return f"does not fit: {share}. {_advice(worst, resident)}"


def _advice(worst: Phase, resident: dict[str, int]) -> str:
    """Advice on what to change, depending on what takes most memory in the worst stage."""
    always = sum(resident.values())
    own = worst.temporaries + worst.outputs - worst.aliased
    if not worst.failure and always >= own:
        return (
            "Most of it is always resident: use more chips, "
            "--park-frozen, --optimizer.moment-dtype bfloat16 or a smaller reward model"
        )
    if worst.name in ("update", "reference", "old log-probabilities"):
        return "Lower --optimizer.micro-batch-size or --optimizer.logprob-chunk"
    if worst.name == "preference reward":
        return "Lower --reward.preference-rows"
    if worst.name == "quality reward":
        return "Lower --reward.judge-rows"
    if worst.name.split(":")[0] in ("weight_sync", "challenge", "solve"):
        return "Each fsdp group holds all rollout parameters: raise --mesh.tensor, or lower --play.num-queries"
    return "Use more chips"


def table(plan: Plan) -> str:
    """Returns the plan as Markdown."""
    chip, mesh = plan.chip, ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    sizes = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in plan.sizes.items())
    lines = [
        f"{plan.model} on {plan.topology} ({mesh}); reward model {plan.reward_model or 'none'}",
        f"{sizes}",
        f"chip: {chip.flops / 1e12:g} TFLOP/s bfloat16, {chip.memory / GIB:.2f} GiB at {chip.bandwidth / 1e9:g} GB/s, "
        f"network {chip.network / 1e9:g} GB/s",
        "",
        "| stage | arguments | temporaries | outputs | held | peak GiB | TFLOP | GB moved | GB network | bound | s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|---:|",
    ]
    shown = [phase for phase in plan.phases if phase.failure or _counts(phase, plan)]
    for phase in shown:
        limit, seconds = bound(phase, chip)
        sizes = (phase.arguments, phase.temporaries, phase.outputs - phase.aliased, phase.held, phase.peak)
        gib = " | ".join(f"{size / GIB:.2f}" for size in sizes)
        work = phase.work
        moved = " | ".join(f"{value:.3g}" for value in (work.flops / 1e12, work.bytes / 1e9, work.network / 1e9))
        end = "refused" if phase.failure else f"{seconds:.3g}"
        times = "" if phase.times == 1 else f" ({phase.times} times)" if phase.times else " (not in every iteration)"
        lines.append(f"| {phase.name}{times} | {gib} | {moved} | {limit} | {end} |")
    resident = ", ".join(f"{name} {size / GIB:.2f}" for name, size in plan.resident.items())
    if small := len(plan.phases) - len(shown):
        lines.append(f"| {small} small programs | | | | | | | | | | |")
    rate = plan.sizes["generated_tokens"] / plan.seconds if plan.seconds else 0.0
    lines += [
        "",
        f"always resident, GiB per chip: {resident}",
        f"iteration: at least {plan.seconds:.3g} s, at most {rate:.4g} tokens/s; "
        f"checkpoint {plan.checkpoint / GIB:.2f} GiB; {len(plan.phases)} programs, compiled in "
        f"{sum(phase.compile_seconds for phase in plan.phases):.0f} s",
        plan.verdict,
    ]
    return "\n".join(lines)


def _counts(phase: Phase, plan: Plan) -> bool:
    """Whether a program takes at least 1/1000 of an iteration's time or of a chip's memory."""
    own = phase.temporaries + phase.outputs - phase.aliased
    return bound(phase, plan.chip)[1] * phase.times >= plan.seconds / 1000 or own >= plan.chip.memory / 1000


def check_output(path: str | Path) -> None:
    """Raises InputError if `write` could not write to `path`; called before long work."""
    path = user_path("output", path)
    if path.is_dir() or not path.parent.is_dir():
        raise InputError("output", str(path), "must be a file in a directory that exists")


def write(plan: Plan, path: str | Path) -> None:
    """Writes the plan as JSON; raises InputError if the directory is missing."""
    check_output(path)
    Path(path).expanduser().write_text(plan.to_json(), encoding="utf-8")
