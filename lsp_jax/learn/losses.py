"""Policy-gradient loss with a KL to the reference: arrays in, (loss, metrics) out, no model call.

LSP maximises, per row, ratio * A - beta * KL (LSP, Section 3); we minimise its negative. The ratio is the policy over
its own stopped gradient, so its value is 1 and its gradient that of the log-probability.

With several inner epochs the ratio is, per token, that of the policy to the rollout policy, and min(ratio * A, clipped
ratio * A) is maximised, as in GRPO. With truncated importance correction each token's gain is also weighted, without a
gradient, by min(old / sampled probability, cap): the learner's probability of the token before the first update over
the sampler's, which is 1 up to rounding. Both are probabilities under the sampled distribution: the
weight does not correct for the mass that top-k, top-p or min-p cut off.

The KL term as the paper prints it, -beta * log(pi / pi_ref) differentiated directly (`k1`), has expected gradient zero:
no pull to the reference, only variance. On-policy, per token and with the prefix fixed, `k2` has the gradient of
KL(pi || ref), `full` is that KL itself, and `k3` (TRL's) has the gradient of KL(ref || pi). Off-policy `k2` keeps that
gradient because each token is weighted by the same stopped ratio and importance weight; `k1` and `k3` are left as in
the paper and in TRL. With every estimator, the sum over tokens ignores the effect of a token on later ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from lsp_jax.core.errors import InputError, one_of
from lsp_jax.learn.batch import Rows
from lsp_jax.learn.logprobs import TokenStatistics
from lsp_jax.learn.spec import Hyperparameters, LossSpec

KL_ESTIMATORS = ("k1", "k2", "k3", "full")
LOSS_TYPES = ("sequence", "token_mean", "constant_length")
SCALES = ("none", "group", "batch")


@dataclass(frozen=True)
class LossConfig:
    """Training objective. Defaults are ours where the paper gives no value."""

    beta: float = 0.05
    """Weight of the KL to the reference, >= 0 (LSP: 0.05)."""
    kl_estimator: Literal["k1", "k2", "k3", "full"] = "k2"
    """k1: as the paper prints it; k2: on-policy the gradient of KL(pi || ref); k3: TRL's; full: exact."""
    loss_type: Literal["sequence", "token_mean", "constant_length"] = "sequence"
    """sequence: each row's sum over tokens, divided by N*G (N), as in the paper (TRL's luspo with token ratios);
    token_mean: mean over all tokens of the iteration (TRL's dapo, and bnpo in one micro-batch); constant_length: sum
    divided by rows times the maximum completion length (TRL's dr_grpo)."""
    scale_rewards: Literal["none", "group", "batch"] = "none"
    """Standard deviation by which advantages are divided: none (the paper), that of the group (TRL's default), or that
    of all rewards of the iteration (batch)."""
    num_iterations: int = 1
    """Inner epochs: updates per rollout batch. Above 1 the ratios are clipped."""
    clip_epsilon: float = 0.2
    """Clipping range of the ratio below 1, and above 1 unless clip_epsilon_high is set (TRL's epsilon)."""
    clip_epsilon_high: float = 0.0
    """Clipping range of the ratio above 1 (TRL's epsilon_high); 0: as clip_epsilon."""
    importance_cap: float = 0.0
    """Cap of the truncated importance weights between sampler and learner, per token; 0: off. (TRL's
    vllm_importance_sampling_correction in mode token_truncate, with its clip_max.)"""
    use_quality: bool = True
    """True: LSP; False: LSP-Zero (quality rewards are measured but not trained on)."""
    alpha_challenger: float = 1.0
    """Weight of the Challenger's loss, alpha_Ch >= 0; 0 trains only the Solver."""
    invalid_query_penalty: float = -1.0
    """Challenger reward of a truncated, blank, tag-leaking or off-task query. Valid queries get -V(q) (+ V_Q(q)), so
    keep this below minus the largest task reward, or invalid queries have the highest reward."""
    value_low: float = 0.0
    """Lower bound of V(q); queries outside the bounds get the invalid-query penalty."""
    value_high: float = 0.0
    """Upper bound of V(q), above value_low; both 0: no bounds. (0.1 and 0.9 select queries that are sometimes
    solved.)"""

    @property
    def value_gate(self) -> tuple[float, float]:
        """Both bounds of V(q); infinite without a gate."""
        gated = (self.value_low, self.value_high) != (0, 0)
        return (self.value_low, self.value_high) if gated else (-math.inf, math.inf)

    @property
    def spec(self) -> LossSpec:
        """The static settings, which select the compiled program."""
        return LossSpec(
            kl_estimator=self.kl_estimator,
            loss_type=self.loss_type,
            scale_rewards=self.scale_rewards,
            num_iterations=self.num_iterations,
            importance_correction=self.importance_cap > 0,
            use_quality=self.use_quality,
            trains_challenger=self.alpha_challenger > 0,
        )

    def check(self) -> None:
        """Raises InputError naming the field."""
        for field in ("value_low", "value_high"):
            if not math.isfinite(getattr(self, field)):
                raise InputError(f"loss.{field}", getattr(self, field), "must be finite")
        if (self.value_low, self.value_high) != (0, 0) and self.value_high <= self.value_low:
            remedy = f"must be above loss.value_low {self.value_low:g} (both 0: no gate)"
            raise InputError("loss.value_high", self.value_high, remedy)
        choices = (("kl_estimator", KL_ESTIMATORS), ("loss_type", LOSS_TYPES), ("scale_rewards", SCALES))
        for field, allowed in choices:
            one_of(f"loss.{field}", getattr(self, field), allowed)
        for field in ("beta", "alpha_challenger", "clip_epsilon_high"):
            if not 0 <= getattr(self, field) < math.inf:
                raise InputError(f"loss.{field}", getattr(self, field), "must be >= 0 and finite")
        if self.num_iterations < 1:
            raise InputError("loss.num_iterations", self.num_iterations, "must be at least 1")
        if not 0 < self.clip_epsilon < math.inf:
            raise InputError("loss.clip_epsilon", self.clip_epsilon, "must be > 0 and finite")
        if self.importance_cap != 0 and not 1 <= self.importance_cap < math.inf:
            remedy = "must be 0 (no correction) or at least 1 and finite"
            raise InputError("loss.importance_cap", self.importance_cap, remedy)
        if not math.isfinite(self.invalid_query_penalty):
            raise InputError("loss.invalid_query_penalty", self.invalid_query_penalty, "must be a finite number")

    @property
    def clip_range(self) -> tuple[float, float]:
        """Lowest and highest ratio that is not clipped."""
        return 1 - self.clip_epsilon, 1 + (self.clip_epsilon_high or self.clip_epsilon)


def kl_terms(logprobs_BT: jax.Array, reference_BT: jax.Array, estimator: str, full_kl_BT: jax.Array) -> jax.Array:
    """Per-token KL terms [B, T] of the loss; the module docstring describes the estimators."""
    difference_BT = logprobs_BT - reference_BT
    if estimator == "k1":
        return difference_BT
    if estimator == "k2":
        return 0.5 * difference_BT**2
    if estimator == "k3":
        return jnp.exp(-difference_BT) - 1 + difference_BT
    if estimator == "full":
        return full_kl_BT
    raise ValueError(f"unknown KL estimator {estimator!r}")


def policy_loss(
    statistics: TokenStatistics, reference_logprobs_BT: jax.Array, rows: Rows, spec: LossSpec, hyper: Hyperparameters
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss (scalar, float32) of `rows`, and sums over their unmasked tokens for the metrics.

    `statistics` are the learner's, `reference_logprobs_BT` the frozen reference's. The loss is a sum over rows with the
    rows' own weights, so the losses of micro-batches add up to that of the batch, whatever their lengths.
    """
    shape = rows.behaviour_logprobs.shape
    if statistics.logprobs.shape != shape or reference_logprobs_BT.shape != shape:
        raise ValueError(
            f"log-probabilities {statistics.logprobs.shape}, {reference_logprobs_BT.shape}: expected {shape}"
        )
    mask_BT = rows.mask
    # select before any arithmetic: masked values may be NaN, and NaN * 0 is NaN, also in the gradient
    logprobs_BT = jnp.where(mask_BT, statistics.logprobs, 0.0)
    reference_BT = jnp.where(mask_BT, reference_logprobs_BT, 0.0)
    full_kl_BT = jnp.where(mask_BT, statistics.full_kl, 0.0)
    advantages_B = jnp.where(rows.weights > 0, rows.advantages, 0.0)
    behaviour_BT = jnp.where(mask_BT, rows.behaviour_logprobs, 0.0)
    log_mass_BT = jnp.where(mask_BT, rows.log_mass, 0.0)
    old_BT = (
        jax.lax.stop_gradient(logprobs_BT) if rows.old_logprobs is None else jnp.where(mask_BT, rows.old_logprobs, 0.0)
    )
    log_ratio_BT = logprobs_BT - old_BT
    kl_BT = kl_terms(logprobs_BT, reference_BT, spec.kl_estimator, full_kl_BT)
    importance_BT: jax.Array | None = None
    if spec.importance_correction:
        importance_BT = jnp.minimum(jnp.exp(old_BT - log_mass_BT - behaviour_BT), hyper.importance_cap)
    if spec.kl_estimator == "k2":  # its expectation is over the policy's tokens, but these are the sampler's
        kl_BT = kl_BT if rows.old_logprobs is None else kl_BT * jax.lax.stop_gradient(jnp.exp(log_ratio_BT))
        kl_BT = kl_BT if importance_BT is None else kl_BT * importance_BT
    kl_B = jnp.sum(kl_BT, axis=-1)
    clip = None if rows.old_logprobs is None else (hyper.clip_low, hyper.clip_high)
    if spec.loss_type == "sequence" and importance_BT is None and clip is None:
        gain_B = jnp.exp(jnp.sum(log_ratio_BT, axis=-1)) * advantages_B
    else:
        gain_B = _token_gains(log_ratio_BT, importance_BT, mask_BT, advantages_B, clip)
    loss = -jnp.sum(rows.weights * (gain_B - hyper.beta * kl_B))

    gap_BT = jnp.where(mask_BT, jnp.exp(jnp.abs(logprobs_BT - log_mass_BT - behaviour_BT)), 0.0)
    sums = {
        "tokens": jnp.sum(mask_BT),
        "kl": jnp.sum(kl_terms(logprobs_BT, reference_BT, "k3", full_kl_BT)),
        "entropy": jnp.sum(jnp.where(mask_BT, statistics.entropy, 0.0)),
        "prob_error": jnp.sum(gap_BT),
    }
    if importance_BT is not None:
        sums["importance_weight"] = jnp.sum(jnp.where(mask_BT, importance_BT, 0.0))
    if clip is not None:
        low, high = clip
        ratio_BT, advantages_B1 = jnp.exp(log_ratio_BT), advantages_B[:, None]
        sums["clip_ratio/low"] = jnp.sum(mask_BT & (ratio_BT < low) & (advantages_B1 < 0))
        sums["clip_ratio/high"] = jnp.sum(mask_BT & (ratio_BT > high) & (advantages_B1 > 0))
        sums["kl_to_old"] = jnp.sum(ratio_BT - 1 - log_ratio_BT)
    return loss, {name: jax.lax.stop_gradient(value).astype(jnp.float32) for name, value in sums.items()}


def _token_gains(
    log_ratio_BT: jax.Array,
    importance_BT: jax.Array | None,
    mask_BT: jax.Array,
    advantages_B: jax.Array,
    clip: tuple[jax.Array | float, jax.Array | float] | None,
) -> jax.Array:
    """Sums [B] over tokens of ratio * A, weighted by `importance_BT` and clipped to `clip` (as in GRPO and PPO)
    unless these are None."""
    ratio_BT = jnp.exp(log_ratio_BT)
    if clip is None:
        return (
            jnp.sum(jnp.where(mask_BT, ratio_BT if importance_BT is None else ratio_BT * importance_BT, 0.0), axis=-1)
            * advantages_B
        )
    gains_BT = jnp.minimum(ratio_BT * advantages_B[:, None], jnp.clip(ratio_BT, *clip) * advantages_B[:, None])
    return jnp.sum(jnp.where(mask_BT, gains_BT if importance_BT is None else gains_BT * importance_BT, 0.0), axis=-1)
