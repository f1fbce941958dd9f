"""Decoding: B rows that continue prefilled prompts, one column at a time.

1. `begin` draws the first token of each row from its prompt's last hidden state.
2. `advance` feeds tokens back until a column is reached, or every row has stopped.
3. `continue_prompts` is both in one, up to the last column; `rollout` prefills the prompts too. Both compose under
   `jax.jit` and read nothing from the device.

`play/chunked_decode.py` runs `advance` from the host instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsp_jax.model import llama
from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.kv_cache import DecodeCache, KVCache, empty_decode_cache
from lsp_jax.model.sharding import shard_rows
from lsp_jax.play.sampler import Draw, SamplingConfig, row_uniforms, sample
from lsp_jax.text.prompts import Ragged


class Completions(NamedTuple):
    """Generated tokens. Leading axes: B, or N, or N and G."""

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


@dataclass(frozen=True)
class DecodeSpec:
    """All that decoding depends on beside its arrays; hashable, a static argument."""

    model: LlamaConfig
    sampling: SamplingConfig
    max_new_tokens: int
    """T: longest completion in tokens, the stop token included."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a completion; none: every completion has T tokens."""
    chunk: int = 0
    """Columns that are decoded between two reads of the host (`play/chunked_decode.py`); 0: all."""

    @property
    def chunked(self) -> bool:
        """Whether completions are decoded chunk by chunk."""
        return 0 < self.chunk < self.max_new_tokens


class DecodeState(NamedTuple):
    """DecodeState between two columns."""

    column: jax.Array
    """int32: of the token drawn last, the same for all rows."""
    token: jax.Array
    """int32 [B]: that token, not yet fed."""
    keys: jax.Array
    """[B]: each row's own."""
    done: Completions
    """Their completions so far."""
    cache: DecodeCache
    """Keys and values of what was fed."""


Layers = tuple[llama.Params, ...]
"""Each layer's parameters by themselves (`llama.unstack_layers`)."""


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
    params: llama.Params, last_hidden: jax.Array, keys: jax.Array, spec: DecodeSpec, cache_columns: int
) -> DecodeState:
    """The first token of each row with `keys` [B], B / N consecutive ones for each of `last_hidden` [N, D]; with a
    cache of `cache_columns`."""
    rows, start = keys.shape[0], jnp.zeros((), jnp.int32)
    empty = Completions(
        tokens=jnp.zeros((rows, spec.max_new_tokens), jnp.int32),
        lengths=jnp.zeros(rows, jnp.int32),
        logprobs=jnp.zeros((rows, spec.max_new_tokens), jnp.float32),
        log_mass=jnp.zeros((rows, spec.max_new_tokens), jnp.float32),
        stopped=jnp.zeros(rows, bool),
    )
    keys = shard_rows(keys)
    logits = jnp.repeat(llama.logits(params, spec.model, last_hidden), rows // last_hidden.shape[0], axis=0)
    # a draw looks at the whole vocabulary of its row
    first = sample(shard_rows(logits), row_uniforms(keys, start), spec.sampling)
    cache = empty_decode_cache(spec.model, rows, cache_columns, last_hidden.dtype)
    return DecodeState(start, first.token, keys, _record(shard_rows(empty), first, start, spec.stop_ids), cache)


def advance(
    params: llama.Params,
    layers: Layers,
    prefixes: Sequence[KVCache],
    rows: DecodeState,
    until: jax.Array | int,
    spec: DecodeSpec,
) -> DecodeState:
    """Draws tokens up to column `until - 1`, or until every row has stopped; `layers` are `llama.unstack_layers`'."""
    shared = tuple(
        tuple(KVCache(prefix.keys[layer], prefix.values[layer], prefix.lengths) for prefix in prefixes)
        for layer in range(spec.model.num_hidden_layers)
    )

    def going(rows: DecodeState) -> jax.Array:
        return (rows.column + 1 < until) & ~jnp.all(rows.done.stopped)

    def step(rows: DecodeState) -> DecodeState:
        hidden, cache = llama.decode_step(params, layers, spec.model, rows.token, shared, rows.cache, rows.column)
        column = rows.column + 1
        logits = shard_rows(llama.logits(params, spec.model, hidden))
        draw = sample(logits, row_uniforms(rows.keys, column), spec.sampling)
        return DecodeState(column, draw.token, rows.keys, _record(rows.done, draw, column, spec.stop_ids), cache)

    return jax.lax.while_loop(going, step, rows)


def continue_prompts(
    params: llama.Params, prefixes: Sequence[KVCache], last_hidden: jax.Array, keys: jax.Array, spec: DecodeSpec
) -> Completions:
    """Completions of B rows that continue N prefilled prompts (B / N rows a prompt); arrays [B, ...].

    A prompt is the `prefixes` in their order, each with rows of its own number as in `llama.extend`; most have one.
    `last_hidden` [N, D] belongs to each prompt's last real token, `keys` [B] are the rows' own.
    """
    layers = llama.unstack_layers(params["model"]["layers"], spec.model.num_hidden_layers)
    rows = begin(params, last_hidden, keys, spec, max(spec.max_new_tokens - 1, 1))
    return advance(params, layers, prefixes, rows, spec.max_new_tokens, spec).done


def rollout(params: llama.Params, prompts: Ragged, keys: jax.Array, spec: DecodeSpec) -> Completions:
    """Completions [B, ...] of right-padded `prompts` (tokens [N, P], lengths [N]), each prefilled once for its B / N
    rows with `keys` [B]."""
    hidden, cache = llama.extend(params, spec.model, *prompts)
    return continue_prompts(params, (cache,), llama.last_hidden(hidden, prompts[1]), keys, spec)
