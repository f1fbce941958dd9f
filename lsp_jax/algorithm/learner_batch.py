"""From an episode to the rows that both roles learn from, in one order whether they are scored yet or not.

1. `rows_without_rewards`: the rows before any reward is known; the reference's pass needs no more.
2. `learn_batch`: rewards and masks -> advantages -> the rows of the update, with the metrics of play and reward.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsp_jax.algorithm.episode_metrics import play_metrics
from lsp_jax.algorithm.spec import Game, prompt_sharing
from lsp_jax.learn.advantages import Advantages, advantages
from lsp_jax.learn.batch import LearnBatch, by_length, make_rows
from lsp_jax.learn.update import Metrics
from lsp_jax.play.selfplay import Episode
from lsp_jax.reward.base import RewardOutput, RewardSpec, Scores, combine
from lsp_jax.text.prompts import ids_row


class ScoredBatch(NamedTuple):
    """The output of the stages before the update."""

    batch: LearnBatch
    advantages: Advantages
    scores: Scores
    metrics: Metrics


@partial(jax.jit, static_argnames="game")
def rows_without_rewards(episode: Episode, game: Game) -> LearnBatch:
    """The rows as `learn_batch` orders them, with advantages of 0; answers to valid queries count, and every query."""
    shape = episode.answers.lengths.shape
    answers = jnp.zeros(shape), jnp.broadcast_to(episode.queries.valid[:, None], shape)
    return _rows(episode, answers, (jnp.zeros(shape[0]), jnp.ones(shape[0], bool)), game)


@partial(jax.jit, static_argnames=("specs", "game"))
def learn_batch(
    episode: Episode,
    outputs: tuple[RewardOutput, ...],
    specs: tuple[RewardSpec, ...],
    game: Game,
    challenger_weight: jax.Array | float = 1.0,
    nearest_similarity_N: jax.Array | None = None,
) -> ScoredBatch:
    """Rewards -> advantages -> the rows of both roles, and the metrics of play and reward. `challenger_weight` is a
    factor of the Challenger's loss: 0 while it is paused; `nearest_similarity_N` is each query's highest similarity
    to an earlier one."""
    loss, penalty = game.loss, None
    scores = combine(specs, outputs, episode, loss.use_quality)
    if nearest_similarity_N is not None and game.memory.penalty:
        penalty = game.memory.penalty * (nearest_similarity_N >= game.memory.near_duplicate)
    result = advantages(
        scores.task,
        scores.quality,
        scores.valid_query,
        scores.valid_answer,
        loss.invalid_query_penalty,
        loss.use_quality,
        loss.scale_rewards,
        loss.value_gate,
        penalty,
    )
    answers, queries = (result.solver, result.answer_counts), (result.challenger, result.query_counts)
    batch = _rows(episode, answers, queries, game)
    if batch.challenger is not None:
        rows = batch.challenger
        batch = batch._replace(challenger=rows._replace(weights=rows.weights * challenger_weight))
    return ScoredBatch(batch, result, scores, play_metrics(episode, scores, result))


def _rows(
    episode: Episode, answers: tuple[jax.Array, jax.Array], queries: tuple[jax.Array, jax.Array], game: Game
) -> LearnBatch:
    """Rows of both roles from the advantages and counts of `answers` [N, G] and `queries` [N].

    They are sorted by what is known once they are played, so that neither rewards nor their masks change the order.
    """
    repeats, sharing, loss = game.play.num_generations, prompt_sharing(game), game.loss
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), episode.answers)
    solver = make_rows(
        jax.tree.map(lambda x: jnp.repeat(x, repeats, axis=0), episode.prompts),
        (flat.tokens, flat.lengths),
        flat.logprobs,
        flat.log_mass,
        answers[0].reshape(-1),
        answers[1].reshape(-1),
        1.0,
        loss.loss_type,
        game.play.max_completion_length,
    )
    solver = by_length(solver, sharing[0], jnp.repeat(episode.queries.valid, repeats))
    sampled = episode.queries.sampled
    if not game.trains_challenger or sampled is None:
        return LearnBatch(solver, None)
    challenger = make_rows(
        ids_row(game.prompts.challenger_ids),
        (sampled.tokens, sampled.lengths),
        sampled.logprobs,
        sampled.log_mass,
        *queries,
        loss.alpha_challenger,
        loss.loss_type,
        game.play.max_query_length,
    )
    return LearnBatch(solver, by_length(challenger, sharing[1], jnp.ones(len(queries[0]), bool)))
