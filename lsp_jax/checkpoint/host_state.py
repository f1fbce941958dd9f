"""The host's part of a checkpoint, beside the train state: progress of the run, and its provenance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from lsp_jax.monitor.health import HealthState


class BestCheckpoint(NamedTuple):
    """The best checkpoint so far by `metric_for_best_model`."""

    iteration: int
    """Its own."""
    value: float
    """Of the metric, finite."""
    metric: str
    """The name of the metric that it is the best by."""
    greater: bool
    """Whether greater values are better."""


@dataclass(frozen=True)
class HostState:
    """The host's part of a checkpoint; without arguments that of a run which has not begun."""

    iteration: int = 0
    """Iterations that are done."""
    cursor: int = 0
    """Prompts of the data set taken so far: where the next iteration's queries begin."""
    skipped: int = 0
    """Iterations in a row, up to this one, whose updates were skipped."""
    best: BestCheckpoint | None = None
    """The best checkpoint, this one included; None without a metric, or before it had a value."""
    health: HealthState = field(default_factory=HealthState)
    """What the alarms of self-play go on from."""
    good: tuple[int, ...] = ()
    """Iterations of the checkpoints that a collapsed run may go back to, the oldest first."""
    offsets: Mapping[str, int] = field(default_factory=dict)
    """Bytes of each JSONL file of the run that belong to these iterations, by the file's name."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What the run is made of (`provenance.identity`): `config`, `config_digest`, `versions`, `numerics`,
    `prompts`, `reference`, `reward_model`."""

    def to_record(self) -> dict[str, Any]:
        """JSON's types, as they lie in a checkpoint beside `arrays` and `digest`."""
        best = self.best._asdict() if self.best is not None else {}
        record = {"iteration": self.iteration, "cursor": self.cursor, "skipped": self.skipped, "best": best}
        record |= {"health": self.health.to_record(), "good": list(self.good), "offsets": dict(self.offsets)}
        return {**record, **self.provenance}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """The host's part of a checkpoint's record. Those of earlier versions have no `skipped`, `best`, `health` or
        `good`."""
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
