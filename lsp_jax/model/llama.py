"""Llama 1 to 3.2 as the pure functions that the rest of the project calls; the modules are in `model/modules.py`.

A model is `(params, config)`: `params` a plain nested dict with Hugging Face's names, the decoder's layers stacked on a
leading axis, projections stored [in, out]; embeddings and an untied head [vocabulary, hidden]. Activations have the
dtype of the parameters; norms, RoPE, softmax and logits are float32.

1. `forward`: tokens [B, T] -> logits [B, T, V]; `hidden_states` stops before the head. A reward model has a score head
   in place of the language model's: `score`, hidden [..., D] -> [...].
2. `extend`: tokens [B, S] after any number of shared prefixes -> hidden [B, S, D] and their own `KVCache`; with no
   prefix this is the prefill.
3. `decode_step`: one token a row, written at one column of a growing cache; layers unrolled.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from lsp_jax.model.attention import Segment, as_held, attend, causal_mask, length_mask
from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.fused_attention import causal_attention
from lsp_jax.model.kv_cache import DecodeCache, KVCache, written
from lsp_jax.model.modules import Llama, RMSNorm, Rotation, layer_of, rotation
from lsp_jax.model.sharding import TENSOR, row_axes, shard, shard_rows

Params = dict[str, Any]
Remat = Literal["none", "dots", "full"]
_KEPT = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


def init_params(config: LlamaConfig, key: jax.Array) -> Params:
    """Random float32 parameters: normal(0, initializer_range), norms 1, biases 0."""
    return nnx.to_pure_dict(nnx.state(Llama(config, nnx.Rngs(key)), nnx.Param))


def params_shape(config: LlamaConfig) -> Params:
    """The parameters' shapes as `jax.ShapeDtypeStruct` leaves, without making any array."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


# --- pure functions ----------------------------------------------------------------------------------------------


def head_weight(params: Params, config: LlamaConfig) -> jax.Array:
    """The head's matrix [V, D], the embedding itself when tied."""
    return (params["model"]["embed_tokens"] if config.tie_word_embeddings else params["lm_head"])["weight"]


def logits(params: Params, config: LlamaConfig, hidden: jax.Array) -> jax.Array:
    """The language-model head: normed hidden states [B, ..., D] -> float32 logits [B, ..., V].

    On a mesh the vocabulary is spread over `tensor`.
    """
    weight = shard(head_weight(params, config), TENSOR, None)
    out = jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=jnp.float32)
    return shard(out, row_axes(out.shape[0]) or None, *(None,) * (out.ndim - 2), TENSOR)


def score(params: Params, hidden: jax.Array) -> jax.Array:
    """The score head of a classifier with one label: normed hidden states [..., D] -> float32 scores [...]."""
    weight = params["score"]["weight"][:, 0]
    return jnp.einsum("...d,d->...", hidden, weight, preferred_element_type=jnp.float32)


def cast(params: Params, dtype: jnp.dtype | str) -> Params:
    """The parameters in another dtype; arrays that have it already are not copied."""
    return jax.tree.map(lambda x: x.astype(dtype), params)


def _norm(params: Params, config: LlamaConfig, x: jax.Array) -> jax.Array:
    norm = nnx.eval_shape(lambda: RMSNorm(config.hidden_size, config.rms_norm_eps))
    return nnx.merge(nnx.split(norm)[0], params["model"]["norm"])(x)


def _embed(params: Params, tokens: jax.Array) -> jax.Array:
    return shard_rows(params["model"]["embed_tokens"]["weight"][tokens])


def hidden_states(
    params: Params, config: LlamaConfig, tokens: jax.Array, mask: jax.Array | None = None, remat: Remat = "none"
) -> jax.Array:
    """Normed hidden states [B, T, D] of `tokens` [B, T], causal.

    Without `mask` every position counts from the left, which is right for right-padded rows: what follows a real token
    never reaches it. `mask` (bool [B, T]) marks the real tokens of rows padded anywhere; positions then count real
    tokens only. `remat` says what the backward pass computes again instead of keeping it: `full` each layer, `dots` all
    of a layer but its products with weights, `none` nothing.
    """
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
    visible = causal_mask(length)
    if mask is not None:
        positions = jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
        visible = visible & mask[:, None, None, :]
    angles = rotation(positions, config)

    def body(x: jax.Array, layer_params: Params) -> tuple[jax.Array, None]:
        layer = layer_of(config, layer_params)
        queries, keys, values = layer.project(x, angles)
        if mask is None:
            return layer.finish(x, causal_attention(queries, keys, values)), None
        return layer.finish(x, attend(queries, (Segment(*as_held(keys, values), visible),))), None

    if remat != "none":
        body = jax.checkpoint(body, prevent_cse=False, policy=_KEPT[remat])
    x, _ = jax.lax.scan(body, _embed(params, tokens), params["model"]["layers"])
    return _norm(params, config, x)


def shared_hidden_states(
    params: Params,
    config: LlamaConfig,
    prompts: jax.Array,
    lengths: jax.Array,
    tokens: jax.Array,
    remat: Remat = "none",
) -> tuple[jax.Array, jax.Array]:
    """Normed hidden states of right-padded `prompts` [N, P] with real `lengths` [N], and of `tokens` [B, T] after them.

    Row n is the prompt of the B / N consecutive rows of `tokens` from n * B / N on, and runs, forward and backward,
    once for all of them. Returns [N, P, D] and [B, T, D]; `remat` as in `hidden_states`.
    """
    width, length = prompts.shape[1], tokens.shape[1]
    if length == 0:
        before = hidden_states(params, config, prompts, remat=remat)
        return before, jnp.zeros((*tokens.shape, config.hidden_size), before.dtype)
    after = jnp.repeat(lengths, tokens.shape[0] // prompts.shape[0])
    prompt_angles = rotation(jnp.broadcast_to(jnp.arange(width)[None], prompts.shape), config)
    angles = rotation(after[:, None] + jnp.arange(length)[None], config)
    seen, visible = length_mask(lengths, width), causal_mask(length)

    def body(streams: tuple[jax.Array, jax.Array], layer_params: Params) -> tuple[tuple[jax.Array, jax.Array], None]:
        layer, (prompt, x) = layer_of(config, layer_params), streams
        queries, keys, values = layer.project(prompt, prompt_angles)
        prompt = layer.finish(prompt, causal_attention(queries, keys, values))
        queries, own_keys, own_values = layer.project(x, angles)
        shared = Segment(*as_held(keys, values), seen)
        segments = shared, Segment(*as_held(own_keys, own_values), visible)
        return (prompt, layer.finish(x, attend(queries, segments))), None

    if remat != "none":
        body = jax.checkpoint(body, prevent_cse=False, policy=_KEPT[remat])
    streams = _embed(params, prompts), _embed(params, tokens)
    (prompt, x), _ = jax.lax.scan(body, streams, params["model"]["layers"])
    return _norm(params, config, prompt), _norm(params, config, x)


def forward(params: Params, config: LlamaConfig, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Logits float32 [B, T, V] of `tokens` int32 [B, T]; `mask` as in `hidden_states`. Pure; `config` is static."""
    return logits(params, config, hidden_states(params, config, tokens, mask))


def extend(
    params: Params, config: LlamaConfig, tokens: jax.Array, lengths: jax.Array, prefixes: Sequence[KVCache] = ()
) -> tuple[jax.Array, KVCache]:
    """Runs right-padded `tokens` [B, S] with real `lengths` [B] after `prefixes`, without touching those.

    Each prefix has N rows with B a multiple of N; prefixes follow one another (rubric, then body, then branch).
    Returns normed hidden states [B, S, D] and the tokens' own cache. With no prefix this is the prefill.
    """
    batch, length = tokens.shape
    angles = rotation(_total_lengths(prefixes, batch)[:, None] + jnp.arange(length)[None], config)
    masks = [length_mask(prefix.lengths, prefix.values.shape[3]) for prefix in prefixes]
    visible = causal_mask(length)

    def body(x: jax.Array, xs: tuple[Params, list[Any]]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        layer = layer_of(config, xs[0])
        queries, keys, values = layer.project(x, angles)
        own = as_held(keys, values)
        if not prefixes:
            return layer.finish(x, causal_attention(queries, keys, values)), own
        shared = [Segment(k, v, m) for (k, v), m in zip(xs[1], masks, strict=True)]
        return layer.finish(x, attend(queries, (*shared, Segment(*own, visible)))), own

    layered = [(prefix.keys, prefix.values) for prefix in prefixes]
    x, (keys, values) = jax.lax.scan(body, _embed(params, tokens), (params["model"]["layers"], layered))
    return _norm(params, config, x), KVCache(keys, values, lengths)


def _total_lengths(prefixes: Sequence[KVCache], batch: int) -> jax.Array:
    """Tokens int32 [B] that stand before each row."""
    total = jnp.zeros(batch, jnp.int32)
    for prefix in prefixes:
        total = total + jnp.repeat(prefix.lengths, batch // prefix.lengths.shape[0])
    return total


def last_hidden(hidden: jax.Array, lengths: jax.Array) -> jax.Array:
    """The hidden state [B, D] of each row's last real token, by its length [B]."""
    return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]


def unstack_layers(tree: Any, layers: int) -> tuple[Any, ...]:
    """Slices stacked layers of parameters once, so that a decode loop runs them unrolled."""
    return tuple(jax.tree.map(lambda x, i=i: x[i], tree) for i in range(layers))


def decode_step(
    params: Params,
    layers: tuple[Params, ...],
    config: LlamaConfig,
    tokens: jax.Array,
    prompts: Sequence[Sequence[KVCache]],
    cache: DecodeCache,
    column: jax.Array,
) -> tuple[jax.Array, DecodeCache]:
    """One token a row: `tokens` [B] at generated position `column` (a scalar, the same for all rows).

    `layers` is `unstack_layers` of the stacked layers; `prompts` holds for each layer the prefixes that the rows
    continue, in their order, as in `extend`: one layer's keys [N, K, h, P] and values [N, K, P, h] of each, with all
    its lengths [N]. The token's keys and values are written at `column`, and columns up to it are attended. Returns
    normed hidden states [B, D] and the cache.
    """
    batch = tokens.shape[0]
    positions = _total_lengths(prompts[0], batch) + column
    angles = rotation(positions[:, None], config)
    masks = [length_mask(prefix.lengths, prefix.values.shape[2]) for prefix in prompts[0]]
    masks.append((jnp.arange(cache.columns) <= column)[None, None, None, :])
    x = _embed(params, tokens)[:, None]
    every = []
    for layer_params, shared, held in zip(layers, prompts, zip(cache.keys, cache.values, strict=True), strict=True):
        pairs = [*((prefix.keys, prefix.values) for prefix in shared), held]
        x, held = _decode_layer(layer_params, config, x, angles, pairs, masks, column)
        every.append(held)
    keys, values = zip(*every, strict=True)
    return _norm(params, config, x)[:, 0], DecodeCache(keys, values)


@partial(
    jax.jit, static_argnames="config"
)  # so that unrolled layers are traced once, which starts a run seconds sooner
def _decode_layer(
    layer_params: Params,
    config: LlamaConfig,
    x: jax.Array,
    angles: Rotation,
    pairs: list[tuple[jax.Array, jax.Array]],
    masks: list[jax.Array],
    column: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """One layer of `decode_step`: keys and values of the prefixes, the cache's last, and their masks; returns the
    hidden states and the cache's with this token's."""
    *shared, held = pairs
    layer = layer_of(config, layer_params)
    queries, key, value = layer.project(x, angles)
    held, own = written(held, *as_held(key, value), column)
    segments = [Segment(*pair, mask) for pair, mask in zip([*shared, own], masks, strict=True)]
    return layer.finish(x, attend(queries, segments)), held
