"""One iteration of LSP as stages, and `iteration`, their order.

The trainer runs the stages and times them, tests trace them into one program, `lsp-jax plan` compiles them for another
machine: all walk `iteration` here, each with a `Backend` and a `Source` of its own.

1. `rollout_params`: the parameters in the layout and dtype of decoding.
2. `rollout.challenge`, `rollout.solve`: queries, and G answers to each -> Episode.
3. the source's rewards.
4. `rows_without_rewards`, `reference_logprobs`: the rows, and the frozen reference's log-probabilities of them;
   `novelty_metrics`: how near the queries are to earlier ones.
5. `learn_batch`: rewards and masks -> advantages -> the same rows to learn from, with the metrics of play and reward.
6. `learn`: as many times as there are inner epochs, `update`: the joint gradient and one optimiser step; the state is
   donated.

LSP, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lsp_jax.algorithm import rollout
from lsp_jax.algorithm.learner_batch import ScoredBatch, learn_batch, rows_without_rewards
from lsp_jax.algorithm.spec import GameSpec
from lsp_jax.core.stage import Backend, Call, execute, stage
from lsp_jax.learn.batch import LearnBatch, References, length_order
from lsp_jax.learn.novelty import Memory, cluster_entropy, nearest, remember, similarities
from lsp_jax.learn.optimizer import Metrics, TrainState
from lsp_jax.learn.spec import Hyperparameters
from lsp_jax.learn.update import reference_logprobs, update, with_old_logprobs
from lsp_jax.model import llama
from lsp_jax.model.lora import LoraConfig, merge_trees, scale_adapters
from lsp_jax.model.sharding import context, shard_params
from lsp_jax.play.selfplay import Episode, Queries
from lsp_jax.reward.base import RewardOutput, RewardSpec


class Source(Protocol):
    """Where an iteration's queries and rewards come from."""

    @property
    def specs(self) -> tuple[RewardSpec, ...]:
        """How the rewards are mixed."""
        ...

    def queries(self, on: Backend, params: llama.Params, key: jax.Array) -> Queries:
        """The Challenger's queries, or a data set's."""
        ...

    def score(
        self, on: Backend, params: llama.Params, key: jax.Array, episode: Episode
    ) -> tuple[Episode, Callable[[], tuple[RewardOutput, ...]]]:
        """Begins to score the episode, or one that takes its place; the function returns the outputs, in the order of
        `specs`, and is called while the devices run the reference."""
        ...


class IterationResult(NamedTuple):
    """One iteration's results."""

    state: TrainState
    """After the update."""
    episode: Episode
    learnable: ScoredBatch
    metrics: Metrics


def iteration(
    on: Backend,
    source: Source,
    state: TrainState,
    reference: llama.Params,
    inputs: tuple[jax.Array, Hyperparameters, jax.Array | float],
    game: GameSpec,
) -> IterationResult:
    """One iteration; `state` is consumed. `reference` are the frozen parameters in the compute dtype, `inputs` the
    seed's key, the hyperparameters, and a factor of the Challenger's loss: 0 while it is paused."""
    seed_key, hyper, challenger_weight = inputs
    on.sync("iteration")  # a process that is late is named here, not waited for in a collective
    key = on.call(iteration_key, seed_key, state.iteration, state.attempt)
    with on.phase("weight_sync"):
        params = on.ready(rollout_params(state.params, game, reference, on.call))
    with on.phase("challenge"):
        queries = on.ready(source.queries(on, params, key))
    with on.phase("solve"):
        episode = on.ready(rollout.solve(params, queries, key, game, on))
    on.sync("reward")
    episode, finish_scores = source.score(on, params, key, episode)
    del params, queries
    with on.phase("reference"):
        rows = on.call(rows_without_rewards, episode, game=game)
        loaded = on.load(reference)
        references = on.call(reference_logprobs, loaded, rows, spec=game.learner)
        del rows
        outputs = finish_scores()
        references = on.ready(references)
    with on.phase("reward"):
        memory, near, novelty = novelty_metrics(on.call, state.memory, episode, references, hyper)
        arguments = episode, outputs, hyper, challenger_weight, near
        learnable = on.ready(on.call(learn_batch, *arguments, specs=source.specs, game=game))
    on.sync("update")
    with on.phase("update"):
        # its log-probabilities are all that most updates need of the reference
        references = references._replace(params=loaded if game.learner.needs_base else None)
        del loaded
        state = state._replace(memory=memory)
        state, metrics = on.ready(learn(on.call, state, learnable.batch, references, game, hyper))
    return IterationResult(state, episode, learnable, learnable.metrics | novelty | metrics)


@stage()
def iteration_key(seed_key: jax.Array, iteration: jax.Array, attempt: jax.Array) -> jax.Array:
    """The iteration's own key, from counters in the checkpoint: a resumed run draws what it would have drawn."""
    return jax.random.fold_in(jax.random.fold_in(seed_key, iteration), attempt)


@stage(static="dtype")
def cast_for_decoding(params: llama.Params, dtype: str) -> llama.Params:
    """The parameters in `dtype`, laid out for decoding."""
    return shard_params(llama.cast(params, dtype), "decode")


@stage(static="dtype")
def cast_adapters(adapters: llama.Params, dtype: str) -> llama.Params:
    """Adapters in `dtype`."""
    return shard_params(llama.cast(adapters, dtype))


@stage(static="lora")
def adapters_for_products(adapters: llama.Params, lora: LoraConfig) -> llama.Params:
    """Adapters with their scale. (Within `cast_adapters` XLA might scale them before it rounds them.)"""
    return shard_params(scale_adapters(adapters, lora))


def rollout_params(params: llama.Params, game: GameSpec, base: llama.Params, call: Call = execute) -> llama.Params:
    """The parameters that play: the trained ones cast and laid out for decoding by one jitted function, or those
    themselves when on a single device they have the dtype. Adapters play beside the arrays of `base`, the frozen
    reference, which is not read otherwise."""
    dtype, lora = game.learner.compute_dtype, game.learner.lora
    if lora.rank:
        adapters = call(cast_adapters, params, dtype=dtype)
        params = merge_trees(base, call(adapters_for_products, adapters, lora=lora))
    same = context() is None and all(leaf.dtype == dtype for leaf in jax.tree.leaves(params))
    return params if same else call(cast_for_decoding, params, dtype=dtype)


@stage()
def update_novelty(
    memory: Memory, embeddings: jax.Array, lengths: jax.Array, threshold: jax.Array | float
) -> tuple[Memory, jax.Array, Metrics]:
    """The memory with this iteration's queries, each one's similarity [N] to the nearest earlier one, and metrics.

    `embeddings` [N, D] are of the rows as `rows_without_rewards` sorts them by the `lengths` [N] of the queries; two
    queries are near-duplicates from the similarity `threshold`.
    """
    order = length_order(lengths, 1, jnp.ones(len(lengths), bool))
    embeddings = jnp.zeros_like(embeddings).at[order].set(embeddings)
    to_memory, among = similarities(memory, embeddings)
    nearest_similarity_N = nearest(to_memory, among)
    metrics = {
        "queries/nearest_similarity": jnp.mean(nearest_similarity_N),
        "queries/near_duplicate_fraction": jnp.mean(nearest_similarity_N >= threshold),
        "queries/cluster_entropy": cluster_entropy(among, threshold),
    }
    metrics = {name: value.astype(jnp.float32) for name, value in metrics.items()}
    return shard_params(remember(memory, embeddings)), nearest_similarity_N, metrics


def novelty_metrics(
    call: Call, memory: Memory | None, episode: Episode, references: References, hyper: Hyperparameters
) -> tuple[Memory | None, jax.Array | None, Metrics]:
    """`update_novelty` of this iteration's queries; nothing where the Challenger does not learn."""
    embeddings, sampled = references.challenger and references.challenger.embeddings, episode.queries.sampled
    if memory is None or embeddings is None or sampled is None:
        return memory, None, {}
    return call(update_novelty, memory, embeddings, sampled.lengths, hyper.near_duplicate)


@stage()
def next_iteration(counter: jax.Array) -> jax.Array:
    """The counter of iterations, one higher."""
    return counter + 1


@stage()
def inner_metrics(each: list[Metrics]) -> Metrics:
    """Of several updates on the same play: their mean; sampler against learner before anything moved; counts so far."""
    merged = {name: jnp.mean(jnp.stack([metrics[name] for metrics in each])) for name in each[0]}
    first = {name: value for name, value in each[0].items() if name.endswith("token_mult_prob_error")}
    failed = jnp.stack([metrics["not_finite/component"] for metrics in each])
    component = failed[jnp.argmax(failed > 0)]
    return merged | first | {"skipped_updates": each[-1]["skipped_updates"], "not_finite/component": component}


def learn(
    call: Call,
    state: TrainState,
    batch: LearnBatch,
    references: References,
    game: GameSpec,
    hyper: Hyperparameters,
) -> tuple[TrainState, Metrics]:
    """All inner epochs of one iteration; `state` is consumed.

    Log-probabilities of both roles are fixed before the first update, and every update is the same program.
    """
    each: list[Metrics] = []
    attempt = call(as_metric, state.attempt)  # before it is donated
    if game.learner.loss.num_iterations > 1:
        batch = call(with_old_logprobs, state.params, references.params, batch, spec=game.learner)
    for _ in range(game.learner.loss.num_iterations):
        state, metrics = call(update, state, batch, references, hyper, spec=game.learner)
        each.append(metrics)
    metrics = each[0] if len(each) == 1 else call(inner_metrics, each)
    counter = call(next_iteration, state.iteration)
    return state._replace(iteration=counter), metrics | {"attempt": attempt}


@stage()
def as_metric(counter: jax.Array) -> jax.Array:
    """float32."""
    return counter.astype(jnp.float32)
