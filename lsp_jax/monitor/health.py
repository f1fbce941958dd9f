"""Monitors of self-play collapse: rules on metrics, alarms, and actions.

An alarm evaluates the mean of a metric over the last `health.window` iterations, most of them relative to the first
window, because some runs start with long answers, for example. Each alarm has an action:

1. warn: a message when the alarm starts.
2. pause: the Challenger does not learn until the alarm clears; the Solver continues.
3. rollback: the run restores its last good checkpoint and continues with different random numbers
   (`training/checkpointing.py`).
4. stop: the run saves and exits with its own status.

All monitor state is in the checkpoint, so a resumed run behaves like an uninterrupted one.
"""

from __future__ import annotations

import itertools
import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, Self

from lsp_jax.core import processes
from lsp_jax.core.errors import InputError, one_of
from lsp_jax.monitor.hooks import Event, StepRecord

COPIED_WORDS = 8
_TAG = re.compile(r"<[/|]?[A-Za-z_]{2,20}[|]?>|\[/?[A-Z_]{3,20}\]")

Action = Literal["off", "warn", "pause", "rollback", "stop"]


@dataclass(frozen=True)
class HealthConfig:
    """Self-play monitors. Each alarm has an action: off, warn, pause the Challenger until the alarm clears, roll back
    to the last good checkpoint, or stop the run with status 6. A resumed run may change these."""

    window: int = 10
    """Number of iterations that alarms average over; the first window is the baseline."""
    max_rollbacks: int = 3
    """Maximum number of rollbacks; at the next alarm the run stops with status 6."""
    probe: str = ""
    """JSONL file of held-out prompts (and fields for rewards), in the format of `data`; empty: none. The Solver
    answers them every `probe_steps` iterations; checkpoints are good while its rewards are not below those of the
    reference."""
    probe_steps: int = 10
    """Iterations between evaluations of the probe."""
    repetition: Action = "warn"
    """Action when the Challenger repeats its queries."""
    validity: Action = "warn"
    """Action when most queries are invalid."""
    leaks: Action = "warn"
    """Action when queries or answers contain template tags."""
    length: Action = "warn"
    """Action when nearly all answers reach the maximum length."""
    learning: Action = "warn"
    """Action when nearly all groups have equal rewards, so that there is no gradient."""
    entropy: Action = "warn"
    """Action when the Solver has become deterministic."""
    drift: Action = "warn"
    """Action when the Solver is far from the reference."""
    decline: Action = "warn"
    """Action when the Solver scores worse than the reference on the probe."""

    def check(self) -> None:
        """Raises InputError naming the field."""
        for name in ("window", "probe_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"health.{name}", getattr(self, name), "must be at least 1 iteration")
        if self.max_rollbacks < 0:
            raise InputError("health.max_rollbacks", self.max_rollbacks, "must be at least 0")
        for name in ALARMS:
            one_of(f"health.{name}", getattr(self, name), typing.get_args(Action))

    @property
    def rolls_back(self) -> bool:
        """Whether any action is a rollback, which requires keeping the last good checkpoint."""
        return any(getattr(self, name) == "rollback" for name in ALARMS)


ALARMS = tuple(field.name for field in fields(HealthConfig) if field.type == "Action")


class Rule(NamedTuple):
    """An alarm condition: the mean of `metric` is beyond `limit`, and has moved by `change` (None: by any amount)."""

    name: str
    """Name of the alarm, and of the field of `HealthConfig` with its action."""
    metric: str
    above: bool
    limit: float
    change: float | None
    meaning: str

    def fires(self, recent: float, first: float | None) -> bool:
        """Evaluates the rule on the means of the last and the first window; None if the first is unknown."""
        sign = 1 if self.above else -1
        far = self.change is None or (first is not None and sign * (recent - first) >= self.change)
        return sign * recent > sign * self.limit and far


RULES = (
    Rule("repetition", "queries/unique_fraction", False, 0.5, None, "the Challenger asks the same again and again"),
    Rule("repetition", "queries/cluster_entropy", False, 0.25, 0.25, "the Challenger's queries are all alike"),
    Rule("validity", "queries/valid_fraction", False, 0.25, 0.25, "most queries have become invalid"),
    Rule("leaks", "queries/leak_fraction", True, 0.5, 0.25, "queries hold tags of the chat template"),
    Rule("leaks", "answers/tag_fraction", True, 0.5, 0.25, "answers are full of tags"),
    Rule("length", "solver/completions/clipped_ratio", True, 0.9, 0.25, "nearly all answers run to the longest"),
    Rule("learning", "solver/frac_reward_zero_std", True, 0.95, 0.25, "nearly all groups have one reward: no gradient"),
    Rule("entropy", "solver/entropy", False, 0.02, 0.1, "the Solver has become deterministic"),
    Rule("drift", "solver/kl", True, 1.0, 0.5, "the Solver is far from the reference"),
    Rule("decline", "probe/declined", True, 0.5, None, "the probe is answered worse than by the reference"),
)


def lexical_metrics(lines: Sequence[Mapping[str, Any]], instruction: str) -> dict[str, float]:
    """Returns lexical metrics of an iteration's transcripts: diversity of queries, copies of the Challenger's
    `instruction`, and tags in answers."""
    words = [line["query"].split() for line in lines]
    single = [word for query in words for word in query]
    pairs = [pair for query in words for pair in itertools.pairwise(query)]
    given = instruction.split()
    runs = {tuple(given[n : n + COPIED_WORDS]) for n in range(len(given) - COPIED_WORDS + 1)}
    copied = [any(tuple(query[n : n + COPIED_WORDS]) in runs for n in range(len(query))) for query in words]
    tagged = [_TAG.search(answer["text"]) is not None for line in lines for answer in line["answers"]]
    return {
        "queries/distinct_1": len(set(single)) / max(len(single), 1),
        "queries/distinct_2": len(set(pairs)) / max(len(pairs), 1),
        "queries/copy_fraction": sum(copied) / max(len(copied), 1),
        "answers/tag_fraction": sum(tagged) / max(len(tagged), 1),
    }


Row = tuple[float | None, ...]
"""Metrics of one iteration in the order of `RULES`; None for one that is missing or not finite."""


@dataclass(frozen=True)
class HealthState:
    """State of the alarms, saved in checkpoints."""

    first: tuple[Row, ...] = ()
    """Metrics of the first window, oldest first; at most `health.window` rows."""
    recent: tuple[Row, ...] = ()
    """Metrics of the last window, oldest first; at most `health.window` rows."""
    on: frozenset[str] = frozenset()
    """Active alarms, by their fields of `HealthConfig`."""
    rollbacks: int = 0
    """Number of rollbacks so far."""
    declined: float = 0.0
    """1 if the last probe was worse than the reference's, else 0."""

    @property
    def good(self) -> bool:
        """Whether a checkpoint is a rollback target: no alarm is active, and the last probe has not declined."""
        return not self.on and not self.declined

    def to_record(self) -> dict[str, Any]:
        """Converts the state to JSON types, for a checkpoint."""
        rows = {"first": list(map(list, self.first)), "recent": list(map(list, self.recent))}
        return {**rows, "on": sorted(self.on), "rollbacks": self.rollbacks, "declined": self.declined}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Reads the state from a checkpoint's record; records of earlier versions may lack fields."""
        first, recent = (tuple(map(tuple, record.get(name, ()))) for name in ("first", "recent"))
        lasting = {name: record[name] for name in ("rollbacks", "declined") if name in record}
        return cls(first, recent, frozenset(record.get("on", ())), **lasting)


class Health:
    """Evaluates the rules after each iteration and returns events. All processes call it together."""

    def __init__(self, config: HealthConfig, state: HealthState = HealthState()):
        """`state` is that of the checkpoint to resume from."""
        self._config = config
        self.state: HealthState = state
        """State after the last iteration; set on rollback."""

    @property
    def paused(self) -> bool:
        """Whether the Challenger is paused."""
        return any(getattr(self._config, name) == "pause" for name in self.state.on)

    def after_step(self, record: StepRecord) -> list[Event]:
        """Calls `update`, as a hook."""
        return self.update(record.iteration, record.metrics)

    def update(self, number: int, metrics: Mapping[str, float]) -> list[Event]:
        """Adds the metrics of iteration `number`, which only process 0 needs to have in full; returns alarms that start
        or end."""
        found = [float(metrics.get(rule.metric, math.nan)) for rule in RULES]
        mine = [value if math.isfinite(value) else None for value in found]
        values, declined = processes.gather("health", [mine, metrics.get("probe/declined", 0.0)])[0]
        window, first, row = self._config.window, self.state.first, tuple(values)
        if number <= window and number == len(first) + 1:  # not after a resume with a longer window
            first = (*first, row)
        recent = (*self.state.recent, row)[-window:]
        self.state = replace(self.state, first=first, recent=recent, declined=declined)
        if len(recent) < window:
            return []
        on = self.state.on
        firing = {rule.name: self._message(place, rule) for place, rule in enumerate(RULES) if self._fires(place, rule)}
        firing = {name: message for name, message in firing.items() if getattr(self._config, name) != "off"}
        # rollback and stop repeat while the alarm is active, also after a resume
        reported = {name for name in on if getattr(self._config, name) not in ("rollback", "stop")}
        new = sorted(firing.keys() - reported)
        begun = [Event(number, name, getattr(self._config, name), firing[name]) for name in new]
        unknown = {rule.name for place, rule in enumerate(RULES) if self._unknown(place)}
        over = sorted(on - firing.keys() - unknown)
        self.state = replace(self.state, on=(on & unknown) | set(firing))
        return begun + [Event(number, name, "over", f"the alarm {name} is over") for name in over]

    def _unknown(self, place: int) -> bool:
        """Whether the metric is missing in part of the window, so that the alarm can neither start nor end."""
        known = [row[place] is not None for row in self.state.recent]
        return any(known) and not all(known)

    def _means(self, place: int) -> tuple[float, float | None] | None:
        """Means over the last and the first window (None without values); None if the last window is incomplete."""
        recent, first = (
            [value for row in rows if (value := row[place]) is not None]
            for rows in (self.state.recent, self.state.first)
        )
        if len(recent) < len(self.state.recent):
            return None
        return sum(recent) / len(recent), sum(first) / len(first) if first else None

    def _fires(self, place: int, rule: Rule) -> bool:
        means = self._means(place)
        return means is not None and rule.fires(*means)

    def _message(self, place: int, rule: Rule) -> str:
        recent, first = self._means(place) or (math.nan, None)
        began = "" if first is None else f" (first {first:.3g})"
        return f"{rule.meaning}: {rule.metric} {recent:.3g} over {self._config.window} iterations{began}"


def format_event(event: Event) -> str:
    """Formats an event as one line for the terminal."""
    consequences = {
        "pause": "; the Challenger is paused until the alarm ends",
        "rollback": "; rolling back to the last good checkpoint",
        "stop": "; the run stops",
    }
    setting = "" if event.action == "over" else f" (health.{event.alarm} {event.action})"
    return f"iteration {event.iteration}: {event.said}{setting}{consequences.get(event.action, '')}"
