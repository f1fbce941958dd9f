"""Decoding in chunks, driven by the host, at a cost that follows the number of tokens actually generated.

Between chunks the host reads how many rows are unfinished, drops finished rows once they are a quarter, and grows the
cache. Every row draws the same tokens as in `decode.rollout`. Row counts and cache lengths take few, fixed values, so
few programs are compiled.
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
"""Maximum initial length of a growing cache: each length is another program, and short caches cost little."""


@stage(static="config")
def unstack(params: llama.Params, config: LlamaConfig) -> Layers:
    """The stacked parameters as one tree per layer."""
    return llama.unstack_layers(params["model"]["layers"], config.num_hidden_layers)


@stage(static=("spec", "cache_columns"))
def prefill(
    params: llama.Params, prompts: Ragged, keys: jax.Array, spec: DecodeSpec, cache_columns: int
) -> tuple[KVCache, DecodeState]:
    """Prefills the prompts; returns their cache, and the rows with their first token and a cache of `cache_columns`."""
    hidden_NPD, prefix = llama.extend(params, spec.model, *prompts)
    return prefix, begin(params, llama.last_hidden(hidden_NPD, prompts[1]), keys, spec, cache_columns)


@stage(static="spec", donate="rows")
def decode_chunk(
    params: llama.Params, layers: Layers, prefix: KVCache, rows: DecodeState, spec: DecodeSpec
) -> tuple[DecodeState, jax.Array]:
    """Decodes up to the next multiple of `spec.chunk` columns; returns the rows and how many have not stopped."""
    until = jnp.minimum(((rows.column + 1) // spec.chunk + 1) * spec.chunk, spec.max_new_tokens)
    rows = advance(params, layers, (prefix,), rows, until, spec)
    return rows, jnp.sum(~rows.done.stopped)


class Finished(NamedTuple):
    """Completions of dropped rows at their original indices, and the original indices of the remaining rows."""

    done: Completions
    places: jax.Array
    """int32 [remaining rows]."""


@stage()
def none_finished(rows: DecodeState) -> Finished:
    """The initial value: no row has been dropped."""
    return Finished(shard_rows(jax.tree.map(jnp.zeros_like, rows.done)), jnp.arange(rows.token.shape[0]))


@stage(static="number")
def drop_finished(
    prefix: KVCache, rows: DecodeState, finished: Finished, number: int
) -> tuple[KVCache, DecodeState, Finished]:
    """Keeps `number` rows, unfinished ones first, and stores the completions of all others in `finished`."""
    batch, places = rows.token.shape[0], finished.places
    order = jnp.argsort(rows.done.stopped, stable=True)[:number]
    shared = prefix.lengths.shape[0]
    if shared > 1:  # groups are incomplete from here on: every row gets its own copy of its prompt
        prompts = order // (batch // shared)
        prefix = KVCache(prefix.keys[:, prompts], prefix.values[:, prompts], prefix.lengths[prompts])
    token, keys, done = shard_rows(jax.tree.map(lambda x: x[order], (rows.token, rows.keys, rows.done)))
    dropped = Finished(_placed(finished, rows.done), places[order])
    return prefix, DecodeState(rows.column, token, keys, done, rows.cache.of(order)), dropped


@stage(static="columns")
def grow_cache(rows: DecodeState, columns: int) -> DecodeState:
    """The rows with their cache padded to `columns` columns."""
    return rows._replace(cache=rows.cache.grown(columns))


def _placed(finished: Finished, done: Completions) -> Completions:
    places = finished.places
    return shard_rows(jax.tree.map(lambda every, part: every.at[places].set(part), finished.done, done))


@stage()
def put_back(finished: Finished, done: Completions) -> Completions:
    """Completions of all rows in their original order: those of dropped rows, and `done` of the remaining ones."""
    return _placed(finished, done)


@partial(jax.jit, static_argnames="columns")
def _at_end(rows: DecodeState, columns: int) -> DecodeState:
    """A copy of the rows after the last of `columns` columns, with nothing left to decode."""
    return jax.tree.map(jnp.copy, rows)._replace(column=jnp.full_like(rows.column, columns))


def cache_lengths(columns: int) -> tuple[int, ...]:
    """Ascending lengths of a growing cache, each about twice the one before; the last is `columns`."""
    lengths = [columns]
    while lengths[0] > SHORTEST_CACHE:
        lengths.insert(0, -(-lengths[0] // 2))
    return tuple(lengths)


def row_counts(batch: int) -> tuple[int, ...]:
    """Row counts with which decoding may continue: all of `batch`, three quarters, half, three eighths, a quarter, ...;
    each divides evenly over the devices."""
    counts = {part >> halvings for part in (batch, 3 * batch // 4) for halvings in range(batch.bit_length())} - {0}
    return tuple(sorted({batch} | {count for count in counts if count % row_shards() == 0}, reverse=True))


def decode_in_chunks(
    params: llama.Params,
    prompts: Ragged,
    keys: jax.Array,
    spec: DecodeSpec,
    on: Backend = EAGER,
) -> Completions:
    """Completions as by `rollout`. Cannot be traced: after each chunk the host reads how many rows have not stopped."""
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
    """Compiles every program that `decode_in_chunks` can need for arguments of these shapes, whatever the
    lengths of the completions."""
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
