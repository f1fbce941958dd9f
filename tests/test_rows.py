"""The rows of an update before and after they are scored, and the reference's pass beside host rewards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsp_jax.algorithm import rollout, stages
from lsp_jax.algorithm.learner_batch import learn_batch, rows_without_rewards
from lsp_jax.config import RewardConfig
from lsp_jax.core.stage import Backend
from lsp_jax.learn.update import reference_logprobs
from lsp_jax.model.llama import Params
from lsp_jax.reward.base import RewardOutput, RewardSpec
from lsp_jax.training import step
from lsp_jax.training.run import Run
from lsp_jax.training.setup import setup
from lsp_jax.training.step import Phases, StepContext, train_step
from test_trainer import game_config, host_reward

QUICK_COMPILES = True
SPECS = (RewardSpec("share", "task", 1.0),)


@pytest.fixture(scope="module")
def started(game_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Params]:
    """One host reward, nothing scored on the device."""
    directory = tmp_path_factory.mktemp("run") / "run"
    return setup(game_config(game_model, directory, reward=RewardConfig(quality_weight=0.0)), [host_reward()])


def test_neither_rewards_nor_their_masks_change_the_order(started: tuple[Run, Params]) -> None:
    run, params = started
    game = run.game
    key = stages.iteration_key(run.seed_key, jnp.int32(0), jnp.int32(0))
    episode = rollout.solve(params, rollout.challenge(params, run.token_classes, key, game), key, game)
    valid = np.asarray([True, False, True, True])
    episode = episode._replace(queries=episode.queries._replace(valid=jnp.asarray(valid)))
    before = rows_without_rewards(episode, game)
    references = reference_logprobs(run.reference, before, game.learner)
    rng = np.random.default_rng(0)
    for _ in range(3):
        masks = rng.random((4, 4)) < 0.6, rng.random(4) < 0.8
        output = RewardOutput(*jax.tree.map(jnp.asarray, (rng.normal(size=(4, 4)).astype(np.float32), *masks)))
        after = learn_batch(episode, (output,), SPECS, run.hyper, game=game).batch
        again = reference_logprobs(run.reference, after, game.learner)
        for old, new, one, other in zip(before, after, references[:2], again[:2], strict=True):
            assert old is not None and new is not None and one is not None and other is not None
            for name in ("tokens", "prompt_lengths", "completion_lengths", "behaviour_logprobs"):
                np.testing.assert_array_equal(getattr(old, name), getattr(new, name), name)
            assert (np.asarray(old.weights > 0) >= np.asarray(new.weights > 0)).all(), "only fewer rows may count"
            counted = np.asarray(new.mask)
            np.testing.assert_allclose(one.logprobs[counted], other.logprobs[counted], atol=1e-6)
        solver = before.solver
        expected = np.where(solver.weights > 0, solver.completion_lengths, 0)
        assert (np.asarray(solver.weights > 0)).sum() == 4 * valid.sum()
        assert game.learner.prompt_sharing(game.learner.solver) == 4, (
            "groups stay together, sorted inside and among themselves"
        )
        assert (np.diff(expected.reshape(4, 4), axis=1) <= 0).all() and (np.diff(expected[::4]) <= 0).all()


def test_the_host_scores_while_the_device_runs_the_reference(
    started: tuple[Run, Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started before the host's rewards, waited for after them."""
    seen: list[str] = []
    run, params = started
    (reward,) = run.rewards

    def score(*arguments: Any) -> Any:
        seen.append("score")
        return reward.score(*arguments)

    def executing(stage: Any, *arrays: Any, **static: Any) -> Any:
        seen.extend(["reference"] * (stage is reference_logprobs))
        return stage(*arrays, **static)

    monkeypatch.setattr(step, "Backend", lambda **fields: Backend(call=executing, **fields))
    phases = Phases()
    state = jax.tree.map(jnp.copy, run.game.init_train_state(params))
    played = train_step(replace(run, rewards=(replace(reward, score=score),)), state, StepContext(1, timer=phases))
    assert seen == ["reference", "score"]
    assert np.isfinite(float(played.metrics["loss"])) and played.texts is not None
    assert set(phases.seconds) == {"weight_sync", "challenge", "solve", "reward", "reference", "update"}
