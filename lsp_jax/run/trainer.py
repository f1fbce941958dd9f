"""The host loop: play -> reward -> reference -> update -> log -> save.

The stages of one iteration are called by `run/step.py`; this file loops, reads the metrics, and writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from lsp_jax import host, processes
from lsp_jax.config import TrainConfig
from lsp_jax.learn.update import TrainState
from lsp_jax.model.sharding import use_mesh
from lsp_jax.policy import Policy, save_pretrained
from lsp_jax.reward.base import Reward, episode_texts
from lsp_jax.run import limits, messages
from lsp_jax.run.checkpoint import Checkpoints
from lsp_jax.run.compiled import keep_programs
from lsp_jax.run.folder import CHECKPOINTS, EXPORT, PROFILE, claim
from lsp_jax.run.metrics import Console, MetricsWriter
from lsp_jax.run.setup import Run, prepare, start_state
from lsp_jax.run.step import Phases, play_and_learn, precompile
from lsp_jax.run.transcripts import records


class IterationEvent(NamedTuple):
    """What a callback is given after each iteration."""

    iteration: int
    """1 for the first."""
    metrics: dict[str, float]
    transcripts: list[dict[str, Any]]
    """One record a query, as written to `transcripts.jsonl`; with several processes only process 0 has them."""
    state: TrainState
    """The state after the update; donated to the next one, so copy what you keep."""


Callback = Callable[[IterationEvent], None]


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

    With several processes (`config.processes`) each calls this with the same arguments; process 0 writes, callbacks are
    called in all. Raises ProcessError naming a process that is late; when one dies the others end with status 3.
    """
    processes.start(config.processes)
    keep_programs(config.compilation_cache)
    with processes.together():
        state = _train(config, rewards, callbacks, policy)
        processes.barrier("the end of the run")
    return state


def _train(
    config: TrainConfig, rewards: Sequence[Reward], callbacks: Sequence[Callback], policy: Policy | None
) -> TrainState:
    run = prepare(config, rewards, policy)
    with use_mesh(run.mesh):
        checkpoints = Checkpoints(run.directory / CHECKPOINTS, run.config.save_total_limit)
        writer = console = None
        try:
            state, saved = start_state(run, checkpoints)
            if processes.is_writer():
                claim(run.directory, run.config, run.policy)
            # from here on only the reference and the state: the loaded parameters, which nothing but `run` holds, would
            # be one more copy on an accelerator
            run = replace(run, policy=replace(run.policy, params={}))
            done, cursor = (saved["iteration"], saved["cursor"]) if saved else (0, 0)
            if processes.is_writer():
                writer = MetricsWriter(run.directory, run.config.report_to)
                # a run that died before its first checkpoint begins again: its lines go
                writer.cut_back(saved["offsets"] if saved else dict.fromkeys(writer.existing(), 0))
                messages.announce(run, done)
                console = Console(run.config.max_steps, done)
            outputs = Outputs(writer, checkpoints, console, callbacks)
            if run.config.precompile:
                precompile(run, state)
            for number in range(done + 1, run.config.max_steps + 1):
                traced = run.config.profile and number == done + 2  # the first one compiles
                with jax.profiler.trace(str(run.directory / PROFILE)) if traced else nullcontext():
                    state = _one(run, state, number, cursor, outputs)
                cursor += run.config.play.num_queries
            checkpoints.wait()
            save_pretrained(replace(run.policy, params=state.params), run.directory / EXPORT)
            if processes.is_writer():
                messages.finish(run)
        finally:
            for resource in (console, writer, checkpoints, run.workers):
                if resource is not None:
                    resource.close()
    return state


class Outputs(NamedTuple):
    """Where an iteration's results go; files and console are process 0's."""

    writer: MetricsWriter | None
    checkpoints: Checkpoints
    console: Console | None
    callbacks: Sequence[Callback]


def _one(run: Run, state: TrainState, number: int, cursor: int, outputs: Outputs) -> TrainState:
    """Iteration `number`, logged and, when due, saved; with data its queries begin at `cursor`."""
    phases, reads = Phases(), host.reads()
    start = time.perf_counter()
    played = play_and_learn(run, state, phases, cursor)
    playing_reads = host.reads() - reads
    with phases("log"):
        shown = None if processes.is_writer() else range(0)
        texts = played.texts or episode_texts(played.episode, run.policy.tokenizer, queries=shown)
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
    metrics |= limits.shares(run.game, metrics, jax.devices())
    metrics["learning_rate"] = _learning_rate(run.config, number, metrics)
    metrics["host_reads"] = playing_reads
    metrics["handover/bytes"] = played.handed_over
    metrics["compile/count"], metrics["compile/seconds"] = host.compiles()
    if outputs.writer is not None:
        outputs.writer.write(number, metrics)
        outputs.writer.write_transcripts(lines)
    if number % run.config.save_steps == 0 or number == run.config.max_steps:
        following = {"iteration": number, "cursor": cursor + run.config.play.num_queries}
        processes.barrier("saving")  # named and bounded, which Orbax's own waiting is not
        offsets = {} if outputs.writer is None else outputs.writer.offsets()
        outputs.checkpoints.save(number, played.state, {**following, "offsets": offsets})
    if outputs.console is not None:
        outputs.console.step(number, metrics, (lines[0]["query"], lines[0]["answers"][0]["text"]))
    for callback in outputs.callbacks:
        callback(IterationEvent(number, metrics, lines, played.state))
    return played.state


def _learning_rate(config: TrainConfig, number: int, metrics: dict[str, float]) -> float:
    """The step size of this iteration's last update: warm-up counts updates made, not iterations."""
    made = number * config.loss.num_iterations - metrics["skipped_updates"]
    return config.optimizer.learning_rate * min(1.0, made / max(config.optimizer.warmup_steps, 1))
