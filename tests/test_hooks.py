"""What follows an iteration: hooks in their order, their events, and what a checkpoint keeps of the host."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

import lsp_jax as lsp
from lsp_jax.checkpoint.host_state import BestCheckpoint, HostState
from lsp_jax.core.errors import Collapsed
from lsp_jax.monitor.health import HealthState
from lsp_jax.monitor.hooks import Event, Hook, StepRecord
from lsp_jax.monitor.watchdog import Watchdog
from lsp_jax.reporting.writer import MetricsWriter
from lsp_jax.training.hooks import IterationEvent, Surroundings, as_hook
from test_resume import config_of
from test_trainer import host_reward, read_lines

QUICK_COMPILES = True
RECORD = StepRecord(7, 28, {"loss": 1.0}, [], cast(Any, "state"), cast(Any, "batch"))


class Noted:
    """A hook that notes its name at each iteration, and returns its events."""

    def __init__(self, seen: list[tuple[str, int]], name: str, *events: Event):
        self._seen, self._name, self._events = seen, name, events

    def after_step(self, record: StepRecord) -> Sequence[Event]:
        self._seen.append((self._name, record.iteration))
        return self._events


def surrounded(hooks: Sequence[Any], folder: Path) -> Surroundings:
    """Nothing around but the hooks and the files."""
    nothing = cast(Any, None)
    return Surroundings(tuple(hooks), nothing, nothing, nothing, Watchdog(0), MetricsWriter(folder), None)


def test_events_are_said_and_written_and_some_stop_the_walk(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    warning, back = Event(7, "length", "warn", "long answers"), Event(7, "drift", "rollback", "far away")
    for events, called in (((warning,), "abc"), ((warning, back), "ab"), ((back._replace(action="stop"),), "ab")):
        seen: list[tuple[str, int]] = []
        hooks = Noted(seen, "a"), Noted(seen, "b", *events), Noted(seen, "c")
        folder = tmp_path / f"{len(events)}{called}"
        decisive = surrounded(hooks, folder).after_step(RECORD)
        assert [name for name, _ in seen] == list(called)
        assert tuple(decisive) == (() if called == "abc" else events)
        assert [line["said"] for line in read_lines(folder / "alarms.jsonl")] == [event.said for event in events]
        said = capfd.readouterr().err
        assert all(f"iteration 7: {event.said} (health.{event.alarm}" in said for event in events)


def test_a_hook_that_returns_nothing_has_no_events(tmp_path: Path):
    class Forgetful:
        def after_step(self, record: StepRecord) -> None:
            pass

    assert not surrounded([Forgetful()], tmp_path).after_step(RECORD)
    assert not (tmp_path / "alarms.jsonl").exists()


def test_functions_and_objects_become_hooks():
    seen: list[IterationEvent] = []
    hook = as_hook(seen.append)
    assert isinstance(hook, Hook) and hook.after_step(RECORD) == ()
    assert seen == [IterationEvent(7, {"loss": 1.0}, [], cast(Any, "state"))]
    own = Noted([], "mine")
    assert as_hook(own) is own


@pytest.mark.full
def test_a_users_hooks_come_last_and_in_their_order(game_model: Path, tmp_path: Path):
    """Lines are written, and the checkpoint is under way, when they are called."""
    seen: list[tuple[str, int]] = []

    class Looks(Noted):
        def after_step(self, record: StepRecord) -> Sequence[Event]:
            lines, sums = (read_lines(tmp_path / "run" / f"{name}.jsonl") for name in ("metrics", "checksums"))
            assert lines[-1]["iteration"] == sums[-1]["iteration"] == record.iteration
            assert lines[-1]["loss"] == record.metrics["loss"] and record.cursor == 4 * record.iteration
            assert len(record.transcripts) == 4 and int(record.state.iteration) == record.iteration
            return super().after_step(record)

    callbacks = [
        lambda event: seen.append(("first", event.iteration)),
        Looks(seen, "hook"),
        lambda event: seen.append(("last", event.iteration)),
    ]
    config = config_of(game_model, tmp_path / "run", max_steps=2, save_steps=1)
    lsp.train(config, rewards=[host_reward()], callbacks=callbacks)
    assert seen == [(name, number) for number in (1, 2) for name in ("first", "hook", "last")]


@pytest.mark.full
def test_a_users_hook_can_end_a_run(game_model: Path, tmp_path: Path):
    """As an alarm does: it is said, written, and the iteration is saved."""
    seen: list[tuple[str, int]] = []
    config = config_of(game_model, tmp_path / "run", save_steps=100)
    hooks = Noted(seen, "ends", Event(1, "mine", "stop", "enough")), Noted(seen, "never")
    with pytest.raises(Collapsed, match=r"enough.*iteration 1 is saved"):
        lsp.train(config, rewards=[host_reward()], callbacks=hooks)
    assert seen == [("ends", 1)]
    (alarm,) = read_lines(tmp_path / "run" / "alarms.jsonl")
    assert (alarm["alarm"], alarm["action"]) == ("mine", "stop")


# --- what a checkpoint keeps of the host ----------------------------------------------------------------------------

ROWS = [
    [1.0, 1.0, 0.75, 0.0, 0.0, 0.375, 0.25, 3.4, 0.0, None],
    [1.0, 1.0, 0.5, 0.25, 0.0, 0.375, 0.5, 3.29, 0.03, None],
]
ON_DISK = {  # a checkpoint of version 0.1.0 as it was written, long values cut
    "iteration": 8,
    "cursor": 32,
    "skipped": 1,
    "best": {"iteration": 6, "value": 0.56, "metric": "solver/reward", "greater": True},
    "health": {"first": ROWS, "recent": ROWS, "on": ["drift", "leaks"], "rollbacks": 1, "declined": 0.0},
    "good": [6, 8],
    "offsets": {"metrics.jsonl": 19901, "transcripts.jsonl": 28383, "checksums.jsonl": 9356, "alarms.jsonl": 206},
    "config": {"model": "model", "play.num_queries": 4},
    "config_digest": "43afb56b",
    "versions": {"python": "3.11.2"},
    "reference": {"source": "model", "revision": "", "commit": "", "digest": "f3e45f25"},
    "reward_model": None,
}


def test_the_record_of_a_checkpoint_comes_back_as_it_was():
    """The same keys in the same order, `arrays` and `digest` being the checkpoint's own."""
    host = HostState.from_record(ON_DISK | {"arrays": {}, "digest": "f4c6"})
    assert host.best == BestCheckpoint(6, 0.56, "solver/reward", True)
    assert host.health.on == {"leaks", "drift"} and host.health.first[0][-1] is None and not host.health.good
    assert (host.iteration, host.cursor, host.skipped, host.good) == (8, 32, 1, (6, 8))
    assert list(host.provenance) == ["config", "config_digest", "versions", "reference", "reward_model"]
    assert json.dumps(host.to_record()) == json.dumps(ON_DISK)
    assert HostState.from_record(json.loads(json.dumps(host.to_record()))) == host


def test_a_run_that_has_not_begun_and_a_record_of_an_early_version():
    begins = HostState()
    assert HostState.from_record(begins.to_record()) == begins and begins.health.good
    early = {"iteration": 3, "cursor": 12, "offsets": {}, "best": {"iteration": 2, "value": 0.5}}
    assert HostState.from_record(early) == HostState(3, 12), "a best checkpoint of no known metric is none"
    assert HealthState.from_record({"on": ["length"]}) == HealthState(on=frozenset({"length"}))


@pytest.mark.full
def test_what_lies_in_a_real_checkpoint(whole_run: tuple[Path, Any]):
    record = json.loads((whole_run[0] / "checkpoints" / "4" / "host" / "metadata").read_text())
    kept = {name: value for name, value in record.items() if name not in ("arrays", "digest")}
    before = list(ON_DISK)
    after_versions = before.index("versions") + 1
    assert list(kept) == [*before[:after_versions], "numerics", "prompts", *before[after_versions:]]
    assert json.dumps(HostState.from_record(record).to_record()) == json.dumps(kept)
