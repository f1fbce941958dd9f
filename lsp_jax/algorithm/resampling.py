"""Queries that teach nothing, because all their answers got one reward, played anew (as DAPO's dynamic sampling).

A new play of the whole iteration takes the place of those queries, as far as its own have answers that differ; so for
`play.max_resamples` times, or until none is left. Queries of the Challenger that are invalid stay: it is to learn from
them. So it does not learn from those that every answer solved or missed, which changes its reward: an ablation, off
unless asked for.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsp_jax.core.stage import stage
from lsp_jax.play.selfplay import Episode
from lsp_jax.reward.base import RewardOutput, RewardSpec, combine, solver_rewards

RESAMPLE = 16  # folded into the iteration's key, one more each time: roles have their own places below


@stage(static=("specs", "use_quality"))
def groups(
    episode: Episode, outputs: tuple[RewardOutput, ...], specs: tuple[RewardSpec, ...], use_quality: bool
) -> jax.Array:
    """bool [2, N]: valid queries whose answers that count all have one reward, and those whose have several."""
    reward, counts = solver_rewards(combine(specs, outputs, episode, use_quality), use_quality)
    highest = jnp.max(jnp.where(counts, reward, -jnp.inf), axis=1)
    lowest = jnp.min(jnp.where(counts, reward, jnp.inf), axis=1)
    return jnp.stack([jnp.any(counts, axis=1) & (highest <= lowest), highest > lowest])


def sources(flat: np.ndarray, fresh_differ: np.ndarray) -> np.ndarray:
    """int32 [N]: for each query the one of a fresh play that takes its place, -1 where it stays; in order."""
    found = np.full(len(flat), -1, np.int32)
    usable = np.flatnonzero(fresh_differ)
    places = np.flatnonzero(flat)[: len(usable)]
    found[places] = usable[: len(places)]
    return found


@stage()
def replaced(old: tuple[Episode, tuple[RewardOutput, ...]], fresh: Any, source: jax.Array) -> Any:
    """`old` with the queries for which `source` [N] is not -1 taken from `fresh`, with all that belongs to them."""

    def take(left: jax.Array, right: jax.Array) -> jax.Array:
        chosen = (source >= 0).reshape(-1, *[1] * (left.ndim - 1))
        return jnp.where(chosen, right[jnp.maximum(source, 0)], left)

    return jax.tree.map(take, old, fresh)
