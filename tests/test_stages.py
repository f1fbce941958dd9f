"""Stages: a run that starts from another run's policy, with that policy as its reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lsp_jax import cli
from lsp_jax.checkpoint.export import load_run_params, open_run
from lsp_jax.config import TrainConfig
from lsp_jax.core.errors import InputError
from lsp_jax.model.llama import cast
from lsp_jax.training.loop import train
from lsp_jax.training.setup import setup
from test_trainer import game_config, game_dir, host_reward, read_lines, same_bits

QUICK_COMPILES = True
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return game_dir(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def first(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two iterations with a checkpoint after each."""
    directory = tmp_path_factory.mktemp("run") / "first"
    train(game_config(model, directory, max_steps=2, save_steps=1), rewards=[host_reward()])
    return directory


def second_config(first: Path, directory: Path, **changes: Any) -> TrainConfig:
    return game_config("", directory, init_from=str(first), **{"max_steps": 2, "save_steps": 1, **changes})


def test_the_second_stage_starts_from_the_firsts_policy_and_keeps_it_as_reference(first: Path, tmp_path: Path):
    run, params = setup(second_config(first, tmp_path / "second"), [host_reward()])
    policy = load_run_params(first, 2)
    assert same_bits(params, policy) and same_bits(run.reference, cast(policy, run.game.learner.compute_dtype))
    assert not same_bits(policy, load_run_params(first, 1)), "the newest checkpoint, and training moved it"
    assert run.config.init_step == 2

    train(run.config, rewards=[host_reward()])
    metrics = read_lines(tmp_path / "second" / "metrics.jsonl")
    for role in ("solver", "challenger"):
        assert metrics[0][f"{role}/kl"] == pytest.approx(0, abs=1e-6), "policy and reference are one at the start"
        assert metrics[1][f"{role}/kl"] > 1e-6
    state = open_run(tmp_path / "second")
    assert state.config == run.policy.config and state.tokenizer.stop_ids == run.policy.tokenizer.stop_ids


def test_an_earlier_checkpoint_can_be_named(first: Path, tmp_path: Path):
    _, params = setup(second_config(first, tmp_path / "second", init_step=1), [host_reward()])
    assert same_bits(params, load_run_params(first, 1))


def test_a_resumed_stage_keeps_the_policy_that_it_started_from(first: Path, model: Path, tmp_path: Path):
    whole = train(second_config(first, tmp_path / "whole"), rewards=[host_reward()])
    source = tmp_path / "source"
    train(game_config(model, source, max_steps=2, save_steps=1, save_total_limit=9), rewards=[host_reward()])
    train(second_config(source, tmp_path / "half", max_steps=1), rewards=[host_reward()])
    longer = game_config(model, source, max_steps=3, save_steps=1, save_total_limit=9, resume="must")
    train(longer, rewards=[host_reward()])
    half = train(second_config(source, tmp_path / "half", resume="must"), rewards=[host_reward()])
    assert same_bits(whole, half), "not the newest policy of the first stage, which went on"


def test_it_needs_no_model_and_says_what_is_missing(first: Path, model: Path, tmp_path: Path):
    bad = {
        "init_step": [
            second_config(first, tmp_path / "a", init_step=7),
            game_config(model, tmp_path / "b", init_step=1),
        ],
        "config": [second_config(tmp_path / "nothing", tmp_path / "c"), second_config(model.parent, tmp_path / "d")],
        "model": [replace(second_config(first, tmp_path / "e"), init_from="")],
    }
    for field, configs in bad.items():
        for config in configs:
            with pytest.raises(InputError) as error:
                setup(config, [host_reward()])
            assert error.value.field == field
    assert not [name for name in "abcde" if (tmp_path / name).exists()]


def test_from_the_command_line(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    reward = tmp_path / "reward.py"
    reward.write_text("def count(queries, answers):\n    return [[len(a) / 9 for a in group] for group in answers]\n")
    sizes = ["--play.num-queries", 4, "--play.num-generations", 4, "--play.max-query-length", 8]
    sizes += ["--play.max-completion-length", 8, "--max-steps", 1, "--reward.quality-weight", 0]
    command = ["train", "--init-from", first, "--output-dir", tmp_path / "second", "--prompts.challenger", "Ask."]
    command += ["--reward.callable", f"{reward}:count", *sizes]
    assert cli.main([str(part) for part in command]) == 0
    assert str(first) in capsys.readouterr().out
    exported = np.concatenate([np.ravel(x) for x in jax.tree.leaves(load_run_params(tmp_path / "second", 1))])
    assert np.isfinite(exported).all()
