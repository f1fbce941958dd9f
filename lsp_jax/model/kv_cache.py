"""Keys and values that decoding attends to: of prompts, shared by rows, and of the tokens that rows generate."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.sharding import shard_heads, shard_rows


class KVCache(NamedTuple):
    """Keys and values of N prompts, each shared by the rows that continue it."""

    keys: jax.Array
    """[L, N, K, h, P], rotated."""
    values: jax.Array
    """[L, N, K, P, h]."""
    lengths: jax.Array
    """int32 [N]: the real ones come first, the rest is padding."""


class DecodeCache(NamedTuple):
    """Generated keys and values, one array a layer so that the decode loop updates each in place.

    A single kv head has no axis: XLA would drop it for the product, and on CPUs then write the cache twice a step, the
    second time as a copy of the whole.
    """

    keys: tuple[jax.Array, ...]
    """L arrays [B, K, h, T], rotated; [B, h, T] with a single kv head."""
    values: tuple[jax.Array, ...]
    """L arrays [B, K, T, h], or [B, T, h]."""

    @property
    def columns(self) -> int:
        """T."""
        return self.values[0].shape[-2]

    def grown(self, columns: int) -> DecodeCache:
        """With room for `columns` columns."""
        more, axes = columns - self.columns, self.values[0].ndim
        wider, taller = [[(0, 0)] * axes for _ in range(2)]
        wider[-1], taller[-2] = (0, more), (0, more)
        keys = tuple(_spread(jnp.pad(x, wider)) for x in self.keys)
        return DecodeCache(keys, tuple(_spread(jnp.pad(x, taller)) for x in self.values))

    def of(self, rows: jax.Array) -> DecodeCache:
        """Of those `rows` alone."""
        return jax.tree.map(lambda x: _spread(x[rows]), self)


def empty_decode_cache(config: LlamaConfig, batch: int, columns: int, dtype: jnp.dtype) -> DecodeCache:
    heads, width = config.num_key_value_heads, config.head_dim

    def zeros(*shape: int) -> tuple[jax.Array, ...]:
        whole = (batch, heads, *shape) if heads > 1 else (batch, *shape)
        return tuple(_spread(jnp.zeros(whole, dtype)) for _ in range(config.num_hidden_layers))

    return DecodeCache(zeros(width, columns), zeros(columns, width))


def written(
    held: tuple[jax.Array, jax.Array], key: jax.Array, value: jax.Array, column: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """One layer's keys and values with a token's `key` [B, K, h, 1] and `value` [B, K, 1, h] at `column`; and the same
    as attention takes them, [B, K, h, T] and [B, K, T, h]."""
    single = held[0].ndim == 3
    if single:
        key, value = key[:, 0], value[:, 0]
    keys = _spread(jax.lax.dynamic_update_slice_in_dim(held[0], key, column, axis=-1))
    values = _spread(jax.lax.dynamic_update_slice_in_dim(held[1], value, column, axis=-2))
    return (keys, values), (keys[:, None], values[:, None]) if single else (keys, values)


def _spread(x: jax.Array) -> jax.Array:
    return shard_heads(x, 1) if x.ndim == 4 else shard_rows(x)
