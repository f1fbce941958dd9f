"""Decoding: B rows that continue prefilled prompts, one column at a time, as one program or chunk by chunk.

1. `begin` draws the first token of each row from its prompt's last hidden state.
2. `advance` feeds tokens back until a column is reached, or every row has stopped.
3. `rollout` is both in one, up to the last column; it composes under `jax.jit` and never asks the host.
4. `rollout_chunked` runs `advance` chunk by chunk from the host. Between two it reads how many rows still run, drops
   the others when half are done, and lets the cache grow: the cost follows the tokens really generated. Same draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lsp_jax import host, processes
from lsp_jax.model import llama
from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.sharding import place, row_shards, shard_heads, shard_rows
from lsp_jax.play.sampler import Draw, SamplingConfig, row_uniforms, sample

SHORTEST_CACHE = 128
"""Columns with which a growing cache begins: each length is one more program, and short caches cost little."""


class Completions(NamedTuple):
    """What was generated. Leading axes: B, or N, or N and G."""

    tokens: jax.Array
    """int32 [..., T]; 0 after `lengths`."""
    lengths: jax.Array
    """int32 [...]: tokens generated, the one that stopped the row included."""
    logprobs: jax.Array
    """float32 [..., T]: of each token under the distribution it was drawn from; 0 after `lengths`."""
    log_mass: jax.Array
    """float32 [..., T]: log of the mass that truncation kept; 0 without truncation and after `lengths`."""
    stopped: jax.Array
    """bool [...]: ended by a stop token; False means cut off at T."""


class Rows(NamedTuple):
    """Rows between two columns."""

    column: jax.Array
    """int32: of the token drawn last, the same for all rows."""
    token: jax.Array
    """int32 [B]: that token, not yet fed."""
    keys: jax.Array
    """[B]: each row's own."""
    done: Completions
    """What they have so far."""
    cache: llama.DecodeCache
    """Keys and values of what was fed."""


Layers = tuple[llama.Params, ...]


def _record(done: Completions, draw: Draw, column: jax.Array, stop_ids: tuple[int, ...]) -> Completions:
    alive = ~done.stopped

    def put(array: jax.Array, value: jax.Array) -> jax.Array:
        value = jnp.where(alive, value, jnp.zeros_like(value))
        return jax.lax.dynamic_update_slice_in_dim(array, value[:, None], column, axis=1)

    stop = jnp.zeros_like(done.stopped)
    for stop_id in stop_ids:
        stop = stop | (draw.token == stop_id)
    return Completions(
        tokens=put(done.tokens, draw.token),
        lengths=done.lengths + alive,
        logprobs=put(done.logprobs, draw.logprob),
        log_mass=put(done.log_mass, draw.log_mass),
        stopped=done.stopped | (alive & stop),
    )


def begin(
    params: llama.Params,
    config: LlamaConfig,
    last_hidden: jax.Array,
    keys: jax.Array,
    sampling: SamplingConfig,
    columns: int,
    stop_ids: tuple[int, ...],
    cache_columns: int,
) -> Rows:
    """The first token of each row with `keys` [B], B / N consecutive ones for each of `last_hidden` [N, D]."""
    rows, start = keys.shape[0], jnp.zeros((), jnp.int32)
    empty = Completions(
        tokens=jnp.zeros((rows, columns), jnp.int32),
        lengths=jnp.zeros(rows, jnp.int32),
        logprobs=jnp.zeros((rows, columns), jnp.float32),
        log_mass=jnp.zeros((rows, columns), jnp.float32),
        stopped=jnp.zeros(rows, bool),
    )
    keys = shard_rows(keys)
    logits = jnp.repeat(llama.logits(params, config, last_hidden), rows // last_hidden.shape[0], axis=0)
    # a draw looks at the whole vocabulary of its row
    first = sample(shard_rows(logits), row_uniforms(keys, start), sampling)
    cache = llama.empty_decode_cache(config, rows, cache_columns, last_hidden.dtype)
    return Rows(start, first.token, keys, _record(shard_rows(empty), first, start, stop_ids), cache)


def advance(
    params: llama.Params,
    layers: Layers,
    config: LlamaConfig,
    prefixes: Sequence[llama.KVCache],
    rows: Rows,
    until: jax.Array | int,
    sampling: SamplingConfig,
    stop_ids: tuple[int, ...],
) -> Rows:
    """Draws tokens up to column `until - 1`, or until every row has stopped; `layers` are `llama.unstack_layers`'."""
    shared = tuple(
        tuple(llama.KVCache(prefix.keys[layer], prefix.values[layer], prefix.lengths) for prefix in prefixes)
        for layer in range(config.num_hidden_layers)
    )

    def going(rows: Rows) -> jax.Array:
        return (rows.column + 1 < until) & ~jnp.all(rows.done.stopped)

    def step(rows: Rows) -> Rows:
        hidden, cache = llama.decode_step(params, layers, config, rows.token, shared, rows.cache, rows.column)
        column = rows.column + 1
        logits = shard_rows(llama.logits(params, config, hidden))
        draw = sample(logits, row_uniforms(rows.keys, column), sampling)
        return Rows(column, draw.token, rows.keys, _record(rows.done, draw, column, stop_ids), cache)

    return jax.lax.while_loop(going, step, rows)


def rollout(
    params: llama.Params,
    config: LlamaConfig,
    prefixes: Sequence[llama.KVCache],
    last_hidden: jax.Array,
    keys: jax.Array,
    sampling: SamplingConfig,
    columns: int,
    stop_ids: tuple[int, ...],
) -> Completions:
    """Up to `columns` tokens for each of B rows that continue N prefilled prompts (B / N rows a prompt).

    A prompt is the `prefixes` in their order, each with rows of its own number as in `llama.extend`; most have one.
    `last_hidden` [N, D] belongs to each prompt's last real token, `keys` [B] are the rows' own. An empty `stop_ids`
    forces the full length. Returns arrays [B, ...].
    """
    layers = llama.unstack_layers(params["model"]["layers"], config.num_hidden_layers)
    rows = begin(params, config, last_hidden, keys, sampling, columns, stop_ids, max(columns - 1, 1))
    return advance(params, layers, config, prefixes, rows, columns, sampling, stop_ids).done


# --- chunk by chunk ------------------------------------------------------------------------------------------------


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
) -> tuple[llama.KVCache, Rows]:
    hidden, prefix = llama.extend(params, config, tokens, lengths)
    last = llama.last_hidden(hidden, lengths)
    return prefix, begin(params, config, last, keys, sampling, columns, stop_ids, cache_columns)


@partial(jax.jit, static_argnames=("config", "sampling", "stop_ids"), donate_argnames="rows")
def _advance(
    params: llama.Params,
    layers: Layers,
    prefix: llama.KVCache,
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


@partial(jax.jit, static_argnames="number", donate_argnames="finished")
def _drop(
    prefix: llama.KVCache, rows: Rows, places: jax.Array, finished: Completions, *, number: int
) -> tuple[llama.KVCache, Rows, jax.Array, Completions]:
    """The `number` rows that run longest; all others are put to their `places` [B] in `finished`."""
    batch = rows.token.shape[0]
    finished = _put(finished, rows.done, places)
    order = jnp.argsort(rows.done.stopped, stable=True)[:number]
    shared = prefix.lengths.shape[0]
    if shared > 1:  # groups are no longer whole: every row gets its prompt for itself
        prompts = order // (batch // shared)
        prefix = llama.KVCache(prefix.keys[:, prompts], prefix.values[:, prompts], prefix.lengths[prompts])
    token, keys, done = shard_rows(jax.tree.map(lambda x: x[order], (rows.token, rows.keys, rows.done)))
    cache = jax.tree.map(lambda x: shard_heads(x[order]), rows.cache)
    return prefix, Rows(rows.column, token, keys, done, cache), places[order], finished


@partial(jax.jit, static_argnames="columns")
def _grow(rows: Rows, *, columns: int) -> Rows:
    """The rows with a cache of `columns` columns."""

    def longer(x: jax.Array) -> jax.Array:
        return shard_heads(jnp.pad(x, ((0, 0), (0, columns - x.shape[1]), (0, 0), (0, 0))))

    return rows._replace(cache=jax.tree.map(longer, rows.cache))


@jax.jit
def _empty_like(done: Completions) -> Completions:
    return shard_rows(jax.tree.map(jnp.zeros_like, done))


@partial(jax.jit, donate_argnames="finished")
def _put(finished: Completions, done: Completions, places: jax.Array) -> Completions:
    return shard_rows(jax.tree.map(lambda whole, part: whole.at[places].set(part), finished, done))


def cache_lengths(columns: int) -> tuple[int, ...]:
    """Columns that a growing cache may have, each about twice the one before; the last holds `columns` tokens."""
    lengths = [columns]
    while lengths[0] > SHORTEST_CACHE:
        lengths.insert(0, -(-lengths[0] // 2))
    return tuple(lengths)


def rows_left(alive: int, number: int) -> int:
    """With how many of `number` rows decoding goes on when `alive` still run: halved as often as they fit, in rows that
    every device has as many of."""
    while number % (2 * row_shards()) == 0 and alive <= number // 2:
        number //= 2
    return number


def rollout_chunked(
    params: llama.Params,
    config: LlamaConfig,
    tokens: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    sampling: SamplingConfig,
    columns: int,
    stop_ids: tuple[int, ...],
    chunk: int,
) -> Completions:
    """As `rollout`, after right-padded prompts `tokens` [N, P] with `lengths` [N], `chunk` columns at a time.

    Not to be traced: between chunks it reads one number from the device.
    """
    caches = cache_lengths(columns)
    static = {"config": config, "sampling": sampling, "stop_ids": stop_ids}
    arguments = params, tokens, lengths, keys
    processes.check_program("decode", _begin, *arguments, **static, columns=columns, cache_columns=caches[0])
    prefix, rows = _begin(*arguments, **static, columns=columns, cache_columns=caches[0])
    layers, number, places, finished = _unstack(params, config), keys.shape[0], None, None
    for start in range(0, columns, chunk):
        until = min(start + chunk, columns)
        needed = next(size for size in caches if size >= until)
        if rows.cache.keys[0].shape[1] < needed:
            rows = _grow(rows, columns=needed)
        rows, alive = _advance(params, layers, prefix, rows, place(np.int32(until)), **static)
        running = int(host.to_host(alive)) if until < columns else 0
        if running == 0:
            break
        left = rows_left(running, number)
        if left < number:
            if finished is None or places is None:
                finished = _empty_like(rows.done)
                places = place(np.arange(number, dtype=np.int32))
            prefix, rows, places, finished = _drop(prefix, rows, places, finished, number=left)
            number = left
    return rows.done if finished is None or places is None else _put(finished, rows.done, places)
