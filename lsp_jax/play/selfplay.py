"""Self-play: one policy samples queries as Challenger and answers them as Solver, giving an `Episode`.

1. `challenger_rows`: the Challenger's one prompt, and the keys of its N queries.
2. `read_queries`: its completions as queries, with their validity.
3. `solver_rows`: the ids of queries spliced into those of the Solver's chat template, and the keys of the answers.
4. `grouped`: the N * G answers, grouped by query.

Decoding happens between them (`algorithm/rollout.py`). All functions are pure and stay on device. LSP, Algorithm 1,
steps 1 and 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsp_jax.core.errors import InputError
from lsp_jax.play.decode import Completions
from lsp_jax.play.sampler import row_keys
from lsp_jax.text.prompts import PlayPrompts, Ragged, contains_sequence, ids_row, pack, splice
from lsp_jax.text.tokenizer import SPECIAL, TEXT

CHALLENGER, SOLVER = 0, 1  # folded into the key, so that the roles draw different noise


@dataclass(frozen=True)
class PlayConfig:
    """Rollout sizes. Names as in TRL."""

    num_queries: int = 8
    """N: queries that the Challenger samples per iteration."""
    num_generations: int = 8
    """G: answers the Solver gives to each query."""
    max_query_length: int = 64
    """Maximum query length in sampled tokens, including the stop token; a truncated query is invalid."""
    max_completion_length: int = 128
    """Maximum answer length in tokens, including the stop token."""
    decode_chunk: int = 32
    """Tokens decoded per chunk; finished rows are dropped between chunks. Completions no longer than this are decoded
    by one program without host reads, as are all with 0."""
    max_resamples: int = 0
    """Maximum resampling rounds per iteration for queries whose answers all have the same reward (DAPO's dynamic
    sampling)."""

    def check(self, trains_challenger: bool) -> None:
        """Raises InputError for sizes that make all group-relative advantages zero, or texts empty."""
        if self.num_generations < 2:
            raise InputError(
                "play.num_generations", self.num_generations, "G must be at least 2: the baseline is the group's mean"
            )
        if self.num_queries < 1 or (trains_challenger and self.num_queries < 2):
            raise InputError(
                "play.num_queries",
                self.num_queries,
                "N must be at least 2 with a Challenger (its baseline is the mean over queries); "
                "or set loss.alpha_challenger to 0 to train the Solver alone",
            )
        for field in ("max_query_length", "max_completion_length"):
            if getattr(self, field) < 1:
                raise InputError(f"play.{field}", getattr(self, field), "must be at least 1 token")
        if self.max_resamples < 0:
            raise InputError("play.max_resamples", self.max_resamples, "must be at least 0")
        if self.decode_chunk < 0:
            raise InputError(
                "play.decode_chunk", self.decode_chunk, "must be a number of tokens, or 0 for a single chunk"
            )


class Queries(NamedTuple):
    """The Challenger's queries, or a data set's in their place."""

    sampled: Completions | None
    """[N, T]: the sampled tokens, trained on; None for queries from data."""
    text: Ragged
    """Query prefix and sampled tokens without the stop token: tokens [N, q + T], lengths [N]."""
    valid: jax.Array
    """bool [N]: ended by a stop token, not blank, free of template tags."""
    leaks: jax.Array | None = None
    """bool [N]: contains a control token or a template tag; None for queries from data."""
    before: Ragged | None = None
    """Of data with system or earlier turns: ids before `text` in the Solver's prompts, in place of the fixed ones."""


class Episode(NamedTuple):
    """The rollouts of one iteration."""

    queries: Queries
    prompts: Ragged
    """The Solver's prompts: tokens [N, P], lengths [N]."""
    answers: Completions
    """[N, G, T]."""

    @property
    def answer_lengths(self) -> jax.Array:
        """int32 [N, G]: tokens of each answer without the stop token."""
        return self.answers.lengths - self.answers.stopped


def challenger_rows(key: jax.Array, prompts: PlayPrompts, num_queries: int) -> tuple[Ragged, jax.Array]:
    """The Challenger's prompt, one row, and the keys [N] of the queries."""
    return ids_row(prompts.challenger_ids), row_keys(jax.random.fold_in(key, CHALLENGER), num_queries)


def read_queries(sampled: Completions, token_classes_V: jax.Array, prompts: PlayPrompts) -> Queries:
    """The Challenger's completions as queries, with their validity."""
    written = (sampled.tokens, sampled.lengths - sampled.stopped)
    text = pack((ids_row(prompts.query_prefix_ids), written))
    leaks_N = _leaks(written, token_classes_V, prompts.tags)
    return Queries(sampled, text, sampled.stopped & _has_text(written, token_classes_V) & ~leaks_N, leaks_N)


def _has_text(written: Ragged, token_classes_V: jax.Array) -> jax.Array:
    tokens_NT, lengths_N = written
    real_NT = jnp.arange(tokens_NT.shape[1])[None] < lengths_N[:, None]
    return jnp.any(real_NT & (token_classes_V[tokens_NT] == TEXT), axis=-1)


def _leaks(written: Ragged, token_classes_V: jax.Array, tags: tuple[tuple[int, ...], ...]) -> jax.Array:
    tokens_NT, lengths_N = written
    real_NT = jnp.arange(tokens_NT.shape[1])[None] < lengths_N[:, None]
    leaks_N = jnp.any(real_NT & (token_classes_V[tokens_NT] == SPECIAL), axis=-1)
    for tag in tags:
        leaks_N = leaks_N | contains_sequence(written, tag)
    return leaks_N


def solver_rows(
    queries: Queries, key: jax.Array, prompts: PlayPrompts, num_generations: int
) -> tuple[Ragged, jax.Array]:
    """The Solver's prompts (tokens [N, P], lengths [N]) and the keys [N * G] of the answers."""
    if queries.before is None:
        spliced = splice(prompts.solver, queries.text)
    else:
        spliced = pack((queries.before, queries.text, ids_row(prompts.solver.suffix_ids)))
    return spliced, row_keys(jax.random.fold_in(key, SOLVER), spliced[0].shape[0] * num_generations)


def grouped(flat: Completions, num_generations: int) -> Completions:
    """Groups the answers by query: [N * G, ...] -> [N, G, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, num_generations, *x.shape[1:]), flat)
