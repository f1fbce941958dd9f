"""Metrics of an iteration's play and rewards: means over the rows that count, computed on the device."""

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
    """Means over what counts; names are listed in `reporting/metrics.py`."""
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
    # the rewards themselves: centred on their mean, equal ones need not be exactly 0
    highest = jnp.max(jnp.where(result.answer_counts, result.solver_reward, -jnp.inf), axis=1)
    lowest = jnp.min(jnp.where(result.answer_counts, result.solver_reward, jnp.inf), axis=1)
    flat = highest <= lowest
    metrics["solver/frac_reward_zero_std"] = jnp.mean(flat)
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
    """float32: tokens sampled by both roles."""
    sampled = episode.queries.sampled
    asked = 0 if sampled is None else jnp.sum(sampled.lengths)
    return (jnp.sum(episode.answers.lengths) + asked).astype(jnp.float32)


def _values(task: jax.Array, result: Advantages) -> Metrics:
    """How V(q), the mean task reward of a query's answers, is spread over the queries that have any; 0 without one."""
    answered = jnp.sum(result.answer_counts, axis=1)
    value = jnp.sum(jnp.where(result.answer_counts, task, 0.0), axis=1) / jnp.maximum(answered, 1)
    value = jnp.sort(jnp.where(answered > 0, value, jnp.inf))  # those without one at the end
    number = jnp.sum(answered > 0)
    at = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "max": 1.0}
    places = {name: jnp.round(share * (number - 1)).astype(jnp.int32) for name, share in at.items()}
    return {f"queries/value/{name}": jnp.where(number > 0, value[place], 0.0) for name, place in places.items()}


def _unique_fraction(queries: Queries) -> jax.Array:
    """Distinct queries over N, by their ids."""
    tokens, lengths = queries.text
    real = jnp.where(jnp.arange(tokens.shape[1])[None] < lengths[:, None], tokens, -1)
    same = jnp.all(real[:, None] == real[None], axis=-1)
    earlier = jnp.tril(same, -1)
    return jnp.mean(~jnp.any(earlier, axis=-1))
