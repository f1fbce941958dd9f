"""Sampling of one token per row from logits, with its log-probability under the distribution it was drawn from.

Applies temperature, then top-k, top-p and min-p in the order and with the meaning of transformers' logits warpers. The
draw inverts the cumulative distribution in two levels, block then token, with two uniforms per row instead of V Gumbel
variates: it is exact, and its cost is negligible beside that of the head.
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
HIGHEST = 1e37
"""Highest temperature: compilers multiply by the reciprocal, and that of higher ones can become 0 in float32."""
_TINY = float(np.finfo(np.float32).tiny)


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
        """Raises InputError naming `field`.<name>; `greedy` False rejects temperatures that training cannot use."""
        plain = arguments.plain(self, field)
        if greedy and not 0 <= plain.temperature <= HIGHEST:
            remedy = f"must be > 0, finite, <= {HIGHEST:g} (or 0: greedy)"
            raise InputError(f"{field}.temperature", self.temperature, remedy)
        if not greedy and not LEAST_TRAINING <= plain.temperature <= HIGHEST:
            remedy = f"must be > 0, at least {LEAST_TRAINING}, finite, <= {HIGHEST:g}: losses overflow at smaller ones"
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
    """One sampled token per row."""

    token: jax.Array
    """int32 [B]."""
    logprob: jax.Array
    """float32 [B]: under the tempered, truncated, renormalised distribution; 0 when greedy. NaN where the logits hold
    NaN or +inf."""
    log_mass: jax.Array
    """float32 [B]: log of the tempered probability mass that truncation kept (0 without truncation):
    logprob = tempered log-probability - log_mass."""


def row_keys(key: jax.Array, rows: int, first: jax.Array | int = 0) -> jax.Array:
    """One key per row, folded from its global index, so that its noise does not depend on the batch."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, first + jnp.arange(rows))


def row_uniforms(keys_B: jax.Array, position: jax.Array) -> jax.Array:
    """float32 [B, 2] in [0, 1) for token `position` of rows with `keys_B`."""

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(key, position), (2,))

    return jax.vmap(draw)(keys_B)


def truncate(scaled_BV: jax.Array, config: SamplingConfig) -> jax.Array:
    """The tempered logits `scaled_BV`, with those of tokens that top-k, top-p or min-p cut off set to -inf."""
    if 0 < config.top_k < scaled_BV.shape[-1]:
        kth_B1 = jax.lax.top_k(scaled_BV, config.top_k)[0][:, -1:]
        scaled_BV = jnp.where(scaled_BV < kth_B1, -jnp.inf, scaled_BV)
    if config.top_p < 1:
        ordered_BV = jnp.sort(scaled_BV, axis=-1, descending=True)
        probabilities_BV = jax.nn.softmax(ordered_BV, axis=-1)
        before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
        # the first token is always kept, also where float32 has no such small top_p; `before_BV` ascends, so the
        # kept set is a prefix of the order
        kept_BV = (before_BV < max(config.top_p, _TINY)) & (ordered_BV > -jnp.inf)
        threshold_B1 = jnp.min(jnp.where(kept_BV, ordered_BV, jnp.inf), axis=-1, keepdims=True)
        scaled_BV = jnp.where(scaled_BV < threshold_B1, -jnp.inf, scaled_BV)
    if config.min_p > 0:
        highest_B1 = jnp.max(scaled_BV, axis=-1, keepdims=True)
        scaled_BV = jnp.where(scaled_BV < highest_B1 + jnp.log(config.min_p), -jnp.inf, scaled_BV)
    return scaled_BV


def sample(logits_BV: jax.Array, uniforms_B2: jax.Array, config: SamplingConfig) -> Draw:
    """Draws one token from each row of `logits_BV` with `uniforms_B2` in [0, 1)."""
    logits_BV = logits_BV.astype(jnp.float32)
    if config.greedy:
        zeros_B = jnp.zeros(logits_BV.shape[0], jnp.float32)
        token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        highest_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]  # the first NaN, if there is one
        return Draw(token_B, jnp.where(jnp.isfinite(highest_B), zeros_B, jnp.nan), zeros_B)
    scaled_BV = tempered(logits_BV, config.temperature)
    kept_BV = truncate(scaled_BV, config)
    highest_B1 = jnp.max(scaled_BV, axis=-1, keepdims=True)
    weights_BV = jnp.exp(kept_BV - highest_B1)
    token_B, total_B = draw_index(weights_BV, uniforms_B2)
    chosen_B = jnp.take_along_axis(scaled_BV - highest_B1, token_B[:, None], axis=-1)[:, 0]
    log_mass_B = jnp.zeros_like(total_B)
    if config.truncates:
        log_mass_B = jnp.log(total_B) - jnp.log(jnp.sum(jnp.exp(scaled_BV - highest_B1), axis=-1))
    return Draw(token_B, chosen_B - jnp.log(total_B), log_mass_B)


def draw_index(weights_BV: jax.Array, uniforms_B2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Indices [B] drawn in proportion to the non-negative `weights_BV`, and the total weights [B].

    An index of weight 0 is never drawn, whatever `uniforms_B2` and the rounding of sums.
    """
    batch, vocabulary = weights_BV.shape
    padded = jnp.pad(weights_BV, ((0, 0), (0, -vocabulary % BLOCK))).reshape(batch, -1, BLOCK)
    sums = jnp.sum(padded, axis=-1)
    block_B = _invert(sums, uniforms_B2[:, 0])
    inside = jnp.take_along_axis(padded, block_B[:, None, None], axis=1)[:, 0]
    index_B = block_B * BLOCK + _invert(inside, uniforms_B2[:, 1])
    return index_B.astype(jnp.int32), jnp.sum(sums, axis=-1)


def _invert(weights: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """Inverse of the cumulative distribution of `weights` [B, n] at `uniform_B`."""
    cumulative = jnp.cumsum(weights, axis=-1)
    target_B1 = uniform_B[:, None] * cumulative[:, -1:]
    # `<=`, so that u = 0 skips leading zeros; then the next index of positive weight, or the last one if rounding
    # carried the target past the end
    reached_B1 = jnp.sum(cumulative <= target_B1, axis=-1, keepdims=True)
    positions = jnp.arange(weights.shape[-1])[None]
    positive = weights > 0
    at_or_after = positive & (positions >= reached_B1)
    last_B = jnp.max(jnp.where(positive, positions, 0), axis=-1)
    return jnp.where(jnp.any(at_or_after, axis=-1), jnp.argmax(at_or_after, axis=-1), last_B)
