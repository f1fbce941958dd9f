"""Scores of an episode by each of a run's components: compiled ones on the device, the others from texts here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lsp_jax.core import processes
from lsp_jax.core.stage import stage
from lsp_jax.model.sharding import load_to_device
from lsp_jax.play.selfplay import Episode
from lsp_jax.reward.base import (
    DeviceReward,
    EpisodeReward,
    EpisodeTexts,
    HostReward,
    Reward,
    RewardOutput,
    episode_texts,
    score_on_host,
)
from lsp_jax.text.tokenizer import Tokenizer

Outputs = dict[str, RewardOutput]
"""By the component's name."""


def score(
    rewards: Sequence[Reward], tokenizer: Tokenizer, episode: Episode, rows: Sequence[Mapping[str, Any]] = ()
) -> tuple[RewardOutput, ...]:
    """Every component's output, in the order of `rewards`; `rows` of the data set lie behind the queries."""
    outputs = score_compiled(rewards, episode)
    if texts := texts_to_score(rewards, tokenizer, episode, rows):
        outputs |= score_texts(rewards, texts)
    return tuple(outputs[reward.name] for reward in rewards)


def score_compiled(rewards: Sequence[Reward], episode: Episode) -> Outputs:
    """Outputs of the components that need no text on the host."""
    return {reward.name: score_episode(reward, episode) for reward in rewards if not isinstance(reward, HostReward)}


def score_texts(rewards: Sequence[Reward], texts: EpisodeTexts) -> Outputs:
    """Outputs of the components that read texts, on this machine's processors."""
    return {reward.name: score_on_host(reward, texts) for reward in rewards if isinstance(reward, HostReward)}


def texts_to_score(
    rewards: Sequence[Reward], tokenizer: Tokenizer, episode: Episode, rows: Sequence[Mapping[str, Any]]
) -> EpisodeTexts | None:
    """This process's share of the episode in words; None where no component reads any."""
    if not any(isinstance(reward, HostReward) for reward in rewards):
        return None
    mine = processes.share(episode.queries.valid.shape[0])
    texts = episode_texts(episode, tokenizer, queries=mine)
    return texts._replace(rows=[rows[n] for n in mine] if rows else rows)


def score_episode(reward: DeviceReward | EpisodeReward, episode: Episode) -> RewardOutput:
    """One component's output, on device."""
    if isinstance(reward, EpisodeReward):
        return reward.score(episode)
    return score_component(load_to_device(reward.params), episode, score=reward.score)


@stage(static="score")
def score_component(params: Any, episode: Episode, *, score: Callable[[Any, Episode], RewardOutput]) -> RewardOutput:
    """One compiled component's output."""
    return score(params, episode)
