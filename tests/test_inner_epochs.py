"""Inner epochs: several updates on one iteration's play, for both roles, one counter, one program."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lsp_jax.algorithm import rollout, stages
from lsp_jax.algorithm.learner_batch import learn_batch
from lsp_jax.algorithm.spec import GameSpec
from lsp_jax.core import runtime
from lsp_jax.core.stage import execute
from lsp_jax.learn.losses import LossConfig
from lsp_jax.learn.optimizer import OptimizerConfig, TrainState, init_state
from lsp_jax.learn.spec import Hyperparameters
from lsp_jax.learn.update import gradients, reference_logprobs, update, with_old_logprobs
from lsp_jax.play.sampler import SamplingConfig
from lsp_jax.play.selfplay import PlayConfig
from lsp_jax.reward.base import DeviceReward, RewardOutput, RewardSpec
from lsp_jax.text.prompts import PlayPrompts, TokenTemplate
from lsp_jax.text.tokenizer import TEXT
from lsp_jax.training.announce import policy_in_the_loss
from specs import composed_iteration, game_spec
from tiny import tiny_config, tiny_params

QUICK_COMPILES = True
MODEL = tiny_config(vocab_size=12, hidden_size=16, intermediate_size=16, num_hidden_layers=1, initializer_range=0.5)
PROMPTS = PlayPrompts((1, 5, 7), (3,), TokenTemplate((1, 2), (4,)), ((8, 9),))
LOSS = LossConfig(beta=0.1, num_iterations=3)
OPTIMIZER = OptimizerConfig(learning_rate=0.02, micro_batch_size=8, logprob_chunk=16, remat="none", warmup_steps=4)


def game_of(**changes: Any) -> tuple[GameSpec, Hyperparameters]:
    fields: dict[str, Any] = {
        "play": PlayConfig(num_queries=4, num_generations=3, max_query_length=5, max_completion_length=4),
        "sampling": SamplingConfig(temperature=0.7, top_p=0.9),
        "challenger_sampling": SamplingConfig(temperature=1.3, top_k=6),
        "loss": LOSS,
        "optimizer": OPTIMIZER,
    }
    return game_spec(MODEL, PROMPTS, (0, 10, 11), **fields | changes)


GAME, HYPER = game_of()
POLICY, REFERENCE = tiny_params(MODEL, seed=1), tiny_params(MODEL, seed=2)
KEY = jax.random.key(3)


def score(_: Any, episode: Any) -> RewardOutput:
    values = jnp.sum(episode.answers.tokens % 5, axis=-1).astype(jnp.float32)
    return RewardOutput(values, jnp.ones(values.shape, bool), jnp.ones(values.shape[0], bool))


def fresh() -> TrainState:
    return init_state(POLICY, GAME.learner.optimizer)


def play(game: GameSpec, state: TrainState, hyper: Hyperparameters = HYPER) -> tuple[Any, Any]:
    """The batch of one iteration and what the reference says of it."""
    key = stages.iteration_key(KEY, state.iteration, state.attempt)
    token_classes = jnp.full(MODEL.vocab_size, TEXT, jnp.uint8)
    episode = rollout.solve(state.params, rollout.challenge(state.params, token_classes, key, game), key, game)
    outputs, specs = (score(None, episode),), (RewardSpec("sum", "task", 1.0),)
    batch = learn_batch(episode, outputs, specs, hyper, game=game).batch
    return batch, reference_logprobs(REFERENCE, batch, game.learner)._replace(params=REFERENCE)


def learn(state: TrainState, batch: Any, references: Any) -> tuple[TrainState, Any]:
    return stages.learn(execute, state, batch, references, GAME, HYPER)


def norm(left: Any, right: Any) -> float:
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, left, right)))


@pytest.mark.full
@pytest.mark.parametrize("own", [False, pytest.param(True, marks=pytest.mark.full)])
def test_old_log_probabilities_are_those_of_the_sampled_distribution(own: bool) -> None:
    """Tempered, truncated sampling of both roles: the sampler's numbers with the kept mass are the learner's."""
    game, _ = game_of(loss=replace(LOSS, importance_cap=2.0 if own else 0.0))
    assert game.learner.recompute_old_logprobs == own
    batch, _ = play(game, fresh())
    old = with_old_logprobs(POLICY, REFERENCE, batch, game.learner)
    learner = reference_logprobs(POLICY, batch, game.learner)  # the learner's pass over the same rows
    for rows, mine in zip(old, learner[:2], strict=True):
        mask = np.asarray(rows.mask)
        assert float(rows.log_mass[mask].min()) < -0.01, "or nothing was cut off"
        np.testing.assert_allclose(rows.old_logprobs[mask], mine.logprobs[mask], atol=1e-4)
        np.testing.assert_allclose(rows.old_logprobs[mask], (rows.behaviour_logprobs + rows.log_mass)[mask], atol=1e-4)


@pytest.mark.full
def test_learning_repeats_one_update_with_the_old_log_probabilities_kept() -> None:
    """`learn` is three updates by hand; its first step is that of one epoch; the iteration counts once."""
    batch, references = play(GAME, fresh())
    state, metrics = learn(fresh(), batch, references)
    assert (int(state.iteration), int(state.skipped)) == (1, 0)
    assert int(optax.tree.get(state.opt_state[1][0], "count")) == 3

    fixed = with_old_logprobs(POLICY, REFERENCE, batch, GAME.learner)
    by_hand, each = fresh(), []
    for _ in range(3):
        by_hand, one = update(by_hand, fixed, references, HYPER, GAME.learner)
        each.append(jax.device_get(one))
    assert norm(state.params, by_hand.params) == 0
    for role in ("solver", "challenger"):
        name = f"{role}/kl_to_old"
        assert each[0][name] < 1e-6 < each[1][name] < each[2][name], "ratios are measured from what played"
        np.testing.assert_allclose(metrics[name], np.mean([one[name] for one in each]), rtol=1e-5)
        # the sampler's mismatch is that of the first update: later ones differ because the policy moved
        error = f"sampling/{role}/token_mult_prob_error"
        np.testing.assert_allclose(metrics[error], 1, atol=1e-4)
        assert each[2][error] > 1.001

    single, _ = game_of(loss=replace(LOSS, num_iterations=1))
    plain, _ = gradients(POLICY, batch, references, HYPER, single.learner)
    first, _ = gradients(POLICY, fixed, references, HYPER, GAME.learner)
    assert norm(first, plain) < 1e-4 * float(optax.tree.norm(plain))


@pytest.mark.full
def test_further_iterations_compile_nothing_and_a_composed_one_does_the_same() -> None:
    rewards = (DeviceReward("sum", "task", 1.0, score),)
    token_classes = jnp.full(MODEL.vocab_size, TEXT, jnp.uint8)
    composed = jax.jit(composed_iteration(rewards, GAME))
    whole, _, metrics = composed(fresh(), REFERENCE, (None,), token_classes, KEY, HYPER)
    batch, references = play(GAME, fresh())
    staged, others = learn(fresh(), batch, references)
    assert int(whole.iteration) == int(staged.iteration) == 1
    np.testing.assert_allclose(metrics["grad_norm"], others["grad_norm"], rtol=1e-3)
    np.testing.assert_allclose(metrics["solver/kl_to_old"], others["solver/kl_to_old"], rtol=0.05)
    compiled = runtime.compiles()[0]
    for _ in range(2):
        staged, _ = learn(staged, batch, references)
    assert runtime.compiles()[0] == compiled and int(staged.iteration) == 3


@pytest.mark.full
def test_skipped_updates_are_counted_one_by_one() -> None:
    batch, references = play(GAME, fresh())
    broken = batch._replace(solver=batch.solver._replace(advantages=jnp.full_like(batch.solver.advantages, jnp.nan)))
    state, metrics = learn(fresh(), broken, references)
    assert (int(state.iteration), int(state.skipped), float(metrics["skipped_updates"])) == (1, 3, 3)
    assert norm(state.params, POLICY) == 0


def test_the_policy_in_the_loss_is_said_in_one_line() -> None:
    assert policy_in_the_loss(GAME) == (
        "Solver: temperature 0.7, top-p 0.9 (the loss sees the whole tempered distribution; kept mass stored); "
        "Challenger: temperature 1.3, top-k 6 (the loss sees the whole tempered distribution; kept mass stored)"
    )
    solver = replace(LOSS, alpha_challenger=0.0)
    alone, _ = game_of(loss=solver, sampling=SamplingConfig())
    assert policy_in_the_loss(alone) == "Solver: temperature 1 (the loss sees the same distribution)"
    tempered, _ = game_of(loss=solver, sampling=SamplingConfig(temperature=0.5, min_p=0.1))
    assert "0.5, min-p 0.1 (the loss sees the whole tempered" in policy_in_the_loss(tempered)
