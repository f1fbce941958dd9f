"""One iteration's stages in order, timed, with what is scored on the host in between.

All numbers are made by the jitted stages of `run/iteration.py`. With compiled rewards nothing is read from the device
but, between chunks of long completions, how many rows still run. While the host scores, the device runs the reference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax

from lsp_jax import processes
from lsp_jax.learn.update import TrainState
from lsp_jax.model.sharding import at_work
from lsp_jax.play.data import data_queries
from lsp_jax.play.selfplay import Episode
from lsp_jax.reward.base import (
    DeviceReward,
    EpisodeReward,
    EpisodeTexts,
    HostReward,
    RewardOutput,
    episode_texts,
    score_on_host,
)
from lsp_jax.run import iteration as stages
from lsp_jax.run import playing
from lsp_jax.run.iteration import first_checked
from lsp_jax.run.rows import Learnable
from lsp_jax.run.setup import Run


class Phases:
    """Seconds of each phase of one iteration; a phase ends when its arrays are there."""

    def __init__(self, begins: Callable[[str], None] = lambda _: None) -> None:
        """`begins` is told the name of each phase that begins."""
        self.seconds: dict[str, float] = {}
        self._begins = begins

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._begins(name)
        start = time.perf_counter()
        yield
        self.took(name, start)

    def took(self, name: str, start: float) -> None:
        """From `start` until now; what is waited for later may have run beside another phase."""
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Played(NamedTuple):
    """One iteration's results, still on device."""

    state: TrainState
    episode: Episode
    learnable: Learnable
    metrics: dict[str, jax.Array]
    texts: EpisodeTexts | None
    """Decoded already, when a host reward needed them and there is one process."""
    handed_over: int
    """Bytes, on one device, of the parameters that played."""


def play_and_learn(
    run: Run,
    state: TrainState,
    phases: Phases,
    cursor: int = 0,
    between: Callable[[str], None] = processes.barrier,
) -> Played:
    """One iteration's stages in order; `cursor`: prompts of the data set taken so far.

    `between` is called with a name by all processes together at some places between phases, the last one before the
    update, which consumes `state`: what it raises leaves `state` as it was.
    """
    game = run.game
    between("iteration")  # a process that is late is named here, not waited for in a collective
    key = stages.iteration_key(run.seed_key, state)
    with phases("handover"):
        params = jax.block_until_ready(stages.rollout_params(state.params, game))
    rows: list[Mapping[str, Any]] = []
    with phases("challenge"):
        if run.data is None:
            queries = jax.block_until_ready(playing.challenge(params, run.kinds, key, game))
        else:
            picked = run.data.batch(cursor, game.play.num_queries, run.config.seed)
            queries, rows = data_queries(run.data, picked), [run.data.rows[index] for index in picked]
    with phases("solve"):
        episode = jax.block_until_ready(playing.solve(params, queries, key, game))
    between("reward")
    handed_over = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
    del params
    with phases("reward"):
        compiled = [reward for reward in run.rewards if not isinstance(reward, HostReward)]
        outputs = {reward.name: score_episode(reward, episode) for reward in compiled}
        texts = None
        if len(outputs) < len(run.rewards):
            mine = processes.share(game.play.num_queries)
            texts = episode_texts(episode, run.policy.tokenizer, queries=mine)
            texts = texts._replace(rows=[rows[n] for n in mine] if rows else rows)
        jax.block_until_ready(outputs)  # a parked reward model has gone before the reference comes
    begun = time.perf_counter()
    played = first_checked(stages.unscored, episode, game)
    reference = at_work(run.reference)
    references = first_checked(stages.reference, reference, played, game)
    del played
    if texts is not None:  # on this machine's processors, beside the reference on the device
        with phases("reward"):
            hosts = [reward for reward in run.rewards if isinstance(reward, HostReward)]
            outputs |= {reward.name: score_on_host(reward, texts) for reward in hosts}
    references = jax.block_until_ready(references)
    phases.took("reference", begun)
    if game.loss.kl_estimator != "full":
        reference = {}  # its log-probabilities are all that the update needs
    with phases("reward"):
        scored = tuple(outputs[reward.name] for reward in run.rewards)
        learnable = jax.block_until_ready(first_checked(stages.learn_batch, episode, scored, run.specs, game))
    between("update")
    with phases("update"):
        state, metrics = jax.block_until_ready(stages.learn(state, reference, learnable.batch, references, game))
    whole = texts if processes.number() == 1 else None
    return Played(state, episode, learnable, learnable.metrics | metrics, whole, handed_over)


def precompile(run: Run, state: TrainState) -> None:
    """Compiles all that decoding may need in this run; what else an iteration runs is of one shape, and compiles in
    the first one."""
    params, key = stages.rollout_params(state.params, run.game), stages.iteration_key(run.seed_key, state)
    if run.data is None:
        queries = playing.challenge(params, run.kinds, key, run.game)
    else:
        queries = data_queries(run.data, run.data.batch(0, run.game.play.num_queries, run.config.seed))
    playing.precompile(params, queries, key, run.game)


def score_episode(reward: DeviceReward | EpisodeReward, episode: Episode) -> RewardOutput:
    """One component's output, on device."""
    if isinstance(reward, EpisodeReward):
        return reward.score(episode)
    params = at_work(reward.params)
    processes.check_program(f"score {reward.name}", stages.score, reward.score, params, episode)
    return stages.score(reward.score, params, episode)
