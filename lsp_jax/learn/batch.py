"""What the learner reads: rows [prompt | completion] of each role, right-padded, masks from lengths only."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsp_jax.text.prompts import Ragged, pack


class Rows(NamedTuple):
    """Rows of one role. B rows of width W, completions up to T tokens."""

    tokens: jax.Array
    """int32 [B, W]: prompt, completion, padding."""
    prompt_lengths: jax.Array
    """int32 [B]: real prompt tokens, >= 1."""
    completion_lengths: jax.Array
    """int32 [B]: completion tokens, the stop token included."""
    behaviour_logprobs: jax.Array
    """float32 [B, T]: log-probabilities the sampler gave its tokens."""
    log_mass: jax.Array
    """float32 [B, T]: log of the mass that truncation kept; 0 without truncation."""
    advantages: jax.Array
    """float32 [B]."""
    weights: jax.Array
    """float32 [B]: the row's share of the loss, denominators and alpha_Ch included; 0 masks the row out."""
    old_logprobs: jax.Array | None = None
    """float32 [B, T]: tempered log-probabilities of the parameters that played, fixed before any parameter moves, for
    the ratios of inner epochs. None: the one update there is starts from those parameters, so every ratio is 1."""

    @property
    def mask(self) -> jax.Array:
        """bool [B, T]: the completion tokens of rows in the loss, from lengths."""
        columns = jnp.arange(self.behaviour_logprobs.shape[1])[None]
        return (columns < self.completion_lengths[:, None]) & (self.weights > 0)[:, None]

    @property
    def positions(self) -> jax.Array:
        """int32 [B, T]: the column of `tokens` that holds each completion token (clipped in the padding)."""
        columns = self.prompt_lengths[:, None] + jnp.arange(self.behaviour_logprobs.shape[1])[None]
        return jnp.minimum(columns, self.tokens.shape[1] - 1)


class LearnBatch(NamedTuple):
    """The rows of one update; `challenger` is None when the Solver is trained alone."""

    solver: Rows
    challenger: Rows | None


def make_rows(
    prompts: Ragged,
    completions: Ragged,
    behaviour_logprobs: jax.Array,
    log_mass: jax.Array,
    advantages: jax.Array,
    counts: jax.Array,
    scale: float,
    loss_type: str,
    longest: int,
) -> Rows:
    """Rows [B, ...] of one role; `prompts` may have one row for all.

    `counts` bool [B] marks the rows in the loss. The weight of each is `scale` over a denominator by `loss_type`:
    sequence: B, whatever is masked; token_mean: all completion tokens of the rows that count; constant_length: B times
    `longest`, the maximum length of a completion.
    """
    tokens, _ = pack((prompts, completions))
    lengths = completions[1]
    rows = tokens.shape[0]
    denominator: jax.Array | int = rows
    if loss_type == "token_mean":
        denominator = jnp.maximum(jnp.sum(jnp.where(counts, lengths, 0)), 1)
    elif loss_type == "constant_length":
        denominator = rows * longest
    return Rows(
        tokens=tokens,
        prompt_lengths=jnp.broadcast_to(prompts[1], (rows,)),
        completion_lengths=lengths,
        behaviour_logprobs=behaviour_logprobs,
        log_mass=log_mass,
        advantages=advantages,
        weights=jnp.where(counts, scale / denominator, 0.0),
    )


def micro_batches(rows: Rows, size: int) -> Rows:
    """[B, ...] -> [ceil(B / size), size, ...]; what is missing is filled with rows of weight 0."""
    missing = -rows.tokens.shape[0] % size

    def split(x: jax.Array) -> jax.Array:
        # padding rows repeat nothing: one prompt token, no completion, weight 0
        padded = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(-1, size, *x.shape[1:])

    split_rows = jax.tree.map(split, rows)
    return split_rows._replace(prompt_lengths=jnp.maximum(split_rows.prompt_lengths, 1))
