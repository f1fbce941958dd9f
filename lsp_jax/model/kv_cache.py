"""KV caches for decoding: those of prompts, shared by rows, and those of the tokens that each row generates."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.sharding import shard_heads, shard_rows


class KVCache(NamedTuple):
    """The keys and values of N prompts, each shared by the rows that continue it."""

    keys: jax.Array
    """[L, N, K, h, P], rotated."""
    values: jax.Array
    """[L, N, K, P, h]."""
    lengths: jax.Array
    """int32 [N]: number of real positions, followed by padding."""


class DecodeCache(NamedTuple):
    """The keys and values of generated tokens, one array per layer, so that the decode loop updates each in place.

    A single kv head has no axis: XLA would drop the axis for the product, and on CPUs then copy the entire cache in
    every step.
    """

    keys: tuple[jax.Array, ...]
    """L arrays [B, K, h, T], rotated; [B, h, T] with a single kv head."""
    values: tuple[jax.Array, ...]
    """L arrays [B, K, T, h], or [B, T, h]."""

    @property
    def columns(self) -> int:
        """T, the number of positions."""
        return self.values[0].shape[-2]

    def grown(self, columns: int) -> DecodeCache:
        """Returns the cache padded to `columns` positions."""
        more, axes = columns - self.columns, self.values[0].ndim
        wider, taller = [[(0, 0)] * axes for _ in range(2)]
        wider[-1], taller[-2] = (0, more), (0, more)
        keys = tuple(_shard(jnp.pad(x, wider)) for x in self.keys)
        return DecodeCache(keys, tuple(_shard(jnp.pad(x, taller)) for x in self.values))

    def of(self, rows: jax.Array) -> DecodeCache:
        """Returns the cache of `rows` only."""
        return jax.tree.map(lambda x: _shard(x[rows]), self)


def empty_decode_cache(config: LlamaConfig, batch: int, columns: int, dtype: jnp.dtype) -> DecodeCache:
    """Returns a zero cache for `batch` rows with room for `columns` tokens each."""
    heads, width = config.num_key_value_heads, config.head_dim

    def zeros(*shape: int) -> tuple[jax.Array, ...]:
        full_shape = (batch, heads, *shape) if heads > 1 else (batch, *shape)
        return tuple(_shard(jnp.zeros(full_shape, dtype)) for _ in range(config.num_hidden_layers))

    return DecodeCache(zeros(width, columns), zeros(columns, width))


def write_column(
    cached: tuple[jax.Array, jax.Array], key: jax.Array, value: jax.Array, column: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Writes a token's `key` [B, K, h, 1] and `value` [B, K, 1, h] at `column` of one layer's cache.

    Returns the cached keys and values, and the same arrays in the layout of attention, [B, K, h, T] and [B, K, T, h].
    """
    single = cached[0].ndim == 3
    if single:
        key, value = key[:, 0], value[:, 0]
    keys = _shard(jax.lax.dynamic_update_slice_in_dim(cached[0], key, column, axis=-1))
    values = _shard(jax.lax.dynamic_update_slice_in_dim(cached[1], value, column, axis=-2))
    return (keys, values), (keys[:, None], values[:, None]) if single else (keys, values)


def _shard(x: jax.Array) -> jax.Array:
    return shard_heads(x, 1) if x.ndim == 4 else shard_rows(x)
