"""The host loop: play -> reward -> reference -> update -> log -> save.

The stages of one iteration are called by `training/step.py`; this file loops, reads the metrics, and writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from lsp_jax.checkpoint.manager import Checkpoints
from lsp_jax.checkpoint.model_card import model_card
from lsp_jax.checkpoint.provenance import identity
from lsp_jax.checkpoint.run_dir import CHECKPOINTS, EXPORT, PROFILE, init_run_dir
from lsp_jax.config import TrainConfig
from lsp_jax.core import console, processes, runtime
from lsp_jax.core.errors import Collapsed, Stopped
from lsp_jax.core.runtime import keep_programs
from lsp_jax.learn.optimizer import TrainState
from lsp_jax.model.llama import Params
from lsp_jax.model.lora import merged
from lsp_jax.model.sharding import use_mesh
from lsp_jax.monitor.health import Event, Health, format_event, lexical_metrics
from lsp_jax.monitor.numerics import Alarms
from lsp_jax.monitor.preemption import Preemption
from lsp_jax.monitor.shutdown import Stopping, close_all
from lsp_jax.monitor.watchdog import Watchdog
from lsp_jax.policy import Policy, save_pretrained
from lsp_jax.reporting.html_report import LiveReport
from lsp_jax.reporting.progress import Console
from lsp_jax.reporting.writer import MetricsWriter
from lsp_jax.reward.base import Reward
from lsp_jax.training import announce
from lsp_jax.training.checkpointing import Progress, Saving, check_rollback, roll_back
from lsp_jax.training.doctor import examine
from lsp_jax.training.probe import Probe
from lsp_jax.training.resume import start_state
from lsp_jax.training.run import Run
from lsp_jax.training.setup import prepare
from lsp_jax.training.step import Phases, StepResult, host_metrics, numbers_and_lines, precompile, train_step


class IterationEvent(NamedTuple):
    """The argument of a callback after each iteration."""

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

    SIGTERM and SIGINT end the run between two phases: Stopped is raised once it is saved. Raises RunError when it
    cannot go on; without progress for `progress_timeout` seconds the process ends with status 4 and all stacks.
    """
    processes.start(config.processes)
    keep_programs(config.compilation_cache)
    with processes.together():
        try:
            state = _train(config, rewards, callbacks, policy)
        except (Stopped, Collapsed):
            processes.barrier("the end of the run")  # nobody leaves while another one still closes its files
            raise
        processes.barrier("the end of the run")
    return state


def _train(
    config: TrainConfig, rewards: Sequence[Reward], callbacks: Sequence[Callback], policy: Policy | None
) -> TrainState:
    checked = config if policy is None else replace(config, model=config.model or policy.source)
    checked.check()
    with (
        Stopping(config.stop_timeout) as stopping,
        Preemption(config.preemption_notice, stopping.ask),
        Watchdog(config.progress_timeout) as watchdog,
    ):
        # not kept in a variable here: `_run` lets the loaded parameters go
        return _run(prepare(config, rewards, policy), callbacks, stopping, watchdog)


def _run(run: Run, callbacks: Sequence[Callback], stopping: Stopping, watchdog: Watchdog) -> TrainState:
    config = run.config
    checkpoints = Checkpoints(run.directory / CHECKPOINTS, config.save_total_limit, config.save_steps)
    writer = console = report = None
    with use_mesh(run.mesh):
        try:
            stopping.check("start")
            watchdog.more = run.workers.show_stacks
            announce.findings(examine(run))
            known = identity(config, run.policy, run.reward_model)
            state, saved = start_state(run, checkpoints, known)
            if processes.is_writer():
                init_run_dir(run.directory, config, run.policy, known)
            # the loaded parameters, which nothing but `run` holds, would be one more copy on an accelerator
            run = replace(run, policy=replace(run.policy, params={}))
            done = saved["iteration"] if saved else 0
            if processes.is_writer():
                writer = MetricsWriter(run.directory, config.report_to)
                # a run that died before its first checkpoint begins again: its lines go
                writer.truncate_to(saved["offsets"] if saved else dict.fromkeys(writer.existing(), 0))
                announce.announce(run, done)
                console, report = Console(config.max_steps, done), LiveReport(run.directory)
            saving = Saving(checkpoints, writer, known, config, saved)
            if config.precompile:
                precompile(run, state)
            outputs = Outputs(writer, checkpoints, saving, console, report, callbacks)
            state = _iterations(run, state, Progress.of(saved), outputs, stopping, watchdog)
            watchdog.beat("export")
            saving.finish(config.max_steps, state)
            card = model_card(run.directory, config.max_steps) if writer is not None else ""
            trained = replace(run.policy, params=policy_params(run, state))
            save_pretrained(trained, run.directory / EXPORT, card=card)
            if report is not None:
                report.refresh(last=True)
                announce.finish(run)
        finally:
            close_all(console, writer, checkpoints, run.workers)
    return state


def policy_params(run: Run, state: TrainState) -> Params:
    """The trained model's parameters, adapters merged."""
    lora = run.game.learner.lora
    return merged(run.reference, state.params, lora) if lora.rank else state.params


class Outputs(NamedTuple):
    """Where an iteration's results go; files and console are process 0's."""

    writer: MetricsWriter | None
    checkpoints: Checkpoints
    saving: Saving
    console: Console | None
    report: LiveReport | None
    callbacks: Sequence[Callback]


def _iterations(
    run: Run, state: TrainState, progress: Progress, outputs: Outputs, stopping: Stopping, watchdog: Watchdog
) -> TrainState:
    """All iterations that are left; saves and raises Stopped when the run is asked to end."""
    config, saving, probe = run.config, outputs.saving, Probe(run)
    alarms, health = Alarms(config.max_skipped, progress.skipped), Health(config.health, progress.health)
    number, first = saving.newest, saving.newest + 1

    def begins(phase: str) -> None:
        watchdog.beat(phase)
        if outputs.console is not None:
            with suppress(OSError):  # a terminal or pipe that is gone
                outputs.console.phase(phase)

    while number < config.max_steps:
        number += 1
        traced = config.profile and number == first + 1  # the first one compiles
        try:
            with jax.profiler.trace(str(run.directory / PROFILE)) if traced else nullcontext():
                played, metrics, lines = _run_iteration(
                    run, state, number, progress.cursor, saving, begins, stopping, health
                )
        except Stopped as asked:  # before the update: the state is the last iteration's
            kept = saving.save_before_exit(number - 1, state, progress)
            raise Stopped(f"{asked}; {kept}; --resume auto goes on") from asked
        state = played.state
        metrics |= probe.evaluate(number, state, health.declined, watchdog.beat)
        if number == first:  # names of metrics are known from here on
            saving.check_metric(metrics)
        watchdog.beat("writing")
        if outputs.writer is not None:
            outputs.writer.write(number, metrics)
            outputs.writer.write_transcripts(lines)
        alarms.check(number, metrics, state.params, played.learnable.batch)
        events = health.update(number, metrics)
        progress = Progress(
            progress.cursor + played.prompts_consumed, alarms.skipped, metrics, health.record(), health.good
        )
        if back := _handle_events(events, state, progress, outputs, health.rollbacks, config.health.max_rollbacks):
            watchdog.beat("rollback")
            state, saved = roll_back(back, state, outputs.checkpoints, outputs.writer, events)
            saving.restore_from(saved)
            progress, rollbacks = Progress.of(saved), health.rollbacks + 1
            alarms, health = Alarms(config.max_skipped, progress.skipped), Health(config.health, progress.health)
            health.rollbacks, number = rollbacks, back
            continue
        if number % config.save_steps == 0 or number == config.max_steps:
            saving.save(number, state, progress)
        if outputs.console is not None:
            with suppress(OSError):  # a terminal or pipe that is gone
                outputs.console.step(number, metrics, (lines[0]["query"], lines[0]["answers"][0]["text"]))
        if outputs.report is not None:
            outputs.report.refresh()
        for callback in outputs.callbacks:
            callback(IterationEvent(number, metrics, lines, state))
    return state


def _handle_events(
    events: Sequence[Event], state: TrainState, progress: Progress, outputs: Outputs, rollbacks: int, most: int
) -> int | None:
    """Says and writes the alarms of an iteration; the checkpoint to go back to, if one asks for it. Saves and raises
    Collapsed where the run ends."""
    for event in events:
        console.warn(format_event(event))
    if outputs.writer is not None:
        outputs.writer.write_alarms(event._asdict() for event in events)
    try:
        acts = {event.action: event for event in reversed(events)}
        if "stop" in acts:
            raise Collapsed(format_event(acts["stop"]))
        if "rollback" in acts:
            outputs.saving.wait()
            return check_rollback(acts["rollback"], outputs.saving, rollbacks, most)
    except Collapsed as ended:
        kept = outputs.saving.save_before_exit(events[0].iteration, state, progress)
        raise Collapsed(f"{ended}; {kept}") from ended
    return None


def _run_iteration(
    run: Run,
    state: TrainState,
    number: int,
    cursor: int,
    saving: Saving,
    begins: Callable[[str], None],
    stopping: Stopping,
    health: Health,
) -> tuple[StepResult, dict[str, float], list[dict[str, Any]]]:
    """Iteration `number` with its metrics and transcripts; with data its queries begin at `cursor`."""
    reads, start, phases = runtime.reads(), time.perf_counter(), Phases(begins)
    saving.check()
    played = train_step(run, state, phases, cursor, stopping.check, health.paused)
    playing_reads = runtime.reads() - reads
    with phases("log"):
        metrics, lines = numbers_and_lines(run, number, played)
    words = lexical_metrics(lines, run.config.prompts.challenger) if lines else {}  # only process 0 has lines
    metrics |= processes.gather("wording", words)[0]
    metrics |= host_metrics(run, number, metrics, phases, time.perf_counter() - start)
    metrics["host_reads"] = playing_reads
    metrics["challenger/paused"] = float(health.paused)
    metrics["weight_sync/bytes"] = played.rollout_param_bytes
    metrics["checkpoint/failed"] = saving.failed
    return played, metrics, lines
