"""Decoding chunk by chunk, from the host: the cost follows the tokens that are really generated.

Between two chunks the host reads how many rows still run, drops the others once a quarter is done and grows the cache.
Every row draws what it would draw in `decode.rollout`. The numbers of rows and the cache's lengths are few and fixed,
so the programs are too.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lsp_jax.core import processes, runtime
from lsp_jax.model import llama
from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.kv_cache import KVCache
from lsp_jax.model.sharding import replicate, row_shards, shard_rows
from lsp_jax.play.decode import Completions, Layers, Rows, advance, begin
from lsp_jax.play.sampler import SamplingConfig

SHORTEST_CACHE = 64
"""Columns with which a growing cache begins: each length is one more program, and short caches cost little."""


@partial(jax.jit, static_argnames="config")
def _unstack(params: llama.Params, config: LlamaConfig) -> Layers:
    return llama.unstack_layers(params["model"]["layers"], config.num_hidden_layers)


@partial(jax.jit, static_argnames=("config", "sampling", "columns", "stop_ids", "cache_columns"))
def _begin(
    params: llama.Params,
    tokens: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    *,
    config: LlamaConfig,
    sampling: SamplingConfig,
    columns: int,
    stop_ids: tuple[int, ...],
    cache_columns: int,
) -> tuple[KVCache, Rows]:
    hidden, prefix = llama.extend(params, config, tokens, lengths)
    last = llama.last_hidden(hidden, lengths)
    return prefix, begin(params, config, last, keys, sampling, columns, stop_ids, cache_columns)


@partial(jax.jit, static_argnames=("config", "sampling", "stop_ids"), donate_argnames="rows")
def _advance(
    params: llama.Params,
    layers: Layers,
    prefix: KVCache,
    rows: Rows,
    until: jax.Array,
    *,
    config: LlamaConfig,
    sampling: SamplingConfig,
    stop_ids: tuple[int, ...],
) -> tuple[Rows, jax.Array]:
    """The rows after the chunk, and how many have not stopped."""
    rows = advance(params, layers, config, (prefix,), rows, until, sampling, stop_ids)
    return rows, jnp.sum(~rows.done.stopped)


class Finished(NamedTuple):
    """Rows that have been dropped, each at its index among all rows, and the indices of the others."""

    done: Completions
    places: jax.Array
    """int32 [rows that still run]."""


@jax.jit
def _none_finished(rows: Rows) -> Finished:
    return Finished(shard_rows(jax.tree.map(jnp.zeros_like, rows.done)), jnp.arange(rows.token.shape[0]))


@partial(jax.jit, static_argnames="number")
def _drop(prefix: KVCache, rows: Rows, finished: Finished, *, number: int) -> tuple[KVCache, Rows, Finished]:
    """The `number` rows that run longest; all others are put to their places."""
    batch, places = rows.token.shape[0], finished.places
    order = jnp.argsort(rows.done.stopped, stable=True)[:number]
    shared = prefix.lengths.shape[0]
    if shared > 1:  # groups are no longer whole: every row gets its prompt for itself
        prompts = order // (batch // shared)
        prefix = KVCache(prefix.keys[:, prompts], prefix.values[:, prompts], prefix.lengths[prompts])
    token, keys, done = shard_rows(jax.tree.map(lambda x: x[order], (rows.token, rows.keys, rows.done)))
    dropped = Finished(_placed(finished, rows.done), places[order])
    return prefix, Rows(rows.column, token, keys, done, rows.cache.of(order)), dropped


@partial(jax.jit, static_argnames="columns")
def _grow(rows: Rows, *, columns: int) -> Rows:
    """The rows with a cache of `columns` columns."""
    return rows._replace(cache=rows.cache.grown(columns))


def _placed(finished: Finished, done: Completions) -> Completions:
    places = finished.places
    return shard_rows(jax.tree.map(lambda whole, part: whole.at[places].set(part), finished.done, done))


_put = jax.jit(_placed)


@jax.jit
def _copy(rows: Rows) -> Rows:
    return jax.tree.map(jnp.copy, rows)


def cache_lengths(columns: int) -> tuple[int, ...]:
    """Columns that a growing cache may have, each about twice the one before; the last holds `columns` tokens."""
    lengths = [columns]
    while lengths[0] > SHORTEST_CACHE:
        lengths.insert(0, -(-lengths[0] // 2))
    return tuple(lengths)


def row_counts(batch: int) -> tuple[int, ...]:
    """With how many of `batch` rows decoding may go on: all, three quarters, half, three eighths, a quarter, ...; every
    device has as many of them."""
    counts = {whole >> halvings for whole in (batch, 3 * batch // 4) for halvings in range(batch.bit_length())} - {0}
    return tuple(sorted({batch} | {count for count in counts if count % row_shards() == 0}, reverse=True))


class Chunks(NamedTuple):
    """Decoding chunk by chunk: the programs of one kind of completion, and what they share."""

    config: LlamaConfig
    sampling: SamplingConfig
    columns: int
    """Longest completion."""
    stop_ids: tuple[int, ...]
    chunk: int
    """Columns of a chunk."""

    @property
    def _static(self) -> dict[str, Any]:
        return {"config": self.config, "sampling": self.sampling, "stop_ids": self.stop_ids}

    def begin(self, params: llama.Params, *prompts: jax.Array) -> tuple[KVCache, Rows]:
        """Prefill and first token; `prompts` are tokens, lengths and the rows' keys."""
        static = {**self._static, "columns": self.columns, "cache_columns": cache_lengths(self.columns)[0]}
        processes.check_program(f"decode {self.columns}", _begin, params, *prompts, **static)
        return _begin(params, *prompts, **static)

    def advance(
        self, params: llama.Params, layers: Layers, prefix: KVCache, rows: Rows, until: int
    ) -> tuple[Rows, jax.Array]:
        """The rows after column `until - 1`, and how many have not stopped."""
        return _advance(params, layers, prefix, rows, replicate(np.int32(until)), **self._static)

    def run(self, params: llama.Params, tokens: jax.Array, lengths: jax.Array, keys: jax.Array) -> Completions:
        """As `rollout`, after right-padded prompts `tokens` [N, P] with `lengths` [N], for rows with `keys` [B].

        Not to be traced: between chunks it reads one number from the device.
        """
        prefix, rows = self.begin(params, tokens, lengths, keys)
        layers, counts, finished = _unstack(params, self.config), row_counts(keys.shape[0]), None
        for start in range(0, self.columns, self.chunk):
            until = min(start + self.chunk, self.columns)
            rows = self._grown(rows, until)
            rows, alive = self.advance(params, layers, prefix, rows, until)
            running = int(runtime.to_host(alive)) if until < self.columns else 0
            if running == 0:
                break
            while len(counts) > 1 and running <= counts[1]:
                counts = counts[1:]
                prefix, rows, finished = _drop(prefix, rows, finished or _none_finished(rows), number=counts[0])
        return rows.done if finished is None else _put(finished, rows.done)

    def _grown(self, rows: Rows, until: int) -> Rows:
        for size in cache_lengths(self.columns):
            here = rows.cache.columns
            if here < until and size > here:
                rows = _grow(rows, columns=size)
        return rows

    def precompile(self, params: llama.Params, tokens: jax.Array, lengths: jax.Array, keys: jax.Array) -> None:
        """Compiles every program that `run` can need for arguments of these shapes, whatever the rows' lengths."""
        layers, caches = _unstack(params, self.config), cache_lengths(self.columns)
        prefix, rows = self.begin(params, tokens, lengths, keys)
        counts, finished = row_counts(keys.shape[0]), None
        for number, fewer in enumerate((*counts[1:], 0)):
            wider = rows
            for size in caches:
                wider = self._grown(wider, size)
                self.advance(params, layers, prefix, _copy(wider), 0)  # donated; there is nothing to do up to column 0
                if fewer:
                    _drop(prefix, wider, finished or _none_finished(wider), number=fewer)
            if number:
                _put(finished, rows.done)
            if fewer:
                prefix, rows, finished = _drop(prefix, rows, finished or _none_finished(rows), number=fewer)
