"""The record of an iteration, and `Hook`, the interface of everything that receives it.

Files and trackers, monitors, the probe, checkpoints, console, report and user callbacks are hooks. The host loop calls
them in a fixed order (`training/hooks.py`); their events are printed and written, and may stop the run or roll it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from lsp_jax.learn.batch import LearnBatch
from lsp_jax.learn.optimizer import TrainState


class Event(NamedTuple):
    """Start or end of an alarm."""

    iteration: int
    """1 for the first."""
    alarm: str
    """Name of the alarm: a field of `HealthConfig`."""
    action: str
    """The alarm's action, or `over`. `stop` saves and ends the run, `rollback` restores a good checkpoint."""
    said: str
    """Message of one line."""


@dataclass(frozen=True)
class StepRecord:
    """One iteration after its update, as hooks receive it."""

    iteration: int
    """1 for the first."""
    cursor: int
    """Prompts of the data set consumed so far, including this iteration's; also counted in self-play."""
    metrics: dict[str, float]
    """Metrics on the host by name (`reporting/metrics.py`). Hooks before the writer may add some, as the probe does."""
    transcripts: list[dict[str, Any]]
    """One record per query, as in `transcripts.jsonl`; with several processes only on process 0."""
    state: TrainState
    """Train state after the update. The next update donates it: copy what you keep."""
    batch: LearnBatch
    """The rows of the update on device."""


@runtime_checkable
class Hook(Protocol):
    """An object that is called after each iteration."""

    def after_step(self, record: StepRecord) -> Sequence[Event]:
        """Processes the iteration; returns alarms that start or end, usually none. With several processes all call it
        and must return the same events."""
        ...
