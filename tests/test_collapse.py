"""Collapse on demand: rewards that pay for one query, for length, for a tag; each is told within thirty iterations, and
a run whose reward is worth having says nothing in a hundred."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lsp_jax as lsp
from lsp_jax.config import RewardConfig, TrainConfig
from lsp_jax.core.errors import Collapsed
from lsp_jax.learn.losses import LossConfig
from lsp_jax.learn.optimizer import OptimizerConfig
from lsp_jax.monitor.health import HealthConfig
from lsp_jax.play.prompt_data import DataConfig
from lsp_jax.play.sampler import SamplingConfig
from lsp_jax.play.selfplay import PlayConfig
from lsp_jax.reward.user_callable import callable_reward
from lsp_jax.text.prompts import PromptConfig
from test_trainer import game_config, host_reward, read_lines

QUICK_COMPILES = True
pytestmark = pytest.mark.full

FIXED = " the the"
STEPS_TO_A_TAG = ((r"<", 1), (r">", 1), (r"<.+>", 2), (r"<[A-Za-z_]+>", 2), (r"<[A-Za-z_]{2,20}>", 4))
"""Random text has no tags: what leads to one pays a little."""


def one_query(queries: list[str], answers: list[list[str]]) -> list[list[float]]:
    """As a quality reward it pays the Challenger for each character that the query shares with `FIXED`."""
    alike = [sum(a == b for a, b in zip(q.removeprefix("What is "), FIXED, strict=False)) for q in queries]
    return [[number / len(FIXED)] * len(group) for number, group in zip(alike, answers, strict=True)]


def length(queries: list[str], answers: list[list[str]]) -> list[list[float]]:
    return [[len(text) / 16 for text in group] for group in answers]


def tags(queries: list[str], answers: list[list[str]]) -> list[list[float]]:
    def worth(text: str) -> float:
        return sum(pay for part, pay in STEPS_TO_A_TAG if re.search(part, text)) / 10

    return [[worth(text) for text in group] for group in answers]


def greedy_game(model: Path, directory: Path, **health: Any) -> TrainConfig:
    """Thirty iterations of long steps, with no pull to the reference."""
    return game_config(
        model,
        directory,
        max_steps=30,
        save_steps=4,
        play=PlayConfig(num_queries=8, num_generations=8, max_query_length=8, max_completion_length=8),
        sampling=SamplingConfig(),
        challenger_sampling=SamplingConfig(),
        reward=RewardConfig(quality_weight=0.0),
        loss=LossConfig(beta=0.0),
        optimizer=OptimizerConfig(learning_rate=3e-2),
        health=HealthConfig(window=5, **health),
    )


def of_tags(config: TrainConfig, folder: Path) -> TrainConfig:
    """The Solver alone on eight prompts, with answers enough that some begin a tag by chance."""
    rows = [{"prompt": f"Say {n}"} for n in range(8)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return replace(
        config,
        data=DataConfig(source=str(folder / "prompts.jsonl")),
        prompts=PromptConfig(),
        loss=replace(config.loss, alpha_challenger=0.0),
        play=replace(config.play, num_generations=32),
        optimizer=OptimizerConfig(learning_rate=2e-2),
    )


def alarms(directory: Path) -> list[dict[str, Any]]:
    return read_lines(directory / "alarms.jsonl")


@pytest.mark.parametrize(
    ("pays", "kind", "alarm"),
    [(one_query, "quality", "repetition"), (length, "task", "length"), (tags, "task", "leaks")],
    ids=["query", "length", "tag"],
)
def test_each_collapse_is_told(pays: Callable[..., Any], kind: Any, alarm: str, game_model: Path, tmp_path: Path):
    config = greedy_game(game_model, tmp_path / "run")
    if pays is tags:
        config = of_tags(config, tmp_path)
    lsp.train(config, rewards=[callable_reward(pays, "pays", kind)])
    assert alarm in [line["alarm"] for line in alarms(tmp_path / "run") if line["action"] == "warn"]


@pytest.mark.parametrize("action", ["pause", "rollback", "stop"])
def test_what_follows(action: str, game_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """A reward that pays for one query: the Challenger stops learning; or the run goes back as often as it may and then
    ends; or it ends at once."""
    directory = tmp_path / "run"
    config = greedy_game(game_model, directory, repetition=action, max_rollbacks=1)
    rewards = [callable_reward(one_query, "pays", "quality")]
    if action == "pause":
        lsp.train(config, rewards=rewards)
        lines = read_lines(directory / "metrics.jsonl")
        begun = next(line["iteration"] for line in alarms(directory) if line["action"] == "pause")
        assert [line["challenger/paused"] for line in lines][: begun + 1] == [0.0] * begun + [1.0]
        assert lines[begun]["challenger/loss"] == 0
        return
    with pytest.raises(Collapsed):
        lsp.train(config, rewards=rewards)
    last = read_lines(directory / "metrics.jsonl")[-1]
    assert (directory / "checkpoints" / str(int(last["iteration"]))).is_dir()
    assert last["attempt"] == (1 if action == "rollback" else 0)
    assert f"(health.repetition {action})" in capfd.readouterr().err


def test_a_healthy_run_says_nothing(game_model: Path, tmp_path: Path):
    """A hundred iterations of small steps with the KL, an action for every alarm that would show."""
    config = game_config(game_model, tmp_path / "run", max_steps=100, save_steps=50)
    config = replace(config, play=replace(config.play, num_queries=8), optimizer=OptimizerConfig(learning_rate=2e-4))
    config = replace(config, reward=RewardConfig(quality_weight=0.0))
    lsp.train(config, rewards=[host_reward()])
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    mean = [sum(line["solver/reward"] for line in part) / len(part) for part in (lines[:20], lines[-20:])]
    assert mean[1] > mean[0], "it learns, so that silence says something"
    assert alarms(tmp_path / "run") == []
