"""What a reward is, and how several become the task and quality rewards of an episode.

A component says what it measures: a `task` reward is negated for the Challenger, a `quality` reward is not. It scores
either on device (a pure function of its own parameters and the episode) or on the host (a function of texts). What it
cannot score it masks: a failure is never a good score.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lsp_jax import host
from lsp_jax.errors import InputError
from lsp_jax.play.selfplay import Episode
from lsp_jax.text.tokenizer import Tokenizer

Kind = Literal["task", "quality"]
logger = logging.getLogger(__name__)


class RewardOutput(NamedTuple):
    """One component's scores; values under a False mask are never read."""

    values: Any
    """float32 [N, G]."""
    valid_answer: Any
    """bool [N, G]: False masks the answer (it could not be scored)."""
    valid_query: Any
    """bool [N]: False says that the query is not one of this component's task: it gets the invalid-query penalty."""


@dataclass(frozen=True)
class DeviceReward:
    """A compiled component."""

    name: str
    """Under which it is logged."""
    kind: Kind
    weight: float
    """Factor in the sum of its kind."""
    score: Callable[[Any, Episode], RewardOutput]
    """Pure and jittable: (params, episode) -> RewardOutput."""
    params: Any = field(default=None, repr=False)
    """Device arrays that `score` reads; made once a run."""


@dataclass(frozen=True)
class HostReward:
    """A component that reads texts on the host."""

    name: str
    kind: Kind
    weight: float
    score: Callable[[list[str], list[list[str]]], RewardOutput]
    """(N queries, N lists of G answers) -> RewardOutput of numpy arrays."""


Reward = DeviceReward | HostReward


class Scores(NamedTuple):
    """The episode's rewards, summed by kind."""

    task: jax.Array
    """float32 [N, G]: R."""
    quality: jax.Array
    """float32 [N, G]: R_Q."""
    valid_query: jax.Array
    """bool [N]: valid as played and on every component's task."""
    valid_answer: jax.Array
    """bool [N, G]: scored by every component."""
    components: dict[str, jax.Array]
    """float32 [N, G] of each component before its weight, for transcripts and statistics."""


def check_rewards(rewards: Sequence[Named], use_quality: bool) -> None:
    """Raises InputError for an empty list, repeated names, an unknown kind, or nothing that the Solver could win."""
    names = [reward.name for reward in rewards]
    if len(set(names)) < len(names):
        raise InputError("rewards", names, "names must differ")
    for reward in rewards:
        if reward.kind not in ("task", "quality"):
            raise InputError(f"rewards.{reward.name}.kind", reward.kind, "must be 'task' or 'quality'")
        if not np.isfinite(reward.weight):
            raise InputError(f"rewards.{reward.name}.weight", reward.weight, "must be a finite number")
    if not any(reward.kind == "task" or use_quality for reward in rewards):
        raise InputError("rewards", names, "at least one component must reach the Solver: add a task reward")


class Named(Protocol):
    """What a sum must know of its terms."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def weight(self) -> float: ...


def combine(rewards: Sequence[Named], outputs: Sequence[RewardOutput], episode: Episode) -> Scores:
    """Weighted sums by kind and the joint masks; `outputs` in the order of `rewards`. Pure."""
    shape = episode.answers.lengths.shape
    totals = {"task": jnp.zeros(shape, jnp.float32), "quality": jnp.zeros(shape, jnp.float32)}
    valid_query, valid_answer = episode.queries.valid, jnp.ones(shape, bool)
    for reward, output in zip(rewards, outputs, strict=True):
        # a non-finite score is a failed score, wherever it was made
        finite = jnp.isfinite(output.values) & output.valid_answer
        totals[reward.kind] = totals[reward.kind] + reward.weight * jnp.where(finite, output.values, 0.0)
        valid_answer, valid_query = valid_answer & finite, valid_query & output.valid_query
    components = {reward.name: output.values for reward, output in zip(rewards, outputs, strict=True)}
    return Scores(totals["task"], totals["quality"], valid_query, valid_answer, components)


class EpisodeTexts(NamedTuple):
    """An episode in words."""

    queries: list[str]
    answers: list[list[str]]


def episode_texts(episode: Episode, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> EpisodeTexts:
    """Reads the episode's tokens once and decodes them, without the stop tokens."""
    (query_ids, query_lengths), answer_ids, answer_lengths = host.to_host(
        (episode.queries.text, episode.answers.tokens, episode.answer_lengths)
    )

    def text(ids: np.ndarray, length: int) -> str:
        return tokenizer.decode(ids[:length].tolist(), skip_special_tokens=skip_special_tokens)

    queries = [text(ids, length) for ids, length in zip(query_ids, query_lengths, strict=True)]
    answers = [
        [text(ids, length) for ids, length in zip(*group, strict=True)]
        for group in zip(answer_ids, answer_lengths, strict=True)
    ]
    return EpisodeTexts(queries, answers)


def score_on_host(reward: HostReward, texts: EpisodeTexts) -> RewardOutput:
    """One host component's output as device arrays; an exception masks every answer and is logged."""
    shape = (len(texts.queries), len(texts.answers[0]))
    try:
        values, valid_answer, valid_query = reward.score(texts.queries, texts.answers)
        output = RewardOutput(
            np.asarray(values, np.float32).reshape(shape),
            np.asarray(valid_answer, bool).reshape(shape),
            np.asarray(valid_query, bool).reshape(shape[0]),
        )
    except Exception as error:  # user code may raise anything; the run goes on without this score
        logger.warning("reward %s failed and is masked: %s: %s", reward.name, type(error).__name__, error)
        output = RewardOutput(np.zeros(shape, np.float32), np.zeros(shape, bool), np.ones(shape[0], bool))
    return RewardOutput(*jax.device_put(tuple(output)))
