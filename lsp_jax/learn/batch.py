"""The learner's batch: rows [prompt | completion] of each role, right-padded, masks from lengths only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsp_jax.model.llama import Params
from lsp_jax.text.prompts import Ragged, pack

NARROWEST = 32  # tokens: narrower programs save less than compiling them costs


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

    def narrowed(self, columns: int) -> Rows:
        """The rows with completions of up to `columns` tokens, which none of them may exceed."""
        cut = self.behaviour_logprobs.shape[1] - columns
        old = self.old_logprobs
        return self._replace(
            tokens=self.tokens[:, : self.tokens.shape[1] - cut],
            behaviour_logprobs=self.behaviour_logprobs[:, :columns],
            log_mass=self.log_mass[:, :columns],
            old_logprobs=None if old is None else old[:, :columns],
        )


class LearnBatch(NamedTuple):
    """The rows of one update; `challenger` is None when the Solver is trained alone."""

    solver: Rows
    challenger: Rows | None


class Reference(NamedTuple):
    """The frozen reference's statistics of one role's rows."""

    logprobs: jax.Array
    """float32 [B, T]."""
    hidden: jax.Array | None = None
    """[B, T, D] for the `full` KL, else None."""
    embeddings: jax.Array | None = None
    """float32 [B, D] of the Challenger's rows (`learn/novelty.py`), else None."""


class References(NamedTuple):
    """The frozen reference, as far as the update depends on it."""

    solver: Reference
    challenger: Reference | None = None
    """None when the Solver is trained alone."""
    params: Params | None = None
    """Its parameters, where the update computes with them (`LearnerSpec.needs_base`)."""


class Sampled(NamedTuple):
    """B completions as they were sampled, up to T tokens."""

    tokens: jax.Array
    """int32 [B, T]."""
    lengths: jax.Array
    """int32 [B]: tokens, the stop token included."""
    logprobs: jax.Array
    """float32 [B, T]: of each token under the distribution it was drawn from."""
    log_mass: jax.Array
    """float32 [B, T]: log of the mass that truncation kept."""


def make_rows(
    prompts: Ragged,
    sampled: Sampled,
    advantages: jax.Array,
    counts: jax.Array,
    scale: jax.Array | float,
    loss_type: str,
) -> Rows:
    """Rows [B, ...] of one role; `prompts` may have one row for all.

    `counts` bool [B] marks the rows in the loss. The weight of each is `scale` over a denominator by `loss_type`:
    sequence: B, whatever is masked; token_mean: all completion tokens of the rows that count; constant_length: B times
    T, the maximum length of a completion.
    """
    tokens, _ = pack((prompts, sampled[:2]))
    lengths = sampled.lengths
    rows = tokens.shape[0]
    denominator: jax.Array | int = rows
    if loss_type == "token_mean":
        denominator = jnp.maximum(jnp.sum(jnp.where(counts, lengths, 0)), 1)
    elif loss_type == "constant_length":
        denominator = rows * sampled.tokens.shape[1]
    return Rows(
        tokens=tokens,
        prompt_lengths=jnp.broadcast_to(prompts[1], (rows,)),
        completion_lengths=lengths,
        behaviour_logprobs=sampled.logprobs,
        log_mass=sampled.log_mass,
        advantages=advantages,
        weights=jnp.where(counts, scale / denominator, 0.0),
    )


def by_length(rows: Rows, group: int, counts: jax.Array) -> Rows:
    """The rows sorted by the length of their completions, so that those of a micro-batch are of about one length.

    Each `group` consecutive rows, which have one prompt, stay together: they are sorted among themselves, and the
    groups by their longest row. Rows for which `counts` bool [B] is False are taken for empty.
    """
    order = length_order(rows.completion_lengths, group, counts)
    return jax.tree.map(lambda x: x[order], rows)


def length_order(lengths: jax.Array, group: int, counts: jax.Array) -> jax.Array:
    """int32 [B]: the row that `by_length` puts in each place. (One group of all rows, or groups of one: the same.)"""
    counted = jnp.where(counts, lengths, 0).reshape(-1, group)
    inside = jnp.argsort(counted, axis=1, descending=True)
    groups = jnp.argsort(jnp.max(counted, axis=1), descending=True)
    return (groups[:, None] * group + inside[groups]).reshape(-1)


def widths(columns: int) -> tuple[int, ...]:
    """How many completion tokens a micro-batch may be computed with: a quarter, half and all of `columns`."""
    return tuple(sorted({*(-(-columns // part) for part in (4, 2) if columns // part >= NARROWEST), columns}))


def width_bucket(rows: Rows, columns: Sequence[int]) -> jax.Array:
    """Which of the rising `columns` holds the longest completion that counts: an index into it, scalar int32."""
    longest = jnp.max(jnp.where(rows.weights > 0, rows.completion_lengths, 0))
    return jnp.sum(longest > jnp.asarray(columns[:-1], jnp.int32), dtype=jnp.int32)


def micro_batches(rows: Rows, size: int) -> Rows:
    """[B, ...] -> [ceil(B / size), size, ...]; what is missing is filled with rows of weight 0."""
    missing = -rows.tokens.shape[0] % size

    def split(x: jax.Array) -> jax.Array:
        # padding rows repeat nothing: one prompt token, no completion, weight 0
        padded = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(-1, size, *x.shape[1:])

    split_rows = jax.tree.map(split, rows)
    return split_rows._replace(prompt_lengths=jnp.maximum(split_rows.prompt_lengths, 1))
