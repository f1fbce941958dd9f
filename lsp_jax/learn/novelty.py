"""Novelty of queries: a ring buffer of embeddings of the Challenger's earlier queries, and similarities of new ones.

An embedding is the mean of the frozen reference's last hidden states over a query's tokens, at unit length. It is a
by-product of the reference pass, and because the reference is frozen, old and new queries stay comparable. Hidden
states after the same prompt point in nearly the same direction, so similarities are taken after subtracting a centre:
the mean of the first queries. The centre then stays fixed: one that followed a collapse would make the collapsed
queries look different from one another again.

The ring buffer is part of the train state, so a resumed run has the same memory as an uninterrupted one.
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
"""Uncentred cosine from which two embeddings count as the same query, whatever the centre."""


def empty(size: int, width: int) -> Memory:
    """An empty memory for embeddings of `width` of the `size` most recent queries."""
    return {
        EMBEDDINGS: jnp.zeros((size, width), jnp.float32),
        COUNT: jnp.zeros((), jnp.int32),
        CENTRE: jnp.zeros(width, jnp.float32),
    }


def pooled(hidden_BTD: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """float32 [B, D] at unit length: the mean of `hidden_BTD` over each row's first `lengths_B` tokens."""
    inside_BT = jnp.arange(hidden_BTD.shape[1])[None] < lengths_B[:, None]
    summed_BD = jnp.sum(jnp.where(inside_BT[..., None], hidden_BTD.astype(jnp.float32), 0.0), axis=1)
    return _unit(summed_BD)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def remember(memory: Memory, embeddings_ND: jax.Array) -> Memory:
    """The memory with `embeddings_ND` in place of the oldest ones; N is at most M."""
    size, number = memory[EMBEDDINGS].shape[0], embeddings_ND.shape[0]
    places_N = (memory[COUNT] + jnp.arange(number)) % size
    return {
        EMBEDDINGS: memory[EMBEDDINGS].at[places_N].set(embeddings_ND),
        COUNT: memory[COUNT] + number,
        CENTRE: centre(memory, embeddings_ND),
    }


def centre(memory: Memory, embeddings_ND: jax.Array) -> jax.Array:
    """float32 [D]: the mean of the first `CENTRED` queries, or of all with `embeddings_ND` while there are fewer."""
    seen, number = memory[COUNT], embeddings_ND.shape[0]
    mean_D = (memory[CENTRE] * seen + jnp.sum(embeddings_ND, axis=0)) / jnp.maximum(seen + number, 1)
    return jnp.where(seen < CENTRED, mean_D, memory[CENTRE])


def similarities(memory: Memory, embeddings_ND: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Centred cosines of `embeddings_ND` to the memory [N, M] and among themselves [N, N]; 1 for the same query, -1 for
    unused entries of the memory."""
    middle_1D = centre(memory, embeddings_ND)[None]
    known_M = jnp.arange(memory[EMBEDDINGS].shape[0]) < memory[COUNT]

    def to(others: jax.Array) -> jax.Array:
        return jnp.where(
            embeddings_ND @ others.T >= SAME, 1.0, _unit(embeddings_ND - middle_1D) @ _unit(others - middle_1D).T
        )

    return jnp.where(known_M[None], to(memory[EMBEDDINGS]), -1.0), to(embeddings_ND)


def nearest(to_memory_NM: jax.Array, among_NN: jax.Array) -> jax.Array:
    """float32 [N]: each query's highest similarity to earlier ones, in the memory or in its own iteration."""
    earlier_NN = jnp.where(jnp.tril(jnp.ones_like(among_NN, bool), -1), among_NN, -1.0)
    return jnp.maximum(jnp.max(to_memory_NM, axis=1), jnp.max(earlier_NN, axis=1))


def cluster_entropy(among_NN: jax.Array, threshold: jax.Array | float) -> jax.Array:
    """Entropy of the cluster sizes of an iteration's queries, relative to that of N single queries: 1 if no two are
    similar, 0 if all are in one cluster. Clusters are connected components of similarities of at least `threshold`."""
    number = among_NN.shape[0]
    linked_NN = (among_NN >= threshold) | jnp.eye(number, dtype=bool)

    def spread(_: int, labels_N: jax.Array) -> jax.Array:
        return jnp.min(jnp.where(linked_NN, labels_N[None], number), axis=1)  # the smallest label among neighbours

    labels_N = jax.lax.fori_loop(0, number, spread, jnp.arange(number))
    share_N = jnp.bincount(labels_N, length=number) / number
    entropy = -jnp.sum(jnp.where(share_N > 0, share_N * jnp.log(jnp.where(share_N > 0, share_N, 1.0)), 0.0))
    return entropy / jnp.log(max(number, 2))
