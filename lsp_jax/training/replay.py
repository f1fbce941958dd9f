"""Replay of an iteration of a run, from the newest intact checkpoint before it and with the same PRNG keys."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lsp_jax.checkpoint.manager import Checkpoints
from lsp_jax.checkpoint.provenance import identity
from lsp_jax.checkpoint.run_dir import CHECKPOINTS, METRICS_FILE, TRANSCRIPTS_FILE
from lsp_jax.config import TrainConfig
from lsp_jax.core.errors import InputError
from lsp_jax.core.files import read_jsonl, user_path
from lsp_jax.core.processes import ProcessConfig
from lsp_jax.core.runtime import keep_programs
from lsp_jax.learn.optimizer import TrainState
from lsp_jax.model.sharding import MeshConfig, replicate, use_mesh
from lsp_jax.policy import Policy
from lsp_jax.reporting.writer import plain
from lsp_jax.reward.base import Reward
from lsp_jax.training.resume import start_state
from lsp_jax.training.run import Run
from lsp_jax.training.setup import setup
from lsp_jax.training.step import StepContext, StepResult, numbers_and_lines, train_step


class Replayed(NamedTuple):
    """The results of a replayed iteration."""

    lines: list[dict[str, Any]]
    """One record per query, as in `transcripts.jsonl`."""
    metrics: dict[str, float]
    """Metrics of rollouts, rewards and update; none that depend on time."""
    start: int
    """Iteration of the checkpoint that the replay started from; 0: the model."""
    same: bool | None
    """Whether `lines` equal the run's own lines of that iteration; None if it has none."""


def replay(run: str | Path, step: int, rewards: Sequence[Reward] = (), policy: Policy | None = None) -> Replayed:
    """Replays iteration `step` (from 1) of the run in folder `run`; writes nothing.

    `rewards` and `policy` are those given to `train`. Iterations between the checkpoint and `step` are run too.
    Raises InputError if there is no such run, or it started from another model.
    """
    if step < 1:
        raise InputError("step", step, "must be an iteration, from 1")
    folder = user_path("run", run)
    config = TrainConfig.load(folder / "config.json")
    # in this folder and one process, on whatever hardware the run was made
    config = replace(config, output_dir=str(folder), resume="auto", mesh=MeshConfig(), processes=ProcessConfig())
    config = replace(config, health=replace(config.health, probe=""))  # the probe is not part of an iteration
    keep_programs(config.compilation_cache)
    prepared, params = setup(config, rewards, policy)
    checkpoints = Checkpoints(folder / CHECKPOINTS)
    try:
        with use_mesh(prepared.mesh):
            provenance = identity(prepared.config, prepared.policy, params, prepared.reward_model)
            state, host = start_state(prepared, params, checkpoints, provenance, before=step)
            del params  # the state is made of copies
            cursor, decided = host.cursor, _decided(folder)
            for number in range(host.iteration + 1, step):
                played = _again(prepared, state, StepContext(number, cursor), decided.get(number))
                state, cursor = played.state, cursor + played.prompts_consumed
            played = _again(prepared, state, StepContext(step, cursor), decided.get(step))
            metrics, lines = numbers_and_lines(prepared, step, played)
    finally:
        checkpoints.close()
        prepared.workers.close()
    lines, there = [plain(line) for line in lines], _written(folder, step)
    return Replayed(lines, metrics, host.iteration, lines == there if there else None)


def _decided(folder: Path) -> dict[int, tuple[int, bool]]:
    """Decisions of the alarms before each iteration: its attempt, and whether the Challenger was paused."""
    decisions = {}
    for line in read_jsonl(folder / METRICS_FILE, skip="invalid"):
        with suppress(KeyError, TypeError):  # metrics of an earlier version
            decisions[line["iteration"]] = int(line["attempt"]), bool(line["challenger/paused"])
    return decisions


def _again(run: Run, state: TrainState, ctx: StepContext, decided: tuple[int, bool] | None) -> StepResult:
    """Runs the iteration after `state`, with the decisions made in the run."""
    if decided is not None:
        attempt, paused = decided
        state = state._replace(attempt=replicate(np.int32(attempt)))
        ctx = replace(ctx, challenger_weight=float(not paused))
    return train_step(run, state, ctx)


def _written(folder: Path, step: int) -> list[dict[str, Any]]:
    """Transcript lines of that iteration written by the run."""
    return [line for line in read_jsonl(folder / TRANSCRIPTS_FILE, skip="torn") if line["iteration"] == step]
