"""Alarms for metrics that are not finite or out of bounds; too many skipped updates end the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from lsp_jax.core import console, runtime
from lsp_jax.core.errors import RunError
from lsp_jax.learn.batch import LearnBatch
from lsp_jax.learn.nonfinite import component_names
from lsp_jax.model.llama import Params
from lsp_jax.model.sharding import path_name
from lsp_jax.monitor.hooks import Event, StepRecord

MOST_PROB_ERROR = 1.05
"""Highest `sampling/token_mult_prob_error` without a warning that sampler and learner disagree."""


class NumbersError(RunError):
    """Too many consecutive updates were not finite; names the first non-finite component."""


class Alarms:
    """Checks the metrics of each iteration."""

    def __init__(self, max_skipped: int, skipped: int = 0):
        """`max_skipped` consecutive skipped iterations end the run; `skipped` is their number so far."""
        self._max_skipped = max_skipped
        self.skipped: int = skipped
        """Consecutive skipped iterations, up to and including the last one."""

    def after_step(self, record: StepRecord) -> Sequence[Event]:
        """Calls `check`, as a hook without events: it warns or ends the run."""
        self.check(record.iteration, record.metrics, record.state.params, record.batch)
        return ()

    def check(self, number: int, metrics: Mapping[str, float], params: Params, batch: LearnBatch) -> None:
        """Warns about the metrics of iteration `number`; raises NumbersError after `max_skipped` skipped iterations."""
        component, gradient = int(metrics["not_finite/component"]), math.isfinite(metrics["grad_norm"])
        skipped = component > 0 or not gradient
        self.skipped = self.skipped + 1 if skipped else 0
        if skipped:
            parameter = parameter_not_finite(params)
            part = component_names(batch)[component - 1] if component else "gradient"
            name = f"parameter {parameter}" if parameter else part
            message = f"iteration {number}: update skipped, first non-finite component: {name}"
            if self.skipped >= self._max_skipped:
                raise NumbersError(f"{message}; {self.skipped} consecutive iterations were skipped (max_skipped)")
            console.warn(message)
        error = metrics["sampling/token_mult_prob_error"]
        if not error <= MOST_PROB_ERROR:
            found = f"sampling/token_mult_prob_error {error:.3f} is above {MOST_PROB_ERROR}"
            console.warn(f"iteration {number}: sampler and learner disagree: {found}")


@jax.jit
def _all_finite(params: Params) -> list[jax.Array]:
    return [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]


def parameter_not_finite(params: Params) -> str | None:
    """Returns the first parameter that is not finite; a separate program, run only after a skipped update by all
    processes together."""
    finite = runtime.to_host(_all_finite(params))
    paths = [path for path, _ in jax.tree.leaves_with_path(params)]
    return next((path_name(path) for path, is_finite in zip(paths, finite, strict=True) if not is_finite), None)
