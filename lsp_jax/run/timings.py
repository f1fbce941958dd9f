"""The metrics of an iteration that only the host knows: seconds, rates, counts."""

from __future__ import annotations

import jax

from lsp_jax import host
from lsp_jax.config import TrainConfig
from lsp_jax.run import limits
from lsp_jax.run.setup import Run
from lsp_jax.run.step import Phases


def host_metrics(run: Run, number: int, played: dict[str, float], phases: Phases, seconds: float) -> dict[str, float]:
    """Of iteration `number` that took `seconds`, whose metrics from the device are `played`."""
    metrics = {f"time/{name}": taken for name, taken in phases.seconds.items()}
    metrics["time/iteration"] = seconds
    metrics["tokens_per_second"] = played["completions/tokens"] / (
        phases.seconds["challenge"] + phases.seconds["solve"]
    )
    metrics |= limits.shares(run.game, played | metrics, jax.devices())
    metrics["learning_rate"] = _learning_rate(run.config, number, played)
    metrics["compile/count"], metrics["compile/seconds"] = host.compiles()
    return metrics


def _learning_rate(config: TrainConfig, number: int, metrics: dict[str, float]) -> float:
    """The step size of this iteration's last update: warm-up counts updates made, not iterations."""
    made = number * config.loss.num_iterations - metrics["skipped_updates"]
    return config.optimizer.learning_rate * min(1.0, made / max(config.optimizer.warmup_steps, 1))
