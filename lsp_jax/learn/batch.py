"""The learner's batch: rows [prompt | completion] of each role, right-padded, masks from lengths only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsp_jax.model.llama import Params
from lsp_jax.text.prompts import Ragged, pack

NARROWEST = 32  # tokens; narrower programs save less time than their compilation takes


class Rows(NamedTuple):
    """B rows of one role: W columns, completions of up to T tokens."""

    tokens: jax.Array
    """int32 [B, W]: prompt, completion, padding."""
    prompt_lengths: jax.Array
    """int32 [B]: real prompt tokens, >= 1."""
    completion_lengths: jax.Array
    """int32 [B]: completion tokens, the stop token included."""
    behaviour_logprobs: jax.Array
    """float32 [B, T]: log-probabilities of the tokens under the sampler."""
    log_mass: jax.Array
    """float32 [B, T]: log of the probability mass that truncation kept; 0 without truncation."""
    advantages: jax.Array
    """float32 [B]."""
    weights: jax.Array
    """float32 [B]: the row's share of the loss, denominators and alpha_Ch included; 0 masks the row out."""
    old_logprobs: jax.Array | None = None
    """float32 [B, T]: tempered log-probabilities under the rollout policy, fixed before the first update, for the
    ratios of inner epochs. None for a single update: it starts from that policy, so every ratio is 1."""

    @property
    def mask(self) -> jax.Array:
        """bool [B, T]: the completion tokens of rows in the loss, from lengths."""
        columns = jnp.arange(self.behaviour_logprobs.shape[1])[None]
        return (columns < self.completion_lengths[:, None]) & (self.weights > 0)[:, None]

    @property
    def positions(self) -> jax.Array:
        """int32 [B, T]: the column of `tokens` that holds each completion token (clipped in the padding)."""
        columns_BT = self.prompt_lengths[:, None] + jnp.arange(self.behaviour_logprobs.shape[1])[None]
        return jnp.minimum(columns_BT, self.tokens.shape[1] - 1)

    def narrowed(self, columns: int) -> Rows:
        """The rows cut to completions of `columns` tokens; none may be longer."""
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
    """Statistics of one role's rows under the frozen reference."""

    logprobs: jax.Array
    """float32 [B, T]."""
    hidden: jax.Array | None = None
    """[B, T, D] for the `full` KL, else None."""
    embeddings: jax.Array | None = None
    """float32 [B, D] of the Challenger's rows (`learn/novelty.py`), else None."""


class References(NamedTuple):
    """All that the update reads of the frozen reference."""

    solver: Reference
    challenger: Reference | None = None
    """None when the Solver is trained alone."""
    params: Params | None = None
    """Its parameters, if the update reads them (`LearnerSpec.needs_base`)."""


class Sampled(NamedTuple):
    """B sampled completions of up to T tokens."""

    tokens: jax.Array
    """int32 [B, T]."""
    lengths: jax.Array
    """int32 [B]: tokens, the stop token included."""
    logprobs: jax.Array
    """float32 [B, T]: log-probability of each token under the distribution it was drawn from."""
    log_mass: jax.Array
    """float32 [B, T]: log of the probability mass that truncation kept."""


def make_rows(
    prompts: Ragged,
    sampled: Sampled,
    advantages_B: jax.Array,
    counts_B: jax.Array,
    scale: jax.Array | float,
    loss_type: str,
) -> Rows:
    """Rows [B, ...] of one role; `prompts` may have one row for all.

    `counts_B` (bool) marks the rows in the loss. Each has the weight `scale` / denominator, where `loss_type` selects
    the denominator. sequence: B, masked rows included; token_mean: the number of completion tokens of the rows in the
    loss; constant_length: B * T, with T the maximum length of a completion.
    """
    tokens_BW, _ = pack((prompts, sampled[:2]))
    lengths_B = sampled.lengths
    rows = tokens_BW.shape[0]
    denominator: jax.Array | int = rows
    if loss_type == "token_mean":
        denominator = jnp.maximum(jnp.sum(jnp.where(counts_B, lengths_B, 0)), 1)
    elif loss_type == "constant_length":
        denominator = rows * sampled.tokens.shape[1]
    return Rows(
        tokens=tokens_BW,
        prompt_lengths=jnp.broadcast_to(prompts[1], (rows,)),
        completion_lengths=lengths_B,
        behaviour_logprobs=sampled.logprobs,
        log_mass=sampled.log_mass,
        advantages=advantages_B,
        weights=jnp.where(counts_B, scale / denominator, 0.0),
    )


def by_length(rows: Rows, group: int, counts_B: jax.Array) -> Rows:
    """The rows sorted by completion length, longest first, so that the rows of a micro-batch have similar lengths.

    Each `group` consecutive rows share a prompt and stay together: rows are sorted within their group, and groups by
    their longest row. Rows for which `counts_B` (bool) is False count as empty.
    """
    order_B = length_order(rows.completion_lengths, group, counts_B)
    return jax.tree.map(lambda x: x[order_B], rows)


def length_order(lengths_B: jax.Array, group: int, counts_B: jax.Array) -> jax.Array:
    """int32 [B]: the permutation of `by_length`; the same for one group of all rows and for groups of one row."""
    counted_NG = jnp.where(counts_B, lengths_B, 0).reshape(-1, group)
    inside_NG = jnp.argsort(counted_NG, axis=1, descending=True)
    groups_N = jnp.argsort(jnp.max(counted_NG, axis=1), descending=True)
    return (groups_N[:, None] * group + inside_NG[groups_N]).reshape(-1)


def widths(columns: int) -> tuple[int, ...]:
    """Completion widths at which a micro-batch may be computed: a quarter, a half and all of `columns`."""
    return tuple(sorted({*(-(-columns // part) for part in (4, 2) if columns // part >= NARROWEST), columns}))


def width_bucket(rows: Rows, columns: Sequence[int]) -> jax.Array:
    """Index (scalar int32) of the smallest of the ascending `columns` that holds the longest completion in the loss."""
    longest = jnp.max(jnp.where(rows.weights > 0, rows.completion_lengths, 0))
    return jnp.sum(longest > jnp.asarray(columns[:-1], jnp.int32), dtype=jnp.int32)


def micro_batches(rows: Rows, size: int) -> Rows:
    """Splits rows [B, ...] into micro-batches [ceil(B / size), size, ...], padded with rows of weight 0."""
    missing = -rows.tokens.shape[0] % size

    def split(x: jax.Array) -> jax.Array:
        # padding rows: one prompt token, no completion, weight 0
        padded = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(-1, size, *x.shape[1:])

    split_rows = jax.tree.map(split, rows)
    return split_rows._replace(prompt_lengths=jnp.maximum(split_rows.prompt_lengths, 1))
