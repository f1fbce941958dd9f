"""Blanking of template tags made of ordinary tokens (Llama 2's `[/INST]`) in model text, however they are tokenised.

A model may spell a tag with tokens that its tokenizer would never choose, or together with a neighbour in one token
(`].`). Tags are therefore matched by characters: for each token and each number of characters matched so far, a table
gives the number matched after the token. The table is built once on the host; matching is a scan over tokens on device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lsp_jax.text.prompts import Ragged
from lsp_jax.text.tokenizer import Tokenizer


class TagTables(NamedTuple):
    """Matching tables of `blank_tags`."""

    steps: tuple[np.ndarray | jax.Array, ...]
    """One int32 [V, m] per tag of m characters. Entry [v, s] is the number of characters matched after token v given s
    matched before it, plus m if the tag ended inside v."""
    widths: np.ndarray | jax.Array
    """int32 [V]: number of characters of each token."""


def tag_tables(tokenizer: Tokenizer, tags: Sequence[str]) -> TagTables:
    """Builds the tables of `tags` (none of them empty) for the tokenizer's vocabulary."""
    texts = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)] if tags else []
    return TagTables(tuple(_steps(texts, tag) for tag in tags), np.array([len(text) for text in texts], np.int32))


def _steps(texts: Sequence[str], tag: str) -> np.ndarray:
    size, characters = len(tag), frozenset(tag)

    @lru_cache
    def after(matched: int, character: str) -> int:
        seen = tag[:matched] + character
        return next(length for length in range(len(seen), -1, -1) if tag.startswith(seen[len(seen) - length :]))

    steps = np.zeros((len(texts), size), np.int32)
    for token, text in enumerate(texts):
        if text and characters.isdisjoint(text):
            continue
        for start in range(size):
            matched, ended = start, False
            for character in text:
                matched = after(matched, character)
                if matched == size:
                    matched, ended = 0, True
            steps[token, start] = matched + size * ended
    return steps


def blank_tags(text: Ragged, tables: TagTables, blank: int) -> Ragged:
    """Replaces every token of `text` [B, W] that holds part of a tag by the token `blank`. Pure.

    Neighbours of a tag may be blanked with it; the tag always is. Padding is ignored.
    """
    tokens, lengths = text
    real = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    covered = jnp.zeros(tokens.shape, bool)
    for steps in map(jnp.asarray, tables.steps):
        covered = covered | _covered(tokens, real, steps, jnp.asarray(tables.widths))
    return jnp.where(covered & real, blank, tokens), lengths


def _covered(tokens: jax.Array, real: jax.Array, steps: jax.Array, widths: jax.Array) -> jax.Array:
    """bool [B, W]: whether a token holds part of the tag of `steps`."""
    size = steps.shape[1]

    def forward(matched: jax.Array, column: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        step = jnp.where(column[1], steps[column[0], matched], 0)
        return step % size, step >= size

    def backward(left: jax.Array, column: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        token, ended = column  # a tag that ends inside a token has at most size - 1 characters before it
        before = jnp.maximum(jnp.where(ended, size - 1, 0), left - widths[token])
        return jnp.maximum(before, 0), ended | (left > 0)

    start = jnp.zeros(tokens.shape[0], jnp.int32)
    _, ends = jax.lax.scan(forward, start, (tokens.T, real.T))
    _, covered = jax.lax.scan(backward, start, (tokens.T, ends), reverse=True)
    return covered.T
