"""Scoring of an episode by all reward components: compiled ones on the device, others on texts on the host."""

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
"""Outputs by component name."""


def score(
    rewards: Sequence[Reward], tokenizer: Tokenizer, episode: Episode, rows: Sequence[Mapping[str, Any]] = ()
) -> tuple[RewardOutput, ...]:
    """Returns the outputs of all components, in the order of `rewards`; `rows` are the data set rows of the queries."""
    outputs = score_compiled(rewards, episode)
    if texts := texts_to_score(rewards, tokenizer, episode, rows):
        outputs |= score_texts(rewards, texts)
    return tuple(outputs[reward.name] for reward in rewards)


def score_compiled(rewards: Sequence[Reward], episode: Episode) -> Outputs:
    """Returns the outputs of the components that need no texts on the host."""
    return {reward.name: score_episode(reward, episode) for reward in rewards if not isinstance(reward, HostReward)}


def score_texts(rewards: Sequence[Reward], texts: EpisodeTexts) -> Outputs:
    """Returns the outputs of the components that score texts on the host."""
    return {reward.name: score_on_host(reward, texts) for reward in rewards if isinstance(reward, HostReward)}


def texts_to_score(
    rewards: Sequence[Reward], tokenizer: Tokenizer, episode: Episode, rows: Sequence[Mapping[str, Any]]
) -> EpisodeTexts | None:
    """Decodes this process's share of the episode; None if no component scores texts."""
    if not any(isinstance(reward, HostReward) for reward in rewards):
        return None
    share = processes.share(episode.queries.valid.shape[0])
    texts = episode_texts(episode, tokenizer, queries=share)
    return texts._replace(rows=[rows[n] for n in share] if rows else rows)


def score_episode(reward: DeviceReward | EpisodeReward, episode: Episode) -> RewardOutput:
    """Returns the output of one component that scores on the device."""
    if isinstance(reward, EpisodeReward):
        return reward.score(episode)
    return score_component(load_to_device(reward.params), episode, score=reward.score)


@stage(static="score")
def score_component(params: Any, episode: Episode, *, score: Callable[[Any, Episode], RewardOutput]) -> RewardOutput:
    """Returns the output of one compiled component."""
    return score(params, episode)
