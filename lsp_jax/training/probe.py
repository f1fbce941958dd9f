"""Evaluation on held-out prompts: the policy's reward compared with the reference's.

The Solver answers every prompt of `health.probe` as in training, with the same random numbers each time, and the run's
rewards score the answers. The gain is the mean over prompts of the policy's reward minus the reference's; the policy
has declined if the gain is more than two standard errors below 0.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from lsp_jax.algorithm import rollout, stages
from lsp_jax.core import console, runtime
from lsp_jax.core.stage import stage
from lsp_jax.learn.optimizer import TrainState
from lsp_jax.model.llama import Params
from lsp_jax.model.sharding import load_to_device
from lsp_jax.monitor.health import Health
from lsp_jax.monitor.hooks import Event, StepRecord
from lsp_jax.play.prompt_data import data_queries
from lsp_jax.play.selfplay import Episode
from lsp_jax.reward.base import UNBOUNDED, RewardOutput, RewardSpec, combine, solver_rewards
from lsp_jax.reward.scoring import score
from lsp_jax.training.run import Run

PROBE = np.uint32(2**32 - 1)  # folded into the seed's key; larger than any iteration


class Probe:
    """The probe of one run; all processes call it together."""

    def __init__(self, run: Run, health: Health, begins: Callable[[str], None]):
        """`health` keeps the last verdict between evaluations; `begins` is called with "probe" before each batch."""
        self._run, self._health, self._begins = run, health, begins
        self._reference: np.ndarray | None = None

    def after_step(self, record: StepRecord) -> Sequence[Event]:
        """Adds the probe's metrics to those of the iteration."""
        record.metrics.update(self.evaluate(record.iteration, record.state))
        return ()

    def evaluate(self, number: int, state: TrainState) -> dict[str, float]:
        """Returns the metrics of the probe after iteration `number`; empty without a probe."""
        config = self._run.config.health
        if self._run.probe is None:
            return {}
        if number % config.probe_steps:
            return {"probe/declined": self._health.state.declined}
        start = time.perf_counter()
        if self._reference is None:
            self._reference = self._values(load_to_device(self._run.reference))
        values = self._values(stages.rollout_params(state.params, self._run.game, self._run.reference))
        gain = values - self._reference
        both = gain[np.isfinite(gain)]  # without prompts that have no scored answer
        if not len(both):
            console.warn(f"iteration {number}: no answer to the probe's prompts could be scored (health.probe)")
            return {"probe/declined": self._health.state.declined, "time/probe": time.perf_counter() - start}
        mean = float(np.mean(both))
        error = float(np.std(both, ddof=1) / math.sqrt(len(both))) if len(both) > 1 else 0.0
        return {
            "probe/reward": float(np.mean(values[np.isfinite(gain)])),
            "probe/gain": mean,
            "probe/standard_error": error,
            "probe/declined": float(mean < -2 * error),
            "time/probe": time.perf_counter() - start,
        }

    def _values(self, params: Params) -> np.ndarray:
        """Mean reward of each prompt, float64; NaN if no answer could be scored."""
        run, data = self._run, self._run.probe
        assert data is not None
        game, size = run.game, run.game.num_queries
        specs = tuple(map(raw, run.specs))
        found: list[np.ndarray] = []
        for start in range(0, len(data.rows), size):
            self._begins("probe")
            picked = [index % len(data.rows) for index in range(start, start + size)]
            key = jax.random.fold_in(jax.random.fold_in(run.seed_key, PROBE), start)
            episode = rollout.solve(params, data_queries(data, picked), key, game)
            outputs = score(run.rewards, run.policy.tokenizer, episode, [data.rows[index] for index in picked])
            found.append(runtime.to_host(query_values(episode, outputs, specs, game.learner.loss.use_quality)))
        return np.concatenate(found).astype(np.float64)[: len(data.rows)]


def raw(spec: RewardSpec) -> RewardSpec:
    """Returns `spec` without standardisation, which would make scores of different iterations incomparable, and without
    the clip bounds of standardised scores."""
    return replace(spec, standardize=False, clip=UNBOUNDED) if spec.standardize else spec


@stage(static="use_quality")
def query_values(
    episode: Episode, outputs: tuple[RewardOutput, ...], specs: tuple[RewardSpec, ...], use_quality: bool
) -> jax.Array:
    """Mean Solver reward of each query over its valid answers, float32 [N]; NaN if it has none."""
    reward_NG, counts_NG = solver_rewards(combine(specs, outputs, episode, use_quality), use_quality)
    return jnp.sum(jnp.where(counts_NG, reward_NG, 0.0), axis=1) / jnp.sum(counts_NG, axis=1)
