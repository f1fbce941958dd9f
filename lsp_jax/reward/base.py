"""Reward components, and how several become the task and quality rewards of an episode.

A component says what it measures: a `task` reward is negated for the Challenger, a `quality` reward is not. It scores
on device (a pure function of its own parameters and the episode), on the host (a function of texts), or from the host
with programs of its own (a judge whose words are read between two of them). What it cannot score it masks: a failure is
never a good score.

How components are mixed (standardised, clipped, weighted) is not theirs to say: that is `RewardSpec` and `combine`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lsp_jax.core import processes, runtime
from lsp_jax.core.errors import InputError
from lsp_jax.model.sharding import replicate, row_shards
from lsp_jax.play.selfplay import Episode
from lsp_jax.text.tokenizer import Tokenizer

Kind = Literal["task", "quality"]
logger: logging.Logger = logging.getLogger(__name__)


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
class EpisodeReward:
    """A component that is called with the episode on the host and runs compiled programs as it likes."""

    name: str
    kind: Kind
    weight: float
    score: Callable[[Episode], RewardOutput]
    """Episode of device arrays -> RewardOutput of device arrays; reads pass through `host.to_host`."""


Rows = Sequence[Mapping[str, Any]]
"""The data set's rows behind the N queries, as the file spells them; empty in self-play."""


@dataclass(frozen=True)
class HostReward:
    """A component that reads texts on the host."""

    name: str
    kind: Kind
    weight: float
    score: Callable[[list[str], list[list[str]], Rows], RewardOutput]
    """(N queries, N lists of G answers, N rows or none) -> RewardOutput of numpy arrays. With several processes each is
    called with its share of the queries."""


Reward = DeviceReward | EpisodeReward | HostReward


class RewardSpec(NamedTuple):
    """How one component enters the sum of its kind; hashable."""

    name: str
    kind: Kind
    weight: float
    standardize: bool = False
    """Subtract the mean and divide by the standard deviation over the iteration's valid answers, before clipping."""
    clip: tuple[float, float] | None = None
    """Lowest and highest value, applied before the weight."""


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
    """float32 [N, G] of each component before it is mixed, for transcripts and statistics."""
    failed: dict[str, jax.Array]
    """bool [N, G]: which answers each component could not score."""


class Named(Protocol):
    """The attributes that a weighted sum needs of its terms."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def weight(self) -> float: ...


def check_rewards(rewards: Sequence[Named], use_quality: bool) -> None:
    """InputError for repeated names, an unknown kind, weights that cancel, or nothing that reaches the Solver."""
    names = [reward.name for reward in rewards]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError("rewards", ", ".join(repeated), "several components have this name; names must differ")
    for reward in rewards:
        if reward.kind not in ("task", "quality"):
            raise InputError(f"rewards.{reward.name}.kind", reward.kind, "must be 'task' or 'quality'")
        if not np.isfinite(reward.weight):
            raise InputError(f"rewards.{reward.name}.weight", reward.weight, "must be a finite number")
    reach = [reward for reward in rewards if reward.kind == "task" or use_quality]
    if not reach:
        raise InputError("rewards", names, "at least one component must reach the Solver: add a task reward")
    if sum(reward.weight for reward in reach) == 0:
        weights = {reward.name: reward.weight for reward in reach}
        raise InputError("rewards weights", weights, "sum to zero: what one component gives another takes away")


def combine(
    specs: Sequence[RewardSpec], outputs: Sequence[RewardOutput], episode: Episode, use_quality: bool
) -> Scores:
    """Weighted sums by kind and the joint masks; `outputs` in the order of `specs`. Pure.

    Each component is standardised if its spec says so, over the answers that it could score of queries that count, then
    clipped, then weighted. Without `use_quality` (LSP-Zero) a quality component masks nothing: it is only measured.
    """
    shape = episode.answers.lengths.shape
    totals = {"task": jnp.zeros(shape, jnp.float32), "quality": jnp.zeros(shape, jnp.float32)}
    # a non-finite score is a failed score, wherever it was made
    scored = [jnp.isfinite(output.values) & output.valid_answer for output in outputs]
    valid_query, valid_answer = episode.queries.valid, jnp.ones(shape, bool)
    for spec, output, finite in zip(specs, outputs, scored, strict=True):
        if use_quality or spec.kind == "task":
            valid_answer, valid_query = valid_answer & finite, valid_query & output.valid_query
    for spec, output, finite in zip(specs, outputs, scored, strict=True):
        values = jnp.where(finite, output.values, 0.0)
        if spec.standardize:
            mean, deviation = mean_std(values, finite & valid_query[:, None])
            # equal values stay at 0: what is left of them after the mean is rounding
            spread = deviation > 1e-6 * jnp.maximum(jnp.abs(mean), 1.0)
            values = jnp.where(spread, (values - mean) / jnp.where(spread, deviation, 1.0), 0.0)
        if spec.clip is not None:
            values = jnp.clip(values, *spec.clip)
        totals[spec.kind] = totals[spec.kind] + spec.weight * jnp.where(finite, values, 0.0)
    components = {spec.name: output.values for spec, output in zip(specs, outputs, strict=True)}
    failed = {spec.name: ~finite for spec, finite in zip(specs, scored, strict=True)}
    return Scores(totals["task"], totals["quality"], valid_query, valid_answer, components, failed)


def solver_rewards(scores: Scores, use_quality: bool) -> tuple[jax.Array, jax.Array]:
    """float32 [N, G] what each answer is worth to the Solver, and bool [N, G] which of them count."""
    reward = scores.task + scores.quality if use_quality else scores.task
    return reward, scores.valid_answer & scores.valid_query[:, None]


def mean_std(values: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation (divided by n) of the values that count; 0 and 0 when none does."""
    number = jnp.maximum(jnp.sum(counts), 1)
    mean = jnp.sum(jnp.where(counts, values, 0.0)) / number
    return mean, jnp.sqrt(jnp.sum(jnp.where(counts, (values - mean) ** 2, 0.0)) / number)


def correlation(left: jax.Array, right: jax.Array, counts: jax.Array) -> jax.Array:
    """Pearson's correlation of two components over the answers that count; 0 where one of them does not vary."""
    left_mean, left_std = mean_std(left, counts)
    right_mean, right_std = mean_std(right, counts)
    covariance, _ = mean_std((left - left_mean) * (right - right_mean), counts)
    spread = left_std * right_std
    return jnp.where(spread > 0, covariance / jnp.where(spread > 0, spread, 1.0), 0.0)


def groups_at_once(queries: int, answers: int, rows: int) -> int:
    """How many queries with their `answers` answers each a frozen model reads at one time: about `rows` answers on each
    device that has rows of its own, at least one group, and a divisor of `queries`."""
    limit = max(1, min(queries, rows * row_shards() // answers))
    return max(size for size in range(1, limit + 1) if queries % size == 0)


class EpisodeTexts(NamedTuple):
    """An episode in words."""

    queries: list[str]
    answers: list[list[str]]
    rows: Rows = ()


def episode_texts(
    episode: Episode, tokenizer: Tokenizer, skip_special_tokens: bool = True, queries: range | None = None
) -> EpisodeTexts:
    """Reads the episode's tokens once and decodes them, without the stop tokens; of `queries` alone where given."""
    (query_ids, query_lengths), answer_ids, answer_lengths = runtime.to_host(
        (episode.queries.text, episode.answers.tokens, episode.answer_lengths)
    )

    def text(ids: np.ndarray, length: int) -> str:
        return tokenizer.decode(ids[:length].tolist(), skip_special_tokens=skip_special_tokens)

    picked = range(len(query_lengths)) if queries is None else queries
    return EpisodeTexts(
        [text(query_ids[n], query_lengths[n]) for n in picked],
        [[text(ids, length) for ids, length in zip(answer_ids[n], answer_lengths[n], strict=True)] for n in picked],
    )


def score_on_host(reward: HostReward, texts: EpisodeTexts) -> RewardOutput:
    """One host component's output as device arrays; an exception masks every answer and is logged.

    With several processes each scores the `texts` of its share of the queries, and all get the whole.
    """
    mine = _scored(reward, texts) if texts.queries else ([], [], [])
    parts = processes.gather(f"reward {reward.name}", mine)
    values, valid_answer, valid_query = ([row for part in parts for row in part[k]] for k in range(3))
    output = np.asarray(values, np.float32), np.asarray(valid_answer, bool), np.asarray(valid_query, bool)
    return RewardOutput(*replicate(output))


def _scored(reward: HostReward, texts: EpisodeTexts) -> tuple[list[Any], list[Any], list[Any]]:
    """The values of `reward` for `texts`, as lists."""
    shape = (len(texts.queries), len(texts.answers[0]))
    try:
        values, valid_answer, valid_query = reward.score(texts.queries, texts.answers, texts.rows)
        output = RewardOutput(
            np.asarray(values, np.float32).reshape(shape),
            np.asarray(valid_answer, bool).reshape(shape),
            np.asarray(valid_query, bool).reshape(shape[0]),
        )
    except Exception as error:  # user code may raise anything; the run goes on without this score
        logger.warning("reward %s failed and is masked: %s: %s", reward.name, type(error).__name__, error)
        output = RewardOutput(np.zeros(shape, np.float32), np.zeros(shape, bool), np.ones(shape[0], bool))
    return output.values.tolist(), output.valid_answer.tolist(), output.valid_query.tolist()
