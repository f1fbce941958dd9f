"""Llama 1 to 3.2 as pure functions; the modules are in `model/modules.py`.

A model is `(params, config)`: `params` is a plain nested dict with Hugging Face's names, decoder layers stacked on a
leading axis, projections stored [in, out], embeddings and an untied head [vocabulary, hidden]. Activations have the
dtype of the parameters; norms, RoPE, softmax and logits are float32.

1. `forward`: tokens [B, T] -> logits [B, T, V]; `hidden_states` stops before the head. A reward model has a score head
   instead: `score`, hidden [..., D] -> [...].
2. `extend`: tokens [B, S] after any number of shared prefixes -> hidden [B, S, D] and the tokens' own `KVCache`;
   without a prefix this is the prefill.
3. `decode_step`: one token per row, written at one column of the decode cache; layers unrolled.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from lsp_jax.core import arguments
from lsp_jax.core.errors import InputError
from lsp_jax.core.runtime import to_host
from lsp_jax.model.attention import Segment, attend, causal_mask, length_mask, to_cache_layout
from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.fused_attention import causal_attention
from lsp_jax.model.kv_cache import DecodeCache, KVCache, write_column
from lsp_jax.model.modules import Llama, RMSNorm, Rotation, layer_of, rotation
from lsp_jax.model.sharding import TENSOR, row_axes, shard, shard_rows

Params = dict[str, Any]
Remat = Literal["none", "dots", "full"]
_REMAT_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


def init_params(config: LlamaConfig, key: jax.Array) -> Params:
    """Random float32 parameters: normal(0, initializer_range), norms 1, biases 0."""
    return nnx.to_pure_dict(nnx.state(Llama(config, nnx.Rngs(key)), nnx.Param))


def params_shape(config: LlamaConfig) -> Params:
    """The shapes of the parameters as `jax.ShapeDtypeStruct` leaves, without allocating."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


# --- what users pass -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _shapes(config: LlamaConfig) -> tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]:
    leaves = jax.tree.leaves_with_path(params_shape(config))
    return tuple((tuple(key.key for key in path), leaf.shape) for path, leaf in leaves)


def check_params(field: str, params: object, config: object) -> None:
    """Raises InputError unless `params` has every array of the language model `config`, in its shape."""
    given = arguments.instance("config", config, LlamaConfig, "must be a LlamaConfig, such as policy.config")
    if given.head != "lm":
        raise InputError("config.head", given.head, "must be lm: only language models have logits")
    for path, shape in _shapes(given):
        leaf = params
        for name in path:
            leaf = leaf.get(name) if isinstance(leaf, dict) else None
        found, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        if found != shape or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            wanted = f"{'/'.join(path)} must be an array of shape {shape}, of floats"
            shown = f"{dtype}{found}" if dtype is not None else type(leaf).__name__
            raise InputError(field, shown, f"{wanted}: give the params of this config's policy")


def check_ids(tokens: object, mask: object, vocabulary: int) -> None:
    """Raises InputError unless `tokens` are ids [B, T] below `vocabulary`, and `mask` is None or bool [B, T].

    Traced ids have no values to look at.
    """
    ids = _matrix("tokens", tokens, jnp.integer, "integer")
    if mask is not None and _matrix("mask", mask, jnp.bool_, "bool").shape != ids.shape:
        raise InputError("mask", getattr(mask, "shape", None), f"must have the shape of tokens, {ids.shape}")
    if isinstance(ids, Tracer) or not ids.size:
        return
    values = to_host(ids)  # computed with here: inside `jax.jit` a constant's minimum would be traced
    outside = values[(values < 0) | (values >= vocabulary)]
    if outside.size:
        raise InputError("tokens", int(outside[0]), f"token id outside the vocabulary (0 to {vocabulary - 1})")


def _matrix(field: str, array: object, kind: Any, name: str) -> jax.Array | np.ndarray:
    if not isinstance(array, jax.Array | np.ndarray) or not jnp.issubdtype(array.dtype, kind) or array.ndim != 2:
        shown = f"{array.dtype}{list(array.shape)}" if isinstance(array, jax.Array | np.ndarray) else array
        raise InputError(field, shown, f"must be a numpy or JAX array [B, T] of {name} dtype")
    return array


# --- pure functions ----------------------------------------------------------------------------------------------


def head_weight(params: Params, config: LlamaConfig) -> jax.Array:
    """The matrix [V, D] of the language-model head, which is the embedding when tied."""
    return (params["model"]["embed_tokens"] if config.tie_word_embeddings else params["lm_head"])["weight"]


def logits(params: Params, config: LlamaConfig, hidden: jax.Array) -> jax.Array:
    """The language-model head: normed hidden states [B, ..., D] -> float32 logits [B, ..., V].

    On a mesh the vocabulary is sharded over `tensor`.
    """
    weight_VD = shard(head_weight(params, config), TENSOR, None)
    out = jnp.einsum("...d,vd->...v", hidden, weight_VD, preferred_element_type=jnp.float32)
    return shard(out, row_axes(out.shape[0]) or None, *(None,) * (out.ndim - 2), TENSOR)


SMALL_TEMPERATURE = 0.01
"""Temperatures below it divide what is left of the logits once their maximum is subtracted."""


def tempered(logits: jax.Array, temperature: float) -> jax.Array:
    """The logits [..., V] of the distribution at a temperature, up to a constant.

    Below `SMALL_TEMPERATURE` the quotient itself would have no digits left for differences, or overflow.
    """
    if temperature < SMALL_TEMPERATURE:
        logits = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    return logits / temperature


def score(params: Params, hidden: jax.Array) -> jax.Array:
    """The score head of a classifier with one label: normed hidden states [..., D] -> float32 scores [...]."""
    weight_D = params["score"]["weight"][:, 0]
    return jnp.einsum("...d,d->...", hidden, weight_D, preferred_element_type=jnp.float32)


def cast(params: Params, dtype: jnp.dtype | str) -> Params:
    """Casts the parameters to `dtype`; arrays that already have it are not copied."""
    return jax.tree.map(lambda x: x.astype(dtype), params)


def _norm(params: Params, config: LlamaConfig, x: jax.Array) -> jax.Array:
    norm = nnx.eval_shape(lambda: RMSNorm(config.hidden_size, config.rms_norm_eps))
    return nnx.merge(nnx.split(norm)[0], params["model"]["norm"])(x)


def _embed(params: Params, tokens: jax.Array) -> jax.Array:
    return shard_rows(params["model"]["embed_tokens"]["weight"][tokens])


def hidden_states(
    params: Params, config: LlamaConfig, tokens_BT: jax.Array, mask_BT: jax.Array | None = None, remat: Remat = "none"
) -> jax.Array:
    """Normed hidden states [B, T, D] of `tokens_BT`, causal.

    Without `mask_BT` positions count from the left, which is correct for right-padded rows: attention is causal.
    `mask_BT` (bool) marks the real tokens of rows with any other padding; positions then count real tokens only.
    `remat` selects what the backward pass recomputes: `full` each layer, `dots` everything in a layer except products
    with weights, `none` nothing.
    """
    batch, length = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
    visible = causal_mask(length)
    if mask_BT is not None:
        positions_BT = jnp.maximum(jnp.cumsum(mask_BT, axis=-1) - 1, 0)
        visible = visible & mask_BT[:, None, None, :]
    angles = rotation(positions_BT, config)

    def body(x_BTD: jax.Array, layer_params: Params) -> tuple[jax.Array, None]:
        layer = layer_of(config, layer_params)
        queries_BTHh, keys_BTKh, values_BTKh = layer.project(x_BTD, angles)
        if mask_BT is None:
            return layer.finish(x_BTD, causal_attention(queries_BTHh, keys_BTKh, values_BTKh)), None
        segment = Segment(*to_cache_layout(keys_BTKh, values_BTKh), visible)
        return layer.finish(x_BTD, attend(queries_BTHh, (segment,))), None

    if remat != "none":
        body = jax.checkpoint(body, prevent_cse=False, policy=_REMAT_POLICIES[remat])
    x_BTD, _ = jax.lax.scan(body, _embed(params, tokens_BT), params["model"]["layers"])
    return _norm(params, config, x_BTD)


def shared_hidden_states(
    params: Params,
    config: LlamaConfig,
    prompts_NP: jax.Array,
    lengths_N: jax.Array,
    tokens_BT: jax.Array,
    remat: Remat = "none",
) -> tuple[jax.Array, jax.Array]:
    """Normed hidden states of right-padded `prompts_NP` with real `lengths_N`, and of `tokens_BT` after them.

    Prompt n is shared by the B / N consecutive rows of `tokens_BT` from n * B / N on, and is computed, forward and
    backward, once for all of them. Returns [N, P, D] and [B, T, D]; `remat` as in `hidden_states`.
    """
    width, length = prompts_NP.shape[1], tokens_BT.shape[1]
    if length == 0:
        before_NPD = hidden_states(params, config, prompts_NP, remat=remat)
        return before_NPD, jnp.zeros((*tokens_BT.shape, config.hidden_size), before_NPD.dtype)
    after_B = jnp.repeat(lengths_N, tokens_BT.shape[0] // prompts_NP.shape[0])
    prompt_angles = rotation(jnp.broadcast_to(jnp.arange(width)[None], prompts_NP.shape), config)
    angles = rotation(after_B[:, None] + jnp.arange(length)[None], config)
    seen, visible = length_mask(lengths_N, width), causal_mask(length)

    def body(streams: tuple[jax.Array, jax.Array], layer_params: Params) -> tuple[tuple[jax.Array, jax.Array], None]:
        layer, (prompt_NPD, x_BTD) = layer_of(config, layer_params), streams
        queries_NPHh, keys_NPKh, values_NPKh = layer.project(prompt_NPD, prompt_angles)
        prompt_NPD = layer.finish(prompt_NPD, causal_attention(queries_NPHh, keys_NPKh, values_NPKh))
        queries_BTHh, own_keys_BTKh, own_values_BTKh = layer.project(x_BTD, angles)
        shared = Segment(*to_cache_layout(keys_NPKh, values_NPKh), seen)
        segments = shared, Segment(*to_cache_layout(own_keys_BTKh, own_values_BTKh), visible)
        return (prompt_NPD, layer.finish(x_BTD, attend(queries_BTHh, segments))), None

    if remat != "none":
        body = jax.checkpoint(body, prevent_cse=False, policy=_REMAT_POLICIES[remat])
    streams = _embed(params, prompts_NP), _embed(params, tokens_BT)
    (prompt_NPD, x_BTD), _ = jax.lax.scan(body, streams, params["model"]["layers"])
    return _norm(params, config, prompt_NPD), _norm(params, config, x_BTD)


def forward(params: Params, config: LlamaConfig, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Logits float32 [B, T, V] of `tokens` int32 [B, T]; `mask` as in `hidden_states`. Pure; `config` is static.

    Raises InputError for parameters and arrays of other shapes or types, and outside of `jax.jit` for ids that the
    vocabulary does not have.
    """
    check_params("params", params, config)
    check_ids(tokens, mask, config.vocab_size)
    return logits(params, config, hidden_states(params, config, tokens, mask))


def extend(
    params: Params, config: LlamaConfig, tokens_BS: jax.Array, lengths_B: jax.Array, prefixes: Sequence[KVCache] = ()
) -> tuple[jax.Array, KVCache]:
    """Runs right-padded `tokens_BS` with real `lengths_B` after `prefixes`, which stay unchanged.

    Each prefix has N rows with B a multiple of N; prefixes are consecutive (rubric, then query, then answer). Returns
    normed hidden states [B, S, D] and the tokens' own cache. Without a prefix this is the prefill.
    """
    batch, length = tokens_BS.shape
    angles = rotation(_total_lengths(prefixes, batch)[:, None] + jnp.arange(length)[None], config)
    masks = [length_mask(prefix.lengths, prefix.values.shape[3]) for prefix in prefixes]
    visible = causal_mask(length)

    def body(x_BSD: jax.Array, xs: tuple[Params, list[Any]]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        layer = layer_of(config, xs[0])
        queries_BSHh, keys_BSKh, values_BSKh = layer.project(x_BSD, angles)
        own = to_cache_layout(keys_BSKh, values_BSKh)
        if not prefixes:
            return layer.finish(x_BSD, causal_attention(queries_BSHh, keys_BSKh, values_BSKh)), own
        shared = [Segment(k, v, m) for (k, v), m in zip(xs[1], masks, strict=True)]
        return layer.finish(x_BSD, attend(queries_BSHh, (*shared, Segment(*own, visible)))), own

    layered = [(prefix.keys, prefix.values) for prefix in prefixes]
    x_BSD, (keys_LBKhS, values_LBKSh) = jax.lax.scan(
        body, _embed(params, tokens_BS), (params["model"]["layers"], layered)
    )
    return _norm(params, config, x_BSD), KVCache(keys_LBKhS, values_LBKSh, lengths_B)


def _total_lengths(prefixes: Sequence[KVCache], batch: int) -> jax.Array:
    """Number of prefix tokens of each row, int32 [B]."""
    total_B = jnp.zeros(batch, jnp.int32)
    for prefix in prefixes:
        total_B = total_B + jnp.repeat(prefix.lengths, batch // prefix.lengths.shape[0])
    return total_B


def last_hidden(hidden_BSD: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """The hidden state [B, D] of the last of each row's `lengths_B` real tokens."""
    return jnp.take_along_axis(hidden_BSD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]


def unstack_layers(tree: Any, layers: int) -> tuple[Any, ...]:
    """Splits stacked layers of parameters into a tuple, for a decode loop with unrolled layers."""
    return tuple(jax.tree.map(lambda x, i=i: x[i], tree) for i in range(layers))


def decode_step(
    params: Params,
    layers: tuple[Params, ...],
    config: LlamaConfig,
    tokens_B: jax.Array,
    prompts: Sequence[Sequence[KVCache]],
    cache: DecodeCache,
    column: jax.Array,
) -> tuple[jax.Array, DecodeCache]:
    """Runs one token per row: `tokens_B` at generated position `column` (a scalar, the same for all rows).

    `layers` is `unstack_layers` of the stacked layers. `prompts` holds the prefixes of each layer in order, as in
    `extend`: keys [N, K, h, P], values [N, K, P, h] and lengths [N]. The token's keys and values are written at
    `column`, and the token attends to columns up to it. Returns normed hidden states [B, D] and the cache.
    """
    batch = tokens_B.shape[0]
    positions_B = _total_lengths(prompts[0], batch) + column
    angles = rotation(positions_B[:, None], config)
    masks = [length_mask(prefix.lengths, prefix.values.shape[2]) for prefix in prompts[0]]
    masks.append((jnp.arange(cache.columns) <= column)[None, None, None, :])
    x_B1D = _embed(params, tokens_B)[:, None]
    updated = []
    for layer_params, shared, cached in zip(layers, prompts, zip(cache.keys, cache.values, strict=True), strict=True):
        pairs = [*((prefix.keys, prefix.values) for prefix in shared), cached]
        x_B1D, cached = _decode_layer(layer_params, config, x_B1D, angles, pairs, masks, column)
        updated.append(cached)
    keys, values = zip(*updated, strict=True)
    return _norm(params, config, x_B1D)[:, 0], DecodeCache(keys, values)


@partial(jax.jit, static_argnames="config")  # traced once for all layers, which saves seconds at the start of a run
def _decode_layer(
    layer_params: Params,
    config: LlamaConfig,
    x_B1D: jax.Array,
    angles: Rotation,
    pairs: list[tuple[jax.Array, jax.Array]],
    masks: list[jax.Array],
    column: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """One layer of `decode_step`: keys and values of the prefixes and, last, of the cache, with their masks. Returns
    the hidden states and the updated cache."""
    *shared, cached = pairs
    layer = layer_of(config, layer_params)
    queries_B1Hh, key_B1Kh, value_B1Kh = layer.project(x_B1D, angles)
    cached, own = write_column(cached, *to_cache_layout(key_B1Kh, value_B1Kh), column)
    segments = [Segment(*pair, mask) for pair, mask in zip([*shared, own], masks, strict=True)]
    return layer.finish(x_B1D, attend(queries_B1Hh, segments)), cached
