"""What an episode is worth by each of a run's components: compiled ones on the device, the others from texts here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lsp_jax import processes
from lsp_jax.model.sharding import at_work
from lsp_jax.play.selfplay import Episode
from lsp_jax.reward.base import (
    DeviceReward,
    EpisodeReward,
    EpisodeTexts,
    HostReward,
    RewardOutput,
    episode_texts,
    score_on_host,
)
from lsp_jax.run import iteration as stages
from lsp_jax.run.setup import Run

Outputs = dict[str, RewardOutput]
"""By the component's name."""


def score(run: Run, episode: Episode, rows: Sequence[Mapping[str, Any]] = ()) -> tuple[RewardOutput, ...]:
    """Every component's output, in the run's order; `rows` of the data set lie behind the queries."""
    outputs = score_compiled(run, episode)
    if texts := texts_to_score(run, episode, rows):
        outputs |= score_texts(run, texts)
    return tuple(outputs[reward.name] for reward in run.rewards)


def score_compiled(run: Run, episode: Episode) -> Outputs:
    """What needs no text on the host."""
    return {reward.name: score_episode(reward, episode) for reward in run.rewards if not isinstance(reward, HostReward)}


def score_texts(run: Run, texts: EpisodeTexts) -> Outputs:
    """What reads texts, on this machine's processors."""
    return {reward.name: score_on_host(reward, texts) for reward in run.rewards if isinstance(reward, HostReward)}


def texts_to_score(run: Run, episode: Episode, rows: Sequence[Mapping[str, Any]]) -> EpisodeTexts | None:
    """This process's share of the episode in words; None where no component reads any."""
    if not any(isinstance(reward, HostReward) for reward in run.rewards):
        return None
    mine = processes.share(run.game.play.num_queries)
    texts = episode_texts(episode, run.policy.tokenizer, queries=mine)
    return texts._replace(rows=[rows[n] for n in mine] if rows else rows)


def score_episode(reward: DeviceReward | EpisodeReward, episode: Episode) -> RewardOutput:
    """One component's output, on device."""
    if isinstance(reward, EpisodeReward):
        return reward.score(episode)
    params = at_work(reward.params)
    processes.check_program(f"score {reward.name}", stages.score, reward.score, params, episode)
    return stages.score(reward.score, params, episode)
