"""Novelty: embeddings of the Challenger's earlier queries in a ring, and how near a new query comes to them.

An embedding is the mean of the frozen reference's last hidden states over a query's tokens, at unit length: the
reference's pass makes it in passing, and since the reference does not move, old and new queries stay comparable.
Hidden states of one prompt all point much the same way, so similarities are taken after a centre is subtracted: the
mean of the first queries. It stays, for a mean that followed a collapse would tell the queries of one apart again.

The ring lies in the train state: a resumed run remembers what it would have remembered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lsp_jax.core.errors import InputError

LARGEST = 1 << 20


@dataclass(frozen=True)
class MemoryConfig:
    """Memory of the Challenger's earlier queries, for near-duplicate detection."""

    size: int = 4096
    """Number of most recent queries in the memory."""
    near_duplicate: float = 0.9
    """Cosine similarity from which a query counts as a near-duplicate of an earlier one."""
    penalty: float = 0.0
    """Penalty on the Challenger's reward for a near-duplicate; 0: none."""

    def check(self, num_queries: int) -> None:
        """Raises InputError naming the field."""
        if not num_queries <= self.size <= LARGEST:
            remedy = f"must be {num_queries} (the queries of an iteration) .. {LARGEST} queries"
            raise InputError("memory.size", self.size, remedy)
        if not -1 < self.near_duplicate <= 1:
            raise InputError("memory.near_duplicate", self.near_duplicate, "must be a cosine in (-1, 1]")
        if not 0 <= self.penalty < math.inf:
            raise InputError("memory.penalty", self.penalty, "must be >= 0 and finite")


Memory = dict[str, jax.Array]
"""`memory/embeddings` float32 [M, D]; `memory/count` int32: queries remembered since the start; `memory/centre` [D]:
the mean of the first `CENTRED` of them."""

EMBEDDINGS, COUNT, CENTRE = "memory/embeddings", "memory/count", "memory/centre"
CENTRED = 128
SAME = 1 - 1e-5
"""Cosine, nothing subtracted, from which two are one query whatever the centre."""


def empty(size: int, width: int) -> Memory:
    """Room for the newest `size` queries' embeddings of `width`."""
    return {
        EMBEDDINGS: jnp.zeros((size, width), jnp.float32),
        COUNT: jnp.zeros((), jnp.int32),
        CENTRE: jnp.zeros(width, jnp.float32),
    }


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
    return {
        EMBEDDINGS: memory[EMBEDDINGS].at[places].set(embeddings),
        COUNT: memory[COUNT] + number,
        CENTRE: centre(memory, embeddings),
    }


def centre(memory: Memory, embeddings: jax.Array) -> jax.Array:
    """float32 [D]: the mean of the first `CENTRED` queries, or of all with the `embeddings` while there are fewer."""
    seen, number = memory[COUNT], embeddings.shape[0]
    mean = (memory[CENTRE] * seen + jnp.sum(embeddings, axis=0)) / jnp.maximum(seen + number, 1)
    return jnp.where(seen < CENTRED, mean, memory[CENTRE])


def similarities(memory: Memory, embeddings: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines of `embeddings` [N, D] to what is remembered [N, M], and among themselves [N, N], about the centre; 1 for
    the same query, -1 where nothing is remembered."""
    middle = centre(memory, embeddings)[None]
    known = jnp.arange(memory[EMBEDDINGS].shape[0]) < memory[COUNT]

    def to(others: jax.Array) -> jax.Array:
        return jnp.where(embeddings @ others.T >= SAME, 1.0, _unit(embeddings - middle) @ _unit(others - middle).T)

    return jnp.where(known[None], to(memory[EMBEDDINGS]), -1.0), to(embeddings)


def nearest(to_memory: jax.Array, among: jax.Array) -> jax.Array:
    """float32 [N]: each query's highest similarity to what came before it, in memory or in its own iteration."""
    earlier = jnp.where(jnp.tril(jnp.ones_like(among, bool), -1), among, -1.0)
    return jnp.maximum(jnp.max(to_memory, axis=1), jnp.max(earlier, axis=1))


def cluster_entropy(among: jax.Array, threshold: jax.Array | float) -> jax.Array:
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
