"""The host's side of an iteration: its record is made, and the hooks are called with it, in one order.

`monitor/hooks.py` has the interface; the order stands in `training/loop.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lsp_jax.core import console, processes
from lsp_jax.learn.optimizer import TrainState
from lsp_jax.monitor.health import Health, format_event, lexical_metrics
from lsp_jax.monitor.hooks import Event, Hook, StepRecord
from lsp_jax.monitor.shutdown import Stopping
from lsp_jax.monitor.watchdog import Watchdog
from lsp_jax.reporting.progress import Console
from lsp_jax.reporting.writer import MetricsWriter
from lsp_jax.training.checkpointing import Saving
from lsp_jax.training.run import Run
from lsp_jax.training.step import StepContext, StepResult, host_metrics, numbers_and_lines

DECISIVE = frozenset({"stop", "rollback"})
"""Actions after which the iteration is not gone on with."""


# --- a user's own -------------------------------------------------------------------------------------------------


class IterationEvent(NamedTuple):
    """The argument of a callback after each iteration."""

    iteration: int
    """1 for the first."""
    metrics: dict[str, float]
    """By name, as written to `metrics.jsonl`."""
    transcripts: list[dict[str, Any]]
    """One record a query, as written to `transcripts.jsonl`; with several processes only process 0 has them."""
    state: TrainState
    """The state after the update; donated to the next one, so copy what you keep."""


Callback = Callable[[IterationEvent], None]


class CallbackHook(NamedTuple):
    """A function that is called after each iteration, as a hook."""

    callback: Callback
    """The user's function."""

    def after_step(self, record: StepRecord) -> Sequence[Event]:
        """Calls the function; it has no events."""
        self.callback(IterationEvent(record.iteration, record.metrics, record.transcripts, record.state))
        return ()


def as_hook(given: Callback | Hook) -> Hook:
    """A user's hook itself, or the hook that calls a user's function."""
    return given if isinstance(given, Hook) else CallbackHook(given)


# --- around an iteration ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Surroundings:
    """Collaborators of the host loop, beside the run itself."""

    hooks: tuple[Hook, ...]
    """In the order in which they are called."""
    saving: Saving
    """One of the hooks."""
    health: Health
    """One of the hooks; says whether the Challenger is paused."""
    stopping: Stopping
    """Asked between phases whether the run is to end."""
    watchdog: Watchdog
    """Told of each phase that begins."""
    writer: MetricsWriter | None
    """Of process 0; alarms are written there."""
    console: Console | None
    """Of process 0; shows the phase."""

    def begins(self, phase: str) -> None:
        """Tells who wants to know that a phase begins."""
        self.watchdog.beat(phase)
        if self.console is not None:
            self.console.phase(phase)

    def after_step(self, record: StepRecord) -> Sequence[Event]:
        """Calls the hooks in their order, and says and writes their events.

        Returns the events of the first hook that ends the run or sends it back: no later one is called. Empty where
        all were.
        """
        for hook in self.hooks:
            self.watchdog.beat("writing")
            events = hook.after_step(record) or ()  # a user's may return nothing
            for event in events:
                console.warn(format_event(event))
            if events and self.writer is not None:
                self.writer.write_alarms(event._asdict() for event in events)
            if not DECISIVE.isdisjoint(event.action for event in events):
                return events
        return ()


def step_record(run: Run, ctx: StepContext, result: StepResult, reads: int, failed: int) -> StepRecord:
    """The iteration with its metrics and transcripts on the host; reads the device.

    `reads` from the device were made while it was played, and `failed` saves could not be written so far.
    """
    with ctx.timer("log"):
        metrics, lines = numbers_and_lines(run, ctx.iteration, result)
    words = lexical_metrics(lines, run.config.prompts.challenger) if lines else {}  # only process 0 has lines
    metrics |= processes.gather("wording", words)[0]
    metrics |= host_metrics(run, ctx.iteration, metrics, ctx.timer, time.perf_counter() - ctx.timer.start)
    metrics["host_reads"] = reads
    metrics["challenger/paused"] = float(ctx.challenger_weight == 0)
    metrics["weight_sync/bytes"] = result.rollout_param_bytes
    metrics["checkpoint/failed"] = failed
    cursor = ctx.data_cursor + result.prompts_consumed
    return StepRecord(ctx.iteration, cursor, metrics, lines, result.state, result.learnable.batch)
