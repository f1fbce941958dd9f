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
"batch" by that of all rewards of the role, each with n - 1 in the denominator and 1e-4 added, as in TRL; what is masked
is in none of them. The Challenger's N queries are one group, so for it "group" and "batch" are the same.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsp_jax.learn.spec import Hyperparameters, LossSpec

STD_EPSILON = 1e-4  # TRL's: added to the standard deviation, not to the variance


class Advantages(NamedTuple):
    """Advantages with the rewards they come from and the rows that count."""

    solver: jax.Array
    """float32 [N, G]; 0 for a masked answer and for all answers of a query with fewer than two valid ones."""
    challenger: jax.Array
    """float32 [N]; 0 for a query that is not counted."""
    solver_reward: jax.Array
    """float32 [N, G]; 0 where masked."""
    challenger_reward: jax.Array
    """float32 [N]; the penalty for an invalid query, 0 where not counted."""
    answer_counts: jax.Array
    """bool [N, G]: in the Solver's loss: a valid answer to a valid query."""
    query_counts: jax.Array
    """bool [N]: in the Challenger's loss and mean: invalid, or with at least one valid answer."""


class GroupRewards(NamedTuple):
    """Rewards of an iteration, and what of them may be read. Values under a False mask never are, NaN included."""

    task: jax.Array
    """float32 [N, G]: R."""
    quality: jax.Array
    """float32 [N, G]: R_Q."""
    valid_query: jax.Array
    """bool [N]."""
    valid_answer: jax.Array
    """bool [N, G]."""


def advantages(
    rewards: GroupRewards, spec: LossSpec, hyper: Hyperparameters, near_duplicate: jax.Array | None = None
) -> Advantages:
    """Advantages of both roles.

    A query for which `near_duplicate` bool [N] is True loses `hyper.novelty_penalty` of the Challenger's reward, and
    one whose V(q) is outside the gate gets what an invalid one does (neither is the paper's).
    """
    task, quality, valid_query, valid_answer = rewards
    if task.ndim != 2 or task.shape != quality.shape or valid_query.shape != task.shape[:1]:
        raise ValueError(f"shapes {task.shape}, {quality.shape}, {valid_query.shape}: expected [N, G], [N, G], [N]")
    counts = valid_answer & valid_query[:, None]
    task = jnp.where(counts, task, 0.0)
    quality = jnp.where(counts, quality, 0.0) if spec.use_quality else jnp.zeros_like(task)
    solver_reward = task + quality
    answered = jnp.sum(counts, axis=1)
    per_query = jnp.maximum(answered, 1)
    centred = solver_reward - (jnp.sum(solver_reward, axis=1) / per_query)[:, None]
    solver = jnp.where(counts & (answered >= 2)[:, None], centred, 0.0)
    if spec.scale_rewards != "none":
        axis = 1 if spec.scale_rewards == "group" else None
        solver = solver / (_sample_std(solver_reward, counts, axis) + STD_EPSILON)

    value = jnp.sum(task, axis=1) / per_query
    quality_value = jnp.sum(quality, axis=1) / per_query
    query_counts = ~valid_query | (answered > 0)
    paid = valid_query & (value >= hyper.value_low) & (value <= hyper.value_high)
    reward = quality_value - value
    if near_duplicate is not None:
        reward = reward - hyper.novelty_penalty * near_duplicate
    reward = jnp.where(paid, reward, hyper.invalid_query_penalty)
    reward = jnp.where(query_counts, reward, 0.0)
    mean = jnp.sum(reward) / jnp.maximum(jnp.sum(query_counts), 1)
    challenger = jnp.where(query_counts, reward - mean, 0.0)
    if spec.scale_rewards != "none":
        challenger = challenger / (_sample_std(reward, query_counts, None) + STD_EPSILON)
    return Advantages(solver, challenger, solver_reward, reward, counts, query_counts)


def _sample_std(values: jax.Array, counts: jax.Array, axis: int | None) -> jax.Array:
    """Standard deviation, n - 1 in the denominator, of the `values` that count; kept dimensions; 0 for fewer than 2."""
    number = jnp.sum(counts, axis=axis, keepdims=True)
    mean = jnp.sum(jnp.where(counts, values, 0.0), axis=axis, keepdims=True) / jnp.maximum(number, 1)
    squares = jnp.sum(jnp.where(counts, (values - mean) ** 2, 0.0), axis=axis, keepdims=True)
    return jnp.sqrt(squares / jnp.maximum(number - 1, 1))
