"""An iteration with compiled rewards stays on the device, is one program when asked, and compiles once."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsp_jax as lsp
from lsp_jax.core import runtime
from lsp_jax.learn.optimizer import TrainState
from lsp_jax.play.generate import PROMPT_BUCKETS
from lsp_jax.play.sampler import SamplingConfig
from lsp_jax.play.selfplay import Episode
from lsp_jax.reward.base import DeviceReward, RewardOutput
from lsp_jax.training.run import Run
from lsp_jax.training.setup import setup
from lsp_jax.training.step import StepContext, train_step
from specs import composed_iteration
from test_trainer import game_config, game_dir


def low_ids(limit: jax.Array, episode: Episode) -> RewardOutput:
    """The share of an answer's tokens below `limit`; even the empty answer has a value."""
    tokens, lengths = episode.answers.tokens, episode.answer_lengths
    real = jnp.arange(tokens.shape[-1])[None, None] < lengths[..., None]
    share = jnp.sum(real & (tokens < limit), axis=-1) / jnp.maximum(lengths, 1)
    return RewardOutput(share, jnp.ones_like(share, bool), jnp.ones(share.shape[0], bool))


class Warm(NamedTuple):
    run: Run
    state: TrainState
    """After two iterations: every program is compiled."""


def copied(state: TrainState) -> TrainState:
    return jax.tree.map(jnp.copy, state)  # an iteration consumes its state


QUICK_COMPILES = True  # for every test here: whatever is compared bit by bit is compiled alike


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Warm:
    model = game_dir(tmp_path_factory.mktemp("model") / "tiny")
    reward = DeviceReward("low", "task", 1.5, low_ids, jax.device_put(np.int32(80)))
    run, params = setup(game_config(model, tmp_path_factory.mktemp("run") / "run"), [reward])
    state = jax.jit(run.game.init_train_state)(params)
    for _ in range(2):
        state = train_step(run, state, StepContext(1)).state
    copied(state)  # and the tests' own copying
    return Warm(run, state)


def forbid_reads(monkeypatch: pytest.MonkeyPatch, array_type: type) -> None:
    """Makes every way from an array to the host fail, `jax.device_get` and so the counted function included."""

    def leak(*_: Any, **__: Any) -> None:
        raise AssertionError("the host read an array")

    for name in ("__array__", "__float__", "__int__", "__bool__", "__index__", "__iter__", "tolist", "item"):
        monkeypatch.setattr(array_type, name, leak)
    monkeypatch.setattr(array_type, "_value", property(leak))
    monkeypatch.setattr(jax, "device_get", leak)
    # numpy reads through the buffer protocol, which cannot be patched
    for name in ("asarray", "array"):
        plain = getattr(np, name)
        guarded = partial(lambda plain, x, *a, **k: leak() if isinstance(x, jax.Array) else plain(x, *a, **k), plain)
        monkeypatch.setattr(np, name, guarded)


def test_an_iteration_reads_nothing_and_sends_nothing(warm: Warm, monkeypatch: pytest.MonkeyPatch):
    run, state = warm.run, copied(warm.state)
    assert {reward.name for reward in run.rewards} == {"low", "quality"}
    reads = runtime.reads()
    with monkeypatch.context() as patch, jax.transfer_guard_host_to_device("disallow"):
        forbid_reads(patch, type(state.iteration))
        played = train_step(run, state, StepContext(1))
    assert runtime.reads() == reads
    assert played.texts is None
    assert int(played.state.iteration) == int(warm.state.iteration) + 1


READS = {
    "int": int,
    "float": float,
    "bool": bool,
    "asarray": lambda x: np.asarray(x),
    "tolist": lambda x: x.tolist(),
    "device_get": lambda x: jax.device_get(x),
    "to_host": runtime.to_host,
}


@pytest.mark.parametrize("name", READS)
def test_that_test_would_notice_a_read(name: str, warm: Warm, monkeypatch: pytest.MonkeyPatch):
    counter = warm.state.iteration + 1
    with monkeypatch.context() as patch:
        forbid_reads(patch, type(counter))
        with pytest.raises(AssertionError, match="the host read an array"):
            READS[name](counter)
    reads = runtime.reads()
    runtime.to_host({"a": counter, "b": counter})
    assert runtime.reads() == reads + 1


def test_that_test_would_notice_a_transfer(warm: Warm):
    with jax.transfer_guard_host_to_device("disallow"), pytest.raises(Exception, match=r"[Dd]isallowed"):
        jnp.add(warm.state.iteration, np.ones((), np.int32))


def test_twenty_iterations_of_changing_lengths_compile_nothing(warm: Warm):
    run, state = warm.run, copied(warm.state)
    compiled, lengths, answers = runtime.compiles()[0], set(), set()
    for _ in range(20):
        played = train_step(run, state, StepContext(1))
        state = played.state
        query_lengths, answer_lengths = jax.device_get((played.episode.prompts[1], played.episode.answers.lengths))
        lengths.add(tuple(query_lengths.tolist()))
        answers.add(int(answer_lengths.sum()))
    assert runtime.compiles()[0] == compiled
    assert len(lengths) >= 10 and len(answers) >= 10, "or the lengths did not change"


@pytest.mark.full
def test_the_composed_iteration_gives_the_same_numbers(warm: Warm):
    """Whole iterations as one program; two in a row, so that the second starts from the first's parameters."""
    run = warm.run
    device_rewards = [reward for reward in run.rewards if isinstance(reward, DeviceReward)]

    whole = jax.jit(composed_iteration(device_rewards, run.game))
    params = [reward.params for reward in device_rewards]
    one, other = copied(warm.state), copied(warm.state)
    for _ in range(2):
        played = train_step(run, one, StepContext(1))
        other, learnable, metrics = whole(other, run.reference, params, run.token_classes, run.seed_key, run.hyper)
        one = played.state
        ours, theirs = played.learnable.batch, learnable.batch
        for rows, composed in ((ours.solver, theirs.solver), (ours.challenger, theirs.challenger)):
            for field in ("tokens", "prompt_lengths", "completion_lengths"):
                np.testing.assert_array_equal(getattr(rows, field), getattr(composed, field))
        assert played.learnable.scores.components.keys() == learnable.scores.components.keys() == {"low", "quality"}
        for ours, theirs in (
            (played.learnable.scores, learnable.scores),
            (played.learnable.advantages, learnable.advantages),
        ):
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), ours, theirs)
        assert played.metrics.keys() == metrics.keys()
        for name, value in metrics.items():
            np.testing.assert_allclose(played.metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
        # Adam divides by the root of the second moment: where a gradient is rounding alone, so is the step's sign
        close = jax.tree.map(lambda a, b: np.mean(np.isclose(a, b, rtol=1e-5, atol=1e-6)), one.params, other.params)
        assert min(jax.tree.leaves(close)) > 0.99, close
        jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=2.1e-3), one.params, other.params)
    assert int(other.iteration) == int(one.iteration) == int(warm.state.iteration) + 2


@pytest.mark.full
def test_generation_compiles_once_a_bucket(warm: Warm):
    policy = replace(warm.run.policy, params=warm.state.params)
    random = np.random.default_rng(0)
    narrow, wide = PROMPT_BUCKETS[:2]

    def generate(*lengths: int) -> int:
        """Programs compiled for prompts of these lengths."""
        compiled = runtime.compiles()[0]
        prompts = [random.integers(3, 290, length).tolist() for length in lengths]
        texts = lsp.generate(policy, prompts, SamplingConfig(temperature=0.7), max_completion_length=3)
        assert len(texts) == len(lengths)
        return runtime.compiles()[0] - compiled

    new = [generate(narrow), generate(wide), generate(narrow, 1), generate(2, wide)]
    assert min(new) >= 1, "a new bucket of rows or of lengths is a new program: the count counts"
    again = [generate(*random.integers(1, wide + 1, random.integers(1, 3)).tolist()) for _ in range(20)]
    assert again == [0] * 20
