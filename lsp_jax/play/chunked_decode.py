"""Decoding chunk by chunk, from the host: the cost follows the tokens that are really generated.

Between two chunks the host reads how many rows still run, drops the others once a quarter is done and grows the cache.
Every row draws what it would draw in `decode.rollout`. The numbers of rows and the cache's lengths are few and fixed,
so the programs are too.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsp_jax.core.stage import EAGER, Backend, stage
from lsp_jax.model import llama
from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.kv_cache import KVCache
from lsp_jax.model.sharding import row_shards, shard_rows
from lsp_jax.play.decode import Completions, DecodeSpec, DecodeState, Layers, advance, begin
from lsp_jax.text.prompts import Ragged

SHORTEST_CACHE = 64
"""Columns with which a growing cache begins: each length is one more program, and short caches cost little."""


@stage(static="config")
def unstack(params: llama.Params, config: LlamaConfig) -> Layers:
    """Each layer's parameters by themselves."""
    return llama.unstack_layers(params["model"]["layers"], config.num_hidden_layers)


@stage(static=("spec", "cache_columns"))
def prefill(
    params: llama.Params, prompts: Ragged, keys: jax.Array, spec: DecodeSpec, cache_columns: int
) -> tuple[KVCache, DecodeState]:
    """The prompts' cache, and each row's first token with a cache of `cache_columns`."""
    hidden, prefix = llama.extend(params, spec.model, *prompts)
    return prefix, begin(params, llama.last_hidden(hidden, prompts[1]), keys, spec, cache_columns)


@stage(static="spec", donate="rows")
def decode_chunk(
    params: llama.Params, layers: Layers, prefix: KVCache, rows: DecodeState, spec: DecodeSpec
) -> tuple[DecodeState, jax.Array]:
    """The rows at the next multiple of `spec.chunk` columns, and how many have not stopped."""
    until = jnp.minimum(((rows.column + 1) // spec.chunk + 1) * spec.chunk, spec.max_new_tokens)
    rows = advance(params, layers, (prefix,), rows, until, spec)
    return rows, jnp.sum(~rows.done.stopped)


class Finished(NamedTuple):
    """Rows that have been dropped, each at its index among all rows, and the indices of the others."""

    done: Completions
    places: jax.Array
    """int32 [rows that still run]."""


@stage()
def none_finished(rows: DecodeState) -> Finished:
    """All rows running."""
    return Finished(shard_rows(jax.tree.map(jnp.zeros_like, rows.done)), jnp.arange(rows.token.shape[0]))


@stage(static="number")
def drop_finished(
    prefix: KVCache, rows: DecodeState, finished: Finished, number: int
) -> tuple[KVCache, DecodeState, Finished]:
    """The `number` rows that run longest; all others are put to their places."""
    batch, places = rows.token.shape[0], finished.places
    order = jnp.argsort(rows.done.stopped, stable=True)[:number]
    shared = prefix.lengths.shape[0]
    if shared > 1:  # groups are incomplete from here on: every row gets its prompt for itself
        prompts = order // (batch // shared)
        prefix = KVCache(prefix.keys[:, prompts], prefix.values[:, prompts], prefix.lengths[prompts])
    token, keys, done = shard_rows(jax.tree.map(lambda x: x[order], (rows.token, rows.keys, rows.done)))
    dropped = Finished(_placed(finished, rows.done), places[order])
    return prefix, DecodeState(rows.column, token, keys, done, rows.cache.of(order)), dropped


@stage(static="columns")
def grow_cache(rows: DecodeState, columns: int) -> DecodeState:
    """The rows with a cache of `columns` columns."""
    return rows._replace(cache=rows.cache.grown(columns))


def _placed(finished: Finished, done: Completions) -> Completions:
    places = finished.places
    return shard_rows(jax.tree.map(lambda every, part: every.at[places].set(part), finished.done, done))


@stage()
def put_back(finished: Finished, done: Completions) -> Completions:
    """All rows' completions in their order: those dropped before, and `done` of the others."""
    return _placed(finished, done)


@partial(jax.jit, static_argnames="columns")
def _at_end(rows: DecodeState, columns: int) -> DecodeState:
    """A copy at the last of so many `columns`: there is nothing left to decode."""
    return jax.tree.map(jnp.copy, rows)._replace(column=jnp.full_like(rows.column, columns))


def cache_lengths(columns: int) -> tuple[int, ...]:
    """Columns that a growing cache may have, each about twice the one before; the last holds `columns` tokens."""
    lengths = [columns]
    while lengths[0] > SHORTEST_CACHE:
        lengths.insert(0, -(-lengths[0] // 2))
    return tuple(lengths)


def row_counts(batch: int) -> tuple[int, ...]:
    """With how many of `batch` rows decoding may go on: all, three quarters, half, three eighths, a quarter, ...; every
    device has as many of them."""
    counts = {part >> halvings for part in (batch, 3 * batch // 4) for halvings in range(batch.bit_length())} - {0}
    return tuple(sorted({batch} | {count for count in counts if count % row_shards() == 0}, reverse=True))


def decode_in_chunks(
    params: llama.Params,
    prompts: Ragged,
    keys: jax.Array,
    spec: DecodeSpec,
    on: Backend = EAGER,
) -> Completions:
    """As `rollout`. Not to be traced: after each chunk the host reads how many rows have not stopped."""
    counts, finished, longest = row_counts(keys.shape[0]), None, spec.max_new_tokens
    prefix, rows = on.call(prefill, params, prompts, keys, spec=spec, cache_columns=cache_lengths(longest)[0])
    layers = on.call(unstack, params, config=spec.model)
    for start in range(0, longest, spec.chunk):
        until = min(start + spec.chunk, longest)
        rows = _grown(rows, until, spec, on)
        rows, alive = on.call(decode_chunk, params, layers, prefix, rows, spec=spec)
        running = on.read(alive) if until < longest else 0
        if running == 0:
            break
        while len(counts) > 1 and running <= counts[1]:
            counts = counts[1:]
            finished = finished or on.call(none_finished, rows)
            prefix, rows, finished = on.call(drop_finished, prefix, rows, finished, number=counts[0])
    return rows.done if finished is None else on.call(put_back, finished, rows.done)


def _grown(rows: DecodeState, until: int, spec: DecodeSpec, on: Backend = EAGER) -> DecodeState:
    for size in cache_lengths(spec.max_new_tokens):
        here = rows.cache.columns
        if here < until and size > here:
            rows = on.call(grow_cache, rows, columns=size)
    return rows


def precompile(params: llama.Params, prompts: Ragged, keys: jax.Array, spec: DecodeSpec) -> None:
    """Compiles every program that `decode_in_chunks` can need for arguments of these shapes, whatever the lengths."""
    layers, caches = unstack(params, spec.model), cache_lengths(spec.max_new_tokens)
    prefix, rows = prefill(params, prompts, keys, spec, caches[0])
    counts, finished = row_counts(keys.shape[0]), None
    for number, fewer in enumerate((*counts[1:], 0)):
        wider = rows
        for size in caches:
            wider = _grown(wider, size, spec)
            decode_chunk(params, layers, prefix, _at_end(wider, spec.max_new_tokens), spec)  # donated
            if fewer:
                drop_finished(prefix, wider, finished or none_finished(wider), fewer)
        if number and finished is not None:
            put_back(finished, rows.done)
        if fewer:
            prefix, rows, finished = drop_finished(prefix, rows, finished or none_finished(rows), fewer)
