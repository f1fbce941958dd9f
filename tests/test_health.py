"""Alarms of self-play: collapse is seen and acted on, a healthy run says nothing, a resumed run decides alike."""

from __future__ import annotations

import json
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import pytest

import lsp_jax as lsp
from lsp_jax.checkpoint.host_state import HostState
from lsp_jax.checkpoint.manager import Checkpoints, SaveError
from lsp_jax.config import TrainConfig
from lsp_jax.core.errors import COLLAPSED_STATUS, Collapsed, InputError
from lsp_jax.monitor.health import RULES, Action, Health, HealthConfig, HealthState, format_event, lexical_metrics
from lsp_jax.monitor.hooks import Event, StepRecord
from lsp_jax.monitor.numerics import Alarms
from lsp_jax.reporting.metrics import describe
from lsp_jax.training.checkpointing import Saving
from lsp_jax.training.replay import replay
from test_resume import assert_same_run, config_of, without_clocks
from test_trainer import host_reward, read_lines, same_bits

QUICK_COMPILES = True
SOUND = {
    "queries/unique_fraction": 1.0,
    "queries/cluster_entropy": 0.9,
    "queries/valid_fraction": 0.8,
    "queries/leak_fraction": 0.0,
    "answers/tag_fraction": 0.0,
    "solver/completions/clipped_ratio": 0.5,
    "solver/frac_reward_zero_std": 0.5,
    "solver/entropy": 1.0,
    "solver/kl": 0.1,
    "probe/declined": 0.0,
}
BAD = {
    "queries/unique_fraction": 0.1,
    "queries/cluster_entropy": 0.0,
    "queries/valid_fraction": 0.0,
    "queries/leak_fraction": 0.9,
    "answers/tag_fraction": 0.9,
    "solver/completions/clipped_ratio": 1.0,
    "solver/frac_reward_zero_std": 1.0,
    "solver/entropy": 0.0,
    "solver/kl": 3.0,
    "probe/declined": 1.0,
}


def watched(health: Health, *metrics: dict[str, float]) -> list[Event]:
    return [event for number, numbers in enumerate(metrics, 1) for event in health.update(number, numbers)]


def stored(state: HealthState) -> HealthState:
    """As a checkpoint brings it back."""
    return HealthState.from_record(json.loads(json.dumps(state.to_record())))


def test_every_metric_of_a_rule_is_written():
    assert all(describe(rule.metric) for rule in RULES) and set(SOUND) == set(BAD) == {rule.metric for rule in RULES}


@pytest.mark.parametrize("metric", SOUND)
def test_each_rule_fires_and_is_over(metric: str):
    name = next(rule.name for rule in RULES if rule.metric == metric)
    health = Health(HealthConfig(window=3))
    assert watched(health, *[SOUND] * 5) == [] and health.state.good
    (event,) = watched(health, *[SOUND | {metric: BAD[metric]}] * 5)
    assert (event.alarm, event.action) == (name, "warn") and metric in event.said and not health.state.good
    assert f"(health.{name} warn)" in format_event(event)
    (over,) = watched(health, *[SOUND] * 5)
    assert (over.alarm, over.action) == (name, "over") and health.state.good


def test_what_a_run_begins_with_is_no_collapse():
    """Long answers, invalid queries and equal rewards from the start: only repetition and decline are in themselves."""
    health = Health(HealthConfig(window=2))
    bad = BAD | {"queries/unique_fraction": 1.0, "probe/declined": 0.0}
    assert watched(health, *[bad] * 10) == []
    (event,) = watched(health, *[BAD | {"probe/declined": 0.0}] * 3)
    assert "asks the same again and again" in event.said


def test_what_is_bad_in_itself_is_over_only_when_it_is_good():
    """Not when it is a little better than at the start."""
    health = Health(HealthConfig(window=2, repetition="pause"))
    events = watched(health, *[SOUND | {"queries/unique_fraction": 0.2}] * 4)
    assert [event.action for event in events] == ["pause"]
    assert watched(health, *[SOUND | {"queries/unique_fraction": 0.4}] * 4) == [] and health.paused
    (over,) = watched(health, *[SOUND] * 2)
    assert over.action == "over" and not health.paused


def test_a_probe_that_comes_or_goes_at_a_resume():
    """It is on from where it is there; an alarm whose metric is there no more is over."""
    without = {name: value for name, value in SOUND.items() if name != "probe/declined"}
    first = Health(HealthConfig(window=2))
    watched(first, *[without] * 5)
    again = Health(HealthConfig(window=2, decline="pause"), first.state)
    (event,) = [event for number in (6, 7) for event in again.update(number, SOUND | {"probe/declined": 1.0})]
    assert (event.iteration, event.action) == (7, "pause") and "first" not in event.said
    last = Health(HealthConfig(window=2, decline="pause"), again.state)
    assert last.update(8, without) == [] and last.paused
    (over,) = last.update(9, without)
    assert over.action == "over" and not last.paused and last.state.good


def test_a_longer_window_at_a_resume_leaves_the_first_one_as_it_was():
    first = Health(HealthConfig(window=2))
    watched(first, *[SOUND] * 4)
    again, long = Health(HealthConfig(window=6), first.state), SOUND | {"solver/completions/clipped_ratio": 1.0}
    events = [event for number in range(5, 12) for event in again.update(number, long)]
    assert [(event.alarm, event.action) for event in events] == [("length", "warn")]


def test_a_metric_that_a_run_has_not_raises_no_alarm():
    assert watched(Health(HealthConfig(window=2)), *[{}] * 5) == []


@pytest.mark.parametrize("action", typing.get_args(Action))
def test_actions(action: Any):
    health = Health(HealthConfig(window=2, repetition=action))
    collapsed = [SOUND | {"queries/unique_fraction": 0.1}] * 4
    events = watched(health, *[SOUND] * 2, *collapsed)
    times = {"off": 0, "rollback": 3, "stop": 3}.get(action, 1)  # as long as it is on, or once
    assert [event.action for event in events] == [action] * times
    assert health.paused == (action == "pause") and health.state.good == (action == "off")
    watched(health, *[SOUND] * 3)
    assert not health.paused and health.state.good


def test_a_restored_one_decides_alike():
    config = HealthConfig(window=3, repetition="pause")
    numbers = [SOUND] * 4 + [SOUND | {"queries/unique_fraction": 0.1}] * 4 + [SOUND] * 5
    whole, decided = Health(config), []
    for number, each in enumerate(numbers):
        whole.update(number, each)
        decided.append(whole.paused)
    for cut in range(len(numbers)):
        first = Health(config)
        watched(first, *numbers[:cut])
        again = Health(config, stored(first.state))
        rest = []
        for each in numbers[cut:]:
            again.update(0, each)
            rest.append(again.paused)
        assert rest == decided[cut:]
    assert any(decided) and not decided[-1]


@pytest.mark.parametrize("action", ["rollback", "stop"])
def test_what_ends_a_run_does_so_again_when_it_is_resumed(action: Any):
    """Unless what it is resumed with says otherwise; then the alarm is on and not told twice."""
    first = Health(HealthConfig(window=2, repetition=action))
    bad = SOUND | {"queries/unique_fraction": 0.1}
    watched(first, *[SOUND] * 2, *[bad] * 4)
    again = Health(HealthConfig(window=2, repetition=action), first.state)
    assert [event.action for event in again.update(7, bad)] == [action]
    assert Health(HealthConfig(window=2), first.state).update(7, bad) == []


def test_what_is_not_finite_is_neither_an_alarm_nor_its_end():
    """An iteration whose update was skipped may have no KL: the first window is not spoiled, a pause is not lifted."""
    nan = SOUND | {"solver/kl": float("nan")}
    health = Health(HealthConfig(window=3, drift="pause"))
    watched(health, SOUND, nan, SOUND)
    drifted = SOUND | {"solver/kl": 3.0}
    for number in range(4, 8):
        health.update(number, drifted)
    assert health.paused
    assert health.update(8, nan) == [] and health.paused
    events = [event for number in range(9, 13) for event in health.update(number, SOUND)]
    assert [event.action for event in events] == ["over"] and not health.paused


def test_a_wider_window_does_not_make_a_new_beginning():
    health = Health(HealthConfig(window=2, entropy="warn"))
    for number in range(1, 5):
        health.update(number, SOUND)
    wider = Health(HealthConfig(window=4), stored(health.state))
    events = [event for number in range(5, 12) for event in wider.update(number, SOUND | {"solver/entropy": 0.0})]
    assert [event.alarm for event in events] == ["entropy"]


class OnDisk(Checkpoints):
    """Checkpoints in a list, with the retention of the real ones."""

    def __init__(self, keep: int, fails: int = 0, every: int = 1):
        super().__init__("nowhere", keep, every)
        self.there: list[int] = []
        self._fails = fails

    def steps(self) -> list[int]:
        return sorted(self.there)

    def save(self, state: Any, host: HostState, arrays: Any) -> None:
        if host.iteration == self._fails:
            raise SaveError("full")
        self.there = sorted(self.preserved([*self.there, host.iteration]))


def at(number: int) -> StepRecord:
    """The iteration as far as saving it reads it."""
    return StepRecord(number, 0, {}, [], cast(Any, {"x": jnp.zeros(1)}), cast(Any, None))


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("every", [1, 3, 7, 12])
def test_there_is_a_checkpoint_to_go_back_to(every: int, limit: int, capfd: pytest.CaptureFixture[str]):
    """At each iteration an older one than the window, where there was any; few are kept; stops between two saves and a
    save that fails change nothing of it."""
    config = TrainConfig(
        model="m",
        save_steps=every,
        save_total_limit=limit,
        save_errors="go_on",
        health=HealthConfig(repetition="rollback"),
    )
    disk = OnDisk(limit, fails=4 * every)
    health = Health(config.health)
    saving = Saving(config, disk, None, Alarms(1), health, HostState())
    for number in range(1, 100):
        good = number % 5 != 0
        if number % every == 0 or number == 50:
            health.state = HealthState(declined=float(not good))
            saving.save(at(number))
        target = saving.good_before(number)
        assert target is None or (target in disk.there and target % 5 and target % every == 0)
        assert len(disk.there) <= limit + 2
        if number > 60 and every < 7:
            assert target is not None and 10 <= number - target <= 10 + 10 * every
    capfd.readouterr()


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize(("window", "every"), [(10, 10), (25, 10), (7, 3)])
def test_a_run_that_was_stopped_goes_back_where_the_whole_one_does(window: int, every: int, limit: int):
    """Whenever it was stopped, between two saves, and whenever the alarm comes."""
    health = HealthConfig(window=window, repetition="rollback")
    config = TrainConfig(model="m", save_steps=every, save_total_limit=limit, health=health)

    def targets(stop: int) -> list[int | None]:
        disk = OnDisk(limit, every=every)
        saving, found = Saving(config, disk, None, Alarms(1), Health(health), HostState()), []
        for number in range(1, 7 * every):
            if number % every == 0 or number == stop:
                saving.save(at(number))
            found.append(saving.good_before(number))
        return found

    whole = targets(0)
    assert whole[-1] is not None
    for stop in range(1, 7 * every):
        if stop % every:
            assert targets(stop) == whole, stop


def test_wording_by_hand():
    instruction = "Write one question about a number that is small and even and write it now"
    lines = [
        {"query": "a b a b", "answers": [{"text": "<score>7</score>"}, {"text": "3 < 4"}]},
        {"query": "please ask about a number that is small and even", "answers": [{"text": "[INST]"}, {"text": "x"}]},
    ]
    found = lexical_metrics(lines, instruction)
    assert found["queries/distinct_1"] == pytest.approx(11 / 14)  # "a" is in both
    assert found["queries/distinct_2"] == pytest.approx(11 / 12)
    assert found["queries/copy_fraction"] == 0.5 and found["answers/tag_fraction"] == 0.5


@pytest.mark.parametrize(("field", "value"), [("window", 0), ("length", "kill")])
def test_settings_that_cannot_be_used(field: str, value: Any):
    with pytest.raises(InputError, match=f"health.{field}"):
        TrainConfig(model="m", health=HealthConfig(**{field: value})).check()


# --- in runs ----------------------------------------------------------------------------------------------------------

AT_ONCE = RULES[0]._replace(limit=2.0)  # fires at the first full window, and is never over


@pytest.mark.full
def test_a_paused_challenger_learns_nothing(game_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its loss is zero while the alarm lasts; resumed it is the same run, and an iteration of it can be replayed."""
    monkeypatch.setattr("lsp_jax.monitor.health.RULES", (AT_ONCE,))
    health = HealthConfig(window=2, repetition="pause")
    config = config_of(game_model, tmp_path / "run", health=health)
    state = lsp.train(config, rewards=[host_reward()])
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["challenger/paused"] for line in lines] == [0, 0, 1, 1]
    assert all((line["challenger/loss"] == 0) == (line["challenger/paused"] == 1) for line in lines)
    half = replace(config, output_dir=str(tmp_path / "half"), max_steps=3, save_steps=3)
    lsp.train(half, rewards=[host_reward()])
    resumed = lsp.train(replace(half, max_steps=4, resume="must"), rewards=[host_reward()])
    assert same_bits(resumed, state)
    assert_same_run(tmp_path / "half", tmp_path / "run")
    assert replay(tmp_path / "run", 4, rewards=[host_reward()]).same


@pytest.mark.full
def test_a_collapse_that_ends_the_run_is_saved(game_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lsp_jax.monitor.health.RULES", (AT_ONCE,))
    config = config_of(game_model, tmp_path / "run", save_steps=100, health=HealthConfig(window=3, repetition="stop"))
    with pytest.raises(Collapsed, match=r"iteration 3.*iteration 3 is saved") as caught:
        lsp.train(config, rewards=[host_reward()])
    assert caught.value.status == COLLAPSED_STATUS
    (alarm,) = read_lines(tmp_path / "run" / "alarms.jsonl")
    assert (alarm["iteration"], alarm["alarm"], alarm["action"]) == (3, "repetition", "stop")
    lsp.train(replace(config, resume="must", health=HealthConfig()), rewards=[host_reward()])
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 4


def collapsing(monkeypatch: pytest.MonkeyPatch, *iterations: int) -> None:
    """Makes the alarm of repetition fire at the end of those iterations, in the order in which they are played."""
    left = list(iterations)
    update = Health.update

    def planted(self: Health, number: int, metrics: Any) -> list[Event]:
        if left and number == left[0]:
            left.pop(0)
            metrics = {**metrics, "queries/unique_fraction": -1e9}
        return update(self, number, metrics)

    monkeypatch.setattr(Health, "update", planted)


def rolling(model: Path, directory: Path, **changes: Any) -> TrainConfig:
    health = HealthConfig(window=2, repetition="rollback", **changes.pop("health", {}))
    return config_of(model, directory, **{"max_steps": 8, "save_steps": 2, "health": health, **changes})


@pytest.mark.full
def test_a_rollback_plays_on_with_other_noise(game_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Collapsed at the end of 5: back to 2, for 4 lies in the window; other queries from 3 on, and what was is gone."""
    calm = tmp_path / "calm"
    lsp.train(rolling(game_model, calm), rewards=[host_reward()])
    collapsing(monkeypatch, 5)
    config = rolling(game_model, tmp_path / "run")
    state = lsp.train(config, rewards=[host_reward()])
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == list(range(1, 9))
    assert [line["attempt"] for line in lines] == [0, 0] + [1] * 6 and int(state.attempt) == 1
    assert without_clocks(tmp_path / "run")[:2] == without_clocks(calm)[:2]
    queries, before = (
        [line["query"] for line in read_lines(d / "transcripts.jsonl")] for d in (tmp_path / "run", calm)
    )
    assert queries[: len(queries) // 4] == before[: len(queries) // 4]
    assert queries[len(queries) // 4 :] != before[len(queries) // 4 :]
    (alarm,) = read_lines(tmp_path / "run" / "alarms.jsonl")
    assert (alarm["iteration"], alarm["back_to"], alarm["attempt"]) == (5, 2, 1)
    assert replay(tmp_path / "run", 3, rewards=[host_reward()]).same
    monkeypatch.undo()
    collapsing(monkeypatch, 5, 4)
    lsp.train(rolling(game_model, tmp_path / "twice", max_steps=6), rewards=[host_reward()])
    alarms = read_lines(tmp_path / "twice" / "alarms.jsonl")
    told = [(alarm["iteration"], alarm["back_to"], alarm["attempt"]) for alarm in alarms if "back_to" in alarm]
    assert told == [(5, 2, 1), (4, 2, 2)], "both are told, though the second goes back before the first"


@pytest.mark.full
@pytest.mark.parametrize("stop", [4, 6])
def test_resume_is_exact_around_a_rollback(
    stop: int, game_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Ended before the collapse, which then comes to the resumed run, and after it."""
    collapsing(monkeypatch, 5)
    whole = lsp.train(rolling(game_model, tmp_path / "whole"), rewards=[host_reward()])
    collapsing(monkeypatch, 5)
    config = rolling(game_model, tmp_path / "half")
    lsp.train(replace(config, max_steps=stop), rewards=[host_reward()])
    resumed = lsp.train(replace(config, resume="must"), rewards=[host_reward()])
    assert same_bits(resumed, whole)
    assert_same_run(tmp_path / "half", tmp_path / "whole")
    assert (tmp_path / "half" / "alarms.jsonl").read_bytes() == (tmp_path / "whole" / "alarms.jsonl").read_bytes()


@pytest.mark.full
def test_a_run_goes_back_so_often_and_not_without_a_checkpoint(
    game_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    collapsing(monkeypatch, 5, 5)
    with pytest.raises(Collapsed, match="after 1 rollbacks"):
        lsp.train(rolling(game_model, tmp_path / "often", health={"max_rollbacks": 1}), rewards=[host_reward()])
    assert (tmp_path / "often" / "checkpoints" / "5").is_dir()
    monkeypatch.undo()
    collapsing(monkeypatch, 2)
    with pytest.raises(Collapsed, match="no good checkpoint"):
        lsp.train(rolling(game_model, tmp_path / "early"), rewards=[host_reward()])
