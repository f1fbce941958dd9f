"""The host state in a checkpoint, beside the train state: progress and provenance of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from lsp_jax.monitor.health import HealthState


class BestCheckpoint(NamedTuple):
    """The best checkpoint so far by `metric_for_best_model`."""

    iteration: int
    """Iteration of the checkpoint."""
    value: float
    """Finite value of the metric."""
    metric: str
    """Name of the metric."""
    greater: bool
    """Whether greater values are better."""


@dataclass(frozen=True)
class HostState:
    """The host state in a checkpoint; the default is that of a new run."""

    iteration: int = 0
    """Number of completed iterations."""
    cursor: int = 0
    """Number of prompts consumed from the data set: the position of the next iteration's queries."""
    skipped: int = 0
    """Number of consecutive skipped updates up to this iteration."""
    best: BestCheckpoint | None = None
    """The best checkpoint so far, possibly this one; None without a metric, or before its first value."""
    health: HealthState = field(default_factory=HealthState)
    """State of the self-play alarms."""
    good: tuple[int, ...] = ()
    """Iterations of the checkpoints that a collapsed run may be rolled back to, oldest first."""
    offsets: Mapping[str, int] = field(default_factory=dict)
    """Size in bytes of each JSONL file of the run as of this iteration, by file name."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Provenance of the run (`provenance.identity`): `config`, `config_digest`, `versions`, `numerics`, `prompts`,
    `reference`, `reward_model`."""

    def to_record(self) -> dict[str, Any]:
        """Returns the JSON object that a checkpoint stores, beside `arrays` and `digest`."""
        best = self.best._asdict() if self.best is not None else {}
        record = {"iteration": self.iteration, "cursor": self.cursor, "skipped": self.skipped, "best": best}
        record |= {"health": self.health.to_record(), "good": list(self.good), "offsets": dict(self.offsets)}
        return {**record, **self.provenance}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Parses the output of `to_record`; records of earlier versions lack `skipped`, `best`, `health` or `good`."""
        best = record.get("best", {})
        known = ("iteration", "cursor", "skipped", "best", "health", "good", "offsets", "arrays", "digest")
        return cls(
            iteration=record["iteration"],
            cursor=record["cursor"],
            skipped=record.get("skipped", 0),
            best=BestCheckpoint(**best) if "metric" in best else None,
            health=HealthState.from_record(record.get("health", {})),
            good=tuple(record.get("good", ())),
            offsets=record["offsets"],
            provenance={name: value for name, value in record.items() if name not in known},
        )
