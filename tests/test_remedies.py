"""Remedies against collapse: the gate on V(q), the price of a repeated query, resampling, and the probe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import lsp_jax as lsp
from lsp_jax.algorithm.resampling import replaced, sources
from lsp_jax.core.errors import InputError
from lsp_jax.learn.advantages import GroupRewards, advantages
from lsp_jax.learn.losses import LossConfig
from lsp_jax.learn.novelty import MemoryConfig
from lsp_jax.monitor.health import HealthConfig
from lsp_jax.play.decode import Completions
from lsp_jax.play.prompt_data import DataConfig
from lsp_jax.play.selfplay import Episode, PlayConfig, Queries
from lsp_jax.reward.base import HostReward, RewardOutput, RewardSpec, combine
from lsp_jax.reward.user_callable import callable_reward
from lsp_jax.training.probe import query_values, raw
from lsp_jax.training.replay import replay
from specs import hyper
from test_resume import assert_same_run, config_of
from test_trainer import host_reward, read_lines, same_bits

QUICK_COMPILES = True


# --- by hand ----------------------------------------------------------------------------------------------------------


def an_episode() -> Episode:
    """Two valid queries with two answers each."""
    zeros = jnp.zeros((2, 2, 3))
    done = Completions(zeros.astype(int), jnp.full((2, 2), 3), zeros, zeros, jnp.ones((2, 2), bool))
    text = jnp.zeros((2, 2), int), jnp.full(2, 2)
    return Episode(Queries(None, text, jnp.ones(2, bool)), text, done)


def test_the_gate_and_the_price_by_hand():
    """V is 0, 0.5, 1 and (invalid) nothing; outside 0.1 .. 0.9 a query is paid as the invalid one, with no price."""
    task = jnp.asarray([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    valid = jnp.asarray([True, True, True, False])
    loss = LossConfig(use_quality=False, invalid_query_penalty=-2.0, value_low=0.1, value_high=0.9)
    rewards = GroupRewards(task, task * 0, valid, jnp.ones((4, 2), bool))
    scalars = hyper(loss, memory=MemoryConfig(penalty=0.25))
    result = advantages(rewards, loss.spec, scalars, jnp.ones(4, bool))
    np.testing.assert_allclose(result.challenger_reward, [-2, -0.75, -2, -2])
    np.testing.assert_allclose(result.challenger, np.array([-2, -0.75, -2, -2]) + 6.75 / 4, atol=1e-6)
    np.testing.assert_allclose(result.solver, [[0, 0], [0.5, -0.5], [0, 0], [0, 0]])
    assert result.answer_counts.tolist() == [[True] * 2] * 3 + [[False] * 2], "the Solver learns as before"
    loss = LossConfig(use_quality=False, invalid_query_penalty=-2.0)
    open_gate = advantages(rewards, loss.spec, hyper(loss))
    np.testing.assert_allclose(open_gate.challenger_reward, [0, -0.5, -1, -2])


@pytest.mark.parametrize(
    ("flat", "differ", "expected"),
    [
        ([0, 1, 1, 0], [0, 1, 0, 1], [-1, 1, 3, -1]),
        ([1, 1, 1, 1], [0, 0, 1, 0], [2, -1, -1, -1]),  # no more than there are
        ([0, 0, 1, 0], [1, 1, 1, 1], [-1, -1, 0, -1]),
        ([1, 1], [0, 0], [-1, -1]),
    ],
)
def test_sources_by_hand(flat: list[int], differ: list[int], expected: list[int]):
    assert sources(np.array(flat, bool), np.array(differ, bool)).tolist() == expected


def test_replaced_takes_all_that_belongs_to_a_query():
    old, fresh = np.arange(12).reshape(3, 2, 2), 100 + np.arange(12).reshape(3, 2, 2)
    tree = (jnp.asarray(old), (jnp.asarray(old[:, 0, 0]),)), (jnp.asarray(fresh), (jnp.asarray(fresh[:, 0, 0]),))
    found = replaced(*tree, jnp.asarray([-1, 0, -1], jnp.int32))
    assert found[0].tolist() == [old[0].tolist(), fresh[0].tolist(), old[2].tolist()]
    assert found[1][0].tolist() == [old[0, 0, 0], fresh[0, 0, 0], old[2, 0, 0]]


def test_what_is_measured_only_masks_nothing():
    """LSP-Zero: answers without a quality verdict are learned from as the others are, and so are their queries."""
    task, every, verdicts = jnp.asarray([[1.0, 0.0]] * 2), jnp.ones((2, 2), bool), jnp.asarray([[1, 0], [0, 0]], bool)
    specs = RewardSpec("verifier", "task", 1.0), RewardSpec("quality", "quality", 1.0)
    outputs = RewardOutput(task, every, every[0]), RewardOutput(task, verdicts, jnp.asarray([True, False]))
    lsp_zero, with_quality = (combine(specs, outputs, an_episode(), use) for use in (False, True))
    assert lsp_zero.valid_answer.all() and lsp_zero.valid_query.all()
    assert lsp_zero.failed["quality"].tolist() == (~verdicts).tolist(), "it is still told"
    assert with_quality.valid_answer.tolist() == verdicts.tolist()
    assert with_quality.valid_query.tolist() == [True, False]


def test_the_probe_reads_scores_as_they_are():
    """Bounds of standardised scores are none of raw ones: 25 and 4 would both be 3."""
    specs = (
        RewardSpec("preference", "task", 1.0, standardize=True, clip=(-3.0, 3.0)),
        RewardSpec("rule", "task", 1.0, clip=(0.0, 1.0)),
    )
    every = jnp.ones((2, 2), bool)
    outputs = tuple(RewardOutput(jnp.asarray(v), every, every[0]) for v in ([[25.0] * 2, [4.0] * 2], [[7.0] * 2] * 2))
    assert query_values(an_episode(), outputs, tuple(map(raw, specs)), True).tolist() == [26.0, 5.0]


@pytest.mark.parametrize(
    ("field", "config"),
    [
        ("loss.value_high", LossConfig(value_high=float("nan"))),
        ("loss.value_high = 0.0: must be above loss.value_low 0.25", LossConfig(value_low=0.25)),
        ("loss.value_high = 0.1", LossConfig(value_low=0.9, value_high=0.1)),
        ("memory.penalty", MemoryConfig(penalty=-1.0)),
        ("play.max_resamples", PlayConfig(max_resamples=-1)),
        ("health.max_rollbacks", HealthConfig(max_rollbacks=-1)),
        ("health.probe_steps", HealthConfig(probe_steps=0)),
    ],
)
def test_settings_that_cannot_be_used(field: str, config: Any):
    argument = [2] if isinstance(config, MemoryConfig | PlayConfig) else []
    with pytest.raises(InputError, match=field):
        config.check(*argument)


# --- in runs ----------------------------------------------------------------------------------------------------------


def coarse(queries: list[str], answers: list[list[str]]) -> list[list[float]]:
    """1 for an answer with an "e" or an "i": many groups of random text have none, some have one."""
    return [[float("e" in text or "i" in text) for text in group] for group in answers]


def coarse_reward() -> HostReward:
    return callable_reward(coarse, "coarse")


@pytest.mark.full
def test_resampling_replaces_groups_that_teach_nothing(game_model: Path, tmp_path: Path):
    """Fewer groups of one reward than without; the first iteration's other queries stay; resumed it is the same run."""
    config = config_of(game_model, tmp_path / "once")
    lsp.train(config, rewards=[coarse_reward()])
    config = replace(config, output_dir=str(tmp_path / "again"), play=replace(config.play, max_resamples=2))
    state = lsp.train(config, rewards=[coarse_reward()])
    once, again = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("once", "again"))
    assert again[0]["resampled_fraction"] > 0 and "resampled_fraction" not in once[0]
    assert again[0]["solver/frac_reward_zero_std"] < once[0]["solver/frac_reward_zero_std"]
    number = config.play.num_queries
    pairs = zip(
        *(read_lines(tmp_path / name / "transcripts.jsonl")[:number] for name in ("once", "again")), strict=True
    )
    kept = [left["query"] == right["query"] for left, right in pairs]
    assert sum(kept) == number - round(again[0]["resampled_fraction"] * number)
    half = replace(config, output_dir=str(tmp_path / "half"), max_steps=2)
    lsp.train(half, rewards=[coarse_reward()])
    resumed = lsp.train(replace(half, max_steps=4, resume="must"), rewards=[coarse_reward()])
    assert same_bits(resumed, state)
    assert_same_run(tmp_path / "half", tmp_path / "again")
    assert replay(tmp_path / "again", 3, rewards=[coarse_reward()]).same


def questions(path: Path, number: int) -> Path:
    path.write_text(
        "".join(json.dumps({"prompt": f"What is {n} plus 1", "answer": str(n + 1)}) + "\n" for n in range(number))
    )
    return path


@pytest.mark.full
def test_resampling_takes_further_prompts_of_a_data_set(game_model: Path, tmp_path: Path):
    """Each iteration goes on where the last one's plays ended, and a resumed run too."""
    seen: list[list[str]] = []

    def watching(queries: list[str], answers: list[list[str]]) -> list[list[float]]:
        seen.append(queries)
        number = float(len(seen) % 2)  # every second play is of equal rewards
        return [[number * len(text) for text in group] for group in answers]

    data = DataConfig(source=str(questions(tmp_path / "data.jsonl", 200)), shuffle=False)
    config = config_of(game_model, tmp_path / "run", data=data, loss=LossConfig(alpha_challenger=0.0), max_steps=3)
    config = replace(
        config, play=replace(config.play, max_resamples=2), prompts=replace(config.prompts, query_prefix="")
    )
    lsp.train(config, rewards=[callable_reward(watching, "coarse")])
    taken = [query for queries in seen[1:] for query in queries]  # the first call only tries the function
    assert len(seen) >= 7 and taken == [f"What is {n} plus 1" for n in range(len(taken))]


@pytest.mark.full
def test_a_repeated_query_costs_its_price(game_model: Path, tmp_path: Path):
    """With a threshold that every query after the first of a run passes, all but that one pay; -V, less the price."""
    memory = MemoryConfig(near_duplicate=-0.999, penalty=0.5)
    config = config_of(game_model, tmp_path / "run", max_steps=2, memory=memory)
    lsp.train(config, rewards=[host_reward()])
    free = replace(config, output_dir=str(tmp_path / "free"), memory=replace(memory, penalty=0.0))
    lsp.train(free, rewards=[host_reward()])
    paid, unpaid = (read_lines(tmp_path / name / "transcripts.jsonl")[:4] for name in ("run", "free"))
    assert [line["query"] for line in paid] == [line["query"] for line in unpaid]
    differences = [left["reward"] - right["reward"] for left, right in zip(paid, unpaid, strict=True)]
    expected = [-0.5 if line["valid"] and n > 0 else 0.0 for n, line in enumerate(paid)]
    np.testing.assert_allclose(differences, expected, atol=1e-6)
    assert any(expected)


@pytest.mark.full
def test_the_probe_against_the_reference(game_model: Path, tmp_path: Path):
    """At a learning rate of almost nothing the policy is the reference and gains nothing; a reward turned round later
    makes it worse than the reference, which is seen, and what was saved then is not good."""
    probe = str(questions(tmp_path / "probe.jsonl", 26))  # not a multiple of the 4 queries of an iteration
    health = HealthConfig(probe=probe, probe_steps=2, window=2)
    still = config_of(game_model, tmp_path / "still", health=health)
    still = replace(still, optimizer=replace(still.optimizer, learning_rate=1e-12))
    lsp.train(still, rewards=[host_reward()])
    lines = read_lines(tmp_path / "still" / "metrics.jsonl")
    assert ["probe/gain" in line for line in lines] == [False, True] * 2
    assert all(line["probe/declined"] == 0 for line in lines)
    assert abs(lines[1]["probe/gain"]) < 1e-6 and lines[1]["probe/reward"] > 0

    def worse(queries: list[str], answers: list[list[str]]) -> list[list[float]]:
        sign = 1.0 if any("plus 1" in query for query in queries) else -1.0  # the probe is paid for what play is not
        return [[sign * sum(c < "N" for c in text) / max(len(text), 1) for text in group] for group in answers]

    config = config_of(game_model, tmp_path / "run", health=health, max_steps=20)
    config = replace(config, optimizer=replace(config.optimizer, learning_rate=1e-2))
    lsp.train(config, rewards=[callable_reward(worse, "worse")])
    lines = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "probe/gain" in line]
    assert len(lines) == 10
    for line in lines:
        assert line["probe/declined"] == (line["probe/gain"] < -2 * line["probe/standard_error"])
    assert any(alarm["alarm"] == "decline" for alarm in read_lines(tmp_path / "run" / "alarms.jsonl"))


def test_a_probe_that_is_not_there(tmp_path: Path, game_model: Path):
    config = config_of(game_model, tmp_path / "run", health=HealthConfig(probe=str(tmp_path / "none.jsonl")))
    with pytest.raises(InputError, match=r"health.probe.*no such file"):
        lsp.train(config, rewards=[host_reward()])
    assert not (tmp_path / "run").exists()
