"""One iteration of LSP as pure stages, each jitted at module level, and `iteration`, the same stages as one function.

1. `challenge`: parameters -> Queries.
2. `solve`: queries spliced into the Solver's template -> Episode.
3. `score`: one compiled reward component (host components are scored by the trainer).
4. `rows_without_rewards`, `reference`: the episode's rows, and the frozen reference's log-probabilities of them;
   `novelty_metrics`: how near its queries are to earlier ones.
5. `learn_batch`: rewards and masks -> advantages -> the same rows to learn from, with the metrics of play and reward.
6. `learn`: as many times as there are inner epochs, `update`: the joint gradient and one optimiser step; the state is
   donated.

Everything static is in `Game`, so each stage compiles once. LSP, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lsp_jax.algorithm.learner_batch import ScoredBatch, learn_batch, rows_without_rewards
from lsp_jax.algorithm.spec import Game, prompt_sharing
from lsp_jax.core.stage import first_checked
from lsp_jax.learn.batch import LearnBatch, length_order
from lsp_jax.learn.nonfinite import first_not_finite
from lsp_jax.learn.novelty import Memory, cluster_entropy, nearest, remember, similarities
from lsp_jax.learn.update import (
    Metrics,
    Reference,
    TrainState,
    apply_gradients,
    fix_old,
    gradients,
    reference_statistics,
)
from lsp_jax.model import llama
from lsp_jax.model.sharding import context, shard_params
from lsp_jax.play import selfplay
from lsp_jax.play.selfplay import Episode, Queries
from lsp_jax.reward.base import DeviceReward, RewardSpec
from lsp_jax.reward.scoring import score_component


@jax.jit
def iteration_key(seed_key: jax.Array, state: TrainState) -> jax.Array:
    """The iteration's own key, from counters in the checkpoint: a resumed run draws what it would have drawn."""
    return jax.random.fold_in(jax.random.fold_in(seed_key, state.iteration), state.attempt)


@partial(jax.jit, static_argnames="dtype")
def _weight_sync(params: llama.Params, dtype: str) -> llama.Params:
    return shard_params(llama.cast(params, dtype), "decode")


@partial(jax.jit, static_argnames="game")
def adapters_cast(adapters: llama.Params, game: Game) -> llama.Params:
    """Adapters in the compute dtype."""
    return shard_params(llama.cast(adapters, game.compute_dtype))


def rollout_params(params: llama.Params, game: Game, base: llama.Params) -> llama.Params:
    """The parameters that play: the trained ones cast and laid out for decoding by one jitted function, or those
    themselves when on a single device they have the dtype. Adapters play beside the arrays of `base`, the frozen
    reference, which is not read otherwise."""
    if game.lora.rank:
        params = game.attach_adapters(base)(adapters_cast(params, game))
    same = context() is None and all(leaf.dtype == game.compute_dtype for leaf in jax.tree.leaves(params))
    return params if same else first_checked(_weight_sync, params, game.compute_dtype)


@partial(jax.jit, static_argnames="game")
def challenge(params: llama.Params, token_classes: jax.Array, key: jax.Array, game: Game) -> Queries:
    """N queries; `token_classes` uint8 [V] tells text, blank and control tokens apart."""
    return selfplay.challenge(
        params, token_classes, key, game.model, game.prompts, game.play, game.challenger_sampling, game.stop_ids
    )


@partial(jax.jit, static_argnames="game")
def solve(params: llama.Params, queries: Queries, key: jax.Array, game: Game) -> Episode:
    """The episode: G answers to each query."""
    prompts = selfplay.splice_queries(queries, game.prompts)
    answers = selfplay.solve(params, prompts, key, game.model, game.play, game.solver_sampling, game.stop_ids)
    return Episode(queries, prompts, answers)


@partial(jax.jit, static_argnames="game")
def reference(params: llama.Params, batch: LearnBatch, game: Game) -> tuple[Reference, Reference | None]:
    """The frozen reference's log-probabilities of every row."""
    static = game.model, game.loss, game.optimizer, game.temperatures, prompt_sharing(game)
    return reference_statistics(params, batch, *static)


@partial(jax.jit, static_argnames="game")
def joint_gradient(
    params: llama.Params,
    reference_params: llama.Params,
    batch: LearnBatch,
    references: tuple[Reference, Reference | None],
    game: Game,
) -> tuple[llama.Params, Metrics]:
    """The unclipped gradient of both roles, float32, and its metrics. `reference_params` are read for the `full` KL and
    beside adapters."""
    compute = llama.cast(params, game.compute_dtype)
    static = game.model, game.loss, game.optimizer, game.temperatures, prompt_sharing(game)
    return gradients(compute, reference_params, batch, references, *static, game.attach_adapters(reference_params))


@partial(jax.jit, static_argnames="game", donate_argnames="state")
def update(
    state: TrainState,
    reference_params: llama.Params,
    batch: LearnBatch,
    references: tuple[Reference, Reference | None],
    game: Game,
) -> tuple[TrainState, Metrics]:
    """One joint gradient step; the old state is consumed. The iteration's counter is `learn`'s to advance."""
    grads, metrics = joint_gradient(state.params, reference_params, batch, references, game)
    component = first_not_finite(batch, references, metrics["loss"])
    state, more = apply_gradients(state, grads, metrics["loss"], game.optimizer, component == 0)
    metrics["not_finite/component"] = component.astype(jnp.float32)
    errors = [value for name, value in metrics.items() if name.endswith("token_mult_prob_error")]
    metrics["sampling/token_mult_prob_error"] = jnp.max(jnp.stack(errors))
    return state, metrics | more


@partial(jax.jit, static_argnames="game")
def with_old_logprobs(
    params: llama.Params, reference_params: llama.Params, batch: LearnBatch, game: Game
) -> LearnBatch:
    """The batch with old log-probabilities, the denominators of inner epochs' ratios; `params` have played."""
    compute = game.attach_adapters(reference_params)(llama.cast(params, game.compute_dtype))
    static = game.model, game.optimizer, game.temperatures, game.recompute_old_logprobs, prompt_sharing(game)
    return fix_old(compute, batch, *static)


@partial(jax.jit, static_argnames="game")
def update_novelty(
    memory: Memory, embeddings: jax.Array, lengths: jax.Array, game: Game
) -> tuple[Memory, jax.Array, Metrics]:
    """The memory with this iteration's queries, each one's similarity [N] to the nearest earlier one, and metrics.

    `embeddings` [N, D] are of the rows as `rows_without_rewards` sorts them by the `lengths` [N] of the queries.
    """
    order = length_order(lengths, 1, jnp.ones(len(lengths), bool))
    embeddings = jnp.zeros_like(embeddings).at[order].set(embeddings)
    to_memory, among = similarities(memory, embeddings)
    nearest_similarity_N, threshold = nearest(to_memory, among), game.memory.near_duplicate
    metrics = {
        "queries/nearest_similarity": jnp.mean(nearest_similarity_N),
        "queries/near_duplicate_fraction": jnp.mean(nearest_similarity_N >= threshold),
        "queries/cluster_entropy": cluster_entropy(among, threshold),
    }
    metrics = {name: value.astype(jnp.float32) for name, value in metrics.items()}
    return shard_params(remember(memory, embeddings)), nearest_similarity_N, metrics


def novelty_metrics(
    state: TrainState, episode: Episode, references: tuple[Reference, Reference | None], game: Game
) -> tuple[Memory | None, jax.Array | None, Metrics]:
    """`update_novelty` of this iteration's queries; nothing where the Challenger does not learn."""
    embeddings, sampled = references[1] and references[1].embeddings, episode.queries.sampled
    if state.memory is None or embeddings is None or sampled is None:
        return state.memory, None, {}
    return first_checked(update_novelty, state.memory, embeddings, sampled.lengths, game)


@jax.jit
def _next(counter: jax.Array) -> jax.Array:
    return counter + 1


@jax.jit
def _inner_metrics(each: list[Metrics]) -> Metrics:
    """Of several updates on the same play: their mean; sampler against learner before anything moved; counts so far."""
    merged = {name: jnp.mean(jnp.stack([metrics[name] for metrics in each])) for name in each[0]}
    first = {name: value for name, value in each[0].items() if name.endswith("token_mult_prob_error")}
    failed = jnp.stack([metrics["not_finite/component"] for metrics in each])
    component = failed[jnp.argmax(failed > 0)]
    return merged | first | {"skipped_updates": each[-1]["skipped_updates"], "not_finite/component": component}


def learn(
    state: TrainState,
    reference_params: llama.Params,
    batch: LearnBatch,
    references: tuple[Reference, Reference | None],
    game: Game,
) -> tuple[TrainState, Metrics]:
    """All inner epochs of one iteration; `state` is consumed.

    Log-probabilities of both roles are fixed before the first update, and every update is the same program.
    """
    each: list[Metrics] = []
    attempt = state.attempt.astype(jnp.float32)  # before it is donated
    if game.loss.num_iterations > 1:
        batch = first_checked(with_old_logprobs, state.params, reference_params, batch, game)
    for _ in range(game.loss.num_iterations):
        state, metrics = first_checked(update, state, reference_params, batch, references, game)
        each.append(metrics)
    metrics = each[0] if len(each) == 1 else _inner_metrics(each)
    return state._replace(iteration=_next(state.iteration)), metrics | {"attempt": attempt}


def iteration(
    state: TrainState,
    reference_params: llama.Params,
    reward_params: Sequence[Any],
    token_classes: jax.Array,
    seed_key: jax.Array,
    rewards: Sequence[DeviceReward],
    game: Game,
) -> tuple[TrainState, ScoredBatch, Metrics]:
    """A whole iteration with compiled rewards; composes under `jax.jit` (close over `rewards` and `game`)."""
    key = iteration_key(seed_key, state)
    params = rollout_params(state.params, game, reference_params)
    episode = solve(params, challenge(params, token_classes, key, game), key, game)
    outputs = tuple(score_component(reward.score, p, episode) for reward, p in zip(rewards, reward_params, strict=True))
    specs = tuple(RewardSpec(reward.name, reward.kind, reward.weight) for reward in rewards)
    references = reference(reference_params, rows_without_rewards(episode, game), game)
    memory, nearest_similarity_N, novelty = novelty_metrics(state, episode, references, game)
    learnable = learn_batch(episode, outputs, specs, game, nearest_similarity_N=nearest_similarity_N)
    state, metrics = learn(state._replace(memory=memory), reference_params, learnable.batch, references, game)
    return state, learnable, learnable.metrics | novelty | metrics
