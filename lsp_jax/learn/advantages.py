"""Group-relative advantages of both roles (LSP, Algorithm 1 and Section 3).

With R the weighted task reward and R_Q the quality reward, V(q) and V_Q(q) their means over a query's valid answers:

| | LSP-Zero | LSP |
|---|---|---|
| Solver reward | R | R + R_Q |
| Challenger reward | -V(q) | -V(q) + V_Q(q) |

An advantage is the reward minus its mean over the group: the G answers of the query, the N queries of the iteration.
The mean includes the sample itself, as in the paper: the expected gradient is (1 - 1/G) of the true one, (1 - 1/N) for
the Challenger.

The paper divides by no standard deviation (`scale_rewards` "none"). GRPO does: "group" divides by that of the group,
"batch" by that of all rewards of the role, each with n - 1 in the denominator and 1e-4 added, as in TRL; masked
samples are excluded. The Challenger's N queries are one group, so for it "group" and "batch" are the same.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsp_jax.learn.spec import Hyperparameters, LossSpec

STD_EPSILON = 1e-4  # TRL's: added to the standard deviation, not to the variance


class Advantages(NamedTuple):
    """Advantages with the rewards they come from and the rows in the loss."""

    solver: jax.Array
    """float32 [N, G]; 0 for a masked answer and for all answers of a query with fewer than two valid ones."""
    challenger: jax.Array
    """float32 [N]; 0 for a query outside the loss."""
    solver_reward: jax.Array
    """float32 [N, G]; 0 where masked."""
    challenger_reward: jax.Array
    """float32 [N]; the penalty for an invalid query, 0 outside the loss."""
    answer_counts: jax.Array
    """bool [N, G]: True for answers in the Solver's loss: valid ones to valid queries."""
    query_counts: jax.Array
    """bool [N]: True for queries in the Challenger's loss and mean: invalid, or with at least one valid answer."""


class GroupRewards(NamedTuple):
    """Rewards of an iteration with their validity. Values under a False mask are never read and may be NaN."""

    task: jax.Array
    """float32 [N, G]: R."""
    quality: jax.Array
    """float32 [N, G]: R_Q."""
    valid_query: jax.Array
    """bool [N]."""
    valid_answer: jax.Array
    """bool [N, G]."""


def advantages(
    rewards: GroupRewards, spec: LossSpec, hyper: Hyperparameters, near_duplicate_N: jax.Array | None = None
) -> Advantages:
    """Advantages of both roles.

    The Challenger's reward of a query with `near_duplicate_N` (bool) is reduced by `hyper.novelty_penalty`; that of a
    query whose V(q) is outside the gate is the penalty for invalid ones. Neither is in the paper.
    """
    task_NG, quality_NG, valid_query_N, valid_answer_NG = rewards
    if task_NG.ndim != 2 or task_NG.shape != quality_NG.shape or valid_query_N.shape != task_NG.shape[:1]:
        raise ValueError(
            f"shapes {task_NG.shape}, {quality_NG.shape}, {valid_query_N.shape}: expected [N, G], [N, G], [N]"
        )
    counts_NG = valid_answer_NG & valid_query_N[:, None]
    task_NG = jnp.where(counts_NG, task_NG, 0.0)
    quality_NG = jnp.where(counts_NG, quality_NG, 0.0) if spec.use_quality else jnp.zeros_like(task_NG)
    solver_reward_NG = task_NG + quality_NG
    answered_N = jnp.sum(counts_NG, axis=1)
    per_query_N = jnp.maximum(answered_N, 1)
    centred_NG = solver_reward_NG - (jnp.sum(solver_reward_NG, axis=1) / per_query_N)[:, None]
    solver_NG = jnp.where(counts_NG & (answered_N >= 2)[:, None], centred_NG, 0.0)
    if spec.scale_rewards != "none":
        axis = 1 if spec.scale_rewards == "group" else None
        solver_NG = solver_NG / (_sample_std(solver_reward_NG, counts_NG, axis) + STD_EPSILON)

    value_N = jnp.sum(task_NG, axis=1) / per_query_N
    quality_value_N = jnp.sum(quality_NG, axis=1) / per_query_N
    query_counts_N = ~valid_query_N | (answered_N > 0)
    paid_N = valid_query_N & (value_N >= hyper.value_low) & (value_N <= hyper.value_high)
    reward_N = quality_value_N - value_N
    if near_duplicate_N is not None:
        reward_N = reward_N - hyper.novelty_penalty * near_duplicate_N
    reward_N = jnp.where(paid_N, reward_N, hyper.invalid_query_penalty)
    reward_N = jnp.where(query_counts_N, reward_N, 0.0)
    mean = jnp.sum(reward_N) / jnp.maximum(jnp.sum(query_counts_N), 1)
    challenger_N = jnp.where(query_counts_N, reward_N - mean, 0.0)
    if spec.scale_rewards != "none":
        challenger_N = challenger_N / (_sample_std(reward_N, query_counts_N, None) + STD_EPSILON)
    return Advantages(solver_NG, challenger_N, solver_reward_NG, reward_N, counts_NG, query_counts_N)


def _sample_std(values: jax.Array, counts: jax.Array, axis: int | None) -> jax.Array:
    """Standard deviation (n - 1 in the denominator) of `values` where `counts`, axes kept; 0 for fewer than two."""
    number = jnp.sum(counts, axis=axis, keepdims=True)
    mean = jnp.sum(jnp.where(counts, values, 0.0), axis=axis, keepdims=True) / jnp.maximum(number, 1)
    squares = jnp.sum(jnp.where(counts, (values - mean) ** 2, 0.0), axis=axis, keepdims=True)
    return jnp.sqrt(squares / jnp.maximum(number - 1, 1))
