"""Resampling of queries without a gradient, whose answers all have the same reward (as in DAPO's dynamic sampling).

The iteration is sampled again, and those queries are replaced by new ones whose answers have different rewards; this
repeats until none is left, at most `play.max_resamples` times. Invalid queries are kept, because the Challenger learns
from their penalty. It no longer learns from queries that all answers solve or all answers miss, which changes its
objective: an ablation, off by default.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsp_jax.core.stage import stage
from lsp_jax.play.selfplay import Episode
from lsp_jax.reward.base import RewardOutput, RewardSpec, combine, solver_rewards

RESAMPLE = 16  # RESAMPLE + attempt is folded into the iteration's key; the roles use smaller numbers


@stage(static="use_quality")
def groups(
    episode: Episode, outputs: tuple[RewardOutput, ...], specs: tuple[RewardSpec, ...], use_quality: bool
) -> jax.Array:
    """Masks bool [2, N]: queries whose valid answers all have the same reward, and those with different rewards."""
    reward_NG, counts_NG = solver_rewards(combine(specs, outputs, episode, use_quality), use_quality)
    highest_N = jnp.max(jnp.where(counts_NG, reward_NG, -jnp.inf), axis=1)
    lowest_N = jnp.min(jnp.where(counts_NG, reward_NG, jnp.inf), axis=1)
    return jnp.stack([jnp.any(counts_NG, axis=1) & (highest_N <= lowest_N), highest_N > lowest_N])


def sources(flat_N: np.ndarray, fresh_differ_N: np.ndarray) -> np.ndarray:
    """Index of the new query that replaces each query, int32 [N]; -1 where it is kept. Both are taken in order."""
    source_N = np.full(len(flat_N), -1, np.int32)
    usable = np.flatnonzero(fresh_differ_N)
    places = np.flatnonzero(flat_N)[: len(usable)]
    source_N[places] = usable[: len(places)]
    return source_N


@stage()
def replaced(old: tuple[Episode, tuple[RewardOutput, ...]], fresh: Any, source_N: jax.Array) -> Any:
    """`old` with the queries for which `source_N` is not -1, and all their arrays, taken from `fresh`."""

    def take(left: jax.Array, right: jax.Array) -> jax.Array:
        chosen = (source_N >= 0).reshape(-1, *[1] * (left.ndim - 1))
        return jnp.where(chosen, right[jnp.maximum(source_N, 0)], left)

    return jax.tree.map(take, old, fresh)
