"""Policy-gradient loss with a KL to the reference: arrays in, (loss, metrics) out, no model call.

LSP maximises, per row, ratio * A - beta * KL (LSP, Section 3); we minimise its negative. The ratio is the policy over
its own stopped gradient, so its value is 1 and its gradient that of the log-probability.

The KL term as the paper prints it, -beta * log(pi / pi_ref) differentiated directly (`k1`), has expected gradient zero:
no pull to the reference, only variance. On-policy, per token and with the prefix fixed, `k2` has the gradient of
KL(pi || ref), `full` is that KL itself, and `k3` (TRL's) has the gradient of KL(ref || pi). Sums over tokens leave out
the effect of a token on later ones, whichever the estimator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from lsp_jax.errors import InputError
from lsp_jax.learn.batch import Rows
from lsp_jax.learn.logprobs import TokenStatistics

KL_ESTIMATORS = ("k1", "k2", "k3", "full")
AGGREGATIONS = ("sequence", "token_mean")


@dataclass(frozen=True)
class LossConfig:
    """The objective. Where the paper is silent the default is ours."""

    beta: float = 0.05
    """Weight of the KL to the reference, >= 0 (LSP: 0.05)."""
    kl_estimator: Literal["k1", "k2", "k3", "full"] = "k2"
    """k1: as the paper prints it; k2: on-policy the gradient of KL(pi || ref); k3: TRL's; full: exact."""
    aggregation: Literal["sequence", "token_mean"] = "sequence"
    """sequence: each row's sum over tokens, divided by N*G (N), as in the paper; token_mean: mean over all tokens."""
    use_quality: bool = True
    """LSP when True; LSP-Zero (quality rewards measured but left out) when False."""
    alpha_challenger: float = 1.0
    """Weight of the Challenger's loss, alpha_Ch >= 0; 0 trains the Solver alone."""
    invalid_query_penalty: float = -1.0
    """Challenger reward of a truncated, blank, tag-leaking or off-task query. Valid ones get -V(q) (+ V_Q(q)): keep
    this below minus the largest task reward, or broken queries pay best."""

    def check(self) -> None:
        """Raises InputError naming the field."""
        for field, allowed in (("kl_estimator", KL_ESTIMATORS), ("aggregation", AGGREGATIONS)):
            if getattr(self, field) not in allowed:
                raise InputError(f"loss.{field}", getattr(self, field), f"must be one of {', '.join(allowed)}")
        for field in ("beta", "alpha_challenger"):
            if not 0 <= getattr(self, field) < math.inf:
                raise InputError(f"loss.{field}", getattr(self, field), "must be >= 0 and finite")
        if not math.isfinite(self.invalid_query_penalty):
            raise InputError("loss.invalid_query_penalty", self.invalid_query_penalty, "must be a finite number")


def kl_terms(logprobs: jax.Array, reference: jax.Array, estimator: str, full_kl: jax.Array) -> jax.Array:
    """The per-token KL term [B, T] whose gradient is taken; the module says what each is."""
    difference = logprobs - reference
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference**2
    if estimator == "k3":
        return jnp.exp(-difference) - 1 + difference
    if estimator == "full":
        return full_kl
    raise ValueError(f"unknown KL estimator {estimator!r}")


def policy_loss(
    statistics: TokenStatistics, reference_logprobs: jax.Array, rows: Rows, config: LossConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss (scalar, float32) of `rows`, and sums over their unmasked tokens for the metrics.

    `statistics` are the learner's [B, T], `reference_logprobs` [B, T] the frozen reference's. The loss is a sum over
    rows with the rows' own weights, so micro-batches add up to the whole batch whatever their lengths.
    """
    shape = rows.behaviour_logprobs.shape
    if statistics.logprobs.shape != shape or reference_logprobs.shape != shape:
        raise ValueError(f"log-probabilities {statistics.logprobs.shape}, {reference_logprobs.shape}: expected {shape}")
    mask = rows.mask
    # where before any arithmetic: what is masked may be NaN, and NaN * 0 is NaN in the gradient too
    logprobs = jnp.where(mask, statistics.logprobs, 0.0)
    reference = jnp.where(mask, reference_logprobs, 0.0)
    full_kl = jnp.where(mask, statistics.full_kl, 0.0)
    advantages = jnp.where(rows.weights > 0, rows.advantages, 0.0)
    kl = jnp.sum(kl_terms(logprobs, reference, config.kl_estimator, full_kl), axis=-1)
    log_ratio = logprobs - jax.lax.stop_gradient(logprobs)
    if config.aggregation == "sequence":
        gain = jnp.exp(jnp.sum(log_ratio, axis=-1)) * advantages
    else:
        gain = jnp.sum(jnp.where(mask, jnp.exp(log_ratio), 0.0), axis=-1) * advantages
    loss = -jnp.sum(rows.weights * (gain - config.beta * kl))

    behaviour = jnp.where(mask, rows.behaviour_logprobs, 0.0)
    sampled = logprobs - jnp.where(mask, rows.log_mass, 0.0)
    gap = jnp.where(mask, jnp.exp(jnp.abs(sampled - behaviour)), 0.0)
    sums = {
        "tokens": jnp.sum(mask),
        "kl": jnp.sum(kl_terms(logprobs, reference, "k3", full_kl)),
        "entropy": jnp.sum(jnp.where(mask, statistics.entropy, 0.0)),
        "prob_error": jnp.sum(gap),
    }
    return loss, {name: jax.lax.stop_gradient(value).astype(jnp.float32) for name, value in sums.items()}
