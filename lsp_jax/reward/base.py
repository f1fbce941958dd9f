"""Reward components, and their combination into the task and quality rewards of an episode.

A component has a kind: `task` rewards are negated for the Challenger, `quality` rewards are not. It scores on device (a
pure function of its parameters and the episode), on the host (a function of texts), or on the host with compiled
programs of its own (a judge whose text is parsed on the host). Answers that it cannot score are masked, so a failure
never counts as a score.

Standardisation, clipping and weighting are separate: see `RewardSpec` and `combine`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lsp_jax.core import arguments, processes, runtime
from lsp_jax.core.errors import InputError
from lsp_jax.learn.spec import Scalar
from lsp_jax.model.sharding import replicate, row_shards
from lsp_jax.play.selfplay import Episode
from lsp_jax.text.tokenizer import Tokenizer

Kind = Literal["task", "quality"]
logger: logging.Logger = logging.getLogger(__name__)


class RewardOutput(NamedTuple):
    """The scores of one component; masked values are never read."""

    values: Any
    """float32 [N, G]."""
    valid_answer: Any
    """bool [N, G]: False masks an answer that could not be scored."""
    valid_query: Any
    """bool [N]: False marks a query outside this component's task, which gets the invalid-query penalty."""


@dataclass(frozen=True)
class DeviceReward:
    """A component compiled for the device."""

    name: str
    """Name in metrics and transcripts."""
    kind: Kind
    weight: float
    """Factor in the sum of its kind."""
    score: Callable[[Any, Episode], RewardOutput]
    """Pure and jittable: (params, episode) -> RewardOutput."""
    params: Any = field(default=None, repr=False)
    """Device arrays that `score` reads; created once per run."""


@dataclass(frozen=True)
class EpisodeReward:
    """A component called on the host with the episode, which runs compiled programs itself."""

    name: str
    kind: Kind
    weight: float
    score: Callable[[Episode], RewardOutput]
    """Episode of device arrays -> RewardOutput of device arrays; device reads go through `runtime.to_host`."""


DataRows = Sequence[Mapping[str, Any]]
"""The N data set rows of the queries, with the fields of the file; empty in self-play."""


@dataclass(frozen=True)
class HostReward:
    """A component that scores texts on the host."""

    name: str
    kind: Kind
    weight: float
    score: Callable[[list[str], list[list[str]], DataRows], RewardOutput]
    """(N queries, N lists of G answers, N rows or none) -> RewardOutput of numpy arrays. With several processes, each
    scores its share of the queries."""


Reward = DeviceReward | EpisodeReward | HostReward


def check_component(field: str, component: object) -> None:
    """Raises InputError unless `component` is a reward with fields of the declared types."""
    if not isinstance(component, DeviceReward | EpisodeReward | HostReward):
        remedy = (
            "must be a DeviceReward, EpisodeReward or HostReward; lsp_jax.reward.user_callable makes one of a function"
        )
        raise InputError(field, component, remedy)
    arguments.text(f"{field}.name", component.name)
    arguments.number(f"{field}.weight", component.weight)
    if not callable(component.score):
        raise InputError(f"{field}.score", component.score, "must be a function")


UNBOUNDED = (-math.inf, math.inf)


@partial(jax.tree_util.register_dataclass, data_fields=("weight", "clip"), meta_fields=("name", "kind", "standardize"))
@dataclass(frozen=True)
class RewardSpec:
    """How one component enters the weighted sum of its kind. A pytree: weight and bounds are traced scalars."""

    name: str
    kind: Kind
    weight: Scalar
    """Factor in the sum of its kind."""
    standardize: bool = False
    """Subtract the mean and divide by the standard deviation over the iteration's valid answers, before clipping."""
    clip: tuple[Scalar, Scalar] = UNBOUNDED
    """Lowest and highest value, applied before the weight."""


class Scores(NamedTuple):
    """The rewards of an episode, summed by kind."""

    task: jax.Array
    """float32 [N, G]: R."""
    quality: jax.Array
    """float32 [N, G]: R_Q."""
    valid_query: jax.Array
    """bool [N]: a valid query, within the task of every component."""
    valid_answer: jax.Array
    """bool [N, G]: scored by every component."""
    components: dict[str, jax.Array]
    """float32 [N, G] of each component before combination, for transcripts and metrics."""
    failed: dict[str, jax.Array]
    """bool [N, G]: answers that each component could not score."""


class WeightedReward(Protocol):
    """The attributes that the terms of a weighted sum have in common."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def weight(self) -> float: ...


def check_rewards(rewards: Sequence[WeightedReward], use_quality: bool) -> None:
    """Raises InputError for duplicate names, an unknown kind, weights that cancel, or no reward for the Solver."""
    names = [reward.name for reward in rewards]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError("rewards", ", ".join(repeated), "is the name of several components; names must be unique")
    for reward in rewards:
        if reward.kind not in ("task", "quality"):
            raise InputError(f"rewards.{reward.name}.kind", reward.kind, "must be 'task' or 'quality'")
        if not np.isfinite(reward.weight):
            raise InputError(f"rewards.{reward.name}.weight", reward.weight, "must be a finite number")
    active = [reward for reward in rewards if reward.kind == "task" or use_quality]
    if not active:
        raise InputError("rewards", names, "at least one component must reward the Solver: add a task reward")
    if sum(reward.weight for reward in active) == 0:
        weights = {reward.name: reward.weight for reward in active}
        raise InputError("rewards weights", weights, "sum to zero, so the components cancel")


def combine(
    specs: Sequence[RewardSpec], outputs: Sequence[RewardOutput], episode: Episode, use_quality: bool
) -> Scores:
    """Returns weighted sums by kind and the joint masks; `outputs` in the order of `specs`. Pure.

    Each component is standardised if its spec says so (over the answers that it could score, of valid queries), then
    clipped, then weighted. Without `use_quality` (LSP-Zero) a quality component is only measured and masks nothing.
    """
    shape = episode.answers.lengths.shape
    totals = {"task": jnp.zeros(shape, jnp.float32), "quality": jnp.zeros(shape, jnp.float32)}
    # a non-finite score counts as failed
    scored = [jnp.isfinite(output.values) & output.valid_answer for output in outputs]
    valid_N, valid_NG = episode.queries.valid, jnp.ones(shape, bool)
    for spec, output, scored_NG in zip(specs, outputs, scored, strict=True):
        if use_quality or spec.kind == "task":
            valid_NG, valid_N = valid_NG & scored_NG, valid_N & output.valid_query
    for spec, output, scored_NG in zip(specs, outputs, scored, strict=True):
        values_NG = jnp.where(scored_NG, output.values, 0.0)
        if spec.standardize:
            mean, deviation = mean_std(values_NG, scored_NG & valid_N[:, None])
            # equal values become 0: what remains after subtracting the mean is rounding error
            spread = deviation > 1e-6 * jnp.maximum(jnp.abs(mean), 1.0)
            values_NG = jnp.where(spread, (values_NG - mean) / jnp.where(spread, deviation, 1.0), 0.0)
        values_NG = jnp.where(scored_NG, jnp.clip(values_NG, *spec.clip), 0.0)
        totals[spec.kind] = totals[spec.kind] + spec.weight * values_NG
    components = {spec.name: output.values for spec, output in zip(specs, outputs, strict=True)}
    failed = {spec.name: ~scored_NG for spec, scored_NG in zip(specs, scored, strict=True)}
    return Scores(totals["task"], totals["quality"], valid_N, valid_NG, components, failed)


def solver_rewards(scores: Scores, use_quality: bool) -> tuple[jax.Array, jax.Array]:
    """Returns the Solver's reward of each answer, float32 [N, G], and a mask of those that count, bool [N, G]."""
    reward_NG = scores.task + scores.quality if use_quality else scores.task
    return reward_NG, scores.valid_answer & scores.valid_query[:, None]


def mean_std(values: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and (population) standard deviation of the values under the mask `counts`; 0 and 0 if it is empty."""
    number = jnp.maximum(jnp.sum(counts), 1)
    mean = jnp.sum(jnp.where(counts, values, 0.0)) / number
    return mean, jnp.sqrt(jnp.sum(jnp.where(counts, (values - mean) ** 2, 0.0)) / number)


def correlation(left: jax.Array, right: jax.Array, counts: jax.Array) -> jax.Array:
    """Pearson correlation of two components under the mask `counts`; 0 if one of them is constant."""
    left_mean, left_std = mean_std(left, counts)
    right_mean, right_std = mean_std(right, counts)
    covariance, _ = mean_std((left - left_mean) * (right - right_mean), counts)
    spread = left_std * right_std
    return jnp.where(spread > 0, covariance / jnp.where(spread > 0, spread, 1.0), 0.0)


def groups_per_chunk(queries: int, answers: int, rows: int) -> int:
    """Number of queries, with `answers` answers each, that a frozen model scores at a time.

    A divisor of `queries`, at least one, with about `rows` answers per row shard.
    """
    limit = max(1, min(queries, rows * row_shards() // answers))
    return max(size for size in range(1, limit + 1) if queries % size == 0)


class EpisodeTexts(NamedTuple):
    """The decoded texts of an episode."""

    queries: list[str]
    answers: list[list[str]]
    rows: DataRows = ()


def episode_texts(
    episode: Episode, tokenizer: Tokenizer, skip_special_tokens: bool = True, queries: range | None = None
) -> EpisodeTexts:
    """Reads the episode's tokens in one transfer and decodes them without stop tokens; `queries` selects some."""
    (query_ids, query_lengths), answer_ids, answer_lengths = runtime.to_host(
        (episode.queries.text, episode.answers.tokens, episode.answer_lengths)
    )

    def text(ids: np.ndarray, length: int) -> str:
        return tokenizer.decode(ids[:length].tolist(), skip_special_tokens=skip_special_tokens)

    selected = range(len(query_lengths)) if queries is None else queries
    return EpisodeTexts(
        [text(query_ids[n], query_lengths[n]) for n in selected],
        [[text(ids, length) for ids, length in zip(answer_ids[n], answer_lengths[n], strict=True)] for n in selected],
    )


def score_on_host(reward: HostReward, texts: EpisodeTexts) -> RewardOutput:
    """Scores `texts` with a host component and returns device arrays; an exception masks all answers and is logged.

    With several processes, each scores the `texts` of its share of the queries, and all get the complete output.
    """
    local = _scored(reward, texts) if texts.queries else ([], [], [])
    parts = processes.gather(f"reward {reward.name}", local)
    values, valid_answer, valid_query = ([row for part in parts for row in part[k]] for k in range(3))
    output = np.asarray(values, np.float32), np.asarray(valid_answer, bool), np.asarray(valid_query, bool)
    return RewardOutput(*replicate(output))


def _scored(reward: HostReward, texts: EpisodeTexts) -> tuple[list[Any], list[Any], list[Any]]:
    """Returns the output of `reward` for `texts` as lists."""
    shape = (len(texts.queries), len(texts.answers[0]))
    try:
        values, valid_answer, valid_query = reward.score(texts.queries, texts.answers, texts.rows)
        output = RewardOutput(
            np.asarray(values, np.float32).reshape(shape),
            np.asarray(valid_answer, bool).reshape(shape),
            np.asarray(valid_query, bool).reshape(shape[0]),
        )
    except Exception as error:  # user code may raise anything; the run continues without this score
        logger.warning("reward %s failed and is masked: %s: %s", reward.name, type(error).__name__, error)
        output = RewardOutput(np.zeros(shape, np.float32), np.zeros(shape, bool), np.ones(shape[0], bool))
    return output.values.tolist(), output.valid_answer.tolist(), output.valid_query.tolist()
