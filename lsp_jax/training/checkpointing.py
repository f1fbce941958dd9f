"""Saving and rollback: when a run saves, which checkpoints it keeps, and what follows a failed save."""

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
    """Saves a run: the train state, the host state, and the sizes of the run's files."""

    def __init__(
        self,
        config: TrainConfig,
        checkpoints: Checkpoints,
        writer: MetricsWriter | None,
        alarms: Alarms,
        health: Health,
        start: HostState,
    ):
        """The states of `alarms` and `health` are saved too; the run continues from the host state `start`, and its
        provenance is that of all checkpoints."""
        self._config, self._checkpoints, self._writer = config, checkpoints, writer
        self._alarms, self._health, self._provenance = alarms, health, start.provenance
        self.failed: int = 0
        """Number of failed saves."""
        self.restore_from(start)

    def restore_from(self, host: HostState) -> None:
        """Continues from the newest checkpoint, whose host state is `host`."""
        self.newest: int = host.iteration
        """Iteration of the newest checkpoint, 0 without one."""
        self.best: BestCheckpoint | None = self._still_best(host.best)
        """The best checkpoint by `metric_for_best_model`; None without one."""
        self._best_before = self.best
        there = self._there()
        self._good: list[int] = [step for step in host.good if step in there]
        self._to_go_back_to: set[int] = set()
        self._pin()
        self._tried: tuple[HostState, Mapping[str, float]] = host, {}

    def _pin(self) -> None:
        """Exempts the best checkpoint and the rollback targets from deletion."""
        self._checkpoints.pin(self._to_go_back_to | ({self.best.iteration} if self.best else set()))

    def _still_best(self, best: BestCheckpoint | None) -> BestCheckpoint | None:
        """`best` if it was chosen by the configured metric and its checkpoint still exists, else None."""
        chosen = self._config.metric_for_best_model, self._config.greater_is_better
        return best if best and (best.metric, best.greater) == chosen and best.iteration in self._there() else None

    def _there(self) -> list[int]:
        """Checkpoints on disk, according to process 0."""
        return processes.gather("checkpoints", self._checkpoints.steps())[0]

    def after_step(self, record: StepRecord) -> Sequence[Event]:
        """Saves every `save_steps` iterations, and after the last one."""
        if record.iteration % self._config.save_steps == 0 or record.iteration == self._config.max_steps:
            self.save(record)
        return ()

    def save(self, record: StepRecord) -> None:
        """Saves the state after that iteration."""
        host = HostState(record.iteration, record.cursor, self._alarms.skipped, health=self._health.state)
        self._save(record.state, host, record.metrics)

    def _save(self, state: TrainState, host: HostState, metrics: Mapping[str, float]) -> None:
        self.wait()  # so that an earlier save's failure is not blamed on this one
        number = host.iteration
        self._choose(number, metrics)
        self._keep_good(number, host.health.good)
        processes.barrier("saving")  # has a name and a time limit, unlike Orbax's own barrier
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
        """Handles a failure of the background save; called once per iteration."""
        try:
            self._checkpoints.check()
        except SaveError as error:
            self._failure(error)

    def wait(self) -> None:
        """Waits until the background save is on disk."""
        try:
            self._checkpoints.wait()
        except SaveError as error:
            self._failure(error)

    def finish(self, state: TrainState) -> None:
        """Waits until `state`, that of the last iteration, is on disk; retries a failed save once."""
        self.wait()
        if self.newest < self._config.max_steps:
            self._save(state, *self._tried)
            self.wait()

    def save_before_exit(self, record: StepRecord | None) -> str:
        """Saves the iteration of `record` if needed; returns a message naming the newest checkpoint.

        `record` is None if there was no iteration since the start or since a rollback.
        """
        self.wait()  # the save in progress may fail
        if record is not None and self.newest < record.iteration:
            self.save(record)
            self.wait()
        return f"iteration {self.newest} is saved" if self.newest else "there was nothing to save"

    def _choose(self, number: int, metrics: Mapping[str, float]) -> None:
        """Updates `best`, the checkpoint that is kept however many newer ones follow."""
        self._best_before = self.best
        name, sign = self._config.metric_for_best_model, 1 if self._config.greater_is_better else -1
        if not name or name not in metrics:  # the probe's metrics are not computed in every iteration
            return
        value = float(metrics[name])
        if math.isfinite(value) and (not self.best or sign * value > sign * self.best.value):
            self.best = BestCheckpoint(number, value, name, self._config.greater_is_better)

    def _keep_good(self, number: int, good: bool) -> None:
        """Updates the rollback targets: if an alarm can roll back, the current and the next one are kept.

        Checkpoints between two multiples of `save_steps` do not count, because an uninterrupted run has none.
        """
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
        """Returns the newest good checkpoint before the window that ends with iteration `number`, else the oldest.

        The collapse may have started within that window.
        """
        past = [step for step in self._good if step <= number - self._config.health.window]
        return max(past) if past else min((step for step in self._good if step < number), default=None)

    def _failure(self, error: SaveError) -> None:
        self.failed += 1
        with suppress(OSError):
            self.newest = max(self._checkpoints.steps(), default=0)
        self.newest = processes.gather("newest checkpoint", self.newest)[0]  # processes may see different files
        self._good = [step for step in self._good if step <= self.newest]
        if self.best is not None and self.best.iteration > self.newest:
            self.best = self._best_before
            self._pin()
        kept = f"the newest one is {self.newest}" if self.newest else "there is none yet"
        if self._config.save_errors != "go_on":
            raise SaveError(f"{error}; {kept} (--save-errors go_on continues without it)") from error
        console.warn(f"{error}; {kept}; continuing")

    # --- rollback ----------------------------------------------------------------------------------------------------

    def rollback_target(self, events: Sequence[Event], record: StepRecord) -> int:
        """Returns the checkpoint to restore after `events`, of which one stops the run or rolls it back.

        If the run ends, saves the iteration of `record` and raises Collapsed.
        """
        acts = {event.action: event for event in reversed(events)}
        try:
            if "stop" in acts:
                raise Collapsed(format_event(acts["stop"]))
            self.wait()
            return self._good_target(acts["rollback"])
        except Collapsed as ended:
            raise Collapsed(f"{ended}; {self.save_before_exit(record)}") from ended

    def _good_target(self, event: Event) -> int:
        """Raises Collapsed if there is no good checkpoint, or after too many rollbacks."""
        rollbacks = self._health.state.rollbacks
        if rollbacks >= self._config.health.max_rollbacks:
            raise Collapsed(f"{event.said}, after {rollbacks} rollbacks (health.max_rollbacks)")
        target = self.good_before(event.iteration)
        if target is None:
            raise Collapsed(f"{event.said}, and there is no good checkpoint to roll back to (save_steps)")
        return target

    def roll_back(self, target: int, state: TrainState, events: Sequence[Event]) -> tuple[TrainState, HostState]:
        """Restores checkpoint `target`, files and monitors included; returns its state and host state.

        The attempt is incremented and `state` deleted. No save may be in progress. All processes together.
        """
        attempt = int(runtime.to_host(state.attempt))
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        for leaf in jax.tree.leaves(state):
            leaf.delete()  # memory has room for one state
        try:
            state, host = self._checkpoints.restore(target, wanted)
            self._checkpoints.remove_after(target)
        except (Damaged, OSError) as error:
            raise RunError(f"a collapsed run cannot roll back to checkpoint {target}: {error}") from error
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
    """Checks `metric_for_best_model` after the first iteration, when all metric names are known."""

    def __init__(self, config: TrainConfig):
        self._config, self._checked = config, False

    def after_step(self, record: StepRecord) -> Sequence[Event]:
        """Raises InputError if no metric has the name `metric_for_best_model`."""
        name = self._config.metric_for_best_model
        probed = name.startswith("probe/") and self._config.health.probe
        if name and name not in record.metrics and not probed and not self._checked:
            remedy = f"no such metric; there are {', '.join(sorted(record.metrics))}"
            raise InputError("metric_for_best_model", name, remedy)
        self._checked = True
        return ()


def export_policy(run: Run, state: TrainState) -> None:
    """Writes the trained policy, adapters merged, to the run's folder as a Hugging Face directory."""
    lora = run.game.learner.lora
    params = merged(run.reference, state.params, lora) if lora.rank else state.params
    card = model_card(run.directory, run.config.max_steps) if processes.is_writer() else ""
    save_pretrained(replace(run.policy, params=params), run.directory / EXPORT, card=card)
