"""When a run saves, what goes with the state, which checkpoints stay, and what happens when it cannot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import jax
import numpy as np

from lsp_jax.checkpoint.checksums import manifest
from lsp_jax.checkpoint.manager import Checkpoints, Damaged, SaveError
from lsp_jax.checkpoint.run_dir import ALARMS_FILE
from lsp_jax.config import TrainConfig
from lsp_jax.core import console, processes, runtime
from lsp_jax.core.errors import Collapsed, InputError, RunError
from lsp_jax.learn.optimizer import TrainState
from lsp_jax.monitor.health import Event
from lsp_jax.reporting.writer import MetricsWriter


class Progress(NamedTuple):
    """Host state that the next iteration needs; saved with the train state."""

    cursor: int = 0
    """Where the next iteration's queries begin in the data set."""
    skipped: int = 0
    """Iterations in a row, up to this one, whose updates were skipped."""
    metrics: Mapping[str, float] = {}
    """The iteration's; what a best checkpoint is chosen by is saved of them."""
    health: Mapping[str, Any] = {}
    """`Health.record`."""
    good: bool = True
    """`Health.good`."""

    @classmethod
    def of(cls, record: dict[str, Any] | None) -> Progress:
        """The progress in a checkpoint's host part; the beginning without one."""
        if record is None:
            return cls()
        return cls(record["cursor"], record.get("skipped", 0), {}, record.get("health", {}))


class Saving:
    """Saves of one run: the state with the bytes its files have, the progress, and the run's identity."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        writer: MetricsWriter | None,
        identity: dict[str, Any],
        config: TrainConfig,
        saved: dict[str, Any] | None,
    ):
        """`saved` is the host part of the checkpoint that the run goes on from."""
        self._checkpoints, self._writer, self._identity, self._config = checkpoints, writer, identity, config
        self.failed: int = 0
        """Saves that could not be written."""
        self.restore_from(saved)

    def restore_from(self, saved: dict[str, Any] | None) -> None:
        """From the checkpoint whose host part is `saved`, the newest one there is."""
        self.newest: int = saved["iteration"] if saved else 0
        """Iteration of the newest checkpoint, 0 without one."""
        self.best: dict[str, Any] = self._still_best((saved or {}).get("best", {}))
        """Iteration and value of the checkpoint that is best by `metric_for_best_model`; empty without one."""
        self._checkpoints.best = self.best.get("iteration")
        self._best_before = self.best
        there = self._there()
        self._good: list[int] = [step for step in (saved or {}).get("good", []) if step in there]
        self._tried = Progress()

    def _still_best(self, best: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint's `best` where it is by the same metric, and its checkpoint still there."""
        chosen = {"metric": self._config.metric_for_best_model, "greater": self._config.greater_is_better}
        return best if best and {**best, **chosen} == best and best["iteration"] in self._there() else {}

    def _there(self) -> list[int]:
        """Checkpoints on disk, as process 0 sees them."""
        return processes.gather("checkpoints", self._checkpoints.steps())[0]

    def save(self, number: int, state: TrainState, progress: Progress) -> None:
        """The state as of iteration `number`."""
        self.wait()  # an earlier one's failure is its own
        self._choose(number, progress.metrics)
        self._keep_good(number, progress.good)
        processes.barrier("saving")  # named and bounded, which Orbax's own waiting is not
        arrays, offsets = manifest(state), {}
        if self._writer is not None:
            self._writer.write_checksums(number, self.newest, arrays)
            offsets = self._writer.offsets()
        host = {"iteration": number, "cursor": progress.cursor, "skipped": progress.skipped, "best": self.best}
        host |= {"health": progress.health, "good": self._good, "offsets": offsets, **self._identity}
        before, self.newest, self._tried = self.newest, number, progress
        try:
            self._checkpoints.save(number, state, host, arrays)
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

    def finish(self, number: int, state: TrainState) -> None:
        """Until iteration `number`, the last one, is on disk: tried once more where it could not be written."""
        self.wait()
        if self.newest < number:
            self.save(number, state, self._tried)
            self.wait()

    def save_before_exit(self, number: int, state: TrainState, progress: Progress) -> str:
        """Iteration `number` on disk, unless it is; says what is there then."""
        self.wait()  # for what is under way: it may fail
        if self.newest < number:
            self.save(number, state, progress)
            self.wait()
        return f"iteration {self.newest} is saved" if self.newest else "nothing was there to save"

    def check_metric(self, metrics: Mapping[str, float]) -> None:
        """Raises InputError when there is no metric of the name by which the best checkpoint is chosen."""
        name = self._config.metric_for_best_model
        probed = name.startswith("probe/") and self._config.health.probe
        if name and name not in metrics and not probed:
            remedy = f"no such metric; there are {', '.join(sorted(metrics))}"
            raise InputError("metric_for_best_model", name, remedy)

    def _choose(self, number: int, metrics: Mapping[str, float]) -> None:
        """Whether this checkpoint is the best so far: then it stays, however many newer ones come."""
        self._best_before = self.best
        name, sign = self._config.metric_for_best_model, 1 if self._config.greater_is_better else -1
        if not name or name not in metrics:  # the probe's are not of every iteration
            return
        value = float(metrics[name])
        if math.isfinite(value) and (not self.best or sign * value > sign * self.best["value"]):
            chosen = {"metric": name, "greater": self._config.greater_is_better}
            self.best = {"iteration": number, "value": value, **chosen}
            self._checkpoints.best = number

    def _keep_good(self, number: int, good: bool) -> None:
        """Which checkpoints a run goes back to: two are kept where an alarm may ask for one, that to go back to now and
        the next. Those between two `save_steps` do not count: an uninterrupted run has none."""
        if not self._config.health.rolls_back:
            self._good, self._checkpoints.good = [], set()
            return
        if good and number % self._config.save_steps == 0:
            self._good.append(number)
        since = number - self._config.health.window
        past, ahead = ([step for step in self._good if (step <= since) == old] for old in (True, False))
        self._checkpoints.good = {*past[-1:], *ahead[:1]}
        steps = sorted({*self._there(), number})
        stay = {step for step, stays in zip(steps, self._checkpoints.preserved(steps), strict=True) if stays}
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
        if self.best.get("iteration", 0) > self.newest:
            self.best = self._best_before
            self._checkpoints.best = self.best.get("iteration")
        kept = f"the newest one is {self.newest}" if self.newest else "there is none yet"
        if self._config.save_errors != "go_on":
            raise SaveError(f"{error}; {kept} (--save-errors go_on trains on without)") from error
        console.warn(f"{error}; {kept}, going on")


def check_rollback(event: Event, saving: Saving, rollbacks: int, most: int) -> int:
    """The checkpoint to go back to; raises Collapsed where there is none, or it was done `most` times already."""
    if rollbacks >= most:
        raise Collapsed(f"{event.said}, though the run has gone back {rollbacks} times (health.max_rollbacks)")
    target = saving.good_before(event.iteration)
    if target is None:
        raise Collapsed(f"{event.said}, and there is no good checkpoint to go back to (save_steps)")
    return target


def roll_back(
    target: int, state: TrainState, checkpoints: Checkpoints, writer: MetricsWriter | None, events: Sequence[Event]
) -> tuple[TrainState, dict[str, Any]]:
    """The state of checkpoint `target`, with another attempt, and its host part; `state` is consumed. No save may be
    under way. All processes together."""
    attempt = int(runtime.to_host(state.attempt))
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    for leaf in jax.tree.leaves(state):
        leaf.delete()  # there is room for one state
    try:
        state, saved = checkpoints.restore(target, wanted)
        checkpoints.remove_after(target)
    except (Damaged, OSError) as error:
        raise RunError(f"a collapsed run cannot go back to checkpoint {target}: {error}") from error
    if writer is not None:
        earlier = writer.rollback_records(saved["offsets"][ALARMS_FILE])
        writer.truncate_to(saved["offsets"])
        now = [{**event._asdict(), "back_to": target, "attempt": attempt + 1} for event in events]
        writer.write_alarms([*earlier, *now])
    raised = np.asarray(attempt + 1, np.int32)
    raised = jax.make_array_from_callback((), state.attempt.sharding, lambda index: raised[index])
    return state._replace(attempt=raised), saved
