"""The host loop: play -> reward -> reference -> update -> log -> save.

All numbers are made by the jitted stages of `run/iteration.py`; this file calls them in order, times them, scores host
rewards, and writes. With compiled rewards nothing is read from the device before the metrics.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from lsp_jax import host
from lsp_jax.config import TrainConfig
from lsp_jax.learn.update import TrainState
from lsp_jax.play.data import data_queries
from lsp_jax.play.selfplay import Episode
from lsp_jax.policy import Policy, save_pretrained
from lsp_jax.reward.base import (
    DeviceReward,
    EpisodeReward,
    EpisodeTexts,
    HostReward,
    Reward,
    RewardOutput,
    episode_texts,
    score_on_host,
)
from lsp_jax.run import iteration as stages
from lsp_jax.run import messages
from lsp_jax.run.checkpoint import Checkpoints
from lsp_jax.run.folder import CHECKPOINTS, EXPORT, claim
from lsp_jax.run.iteration import Learnable
from lsp_jax.run.metrics import Console, MetricsWriter
from lsp_jax.run.setup import Run, prepare, start_state
from lsp_jax.run.transcripts import records


class IterationEvent(NamedTuple):
    """What a callback is given after each iteration."""

    iteration: int
    """1 for the first."""
    metrics: dict[str, float]
    transcripts: list[dict[str, Any]]
    """One record a query, as written to `transcripts.jsonl`."""
    state: TrainState
    """The state after the update; donated to the next one, so copy what you keep."""


Callback = Callable[[IterationEvent], None]


class Phases:
    """Seconds of each phase of one iteration; a phase ends when its arrays are there."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Played(NamedTuple):
    """One iteration's results, still on device."""

    state: TrainState
    episode: Episode
    learnable: Learnable
    metrics: dict[str, jax.Array]
    texts: EpisodeTexts | None
    """Decoded already when a host reward needed them."""


def train(
    config: TrainConfig,
    *,
    rewards: Sequence[Reward] = (),
    callbacks: Sequence[Callback] = (),
    policy: Policy | None = None,
) -> TrainState:
    """Runs Language Self-Play as `config` says and returns the final state; everything written is in `output_dir`.

    `rewards` are components beside the configured ones, `policy` replaces loading `config.model`. Raises InputError
    before any long work when something cannot be used.
    """
    run = prepare(config, rewards, policy)
    checkpoints = Checkpoints(run.directory / CHECKPOINTS, config.save_total_limit)
    writer = console = None
    try:
        state, saved = start_state(run, checkpoints)
        claim(run.directory, run.config, run.policy)
        # from here on only the reference and the state: the loaded parameters would be one more copy on an accelerator
        run = replace(run, policy=replace(run.policy, params={}))
        writer = MetricsWriter(run.directory, config.report_to)
        # a run that died before its first checkpoint begins again: its lines go
        writer.cut_back(saved["offsets"] if saved else dict.fromkeys(writer.existing(), 0))
        done, cursor = (saved["iteration"], saved["cursor"]) if saved else (0, 0)
        messages.announce(run, done)
        console = Console(config.max_steps, done)
        outputs = Outputs(writer, checkpoints, console, callbacks)
        for number in range(done + 1, config.max_steps + 1):
            state = _one(run, state, number, cursor, outputs)
            cursor += config.play.num_queries
        checkpoints.wait()
        save_pretrained(replace(run.policy, params=state.params), run.directory / EXPORT)
        messages.finish(run)
    finally:
        for resource in (console, writer, checkpoints, run.workers):
            if resource is not None:
                resource.close()
    return state


class Outputs(NamedTuple):
    """Where an iteration's results go."""

    writer: MetricsWriter
    checkpoints: Checkpoints
    console: Console
    callbacks: Sequence[Callback]


def _one(run: Run, state: TrainState, number: int, cursor: int, outputs: Outputs) -> TrainState:
    """Iteration `number`, logged and, when due, saved; with data its queries begin at `cursor`."""
    phases, reads = Phases(), host.reads()
    start = time.perf_counter()
    played = play_and_learn(run, state, phases, cursor)
    playing_reads = host.reads() - reads
    with phases("log"):
        texts = played.texts or episode_texts(played.episode, run.policy.tokenizer)
        values, learned = host.to_host(
            (played.metrics, (played.learnable.advantages, played.learnable.scores, played.episode.answers.stopped))
        )
        metrics = {name: float(value) for name, value in values.items()}
        lines = records(number, texts, *learned)
    metrics |= {f"time/{name}": seconds for name, seconds in phases.seconds.items()}
    metrics["time/iteration"] = time.perf_counter() - start
    metrics["tokens_per_second"] = metrics["completions/tokens"] / (
        phases.seconds["challenge"] + phases.seconds["solve"]
    )
    metrics["learning_rate"] = _learning_rate(run.config, number, metrics)
    metrics["host_reads"] = playing_reads
    metrics["compile/count"], metrics["compile/seconds"] = host.compiles()
    outputs.writer.write(number, metrics)
    outputs.writer.write_transcripts(lines)
    if number % run.config.save_steps == 0 or number == run.config.max_steps:
        following = {"iteration": number, "cursor": cursor + run.config.play.num_queries}
        outputs.checkpoints.save(number, played.state, {**following, "offsets": outputs.writer.offsets()})
    outputs.console.step(number, metrics, (lines[0]["query"], lines[0]["answers"][0]["text"]))
    for callback in outputs.callbacks:
        callback(IterationEvent(number, metrics, lines, played.state))
    return played.state


def play_and_learn(run: Run, state: TrainState, phases: Phases, cursor: int = 0) -> Played:
    """One iteration's stages in order; consumes `state`. `cursor`: prompts of the data set taken so far."""
    game, reference = run.game, run.reference
    key = stages.iteration_key(run.seed_key, state)
    params = stages.rollout_params(state.params, game)
    rows: list[Mapping[str, Any]] = []
    with phases("challenge"):
        if run.data is None:
            queries = jax.block_until_ready(stages.challenge(params, run.kinds, key, game))
        else:
            picked = run.data.batch(cursor, game.play.num_queries, run.config.seed)
            queries, rows = data_queries(run.data, picked), [run.data.rows[index] for index in picked]
    with phases("solve"):
        episode = jax.block_until_ready(stages.solve(params, queries, key, game))
    del params
    texts = None
    with phases("reward"):
        if any(isinstance(reward, HostReward) for reward in run.rewards):
            texts = episode_texts(episode, run.policy.tokenizer)._replace(rows=rows)
        outputs = tuple(_score(reward, episode, texts) for reward in run.rewards)
        learnable = jax.block_until_ready(stages.learn_batch(episode, outputs, run.specs, game))
    with phases("reference"):
        references = jax.block_until_ready(stages.reference(reference, learnable.batch, game))
    with phases("update"):
        state, metrics = jax.block_until_ready(stages.learn(state, reference, learnable.batch, references, game))
    return Played(state, episode, learnable, learnable.metrics | metrics, texts)


def _score(reward: Reward, episode: Episode, texts: EpisodeTexts | None) -> RewardOutput:
    if isinstance(reward, DeviceReward):
        return stages.score(reward.score, reward.params, episode)
    if isinstance(reward, EpisodeReward):
        return reward.score(episode)
    assert texts is not None
    return score_on_host(reward, texts)


def _learning_rate(config: TrainConfig, number: int, metrics: dict[str, float]) -> float:
    """The step size of this iteration's last update: warm-up counts updates made, not iterations."""
    made = number * config.loss.num_iterations - metrics["skipped_updates"]
    return config.optimizer.learning_rate * min(1.0, made / max(config.optimizer.warmup_steps, 1))
