"""Logits -> one token a row, with its log-probability under the distribution that was really sampled.

Temperature, then top-k, top-p and min-p in the order (and with the meaning) of transformers' logits warpers. The draw
inverts the cumulative distribution in two levels, block then token, with two uniforms a row instead of V Gumbels:
exact, and the cost of sampling no longer shows beside the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lsp_jax.core import arguments
from lsp_jax.core.errors import InputError
from lsp_jax.model.llama import tempered

BLOCK = 256  # tokens summed together at the first level; V / 256 and 256 are both short enough to scan
GREEDY_BELOW = 1e-5
"""Temperatures below it are greedy, as in vLLM."""
LEAST_TRAINING = 0.01
"""Lowest temperature of training: below it losses, which divide differences of logits by it, overflow."""
_TINY, _HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling parameters. Names as in TRL."""

    temperature: float = 1.0
    """Logits are divided by it; 0, or anything below 1e-5, is greedy (generation only: training needs at least 0.01).
    """
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens whose mass reaches this; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as probable as the most probable one; 0 keeps all."""

    def check(self, field: str, greedy: bool = True) -> None:
        """Raises InputError naming `field`.<name>; `greedy` False refuses temperatures that training cannot use."""
        plain = arguments.plain(self, field)
        if greedy and not 0 <= plain.temperature <= _HUGE:
            raise InputError(f"{field}.temperature", self.temperature, "must be > 0 and finite (or 0: greedy)")
        if not greedy and not LEAST_TRAINING <= plain.temperature <= _HUGE:
            remedy = f"must be > 0, at least {LEAST_TRAINING}, and finite: losses overflow at smaller ones"
            raise InputError(f"{field}.temperature", self.temperature, remedy)
        if plain.top_k < 0:
            raise InputError(f"{field}.top_k", self.top_k, "must be >= 0 (0 keeps all tokens)")
        if not 0 < plain.top_p <= 1:
            raise InputError(f"{field}.top_p", self.top_p, "must be in (0, 1]")
        if not 0 <= plain.min_p < 1:
            raise InputError(f"{field}.min_p", self.min_p, "must be in [0, 1)")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def truncates(self) -> bool:
        """Whether some tokens can be cut off."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


class Draw(NamedTuple):
    """One sampled token a row."""

    token: jax.Array
    """int32 [B]."""
    logprob: jax.Array
    """float32 [B]: under the tempered, truncated, renormalised distribution; 0 when greedy. NaN where the logits hold
    NaN or +inf."""
    log_mass: jax.Array
    """float32 [B]: log of the tempered probability that truncation kept (0 without), so that
    tempered log-probability minus log_mass = logprob."""


def row_keys(key: jax.Array, rows: int, first: jax.Array | int = 0) -> jax.Array:
    """One key a row from its global number, so that a row's noise does not depend on the batch it is drawn in."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, first + jnp.arange(rows))


def row_uniforms(keys: jax.Array, position: jax.Array) -> jax.Array:
    """float32 [B, 2] in [0, 1) for token `position` of rows with `keys` [B]."""

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(key, position), (2,))

    return jax.vmap(draw)(keys)


def truncate(scaled: jax.Array, config: SamplingConfig) -> jax.Array:
    """Sets the logits [B, V] of tokens that top-k, top-p or min-p cut off to -inf; `scaled` is already tempered."""
    if 0 < config.top_k < scaled.shape[-1]:
        kth = jax.lax.top_k(scaled, config.top_k)[0][:, -1:]
        scaled = jnp.where(scaled < kth, -jnp.inf, scaled)
    if config.top_p < 1:
        ordered = jnp.sort(scaled, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # the first token is always kept, also where float32 has no such small top_p; `before` grows, so the kept set is
        # a prefix of the order
        kept = (before < max(config.top_p, _TINY)) & (ordered > -jnp.inf)
        threshold = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        scaled = jnp.where(scaled < threshold, -jnp.inf, scaled)
    if config.min_p > 0:
        highest = jnp.max(scaled, axis=-1, keepdims=True)
        scaled = jnp.where(scaled < highest + jnp.log(config.min_p), -jnp.inf, scaled)
    return scaled


def sample(logits: jax.Array, uniforms: jax.Array, config: SamplingConfig) -> Draw:
    """Draws one token from each row of `logits` [B, V] with `uniforms` [B, 2] in [0, 1)."""
    logits = logits.astype(jnp.float32)
    if config.greedy:
        zeros = jnp.zeros(logits.shape[0], jnp.float32)
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        # of the first NaN, if there is one
        highest = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
        return Draw(token, jnp.where(jnp.isfinite(highest), zeros, jnp.nan), zeros)
    scaled = tempered(logits, config.temperature)
    kept = truncate(scaled, config)
    highest = jnp.max(scaled, axis=-1, keepdims=True)
    weights = jnp.exp(kept - highest)
    token, total = draw_index(weights, uniforms)
    chosen = jnp.take_along_axis(scaled - highest, token[:, None], axis=-1)[:, 0]
    log_mass = jnp.zeros_like(total)
    if config.truncates:
        log_mass = jnp.log(total) - jnp.log(jnp.sum(jnp.exp(scaled - highest), axis=-1))
    return Draw(token, chosen - jnp.log(total), log_mass)


def draw_index(weights: jax.Array, uniforms: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Index [B] drawn in proportion to non-negative `weights` [B, V], and their total [B].

    Never an index of weight 0, whatever the uniforms [B, 2] and however sums round.
    """
    batch, vocabulary = weights.shape
    padded = jnp.pad(weights, ((0, 0), (0, -vocabulary % BLOCK))).reshape(batch, -1, BLOCK)
    sums = jnp.sum(padded, axis=-1)
    block = _invert(sums, uniforms[:, 0])
    inside = jnp.take_along_axis(padded, block[:, None, None], axis=1)[:, 0]
    index = block * BLOCK + _invert(inside, uniforms[:, 1])
    return index.astype(jnp.int32), jnp.sum(sums, axis=-1)


def _invert(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Inverse of the cumulative distribution of `weights` [B, n] at `uniform` [B]."""
    cumulative = jnp.cumsum(weights, axis=-1)
    target = uniform[:, None] * cumulative[:, -1:]
    # `<=`, so that u = 0 skips leading zeros; then the next index of positive weight, or the last one if rounding
    # carried the target past the end
    reached = jnp.sum(cumulative <= target, axis=-1, keepdims=True)
    positions = jnp.arange(weights.shape[-1])[None]
    positive = weights > 0
    at_or_after = positive & (positions >= reached)
    last = jnp.max(jnp.where(positive, positions, 0), axis=-1)
    return jnp.where(jnp.any(at_or_after, axis=-1), jnp.argmax(at_or_after, axis=-1), last)
