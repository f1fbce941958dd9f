"""Specifications and traced scalars from configurations, and an iteration as one function of arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lsp_jax.algorithm import rollout, stages
from lsp_jax.algorithm.learner_batch import ScoredBatch
from lsp_jax.algorithm.spec import GameSpec, hyperparameters
from lsp_jax.config import TrainConfig
from lsp_jax.core.stage import Backend
from lsp_jax.learn.losses import LossConfig
from lsp_jax.learn.optimizer import Metrics, OptimizerConfig, TrainState
from lsp_jax.learn.spec import Hyperparameters, LearnerSpec, RoleSpec
from lsp_jax.model.config import LlamaConfig
from lsp_jax.play.selfplay import Episode, Queries
from lsp_jax.reward.base import DeviceReward, RewardOutput, RewardSpec
from lsp_jax.reward.scoring import score_component
from lsp_jax.text.prompts import PlayPrompts


def game_spec(
    model: LlamaConfig,
    prompts: PlayPrompts,
    stop_ids: tuple[int, ...] = (),
    compute_dtype: str = "float32",
    **fields: Any,
) -> tuple[GameSpec, Hyperparameters]:
    """Of a run whose `TrainConfig` has those `fields`."""
    config = TrainConfig(**fields)
    return GameSpec.of(config, model, prompts, stop_ids, compute_dtype), hyperparameters(config)


def hyper(loss: LossConfig | None = None, optimizer: OptimizerConfig | None = None, **fields: Any) -> Hyperparameters:
    """The traced scalars of a run with those parts."""
    return hyperparameters(TrainConfig(loss=loss or LossConfig(), optimizer=optimizer or OptimizerConfig(), **fields))


def learner_spec(
    model: LlamaConfig,
    loss: LossConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    temperatures: tuple[float, float] = (1.0, 1.0),
    prompt_groups: tuple[int, int] = (1, 1),
) -> LearnerSpec:
    """The learner of a run with those parts, in float32; temperatures and rows a prompt are the Solver's and the
    Challenger's."""
    loss, optimizer = loss or LossConfig(), optimizer or OptimizerConfig()
    return LearnerSpec(
        model=model,
        loss=loss.spec,
        optimizer=optimizer.spec,
        micro_batch_size=optimizer.micro_batch_size,
        logprob_chunk=optimizer.logprob_chunk,
        remat=optimizer.remat,
        solver=RoleSpec(temperatures[0], prompt_groups[0]),
        challenger=RoleSpec(temperatures[1], prompt_groups[1]),
    )


class CompiledSource:
    """Self-play with compiled rewards alone, whose parameters and whose tokens' classes are given: can be traced."""

    def __init__(
        self, rewards: Sequence[DeviceReward], reward_params: Sequence[Any], token_classes: jax.Array, game: GameSpec
    ) -> None:
        self._rewards, self._params, self._token_classes, self._game = rewards, reward_params, token_classes, game
        self.specs: tuple[RewardSpec, ...] = tuple(RewardSpec(r.name, r.kind, r.weight) for r in rewards)

    def queries(self, on: Backend, params: Any, key: jax.Array) -> Queries:
        return rollout.challenge(params, self._token_classes, key, self._game, on)

    def score(
        self, on: Backend, params: Any, key: jax.Array, episode: Episode
    ) -> tuple[Episode, Callable[[], tuple[RewardOutput, ...]]]:
        pairs = zip(self._rewards, self._params, strict=True)
        outputs = tuple(on.call(score_component, params, episode, score=reward.score) for reward, params in pairs)
        return episode, lambda: outputs


Composed = Callable[..., tuple[TrainState, ScoredBatch, Metrics]]


def composed_iteration(rewards: Sequence[DeviceReward], game: GameSpec) -> Composed:
    """(state, reference, reward parameters, token classes, seed key, hyperparameters) -> (state, batch, metrics): the
    stages of an iteration as one function, to be jitted."""

    def run(
        state: TrainState,
        reference: Any,
        reward_params: Sequence[Any],
        token_classes: jax.Array,
        seed_key: jax.Array,
        hyper: Hyperparameters,
    ) -> tuple[TrainState, ScoredBatch, Metrics]:
        source = CompiledSource(rewards, reward_params, token_classes, game)
        result = stages.iteration(Backend(), source, state, reference, (seed_key, hyper, jnp.float32(1)), game)
        return result.state, result.learnable, result.metrics

    return run
