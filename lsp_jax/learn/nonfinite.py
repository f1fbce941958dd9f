"""Non-finite values of a step and their origin, found on device in the program of the update."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lsp_jax.learn.batch import LearnBatch, Reference, References, Rows


def _parts(batch: LearnBatch, references: References, loss: Any) -> list[tuple[str, Any, Rows | None]]:
    """(name, values, rows whose tokens they belong to) of each checked component, after those it is computed from."""
    parts: list[tuple[str, Any, Rows | None]] = []
    for role, rows, reference in zip(("Solver", "Challenger"), batch, references[:2], strict=True):
        if rows is None or reference is None:
            continue
        sampled = rows.behaviour_logprobs + rows.log_mass
        parts.append((f"log-probabilities with which the {role} sampled", sampled, rows))
        parts.append((f"advantages of the {role}", rows.advantages, None))
        parts.append((f"the reference's log-probabilities of what the {role} sampled", reference.logprobs, rows))
    return [*parts, ("loss", loss, None)]


def first_not_finite(batch: LearnBatch, references: References, loss: jax.Array) -> jax.Array:
    """int32: 1-based index in `component_names` of the first component that is not finite, 0 if all are finite.

    The gradient is not checked here, because its norm suffices: with another reader of either, XLA for CPUs plans 0.5
    GiB more (135 M parameters) for the optimiser's step, which runs in the gradient's memory.
    """
    failed = []
    for _, numbers, rows in _parts(batch, references, loss):
        counted = numbers if rows is None else jnp.where(rows.mask, numbers, 0.0)
        failed.append(~jnp.all(jnp.isfinite(counted)))
    failed = jnp.stack(failed)
    return jnp.where(jnp.any(failed), jnp.argmax(failed) + 1, 0).astype(jnp.int32)


def component_names(batch: LearnBatch) -> list[str]:
    """Names of the components that `first_not_finite` counts."""
    same = Reference(batch.solver.behaviour_logprobs)  # only the presence of roles is read
    return [name for name, _, _ in _parts(batch, References(same, same), 0.0)]
