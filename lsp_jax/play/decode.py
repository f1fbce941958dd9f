"""Decoding: B rows that continue prefilled prompts, one column at a time.

1. `begin` draws the first token of each row from its prompt's last hidden state.
2. `advance` feeds tokens back until a column is reached, or every row has stopped.
3. `continue_prompts` does both, up to the last column; `rollout` also prefills the prompts. Both compose under
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
    """int32 [..., T]; 0 beyond `lengths`."""
    lengths: jax.Array
    """int32 [...]: number of generated tokens, including the stop token."""
    logprobs: jax.Array
    """float32 [..., T]: log-probability of each token under the distribution it was drawn from; 0 beyond `lengths`."""
    log_mass: jax.Array
    """float32 [..., T]: log of the probability mass that truncation kept; 0 without truncation and beyond `lengths`."""
    stopped: jax.Array
    """bool [...]: ended by a stop token; False: cut off at T."""


@dataclass(frozen=True)
class DecodeSpec:
    """All static settings of decoding; hashable, a static argument."""

    model: LlamaConfig
    sampling: SamplingConfig
    max_new_tokens: int
    """T: longest completion in tokens, the stop token included."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a completion; none: every completion has T tokens."""
    chunk: int = 0
    """Columns decoded between two reads by the host (`play/chunked_decode.py`); 0: all."""

    @property
    def chunked(self) -> bool:
        """Whether completions are decoded chunk by chunk."""
        return 0 < self.chunk < self.max_new_tokens


class DecodeState(NamedTuple):
    """State of the decode loop between two columns."""

    column: jax.Array
    """int32: column of the token drawn last, the same for all rows."""
    token: jax.Array
    """int32 [B]: that token, not yet fed to the model."""
    keys: jax.Array
    """[B]: PRNG key of each row."""
    done: Completions
    """Completions so far."""
    cache: DecodeCache
    """Keys and values of the tokens fed so far."""


Layers = tuple[llama.Params, ...]
"""One tree of parameters per layer (`llama.unstack_layers`)."""


def _record(done: Completions, draw: Draw, column: jax.Array, stop_ids: tuple[int, ...]) -> Completions:
    alive_B = ~done.stopped

    def put(array: jax.Array, value: jax.Array) -> jax.Array:
        value = jnp.where(alive_B, value, jnp.zeros_like(value))
        return jax.lax.dynamic_update_slice_in_dim(array, value[:, None], column, axis=1)

    stop_B = jnp.zeros_like(done.stopped)
    for stop_id in stop_ids:
        stop_B = stop_B | (draw.token == stop_id)
    return Completions(
        tokens=put(done.tokens, draw.token),
        lengths=done.lengths + alive_B,
        logprobs=put(done.logprobs, draw.logprob),
        log_mass=put(done.log_mass, draw.log_mass),
        stopped=done.stopped | (alive_B & stop_B),
    )


def begin(
    params: llama.Params, last_hidden_ND: jax.Array, keys_B: jax.Array, spec: DecodeSpec, cache_columns: int
) -> DecodeState:
    """The decode state after the first token of each row, with a cache of `cache_columns`.

    Rows draw with their own `keys_B`; each prompt of `last_hidden_ND` has B / N consecutive rows.
    """
    rows, start = keys_B.shape[0], jnp.zeros((), jnp.int32)
    empty = Completions(
        tokens=jnp.zeros((rows, spec.max_new_tokens), jnp.int32),
        lengths=jnp.zeros(rows, jnp.int32),
        logprobs=jnp.zeros((rows, spec.max_new_tokens), jnp.float32),
        log_mass=jnp.zeros((rows, spec.max_new_tokens), jnp.float32),
        stopped=jnp.zeros(rows, bool),
    )
    keys_B = shard_rows(keys_B)
    logits_BV = jnp.repeat(llama.logits(params, spec.model, last_hidden_ND), rows // last_hidden_ND.shape[0], axis=0)
    # a draw reads the whole vocabulary of its row
    first = sample(shard_rows(logits_BV), row_uniforms(keys_B, start), spec.sampling)
    cache = empty_decode_cache(spec.model, rows, cache_columns, last_hidden_ND.dtype)
    return DecodeState(start, first.token, keys_B, _record(shard_rows(empty), first, start, spec.stop_ids), cache)


def advance(
    params: llama.Params,
    layers: Layers,
    prefixes: Sequence[KVCache],
    rows: DecodeState,
    until: jax.Array | int,
    spec: DecodeSpec,
) -> DecodeState:
    """Draws tokens up to column `until - 1`, or until all rows have stopped. `layers`: see `llama.unstack_layers`."""
    shared = tuple(
        tuple(KVCache(prefix.keys[layer], prefix.values[layer], prefix.lengths) for prefix in prefixes)
        for layer in range(spec.model.num_hidden_layers)
    )

    def going(rows: DecodeState) -> jax.Array:
        return (rows.column + 1 < until) & ~jnp.all(rows.done.stopped)

    def step(rows: DecodeState) -> DecodeState:
        hidden_BD, cache = llama.decode_step(params, layers, spec.model, rows.token, shared, rows.cache, rows.column)
        column = rows.column + 1
        logits_BV = shard_rows(llama.logits(params, spec.model, hidden_BD))
        draw = sample(logits_BV, row_uniforms(rows.keys, column), spec.sampling)
        return DecodeState(column, draw.token, rows.keys, _record(rows.done, draw, column, spec.stop_ids), cache)

    return jax.lax.while_loop(going, step, rows)


def continue_prompts(
    params: llama.Params, prefixes: Sequence[KVCache], last_hidden_ND: jax.Array, keys_B: jax.Array, spec: DecodeSpec
) -> Completions:
    """Completions of B rows that continue N prefilled prompts (B / N rows a prompt); arrays [B, ...].

    A prompt is the concatenation of `prefixes`, usually one; each has its own number of rows, as in `llama.extend`.
    `last_hidden_ND` belongs to the last real token of each prompt, `keys_B` are the PRNG keys of the rows.
    """
    layers = llama.unstack_layers(params["model"]["layers"], spec.model.num_hidden_layers)
    rows = begin(params, last_hidden_ND, keys_B, spec, max(spec.max_new_tokens - 1, 1))
    return advance(params, layers, prefixes, rows, spec.max_new_tokens, spec).done


def rollout(params: llama.Params, prompts: Ragged, keys_B: jax.Array, spec: DecodeSpec) -> Completions:
    """Completions [B, ...] of right-padded `prompts` (tokens [N, P], lengths [N]), each prefilled once for its B / N
    rows, which draw with `keys_B`."""
    hidden_NPD, cache = llama.extend(params, spec.model, *prompts)
    return continue_prompts(params, (cache,), llama.last_hidden(hidden_NPD, prompts[1]), keys_B, spec)
