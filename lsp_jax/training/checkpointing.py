"""When a run saves, what goes with the state, which checkpoints stay, and what happens when it cannot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import jax
import numpy as np

from lsp_jax.checkpoint.checksums import manifest
from lsp_jax.checkpoint.host_state import BestCheckpoint, HostState
from lsp_jax.checkpoint.manager import Checkpoints, Damaged, SaveError
from lsp_jax.checkpoint.model_card import model_card
from lsp_jax.checkpoint.run_dir import ALARMS_FILE, EXPORT
from lsp_jax.config import TrainConfig
from lsp_jax.core import console, processes, runtime
from lsp_jax.core.errors import Collapsed, InputError, RunError
from lsp_jax.learn.optimizer import TrainState
from lsp_jax.model.lora import merged
from lsp_jax.monitor.health import Health, format_event
from lsp_jax.monitor.hooks import Event, StepRecord
from lsp_jax.monitor.numerics import Alarms
from lsp_jax.policy import save_pretrained
from lsp_jax.reporting.writer import MetricsWriter
from lsp_jax.training.run import Run


class Saving:
    """Saves of one run: the state, what the host keeps beside it, and the bytes that the run's files have."""

    def __init__(
        self,
        config: TrainConfig,
        checkpoints: Checkpoints,
        writer: MetricsWriter | None,
        alarms: Alarms,
        health: Health,
        start: HostState,
    ):
        """`alarms` and `health` are saved as they are then; `start` is what the run goes on from, with the provenance
        that each of its checkpoints has."""
        self._config, self._checkpoints, self._writer = config, checkpoints, writer
        self._alarms, self._health, self._provenance = alarms, health, start.provenance
        self.failed: int = 0
        """Saves that could not be written."""
        self.restore_from(start)

    def restore_from(self, host: HostState) -> None:
        """From the checkpoint whose host part is `host`, the newest one there is."""
        self.newest: int = host.iteration
        """Iteration of the newest checkpoint, 0 without one."""
        self.best: BestCheckpoint | None = self._still_best(host.best)
        """The checkpoint that is best by `metric_for_best_model`; None without one."""
        self._best_before = self.best
        there = self._there()
        self._good: list[int] = [step for step in host.good if step in there]
        self._to_go_back_to: set[int] = set()
        self._pin()
        self._tried: tuple[HostState, Mapping[str, float]] = host, {}

    def _pin(self) -> None:
        """Tells which checkpoints stay whatever their age."""
        self._checkpoints.pin(self._to_go_back_to | ({self.best.iteration} if self.best else set()))

    def _still_best(self, best: BestCheckpoint | None) -> BestCheckpoint | None:
        """A checkpoint's `best` where it is by the same metric, and its checkpoint still there."""
        chosen = self._config.metric_for_best_model, self._config.greater_is_better
        return best if best and (best.metric, best.greater) == chosen and best.iteration in self._there() else None

    def _there(self) -> list[int]:
        """Checkpoints on disk, as process 0 sees them."""
        return processes.gather("checkpoints", self._checkpoints.steps())[0]

    def after_step(self, record: StepRecord) -> Sequence[Event]:
        """Saves each `save_steps` iterations, and the last one."""
        if record.iteration % self._config.save_steps == 0 or record.iteration == self._config.max_steps:
            self.save(record)
        return ()

    def save(self, record: StepRecord) -> None:
        """The state as of that iteration."""
        host = HostState(record.iteration, record.cursor, self._alarms.skipped, health=self._health.state)
        self._save(record.state, host, record.metrics)

    def _save(self, state: TrainState, host: HostState, metrics: Mapping[str, float]) -> None:
        self.wait()  # an earlier one's failure is its own
        number = host.iteration
        self._choose(number, metrics)
        self._keep_good(number, host.health.good)
        processes.barrier("saving")  # named and bounded, which Orbax's own waiting is not
        arrays, offsets = manifest(state), {}
        if self._writer is not None:
            self._writer.write_checksums(number, self.newest, arrays)
            offsets = self._writer.offsets()
        before, self.newest, self._tried = self.newest, number, (host, metrics)
        host = replace(host, best=self.best, good=tuple(self._good), offsets=offsets, provenance=self._provenance)
        try:
            self._checkpoints.save(state, host, arrays)
        except SaveError as error:
            self.newest = before
            self._failure(error)

    def check(self) -> None:
        """Whether what is written in the background has failed; once an iteration."""
        try:
            self._checkpoints.check()
        except SaveError as error:
            self._failure(error)

    def wait(self) -> None:
        """Until all is on disk."""
        try:
            self._checkpoints.wait()
        except SaveError as error:
            self._failure(error)

    def finish(self, state: TrainState) -> None:
        """Until the last iteration, of which `state` is, is on disk: tried once more where it could not be written."""
        self.wait()
        if self.newest < self._config.max_steps:
            self._save(state, *self._tried)
            self.wait()

    def save_before_exit(self, record: StepRecord | None) -> str:
        """The iteration of `record` on disk, unless it is; says what is there then. None: nothing was played since the
        start or since a return to a checkpoint."""
        self.wait()  # for what is under way: it may fail
        if record is not None and self.newest < record.iteration:
            self.save(record)
            self.wait()
        return f"iteration {self.newest} is saved" if self.newest else "nothing was there to save"

    def _choose(self, number: int, metrics: Mapping[str, float]) -> None:
        """Whether this checkpoint is the best so far: then it stays, however many newer ones come."""
        self._best_before = self.best
        name, sign = self._config.metric_for_best_model, 1 if self._config.greater_is_better else -1
        if not name or name not in metrics:  # the probe's are not of every iteration
            return
        value = float(metrics[name])
        if math.isfinite(value) and (not self.best or sign * value > sign * self.best.value):
            self.best = BestCheckpoint(number, value, name, self._config.greater_is_better)

    def _keep_good(self, number: int, good: bool) -> None:
        """Which checkpoints a run goes back to: two are kept where an alarm may ask for one, that to go back to now and
        the next. Those between two `save_steps` do not count: an uninterrupted run has none."""
        if not self._config.health.rolls_back:
            self._good, self._to_go_back_to = [], set()
            self._pin()
            return
        if good and number % self._config.save_steps == 0:
            self._good.append(number)
        since = number - self._config.health.window
        past, ahead = ([step for step in self._good if (step <= since) == old] for old in (True, False))
        self._to_go_back_to = {*past[-1:], *ahead[:1]}
        self._pin()
        stay = self._checkpoints.preserved(sorted({*self._there(), number}))
        self._good = [step for step in self._good if step in stay]

    def good_before(self, number: int) -> int | None:
        """The newest checkpoint that was good and is no part of the window that ends with iteration `number`, in which
        the collapse may have begun; else the oldest good one."""
        past = [step for step in self._good if step <= number - self._config.health.window]
        return max(past) if past else min((step for step in self._good if step < number), default=None)

    def _failure(self, error: SaveError) -> None:
        self.failed += 1
        with suppress(OSError):
            self.newest = max(self._checkpoints.steps(), default=0)
        self.newest = processes.gather("newest checkpoint", self.newest)[0]  # file systems may show them differently
        self._good = [step for step in self._good if step <= self.newest]
        if self.best is not None and self.best.iteration > self.newest:
            self.best = self._best_before
            self._pin()
        kept = f"the newest one is {self.newest}" if self.newest else "there is none yet"
        if self._config.save_errors != "go_on":
            raise SaveError(f"{error}; {kept} (--save-errors go_on trains on without)") from error
        console.warn(f"{error}; {kept}, going on")

    # --- back to a good checkpoint -----------------------------------------------------------------------------------

    def rollback_target(self, events: Sequence[Event], record: StepRecord) -> int:
        """The checkpoint to go back to after `events`, one of which ends the run or sends it back. Where it ends it is
        saved as of `record`, and Collapsed raised."""
        acts = {event.action: event for event in reversed(events)}
        try:
            if "stop" in acts:
                raise Collapsed(format_event(acts["stop"]))
            self.wait()
            return self._good_target(acts["rollback"])
        except Collapsed as ended:
            raise Collapsed(f"{ended}; {self.save_before_exit(record)}") from ended

    def _good_target(self, event: Event) -> int:
        """Raises Collapsed where there is no good checkpoint, or the run has gone back often enough already."""
        rollbacks = self._health.state.rollbacks
        if rollbacks >= self._config.health.max_rollbacks:
            raise Collapsed(f"{event.said}, though the run has gone back {rollbacks} times (health.max_rollbacks)")
        target = self.good_before(event.iteration)
        if target is None:
            raise Collapsed(f"{event.said}, and there is no good checkpoint to go back to (save_steps)")
        return target

    def roll_back(self, target: int, state: TrainState, events: Sequence[Event]) -> tuple[TrainState, HostState]:
        """The state of checkpoint `target`, with another attempt, and its host part, from which files and monitors go
        on too; `state` is consumed. No save may be under way. All processes together."""
        attempt = int(runtime.to_host(state.attempt))
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        for leaf in jax.tree.leaves(state):
            leaf.delete()  # there is room for one state
        try:
            state, host = self._checkpoints.restore(target, wanted)
            self._checkpoints.remove_after(target)
        except (Damaged, OSError) as error:
            raise RunError(f"a collapsed run cannot go back to checkpoint {target}: {error}") from error
        if self._writer is not None:
            earlier = self._writer.rollback_records(host.offsets[ALARMS_FILE])
            self._writer.truncate_to(host.offsets)
            now = [{**event._asdict(), "back_to": target, "attempt": attempt + 1} for event in events]
            self._writer.write_alarms([*earlier, *now])
        raised = np.asarray(attempt + 1, np.int32)
        raised = jax.make_array_from_callback((), state.attempt.sharding, lambda index: raised[index])
        self.restore_from(host)
        self._alarms.skipped = host.skipped
        self._health.state = replace(host.health, rollbacks=self._health.state.rollbacks + 1)
        return state._replace(attempt=raised), host


class MetricCheck:
    """Refuses, after the first iteration, a `metric_for_best_model` that there is not: then all names are known."""

    def __init__(self, config: TrainConfig):
        self._config, self._checked = config, False

    def after_step(self, record: StepRecord) -> Sequence[Event]:
        """Raises InputError when there is no metric of the name by which the best checkpoint is chosen."""
        name = self._config.metric_for_best_model
        probed = name.startswith("probe/") and self._config.health.probe
        if name and name not in record.metrics and not probed and not self._checked:
            remedy = f"no such metric; there are {', '.join(sorted(record.metrics))}"
            raise InputError("metric_for_best_model", name, remedy)
        self._checked = True
        return ()


def export_policy(run: Run, state: TrainState) -> None:
    """Writes the trained policy, adapters merged, as a Hugging Face directory into the run's folder."""
    lora = run.game.learner.lora
    params = merged(run.reference, state.params, lora) if lora.rank else state.params
    card = model_card(run.directory, run.config.max_steps) if processes.is_writer() else ""
    save_pretrained(replace(run.policy, params=params), run.directory / EXPORT, card=card)
