"""What the Challenger has asked so far, as embeddings in a ring, and how near a new query comes to it.

An embedding is the mean of the frozen reference's last hidden states over a query's tokens, at unit length: the
reference's pass makes it in passing, and since the reference does not move, old and new queries stay comparable.
Hidden states of one prompt all point much the same way, so similarities are taken after the mean of what is remembered
is subtracted.

The ring lies in the train state: a resumed run remembers what it would have remembered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lsp_jax.errors import InputError


@dataclass(frozen=True)
class MemoryConfig:
    """What is kept of the Challenger's queries, and when two are nearly the same."""

    size: int = 4096
    """Queries that are remembered, the newest."""
    near_duplicate: float = 0.9
    """Similarity, up to 1, from which a query counts as nearly one that was asked before."""
    penalty: float = 0.0
    """What such a query costs the Challenger, of its reward; 0 is none."""

    def check(self, num_queries: int) -> None:
        """Raises InputError naming the field."""
        if self.size < num_queries:
            raise InputError("memory.size", self.size, f"must hold the {num_queries} queries of an iteration at least")
        if not -1 < self.near_duplicate <= 1:
            raise InputError("memory.near_duplicate", self.near_duplicate, "must be a cosine in (-1, 1]")
        if not 0 <= self.penalty < math.inf:
            raise InputError("memory.penalty", self.penalty, "must be >= 0 and finite")


Memory = dict[str, jax.Array]
"""`memory/embeddings` float32 [M, D], and `memory/count` int32: queries remembered since the start."""

EMBEDDINGS, COUNT = "memory/embeddings", "memory/count"


def empty(size: int, width: int) -> Memory:
    """Room for the newest `size` queries' embeddings of `width`."""
    return {EMBEDDINGS: jnp.zeros((size, width), jnp.float32), COUNT: jnp.zeros((), jnp.int32)}


def pooled(hidden: jax.Array, lengths: jax.Array) -> jax.Array:
    """float32 [B, D] at unit length: the mean of `hidden` [B, T, D] over each row's first `lengths` [B] tokens."""
    inside = jnp.arange(hidden.shape[1])[None] < lengths[:, None]
    summed = jnp.sum(jnp.where(inside[..., None], hidden.astype(jnp.float32), 0.0), axis=1)
    return _unit(summed)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def remember(memory: Memory, embeddings: jax.Array) -> Memory:
    """With the `embeddings` [N, D] in place of the oldest; N is at most M."""
    size, number = memory[EMBEDDINGS].shape[0], embeddings.shape[0]
    places = (memory[COUNT] + jnp.arange(number)) % size
    return {EMBEDDINGS: memory[EMBEDDINGS].at[places].set(embeddings), COUNT: memory[COUNT] + number}


def similarities(memory: Memory, embeddings: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines of `embeddings` [N, D] to what is remembered [N, M], and among themselves [N, N]; all about the mean of
    both together. -1 where nothing is remembered."""
    known = jnp.arange(memory[EMBEDDINGS].shape[0]) < memory[COUNT]
    total = jnp.sum(jnp.where(known[:, None], memory[EMBEDDINGS], 0.0), axis=0) + jnp.sum(embeddings, axis=0)
    mean = total / (jnp.sum(known) + embeddings.shape[0])
    new, old = _unit(embeddings - mean[None]), _unit(memory[EMBEDDINGS] - mean[None])
    return jnp.where(known[None], new @ old.T, -1.0), new @ new.T


def nearest(to_memory: jax.Array, among: jax.Array) -> jax.Array:
    """float32 [N]: each query's highest similarity to what came before it, in memory or in its own iteration."""
    earlier = jnp.where(jnp.tril(jnp.ones_like(among, bool), -1), among, -1.0)
    return jnp.maximum(jnp.max(to_memory, axis=1), jnp.max(earlier, axis=1))


def cluster_entropy(among: jax.Array, threshold: float) -> jax.Array:
    """Entropy of the sizes of an iteration's clusters of queries over that of N single ones: 1 when none is near
    another, 0 when all are. A cluster holds what is linked by similarities of at least `threshold`."""
    number = among.shape[0]
    linked = (among >= threshold) | jnp.eye(number, dtype=bool)

    def spread(_: int, labels: jax.Array) -> jax.Array:
        return jnp.min(jnp.where(linked, labels[None], number), axis=1)  # the least label of all neighbours

    labels = jax.lax.fori_loop(0, number, spread, jnp.arange(number))
    share = jnp.bincount(labels, length=number) / number
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0))
    return entropy / jnp.log(max(number, 2))
