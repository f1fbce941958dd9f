"""Numbers of an iteration that should not be: said at once, and the end of a run when they do not go away."""

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
"""`sampling/token_mult_prob_error` above which sampler and learner do not agree."""


class NumbersError(RunError):
    """Updates have not been finite for too long: names the first component that was not."""


class Alarms:
    """Looks at each iteration's metrics."""

    def __init__(self, max_skipped: int, skipped: int = 0):
        """`max_skipped` iterations in a row may be skipped; `skipped` were so far."""
        self._max_skipped = max_skipped
        self.skipped: int = skipped
        """Iterations in a row, the last one included, that changed nothing."""

    def after_step(self, record: StepRecord) -> Sequence[Event]:
        """`check` as a hook: what it finds is a warning or the end of the run, never an event."""
        self.check(record.iteration, record.metrics, record.state.params, record.batch)
        return ()

    def check(self, number: int, metrics: Mapping[str, float], params: Params, batch: LearnBatch) -> None:
        """At the metrics of iteration `number`. Raises NumbersError."""
        component, gradient = int(metrics["not_finite/component"]), math.isfinite(metrics["grad_norm"])
        skipped = component > 0 or not gradient
        self.skipped = self.skipped + 1 if skipped else 0
        if skipped:
            parameter = parameter_not_finite(params)
            part = component_names(batch)[component - 1] if component else "gradient"
            name = f"parameter {parameter}" if parameter else part
            said = f"iteration {number} changed nothing: the first that was not finite: {name}"
            if self.skipped >= self._max_skipped:
                raise NumbersError(f"{said}; so for {self.skipped} iterations in a row (max_skipped)")
            console.warn(said)
        error = metrics["sampling/token_mult_prob_error"]
        if not error <= MOST_PROB_ERROR:
            said = f"sampling/token_mult_prob_error {error:.3f} is above {MOST_PROB_ERROR}"
            console.warn(f"iteration {number}: sampler and learner disagree: {said}")


@jax.jit
def _all_finite(params: Params) -> list[jax.Array]:
    return [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]


def parameter_not_finite(params: Params) -> str | None:
    """The first parameter that is not finite; a program of its own, for when a step was not. All processes together."""
    finite = runtime.to_host(_all_finite(params))
    paths = [path for path, _ in jax.tree.leaves_with_path(params)]
    return next((path_name(path) for path, sound in zip(paths, finite, strict=True) if not sound), None)
