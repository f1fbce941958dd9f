"""Metrics of rollouts and rewards: means over the valid rows, computed on the device."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp

from lsp_jax.learn.advantages import Advantages
from lsp_jax.learn.optimizer import Metrics
from lsp_jax.play.decode import Completions
from lsp_jax.play.selfplay import Episode, Queries
from lsp_jax.reward.base import Scores, correlation, mean_std


def play_metrics(episode: Episode, scores: Scores, result: Advantages) -> Metrics:
    """Metrics of an episode and its scores, float32 scalars by name (defined in `reporting/metrics.py`)."""
    metrics: Metrics = {}
    for role, values, counts in (
        ("solver", result.solver_reward, result.answer_counts),
        ("challenger", result.challenger_reward, result.query_counts),
    ):
        metrics[f"{role}/reward"], metrics[f"{role}/reward_std"] = mean_std(values, counts)
    played: list[tuple[str, Completions]] = [("solver", episode.answers)]
    if episode.queries.sampled is not None:
        played.append(("challenger", episode.queries.sampled))
    for role, completions in played:
        metrics[f"{role}/completions/mean_length"] = jnp.mean(completions.lengths.astype(jnp.float32))
        metrics[f"{role}/completions/max_length"] = jnp.max(completions.lengths)
        metrics[f"{role}/completions/clipped_ratio"] = jnp.mean(~completions.stopped)
    for name, values in scores.components.items():
        counts = result.answer_counts & jnp.isfinite(values)
        metrics[f"rewards/{name}/mean"], metrics[f"rewards/{name}/std"] = mean_std(values, counts)
        metrics[f"rewards/{name}/failed_fraction"] = jnp.mean(scores.failed[name])
    for one, other in itertools.combinations(scores.components, 2):
        pair = scores.components[one], scores.components[other]
        metrics[f"rewards/{one}/correlation/{other}"] = correlation(*pair, result.answer_counts)
    pair = scores.task, scores.quality
    metrics["rewards/task_quality_correlation"] = correlation(*pair, result.answer_counts)
    # compares rewards, not advantages: those of equal rewards need not be exactly 0
    highest_N = jnp.max(jnp.where(result.answer_counts, result.solver_reward, -jnp.inf), axis=1)
    lowest_N = jnp.min(jnp.where(result.answer_counts, result.solver_reward, jnp.inf), axis=1)
    metrics["solver/frac_reward_zero_std"] = jnp.mean(highest_N <= lowest_N)
    metrics["solver/prompts/mean_length"] = jnp.mean(episode.prompts[1].astype(jnp.float32))
    metrics["queries/valid_fraction"] = jnp.mean(scores.valid_query)
    metrics["queries/unique_fraction"] = _unique_fraction(episode.queries)
    if episode.queries.leaks is not None:
        metrics["queries/leak_fraction"] = jnp.mean(episode.queries.leaks)
    metrics |= _values(scores.task, result)
    metrics["answers/valid_fraction"] = jnp.mean(scores.valid_answer)
    metrics["completions/tokens"] = tokens_of(episode)
    return {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}


@jax.jit
def tokens_of(episode: Episode) -> jax.Array:
    """Number of tokens sampled by both roles, float32."""
    sampled = episode.queries.sampled
    asked = 0 if sampled is None else jnp.sum(sampled.lengths)
    return (jnp.sum(episode.answers.lengths) + asked).astype(jnp.float32)


def _values(task_NG: jax.Array, result: Advantages) -> Metrics:
    """Quantiles of V(q), the mean task reward of a query's valid answers, over queries that have any; 0 without one."""
    answered_N = jnp.sum(result.answer_counts, axis=1)
    value_N = jnp.sum(jnp.where(result.answer_counts, task_NG, 0.0), axis=1) / jnp.maximum(answered_N, 1)
    value_N = jnp.sort(jnp.where(answered_N > 0, value_N, jnp.inf))  # queries without valid answers last
    number = jnp.sum(answered_N > 0)
    quantiles = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "max": 1.0}
    ranks = {name: jnp.round(quantile * (number - 1)).astype(jnp.int32) for name, quantile in quantiles.items()}
    return {f"queries/value/{name}": jnp.where(number > 0, value_N[rank], 0.0) for name, rank in ranks.items()}


def _unique_fraction(queries: Queries) -> jax.Array:
    """Fraction of distinct queries, compared by token ids."""
    tokens_NT, lengths_N = queries.text
    tokens_NT = jnp.where(jnp.arange(tokens_NT.shape[1])[None] < lengths_N[:, None], tokens_NT, -1)
    same_NN = jnp.all(tokens_NT[:, None] == tokens_NT[None], axis=-1)
    return jnp.mean(~jnp.any(jnp.tril(same_NN, -1), axis=-1))  # equal to no earlier query
