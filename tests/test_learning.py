"""The optimiser learns: on a tiny random model the reward of a compiled component rises within 30 iterations.

Also noise: two iterations differ, another `attempt` differs, the same seed twice is the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsp_jax.algorithm import rollout, stages
from lsp_jax.algorithm.spec import GameSpec
from lsp_jax.learn.losses import LossConfig
from lsp_jax.learn.optimizer import OptimizerConfig, TrainState, init_state
from lsp_jax.learn.spec import Hyperparameters
from lsp_jax.model import llama
from lsp_jax.play.selfplay import Episode, PlayConfig
from lsp_jax.reward.base import DeviceReward, RewardOutput
from lsp_jax.text.prompts import PlayPrompts, TokenTemplate
from lsp_jax.text.tokenizer import SPECIAL, TEXT
from specs import composed_iteration, game_spec
from tiny import tiny_config, tiny_params

STOPS, TAG, WANTED = (0, 9, 10, 11), 1, 2

VOCABULARY = 12
KINDS = np.full(VOCABULARY, TEXT, np.uint8)
KINDS[[*STOPS, TAG]] = SPECIAL
MODEL = tiny_config(
    vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, initializer_range=0.15
)
LOSS = LossConfig(beta=0.01)
ITERATIONS = 30
LOSSES = {
    "lsp": LOSS,
    "lsp-zero": replace(LOSS, use_quality=False),
    "solver-alone": replace(LOSS, alpha_challenger=0.0),
}


def game_of(loss: LossConfig) -> tuple[GameSpec, Hyperparameters]:
    return game_spec(
        MODEL,
        PlayPrompts((TAG, 3, 4, TAG), (), TokenTemplate((TAG, 5), (TAG,)), ()),
        STOPS,
        play=PlayConfig(num_queries=8, num_generations=8, max_query_length=8, max_completion_length=4),
        loss=loss,
        optimizer=OptimizerConfig(learning_rate=0.02, micro_batch_size=64, remat="none"),
    )


GAME, _ = game_of(LOSS)


def everything_valid(values: jax.Array) -> RewardOutput:
    return RewardOutput(values, jnp.ones(values.shape, bool), jnp.ones(values.shape[0], bool))


def share(_: None, episode: Episode) -> RewardOutput:
    """The share of WANTED in an answer."""
    wanted = jnp.sum(episode.answers.tokens == WANTED, axis=-1)  # what follows the end is 0
    return everything_valid(wanted / jnp.maximum(episode.answer_lengths, 1))


def ended(_: None, episode: Episode) -> RewardOutput:
    """1 for an answer that ends by itself: a quality, and what keeps the queries of a Solver trained alone valid."""
    return everything_valid(episode.answers.stopped.astype(jnp.float32))


REWARDS = (DeviceReward("share", "task", 1.0, share), DeviceReward("ended", "quality", 0.4, ended))

Step = Callable[[TrainState, llama.Params, jax.Array], tuple[TrainState, Any, dict[str, jax.Array]]]


@cache
def step(method: str) -> Step:
    """One whole iteration as one program."""
    game, hyper = game_of(LOSSES[method])
    composed, token_classes = composed_iteration(REWARDS, game), jnp.asarray(KINDS)

    @jax.jit
    def one(state: TrainState, reference: llama.Params, key: jax.Array) -> Any:
        return composed(state, reference, (None, None), token_classes, key, hyper)

    return one


def start() -> tuple[TrainState, llama.Params]:
    params = tiny_params(MODEL, seed=1)
    return init_state(params, GAME.learner.optimizer), params


def run(method: str, seed: int, iterations: int = ITERATIONS) -> tuple[TrainState, dict[str, np.ndarray]]:
    """The final state and every metric by iteration."""
    state, reference = start()
    rows = []
    for _ in range(iterations):
        state, _, metrics = step(method)(state, reference, jax.random.key(seed))
        rows.append(metrics)
    rows = jax.device_get(rows)
    return state, {name: np.array([row[name] for row in rows]) for name in rows[0]}


def assert_learns(method: str) -> None:
    for seed in range(3):
        _, metrics = run(method, seed)
        for name in ("solver/reward", "rewards/share/mean"):
            values = metrics[name]
            assert values[-5:].mean() > values[:5].mean() + 0.4, (seed, name, values)
        assert metrics["skipped_updates"][-1] == 0
        assert ("challenger/loss" in metrics) == (method != "solver-alone")


@pytest.mark.full
def test_lsp_learns() -> None:
    assert_learns("lsp")


@pytest.mark.full
@pytest.mark.parametrize("method", [pytest.param("lsp-zero", marks=pytest.mark.slow), "solver-alone"])
def test_learns(method: str) -> None:
    assert_learns(method)


def same(left: Any, right: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


@pytest.mark.full
def test_the_same_seed_is_the_same_run_and_another_is_not() -> None:
    first, again, other = run("lsp", 0, 3), run("lsp", 0, 3), run("lsp", 1, 3)
    assert same(first[0], again[0]) and same(first[1], again[1])
    assert not same(first[1], other[1])


@pytest.mark.full
def test_each_iteration_and_each_attempt_draws_its_own_noise() -> None:
    """Queries and answers from the same parameters, with counters as the only difference."""
    params, token_classes = start()[1], jnp.asarray(KINDS)

    def play(iteration: int, attempt: int, seed: int = 0) -> np.ndarray:
        key = stages.iteration_key(jax.random.key(seed), jnp.int32(iteration), jnp.int32(attempt))
        episode = rollout.solve(params, rollout.challenge(params, token_classes, key, GAME), key, GAME)
        tokens = (episode.queries.sampled.tokens, episode.answers.tokens)
        return np.concatenate([np.asarray(x).ravel() for x in tokens])

    played = {at: play(*at) for at in [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (0, 0, 1)]}
    for at, tokens in played.items():
        np.testing.assert_array_equal(tokens, play(*at))
        differing = [np.mean(tokens != other) for place, other in played.items() if place != at]
        assert min(differing) > 0.2


@pytest.mark.full
def test_an_iteration_counts_itself_and_leaves_the_attempt() -> None:
    state, reference = start()
    after, _, _ = step("lsp")(state, reference, jax.random.key(0))
    assert (int(after.iteration), int(after.attempt), int(after.skipped)) == (1, 0, 0)
