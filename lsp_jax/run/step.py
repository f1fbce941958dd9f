"""One iteration's stages in order, timed, with what is scored on the host in between.

All numbers are made by the jitted stages of `run/iteration.py`. With compiled rewards nothing is read from the device
but, between chunks of long completions, how many rows still run. While the host scores, the device runs the reference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np

from lsp_jax import host, processes
from lsp_jax.learn.update import TrainState
from lsp_jax.model import llama
from lsp_jax.model.sharding import at_work, place
from lsp_jax.play.data import data_queries
from lsp_jax.play.selfplay import Episode
from lsp_jax.reward.base import EpisodeTexts, RewardOutput
from lsp_jax.run import iteration as stages
from lsp_jax.run import playing, scoring
from lsp_jax.run.iteration import first_checked, named
from lsp_jax.run.played import tokens_of
from lsp_jax.run.resample import RESAMPLE, groups, replaced, sources
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
        with named(f"phase {name}"):
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
    taken: int
    """Prompts of the data set that were taken."""


def play_and_learn(
    run: Run,
    state: TrainState,
    phases: Phases,
    cursor: int = 0,
    between: Callable[[str], None] = processes.barrier,
    paused: bool = False,
) -> Played:
    """One iteration's stages in order; `cursor`: prompts of the data set taken so far.

    `between` is called with a name by all processes together at some places between phases, the last one before the
    update, which consumes `state`: what it raises leaves `state` as it was. `paused`: the Challenger learns nothing.
    """
    game = run.game
    between("iteration")  # a process that is late is named here, not waited for in a collective
    key = stages.iteration_key(run.seed_key, state)
    with phases("handover"):
        params = jax.block_until_ready(stages.rollout_params(state.params, game, run.reference))
    handed_over = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
    episode, rows = _play(run, params, key, cursor, phases)
    between("reward")
    taken, outputs, texts, seen = game.play.num_queries, None, None, {}
    if game.play.max_resamples:
        episode, outputs, taken, seen = _resampled(run, params, key, cursor, phases, episode, rows)
    del params
    if outputs is None:
        with phases("reward"):
            scored = scoring.score_compiled(run, episode)
            texts = scoring.texts_to_score(run, episode, rows)
            jax.block_until_ready(scored)  # a parked reward model has gone before the reference comes
    begun = time.perf_counter()
    played = first_checked(stages.unscored, episode, game)
    reference = at_work(run.reference)
    references = first_checked(stages.reference, reference, played, game)
    del played
    if outputs is None:
        if texts is not None:  # on this machine's processors, beside the reference on the device
            with phases("reward"):
                scored |= scoring.score_texts(run, texts)
        outputs = tuple(scored[reward.name] for reward in run.rewards)
    with named("phase reference"):
        references = jax.block_until_ready(references)
    phases.took("reference", begun)
    if not game.needs_base:
        reference = {}  # its log-probabilities are all that the update needs
    with phases("reward"):
        memory, near, recalled = stages.recall(state, episode, references, game)
        arguments = episode, outputs, run.specs, game, place(np.float32(not paused)), near
        learnable = jax.block_until_ready(first_checked(stages.learn_batch, *arguments))
    between("update")
    with phases("update"):
        state = state._replace(memory=memory)
        state, metrics = jax.block_until_ready(stages.learn(state, reference, learnable.batch, references, game))
    whole = texts if processes.number() == 1 else None
    metrics = learnable.metrics | recalled | metrics | seen
    return Played(state, episode, learnable, metrics, whole, handed_over, taken)


def _play(
    run: Run, params: llama.Params, key: jax.Array, cursor: int, phases: Phases
) -> tuple[Episode, list[Mapping[str, Any]]]:
    """One play, and the rows of the data set behind its queries."""
    game, rows = run.game, []
    with phases("challenge"):
        if run.data is None:
            queries = jax.block_until_ready(playing.challenge(params, run.kinds, key, game))
        else:
            picked = run.data.batch(cursor, game.play.num_queries, run.config.seed)
            queries, rows = data_queries(run.data, picked), [run.data.rows[index] for index in picked]
    with phases("solve"):
        return jax.block_until_ready(playing.solve(params, queries, key, game)), rows


def _resampled(
    run: Run,
    params: llama.Params,
    key: jax.Array,
    cursor: int,
    phases: Phases,
    episode: Episode,
    rows: Sequence[Mapping[str, Any]],
) -> tuple[Episode, tuple[RewardOutput, ...], int, dict[str, jax.Array]]:
    """The play with queries that teach nothing replaced (`run/resample.py`), its scores, the prompts taken of the data
    set, and metrics: the fraction of queries that were replaced, and the tokens of all plays."""
    play, static = run.game.play, (run.specs, run.game.loss.use_quality)
    with phases("reward"):
        outputs = scoring.score(run, episode, rows)
    changed = np.zeros(play.num_queries, bool)
    taken, tokens = play.num_queries, tokens_of(episode)
    for number in range(play.max_resamples):
        flat, _ = host.to_host(first_checked(groups, episode, outputs, *static))
        if not flat.any():
            break
        more, fresh_rows = _play(run, params, jax.random.fold_in(key, RESAMPLE + number), cursor + taken, phases)
        taken, tokens = taken + play.num_queries, tokens + tokens_of(more)
        with phases("reward"):
            fresh = scoring.score(run, more, fresh_rows)
            _, differ = host.to_host(first_checked(groups, more, fresh, *static))
            source = sources(flat, differ)
            episode, outputs = first_checked(replaced, (episode, outputs), (more, fresh), place(source))
        changed |= source >= 0
    seen = {"resampled_fraction": place(np.float32(changed.mean())), "completions/tokens": tokens}
    return episode, outputs, taken, seen


def precompile(run: Run, state: TrainState) -> None:
    """Compiles all that decoding may need in this run; what else an iteration runs is of one shape, and compiles in
    the first one."""
    params = stages.rollout_params(state.params, run.game, run.reference)
    key = stages.iteration_key(run.seed_key, state)
    if run.data is None:
        queries = playing.challenge(params, run.kinds, key, run.game)
    else:
        queries = data_queries(run.data, run.data.batch(0, run.game.play.num_queries, run.config.seed))
    playing.precompile(params, queries, key, run.game)
