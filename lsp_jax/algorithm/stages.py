"""One iteration of LSP as stages, and `iteration`, their order.

The trainer runs and times the stages, tests trace them into one program, `lsp-jax plan` compiles them for other
hardware: all call `iteration`, each with its own `Backend` and `Source`.

1. `rollout_params`: the parameters in the layout and dtype for decoding.
2. `rollout.challenge`, `rollout.solve`: queries, and G answers to each -> Episode.
3. `Source.score`: rewards.
4. `rows_without_rewards`, `reference_logprobs`: the rows, and their log-probabilities under the frozen reference;
   `novelty_metrics`: similarity of the queries to earlier ones.
5. `learn_batch`: rewards and masks -> advantages -> the same rows with advantages, and the metrics of rollouts and
   rewards.
6. `learn`: one `update` per inner epoch: the joint gradient and one optimiser step; the state is donated.

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
        """How the rewards are combined."""
        ...

    def queries(self, on: Backend, params: llama.Params, key: jax.Array) -> Queries:
        """Queries of the Challenger or of a data set."""
        ...

    def score(
        self, on: Backend, params: llama.Params, key: jax.Array, episode: Episode
    ) -> tuple[Episode, Callable[[], tuple[RewardOutput, ...]]]:
        """Starts scoring; returns the episode, which resampling may have changed, and a function that returns the
        outputs in the order of `specs`. It is called while the devices run the reference."""
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
    """Runs one iteration; `state` is donated. `reference` are the frozen parameters in the compute dtype; `inputs` are
    the seed's key, the hyperparameters, and a factor of the Challenger's loss, 0 while it is paused."""
    seed_key, hyper, challenger_weight = inputs
    on.sync("iteration")  # names a late process here; a collective would only wait for it
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
        arguments = episode, outputs, source.specs, hyper, challenger_weight, near
        learnable = on.ready(on.call(learn_batch, *arguments, game=game))
    on.sync("update")
    with on.phase("update"):
        # most updates need only the reference's log-probabilities, not its parameters
        references = references._replace(params=loaded if game.learner.needs_base else None)
        del loaded
        state = state._replace(memory=memory)
        state, metrics = on.ready(learn(on.call, state, learnable.batch, references, game, hyper))
    return IterationResult(state, episode, learnable, learnable.metrics | novelty | metrics)


@stage()
def iteration_key(seed_key: jax.Array, iteration: jax.Array, attempt: jax.Array) -> jax.Array:
    """The PRNG key of an iteration, derived from counters in the checkpoint, so that a resumed run is identical."""
    return jax.random.fold_in(jax.random.fold_in(seed_key, iteration), attempt)


@stage(static="dtype")
def cast_for_decoding(params: llama.Params, dtype: str) -> llama.Params:
    """The parameters in `dtype` and in the decode layout."""
    return shard_params(llama.cast(params, dtype), "decode")


@stage(static="dtype")
def cast_adapters(adapters: llama.Params, dtype: str) -> llama.Params:
    """The adapters in `dtype`."""
    return shard_params(llama.cast(adapters, dtype))


@stage(static="lora")
def adapters_for_products(adapters: llama.Params, lora: LoraConfig) -> llama.Params:
    """The adapters multiplied by their scale; not in `cast_adapters`, where XLA might scale before it rounds."""
    return shard_params(scale_adapters(adapters, lora))


def rollout_params(params: llama.Params, game: GameSpec, base: llama.Params, call: Call = execute) -> llama.Params:
    """The parameters for rollouts: the trained ones, cast and resharded for decoding; the same arrays on a single
    device if they already have the dtype. Adapters are merged into the tree of `base`, the frozen reference, which is
    read only then."""
    dtype, lora = game.learner.compute_dtype, game.learner.lora
    if lora.rank:
        adapters = call(cast_adapters, params, dtype=dtype)
        params = merge_trees(base, call(adapters_for_products, adapters, lora=lora))
    same = context() is None and all(leaf.dtype == dtype for leaf in jax.tree.leaves(params))
    return params if same else call(cast_for_decoding, params, dtype=dtype)


@stage()
def update_novelty(
    memory: Memory, embeddings_ND: jax.Array, lengths_N: jax.Array, threshold: jax.Array | float
) -> tuple[Memory, jax.Array, Metrics]:
    """Adds this iteration's queries to the memory; returns it, the highest similarity [N] of each query to an earlier
    one, and metrics.

    `embeddings_ND` are in the row order of `rows_without_rewards`, which sorts queries by `lengths_N`; queries with a
    similarity of at least `threshold` are near-duplicates.
    """
    order_N = length_order(lengths_N, 1, jnp.ones(len(lengths_N), bool))
    embeddings_ND = jnp.zeros_like(embeddings_ND).at[order_N].set(embeddings_ND)
    to_memory, among = similarities(memory, embeddings_ND)
    nearest_similarity_N = nearest(to_memory, among)
    metrics = {
        "queries/nearest_similarity": jnp.mean(nearest_similarity_N),
        "queries/near_duplicate_fraction": jnp.mean(nearest_similarity_N >= threshold),
        "queries/cluster_entropy": cluster_entropy(among, threshold),
    }
    metrics = {name: value.astype(jnp.float32) for name, value in metrics.items()}
    return shard_params(remember(memory, embeddings_ND)), nearest_similarity_N, metrics


def novelty_metrics(
    call: Call, memory: Memory | None, episode: Episode, references: References, hyper: Hyperparameters
) -> tuple[Memory | None, jax.Array | None, Metrics]:
    """Applies `update_novelty` to this iteration's queries; no metrics if the Challenger is not trained."""
    embeddings, sampled = references.challenger and references.challenger.embeddings, episode.queries.sampled
    if memory is None or embeddings is None or sampled is None:
        return memory, None, {}
    return call(update_novelty, memory, embeddings, sampled.lengths, hyper.near_duplicate)


@stage()
def next_iteration(counter: jax.Array) -> jax.Array:
    """Increments the iteration counter."""
    return counter + 1


@stage()
def inner_metrics(each: list[Metrics]) -> Metrics:
    """Combines the metrics of several updates on the same rollouts: means, except that the mismatch between sampler and
    learner is that of the first update, `skipped_updates` that of the last, and the non-finite component the first
    one found."""
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
    """Runs all inner epochs of one iteration; `state` is donated.

    Old log-probabilities of both roles are fixed before the first update; all updates run the same program.
    """
    each: list[Metrics] = []
    attempt = call(as_metric, state.attempt)  # read before the state is donated
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
    """The counter as a float32 metric."""
    return counter.astype(jnp.float32)
