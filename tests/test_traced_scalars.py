"""A number that only scales compiles nothing when it changes, and still has its effect where it should first show."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsp_jax.algorithm.learner_batch import learn_batch, rows_without_rewards
from lsp_jax.config import TrainConfig
from lsp_jax.core import runtime
from lsp_jax.learn.losses import LossConfig
from lsp_jax.learn.novelty import MemoryConfig
from lsp_jax.learn.optimizer import OptimizerConfig, init_state
from lsp_jax.learn.update import reference_logprobs, update, with_old_logprobs
from lsp_jax.play.decode import Completions
from lsp_jax.play.selfplay import Episode, PlayConfig, Queries
from lsp_jax.reward.base import RewardOutput, RewardSpec
from lsp_jax.text.prompts import PlayPrompts, TokenTemplate
from specs import game_spec
from tiny import tiny_config, tiny_params

QUICK_COMPILES = True
MODEL = tiny_config(vocab_size=12, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
PROMPTS = PlayPrompts((1, 5, 7), (3,), TokenTemplate((1, 2), (4,)), ())
N, G, T = 4, 3, 4
POLICY, REFERENCE = tiny_params(MODEL, seed=1), tiny_params(MODEL, seed=2)
STAGES = (reference_logprobs, learn_batch, with_old_logprobs, update)

TASK = jnp.asarray([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9], [0.5, 0.5, 0.5]])  # V(q) 0.2, 0.5, 0.8
VALID = jnp.asarray([True, True, True, False])
NEAREST = jnp.asarray([0.95, 0.5, 0.1, 0.1])
PLAIN_MIXING = RewardSpec("task", "task", 1.0)
CONFIG = TrainConfig(
    play=PlayConfig(N, G, max_query_length=T, max_completion_length=T),
    loss=LossConfig(num_iterations=2, clip_epsilon=0.2, importance_cap=2.0, value_low=0.1, value_high=0.9),
    memory=MemoryConfig(near_duplicate=0.9, penalty=0.25),
    # Adam's first step is of any gradient's sign alone, but for this epsilon
    optimizer=OptimizerConfig(learning_rate=0.05, warmup_steps=2, adam_epsilon=0.1, micro_batch_size=16, remat="none"),
)


def sampled(*shape: int) -> Completions:
    """Completions of T tokens at most; the sampler's log-probabilities are lower than the policy's at some tokens."""
    rng = np.random.default_rng(len(shape))
    lengths = jnp.asarray(rng.integers(1, T + 1, shape), jnp.int32)
    tokens = jnp.asarray(rng.integers(0, MODEL.vocab_size, (*shape, T)), jnp.int32)
    logprobs = jnp.asarray(-rng.gamma(3.0, size=(*shape, T)), jnp.float32)
    return Completions(tokens, lengths, logprobs, jnp.zeros((*shape, T)), jnp.ones(shape, bool))


def played() -> Episode:
    queries, answers = sampled(N), sampled(N, G)
    text = queries.tokens, queries.lengths
    return Episode(Queries(queries, text, VALID, ~VALID), text, answers)


EPISODE = played()


def config(**changes: Any) -> TrainConfig:
    """CONFIG with fields of its parts changed, each named `part__field`."""
    found = CONFIG
    for name, value in changes.items():
        part, field = name.split("__")
        found = replace(found, **{part: replace(getattr(found, part), **{field: value})})
    return found


def learned(config: TrainConfig, mixing: RewardSpec = PLAIN_MIXING) -> dict[str, np.ndarray]:
    """What two updates on one play give, in the order in which it is made."""
    parts = {name: getattr(config, name) for name in ("play", "loss", "memory", "optimizer")}
    game, hyper = game_spec(MODEL, PROMPTS, **parts)
    assert all(isinstance(scalar, np.float32) for scalar in hyper)
    references = reference_logprobs(REFERENCE, rows_without_rewards(EPISODE, game=game), spec=game.learner)
    outputs = (RewardOutput(TASK, jnp.ones((N, G), bool), jnp.ones(N, bool)),)
    scored = learn_batch(EPISODE, outputs, (mixing,), hyper, jnp.float32(1), NEAREST, game=game)
    batch = with_old_logprobs(POLICY, None, scored.batch, spec=game.learner)
    first, metrics = update(init_state(POLICY, game.learner.optimizer), batch, references, hyper, spec=game.learner)
    moved = jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), first.params, POLICY)
    _, later = update(first, batch, references, hyper, spec=game.learner)
    assert scored.batch.challenger is not None
    return {
        "rewards": np.asarray(scored.advantages.challenger_reward),
        "weights": np.asarray(scored.batch.challenger.weights),
        "loss": np.asarray(metrics["loss"]),
        "step": np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(moved)]),
        "loss after the step": np.asarray(later["loss"]),
    }


def compiled() -> tuple[int, ...]:
    """Programs compiled so far: all, and those of each stage."""
    return runtime.compiles()[0], *(stage.jitted._cache_size() for stage in STAGES)


@pytest.fixture(scope="module")
def plain() -> dict[str, np.ndarray]:
    return learned(CONFIG)


SHOWS_FIRST = {
    "loss__beta": (0.2, "loss"),
    "loss__alpha_challenger": (0.3, "weights"),
    "loss__invalid_query_penalty": (-2.0, "rewards"),
    "loss__value_low": (0.3, "rewards"),
    "loss__value_high": (0.6, "rewards"),
    "loss__clip_epsilon": (0.02, "loss after the step"),
    "loss__clip_epsilon_high": (0.02, "loss after the step"),
    "loss__importance_cap": (1.1, "loss"),
    "memory__penalty": (0.5, "rewards"),
    "memory__near_duplicate": (0.4, "rewards"),
    "optimizer__learning_rate": (0.1, "step"),
    "optimizer__warmup_steps": (5, "step"),
    "optimizer__weight_decay": (0.1, "step"),
    "optimizer__max_grad_norm": (0.1, "step"),
}


@pytest.mark.parametrize("name", SHOWS_FIRST)
def test_a_scalar_compiles_nothing_and_has_its_effect(plain: dict[str, np.ndarray], name: str) -> None:
    """All that is made before the scalar is read stays as it was, bit for bit."""
    value, place = SHOWS_FIRST[name]
    before = compiled()
    found = learned(config(**{name: value}))
    assert compiled() == before
    different = [part for part in plain if not np.array_equal(plain[part], found[part])]
    assert different[0] == place


def test_leaving_the_gate_and_the_warm_up_out_compiles_nothing(plain: dict[str, np.ndarray]) -> None:
    """No gate is one at infinity, no warm-up one of one step."""
    before = compiled()
    found = learned(config(loss__value_low=0.0, loss__value_high=0.0, optimizer__warmup_steps=0))
    assert compiled() == before
    np.testing.assert_array_equal(found["rewards"], plain["rewards"])  # every V(q) was inside
    np.testing.assert_allclose(found["step"], 2 * plain["step"], rtol=1e-4, atol=1e-7)


def test_weight_and_bounds_of_a_reward_compile_nothing(plain: dict[str, np.ndarray]) -> None:
    """Both have their effect on the Challenger's reward -V(q) of the queries that get no penalty."""
    before = compiled()
    halved = learned(CONFIG, replace(PLAIN_MIXING, weight=0.5))
    clipped = learned(CONFIG, replace(PLAIN_MIXING, clip=(0.0, 0.5)))
    assert compiled() == before
    np.testing.assert_allclose(plain["rewards"][1:3], [-0.5, -0.8], rtol=1e-6)
    np.testing.assert_allclose(halved["rewards"][1:3], [-0.25, -0.4], rtol=1e-6)
    np.testing.assert_allclose(clipped["rewards"][1:3], [-(0.4 + 0.5 + 0.5) / 3, -0.5], rtol=1e-6)


def test_the_effects_are_of_the_right_size(plain: dict[str, np.ndarray]) -> None:
    half = learned(config(loss__alpha_challenger=0.5))
    np.testing.assert_allclose(half["weights"], 0.5 * plain["weights"], rtol=1e-6)
    twice = learned(config(optimizer__learning_rate=0.1))
    np.testing.assert_allclose(twice["step"], 2 * plain["step"], rtol=1e-4, atol=1e-7)
    losses = [learned(config(loss__beta=beta))["loss"] for beta in (0.0, 0.1, 0.2)]
    np.testing.assert_allclose(losses[2] - losses[1], losses[1] - losses[0], rtol=1e-4)
    penalised = learned(config(memory__penalty=0.5))["rewards"]
    np.testing.assert_allclose(penalised - plain["rewards"], [-0.25, 0, 0, 0], atol=1e-6)


def test_standardisation_of_a_reward_compiles(plain: dict[str, np.ndarray]) -> None:
    """The control of a reward's weight and bounds."""
    before = learn_batch.jitted._cache_size()
    learned(CONFIG, replace(PLAIN_MIXING, standardize=True))
    assert learn_batch.jitted._cache_size() == before + 1


@pytest.mark.parametrize("change", [{"loss__kl_estimator": "k3"}, {"loss__importance_cap": 0.0}], ids=str)
def test_what_is_static_compiles(plain: dict[str, np.ndarray], change: dict[str, Any]) -> None:
    """The control: the same counters rise. (Whether importance is corrected decides programs; how far does not.)"""
    before = compiled()
    learned(config(**change))
    assert all(now > then for now, then in zip(compiled(), before, strict=True))
