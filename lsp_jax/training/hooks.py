"""The record of an iteration on the host, and the calls of the hooks with it.

`monitor/hooks.py` defines the interface; `training/loop.py` defines the order of the hooks.
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
"""Actions after which no later hook is called."""


# --- user callbacks -----------------------------------------------------------------------------------------------


class IterationEvent(NamedTuple):
    """The argument of a callback after each iteration."""

    iteration: int
    """1 for the first."""
    metrics: dict[str, float]
    """Metrics by name, as written to `metrics.jsonl`."""
    transcripts: list[dict[str, Any]]
    """One record per query, as written to `transcripts.jsonl`; with several processes only on process 0."""
    state: TrainState
    """Train state after the update. The next update donates it: copy what you keep."""


Callback = Callable[[IterationEvent], None]


class CallbackHook(NamedTuple):
    """A hook that calls a user's function after each iteration."""

    callback: Callback
    """The user's function."""

    def after_step(self, record: StepRecord) -> Sequence[Event]:
        """Calls the function; returns no events."""
        self.callback(IterationEvent(record.iteration, record.metrics, record.transcripts, record.state))
        return ()


def as_hook(given: Callback | Hook) -> Hook:
    """Returns `given` if it is a hook, else a hook that calls it."""
    return given if isinstance(given, Hook) else CallbackHook(given)


# --- around an iteration ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Surroundings:
    """Collaborators of the host loop, beside the run itself."""

    hooks: tuple[Hook, ...]
    """Hooks in the order of their calls."""
    saving: Saving
    """One of the hooks."""
    health: Health
    """One of the hooks; knows whether the Challenger is paused."""
    stopping: Stopping
    """Checked between phases for a request to end the run."""
    watchdog: Watchdog
    """Gets a beat at the start of each phase."""
    writer: MetricsWriter | None
    """Writer of alarms, on process 0."""
    console: Console | None
    """Display of the current phase, on process 0."""

    def begins(self, phase: str) -> None:
        """Announces the start of a phase to watchdog and console."""
        self.watchdog.beat(phase)
        if self.console is not None:
            self.console.phase(phase)

    def after_step(self, record: StepRecord) -> Sequence[Event]:
        """Calls the hooks in order, and prints and writes their events.

        Stops at the first hook whose events stop the run or roll it back, and returns these; else returns no events.
        """
        for hook in self.hooks:
            self.watchdog.beat("writing")
            events = hook.after_step(record) or ()  # a user's hook may return None
            for event in events:
                console.warn(format_event(event))
            if events and self.writer is not None:
                self.writer.write_alarms(event._asdict() for event in events)
            if not DECISIVE.isdisjoint(event.action for event in events):
                return events
        return ()


def step_record(run: Run, ctx: StepContext, result: StepResult, reads: int, failed: int) -> StepRecord:
    """Reads metrics and transcripts of an iteration from the device and returns its record.

    `reads` is the number of device reads during the iteration, `failed` that of failed saves so far.
    """
    with ctx.timer("log"):
        metrics, lines = numbers_and_lines(run, ctx.iteration, result)
    words = lexical_metrics(lines, run.config.prompts.challenger) if lines else {}  # only process 0 has lines
    metrics |= processes.gather("lexical metrics", words)[0]
    metrics |= host_metrics(run, ctx.iteration, metrics, ctx.timer, time.perf_counter() - ctx.timer.start)
    metrics["host_reads"] = reads
    metrics["challenger/paused"] = float(ctx.challenger_weight == 0)
    metrics["weight_sync/bytes"] = result.rollout_param_bytes
    metrics["checkpoint/failed"] = failed
    cursor = ctx.data_cursor + result.prompts_consumed
    return StepRecord(ctx.iteration, cursor, metrics, lines, result.state, result.learnable.batch)
