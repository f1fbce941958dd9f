"""The host loop: rollout -> reward -> reference -> update -> hooks (write, monitor, save, show).

`training/step.py` runs the stages of an iteration, `training/hooks.py` the hooks after it; this file is the loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import jax

from lsp_jax.checkpoint.host_state import HostState
from lsp_jax.checkpoint.manager import Checkpoints
from lsp_jax.checkpoint.provenance import identity
from lsp_jax.checkpoint.run_dir import CHECKPOINTS, PROFILE, init_run_dir
from lsp_jax.config import TrainConfig
from lsp_jax.core import arguments, processes, runtime
from lsp_jax.core.errors import Collapsed, InputError, Stopped
from lsp_jax.learn.optimizer import TrainState
from lsp_jax.model.sharding import use_mesh
from lsp_jax.monitor.health import Health
from lsp_jax.monitor.hooks import Hook
from lsp_jax.monitor.numerics import Alarms
from lsp_jax.monitor.preemption import Preemption
from lsp_jax.monitor.shutdown import Stopping, close_all
from lsp_jax.monitor.watchdog import Watchdog
from lsp_jax.policy import Policy, check_policy
from lsp_jax.reporting.html_report import LiveReport
from lsp_jax.reporting.progress import Console
from lsp_jax.reporting.writer import MetricsWriter
from lsp_jax.reward.base import Reward, check_component
from lsp_jax.training import announce
from lsp_jax.training.checkpointing import MetricCheck, Saving, export_policy
from lsp_jax.training.doctor import examine
from lsp_jax.training.hooks import Callback, Surroundings, as_hook, step_record
from lsp_jax.training.probe import Probe
from lsp_jax.training.resume import start_state
from lsp_jax.training.run import Run
from lsp_jax.training.setup import setup
from lsp_jax.training.step import Phases, StepContext, precompile, train_step


def train(
    config: TrainConfig,
    *,
    rewards: Sequence[Reward] = (),
    callbacks: Sequence[Callback | Hook] = (),
    policy: Policy | None = None,
) -> TrainState:
    """Runs Language Self-Play with `config` and returns the final state; all files are written to `output_dir`.

    `rewards` are further components beside the configured ones, `policy` replaces loading `config.model`. `callbacks`
    are functions of an `IterationEvent`, or hooks, whose events are alarms of the run; they are called after the save
    of each iteration. Raises InputError for invalid settings, before any long work.

    With several processes (`config.processes`) all call this with the same arguments; process 0 writes, and callbacks
    are called in all. Raises ProcessError naming a late process; when a process dies, the others exit with status 3.

    SIGTERM and SIGINT end the run between two phases: it is saved and Stopped is raised. Raises RunError if the run
    cannot continue; without progress for `progress_timeout` seconds the process exits with status 4 and all stacks.
    """
    config, rewards, callbacks = _checked(config, rewards, callbacks, policy)
    processes.start(config.processes)
    runtime.keep_programs(config.compilation_cache)
    with _guarded(config) as (stopping, watchdog):
        run, params = setup(config, rewards, policy)
        config, console, writer, report = run.config, None, None, None
        checkpoints = Checkpoints(run.directory / CHECKPOINTS, config.save_total_limit, config.save_steps)
        with use_mesh(run.mesh):
            try:
                stopping.check("start")
                watchdog.more = run.workers.show_stacks
                announce.findings(examine(run, params))
                provenance = identity(config, run.policy, params, run.reward_model)
                state, host = start_state(run, params, checkpoints, provenance)
                del params  # another copy of the weights on an accelerator
                if processes.is_writer():
                    init_run_dir(run.directory, config, run.policy, provenance)
                    writer = MetricsWriter(run.directory, config.report_to)
                    # a run that died before its first checkpoint starts again, without its earlier lines
                    writer.truncate_to(host.offsets if host.iteration else dict.fromkeys(writer.existing(), 0))
                    announce.announce(run, host.iteration)
                    console, report = Console(config.max_steps, host.iteration), LiveReport(run.directory)
                alarms, health = Alarms(config.max_skipped, host.skipped), Health(config.health, host.health)
                saving = Saving(config, checkpoints, writer, alarms, health, host)
                # in this order: the probe adds metrics, and hooks that may stop or roll back the run precede the save
                watching = Probe(run, health, watchdog.beat), MetricCheck(config), writer, alarms, health
                showing = console, report, *map(as_hook, callbacks)
                hooks = tuple(hook for hook in (*watching, saving, *showing) if hook is not None)
                around = Surroundings(hooks, saving, health, stopping, watchdog, writer, console)
                if config.precompile:
                    precompile(run, state)
                state = _iterations(run, state, host, around)
                watchdog.beat("export")
                saving.finish(state)
                export_policy(run, state)
                if report is not None:
                    report.refresh(last=True)
                    announce.finish(run)
            finally:
                close_all(console, writer, checkpoints, run.workers)
    return state


def _checked(
    config: object, rewards: object, callbacks: object, policy: object
) -> tuple[TrainConfig, list[Reward], list[Callback | Hook]]:
    """Returns the arguments of `train` with plain values; InputError for other types than it takes."""
    plain = arguments.plain(arguments.instance("config", config, TrainConfig, "must be a TrainConfig"))
    components = arguments.items("rewards", rewards, "must be a list of rewards")
    for index, component in enumerate(components):
        check_component(f"rewards[{index}]", component)
    called = arguments.items("callbacks", callbacks, "must be a list of functions or hooks")
    for index, callback in enumerate(called):
        if not callable(callback) and not isinstance(callback, Hook):
            raise InputError(f"callbacks[{index}]", callback, "must be a function of an IterationEvent, or a hook")
    if policy is not None:
        source = check_policy("policy", policy).source
        plain = replace(plain, model=plain.model or source)
    return plain, components, called


@contextmanager
def _guarded(config: TrainConfig) -> Iterator[tuple[Stopping, Watchdog]]:
    """Context of a run: signals, preemption notices, the watchdog, and a common end of all processes."""
    with processes.together():
        try:
            config.check()
            with (
                Stopping(config.stop_timeout) as stopping,
                Preemption(config.preemption_notice, stopping.ask),
                Watchdog(config.progress_timeout) as watchdog,
            ):
                yield stopping, watchdog
        except (Stopped, Collapsed):
            processes.barrier("the end of the run")  # no process exits while another still closes its files
            raise
        processes.barrier("the end of the run")


def _iterations(run: Run, state: TrainState, host: HostState, around: Surroundings) -> TrainState:
    """Runs the remaining iterations; saves and raises Stopped on a request to end the run."""
    saving, number, cursor, record = around.saving, host.iteration, host.cursor, None
    profiled = host.iteration + 2  # not the first, which compiles
    while number < run.config.max_steps:
        number, reads = number + 1, runtime.reads()
        weight, timer = float(not around.health.paused), Phases(around.begins)
        ctx = StepContext(number, cursor, weight, around.stopping.check, timer)
        saving.check()
        traced = run.config.profile and number == profiled
        try:
            with jax.profiler.trace(str(run.directory / PROFILE)) if traced else nullcontext():
                result = train_step(run, state, ctx)
                record = step_record(run, ctx, result, runtime.reads() - reads, saving.failed)
        except Stopped as asked:  # before the update, so the state is that of the previous iteration
            raise Stopped(f"{asked}; {saving.save_before_exit(record)}; --resume auto continues") from asked
        state, cursor = record.state, record.cursor
        if events := around.after_step(record):
            target = saving.rollback_target(events, record)
            around.watchdog.beat("rollback")
            state, host = saving.roll_back(target, state, events)
            number, cursor, record = host.iteration, host.cursor, None
    return state
