"""The record of an iteration, and the one interface of all that reads it.

Files and trackers, monitors, the probe, checkpoints, console, report and a user's callbacks are hooks. The host loop
calls them in a fixed order (`training/hooks.py`); their events are said, written, and may end the run or send it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from lsp_jax.learn.batch import LearnBatch
from lsp_jax.learn.optimizer import TrainState


class Event(NamedTuple):
    """An alarm that begins or is over."""

    iteration: int
    """1 for the first."""
    alarm: str
    """Its field of `HealthConfig`."""
    action: str
    """The alarm's action, or `over`. `stop` saves and ends the run, `rollback` sends it back to a good checkpoint."""
    said: str
    """One line for the terminal."""


@dataclass(frozen=True)
class StepRecord:
    """One iteration, as hooks see it after its update."""

    iteration: int
    """1 for the first."""
    cursor: int
    """Prompts of the data set taken so far, this iteration's included; it grows in self-play too."""
    metrics: dict[str, float]
    """By name (`reporting/metrics.py`), on the host. A hook before the writer may add to it, as the probe does."""
    transcripts: list[dict[str, Any]]
    """One record a query, as in `transcripts.jsonl`; with several processes only process 0 has them."""
    state: TrainState
    """The state after the update; donated to the next one, so copy what you keep."""
    batch: LearnBatch
    """The rows of the update, on device."""


@runtime_checkable
class Hook(Protocol):
    """Anything that is called after each iteration."""

    def after_step(self, record: StepRecord) -> Sequence[Event]:
        """Looks at the iteration; alarms that begin or are over, most often none. With several processes all call it,
        and all must return the same."""
        ...
