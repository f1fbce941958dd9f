"""From an episode to the rows of the loss for both roles, in the same order before and after scoring.

1. `rows_without_rewards`: the rows before any reward is known, which suffice for the reference's forward pass.
2. `learn_batch`: rewards and masks -> advantages -> the rows of the update, with the metrics of rollouts and rewards.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsp_jax.algorithm.episode_metrics import play_metrics
from lsp_jax.algorithm.spec import GameSpec
from lsp_jax.core.stage import stage
from lsp_jax.learn.advantages import Advantages, GroupRewards, advantages
from lsp_jax.learn.batch import LearnBatch, Sampled, by_length, make_rows
from lsp_jax.learn.optimizer import Metrics
from lsp_jax.learn.spec import Hyperparameters
from lsp_jax.play.decode import Completions
from lsp_jax.play.selfplay import Episode
from lsp_jax.reward.base import RewardOutput, RewardSpec, Scores, combine
from lsp_jax.text.prompts import ids_row


class ScoredBatch(NamedTuple):
    """The output of the stages before the update."""

    batch: LearnBatch
    advantages: Advantages
    scores: Scores
    metrics: Metrics


@stage(static="game")
def rows_without_rewards(episode: Episode, game: GameSpec) -> LearnBatch:
    """The rows in the order of `learn_batch`, with advantages 0; all queries and all answers to valid queries count."""
    shape = episode.answers.lengths.shape
    answers = jnp.zeros(shape), jnp.broadcast_to(episode.queries.valid[:, None], shape)
    return _rows(episode, answers, (jnp.zeros(shape[0]), jnp.ones(shape[0], bool)), game, 1.0)


@stage(static="game")
def learn_batch(
    episode: Episode,
    outputs: tuple[RewardOutput, ...],
    specs: tuple[RewardSpec, ...],
    hyper: Hyperparameters,
    challenger_weight: jax.Array | float = 1.0,
    nearest_similarity_N: jax.Array | None = None,
    *,
    game: GameSpec,
) -> ScoredBatch:
    """Rewards -> advantages -> the rows of both roles, with the metrics of rollouts and rewards.

    `outputs` and `specs` are those of the reward components, in the same order. `challenger_weight` is a factor of the
    Challenger's loss, 0 while it is paused; `nearest_similarity_N` is the highest similarity of each query to an
    earlier one.
    """
    loss = game.learner.loss
    scores = combine(specs, outputs, episode, loss.use_quality)
    near_duplicate_N = None if nearest_similarity_N is None else nearest_similarity_N >= hyper.near_duplicate
    rewards = GroupRewards(scores.task, scores.quality, scores.valid_query, scores.valid_answer)
    result = advantages(rewards, loss, hyper, near_duplicate_N)
    answers, queries = (result.solver, result.answer_counts), (result.challenger, result.query_counts)
    batch = _rows(episode, answers, queries, game, hyper.alpha_challenger)
    if batch.challenger is not None:
        rows = batch.challenger
        batch = batch._replace(challenger=rows._replace(weights=rows.weights * challenger_weight))
    return ScoredBatch(batch, result, scores, play_metrics(episode, scores, result))


def _rows(
    episode: Episode,
    answers: tuple[jax.Array, jax.Array],
    queries: tuple[jax.Array, jax.Array],
    game: GameSpec,
    alpha_challenger: jax.Array | float,
) -> LearnBatch:
    """Rows of both roles from the advantages and counts of `answers` [N, G] and `queries` [N].

    The sort keys are known after sampling, so neither rewards nor their masks change the order.
    """
    repeats, learner = game.num_generations, game.learner
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), episode.answers)
    prompts = jax.tree.map(lambda x: jnp.repeat(x, repeats, axis=0), episode.prompts)
    advantages_B, counts_B = (x.reshape(-1) for x in answers)
    solver = make_rows(prompts, _sampled(flat), advantages_B, counts_B, 1.0, learner.loss.loss_type)
    valid_B = jnp.repeat(episode.queries.valid, repeats)
    solver = by_length(solver, learner.prompt_sharing(learner.solver), valid_B)
    sampled = episode.queries.sampled
    if not game.trains_challenger or sampled is None:
        return LearnBatch(solver, None)
    prompt = ids_row(game.prompts.challenger_ids)
    challenger = make_rows(prompt, _sampled(sampled), *queries, alpha_challenger, learner.loss.loss_type)
    every_N = jnp.ones(len(queries[0]), bool)
    return LearnBatch(solver, by_length(challenger, learner.prompt_sharing(learner.challenger), every_N))


def _sampled(completions: Completions) -> Sampled:
    return Sampled(completions.tokens, completions.lengths, completions.logprobs, completions.log_mass)
