"""What is not finite in a step, and where it began: found on device, in the program of the update."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lsp_jax.learn.batch import LearnBatch, Rows
from lsp_jax.learn.update import Reference
from lsp_jax.model.llama import Params


def _parts(
    params: Params, batch: LearnBatch, references: tuple[Reference, Reference | None], loss: Any, grads: Params
) -> list[tuple[str, Any, Rows | None]]:
    """(name, numbers, the rows whose tokens they are of): what each follows from comes before it."""
    parts: list[tuple[str, Any, Rows | None]] = [(f"parameter {name}", leaf, None) for name, leaf in _leaves(params)]
    for role, rows, reference in zip(("Solver", "Challenger"), batch, references, strict=True):
        if rows is None or reference is None:
            continue
        parts.append(
            (f"log-probabilities with which the {role} sampled", rows.behaviour_logprobs + rows.log_mass, rows)
        )
        parts.append((f"advantages of the {role}", rows.advantages, None))
        parts.append((f"the reference's log-probabilities of what the {role} sampled", reference.logprobs, rows))
    parts.append(("loss", loss, None))
    return parts + [(f"gradient of {name}", leaf, None) for name, leaf in _leaves(grads)]


def _leaves(tree: Params) -> list[tuple[str, Any]]:
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in jax.tree.leaves_with_path(tree)
    ]


def first_not_finite(
    params: Params, batch: LearnBatch, references: tuple[Reference, Reference | None], loss: jax.Array, grads: Params
) -> jax.Array:
    """int32: 0 where all is finite, else the place, from 1, of the first part that is not in `component_names`."""
    failed = []
    for _, numbers, rows in _parts(params, batch, references, loss, grads):
        counted = numbers if rows is None else jnp.where(rows.mask, numbers, 0.0)
        failed.append(~jnp.all(jnp.isfinite(counted)))
    failed = jnp.stack(failed)
    return jnp.where(jnp.any(failed), jnp.argmax(failed) + 1, 0).astype(jnp.int32)


def component_names(params: Params, batch: LearnBatch) -> list[str]:
    """What the places of `first_not_finite` stand for."""
    same = Reference(batch.solver.behaviour_logprobs, None)  # only who is there is looked at
    return [name for name, _, _ in _parts(params, batch, (same, same), 0.0, params)]
