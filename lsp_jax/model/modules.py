"""Flax NNX modules of Llama and rotary embeddings: the parameters and the computation of one layer.

Names are Hugging Face's; projections are stored [in, out], embeddings and an untied head [vocabulary, hidden].
Activations have the dtype of the parameters; norms and RoPE are float32. Attention itself is applied between a layer's
`project` and `finish` (`model/llama.py`), because each kind of pass attends to different keys. Projections may have
low-rank adapters beside their weights (`model/lora.py`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.sharding import shard_heads, shard_rows


class Rotation(NamedTuple):
    """Cosines and sines, float32 [B, S, h / 2]."""

    cos: jax.Array
    sin: jax.Array


def rotation(positions_BS: jax.Array, config: LlamaConfig) -> Rotation:
    """Returns the RoPE rotation of integer `positions_BS`, in float32 with the scaling of `config`."""
    frequencies = jnp.asarray(config.rope_frequencies(), jnp.float32)
    angles = positions_BS.astype(jnp.float32)[..., None] * frequencies[None, None, :]
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x_BSHh: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates the pairs (i, i + h/2) of `x_BSHh` (H or K heads), in float32 (Hugging Face's order of rows)."""
    first, second = jnp.split(x_BSHh.astype(jnp.float32), 2, axis=-1)
    cos, sin = rotation.cos[:, :, None, :], rotation.sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BSHh.dtype)


class Linear(nnx.Module):
    def __init__(self, inputs: int, outputs: int, bias: bool, scale: float, rngs: nnx.Rngs):
        self.weight = nnx.Param(scale * jax.random.normal(rngs.params(), (inputs, outputs)))
        if bias:
            self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.weight[...]
        first, second = (getattr(self, name, None) for name in ("lora_A", "lora_B"))
        if first is not None and second is not None:
            y = y + (x @ first[...]) @ second[...]
        return y + self.bias[...].reshape((1,) * (y.ndim - 1) + (-1,)) if hasattr(self, "bias") else y


class RMSNorm(nnx.Module):
    def __init__(self, width: int, eps: float):
        self.weight = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        exact = x.astype(jnp.float32)
        exact = exact * jax.lax.rsqrt(jnp.mean(exact**2, axis=-1, keepdims=True) + self.eps)
        return self.weight[...].reshape((1,) * (x.ndim - 1) + (-1,)) * exact.astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        width, scale, bias = config.hidden_size, config.initializer_range, config.attention_bias
        self.head_dim = config.head_dim
        self.q_proj = Linear(width, config.num_attention_heads * config.head_dim, bias, scale, rngs)
        self.k_proj = Linear(width, config.num_key_value_heads * config.head_dim, bias, scale, rngs)
        self.v_proj = Linear(width, config.num_key_value_heads * config.head_dim, bias, scale, rngs)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, width, bias, scale, rngs)

    def project(self, x_BSD: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, S, D] -> rotated queries [B, S, H, h], rotated keys and values [B, S, K, h]."""
        queries_BSHh, keys_BSKh, values_BSKh = (
            shard_heads(projection(x_BSD).reshape(*x_BSD.shape[:2], -1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(queries_BSHh, rotation), rotate(keys_BSKh, rotation), values_BSKh

    def output(self, heads_BSHh: jax.Array) -> jax.Array:
        return self.o_proj(heads_BSHh.reshape(*heads_BSHh.shape[:2], -1))


class MLP(nnx.Module):
    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        width, inner, scale = config.hidden_size, config.intermediate_size, config.initializer_range
        self.gate_proj = Linear(width, inner, config.mlp_bias, scale, rngs)
        self.up_proj = Linear(width, inner, config.mlp_bias, scale, rngs)
        self.down_proj = Linear(inner, width, config.mlp_bias, scale, rngs)

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x_BSD)) * self.up_proj(x_BSD))


class DecoderLayer(nnx.Module):
    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, rngs)

    def project(self, x_BSD: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.self_attn.project(self.input_layernorm(x_BSD), rotation)

    def finish(self, x_BSD: jax.Array, heads_BSHh: jax.Array) -> jax.Array:
        """Adds the attention output `heads_BSHh` and the MLP to the residual stream `x_BSD`."""
        x_BSD = shard_rows(x_BSD + self.self_attn.output(heads_BSHh))
        return shard_rows(x_BSD + self.mlp(self.post_attention_layernorm(x_BSD)))


class Embedding(nnx.Module):
    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        self.weight = nnx.Param(config.initializer_range * jax.random.normal(rngs.params(), shape))


class Backbone(nnx.Module):
    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap
        def stack(layer_rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, layer_rngs)

        self.embed_tokens = Embedding(config, rngs)
        self.layers = stack(rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nnx.Module):
    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.model = Backbone(config, rngs)
        if config.head == "score":
            self.score = Linear(config.hidden_size, 1, False, config.initializer_range, rngs)
        elif not config.tie_word_embeddings:
            self.lm_head = Embedding(config, rngs)


def layer_of(config: LlamaConfig, params: dict[str, Any]) -> DecoderLayer:
    """Returns one decoder layer with its slice of the stacked parameters."""
    parts = "self_attn", "mlp"
    adapted = [(part, name) for part in parts for name, leaves in params[part].items() if "lora_A" in leaves]
    return nnx.merge(_layer_graph(config, tuple(adapted)), params)


@lru_cache
def _layer_graph(config: LlamaConfig, adapted: tuple[tuple[str, str], ...]) -> nnx.GraphDef[DecoderLayer]:
    """The graph of one decoder layer in which the projections `adapted` (part, name) have adapters."""

    def layer() -> DecoderLayer:
        module = DecoderLayer(config, nnx.Rngs(0))
        for part, name in adapted:
            projection = getattr(getattr(module, part), name)
            # placeholders: the merged parameters bring the shapes
            projection.lora_A, projection.lora_B = nnx.Param(jnp.zeros(())), nnx.Param(jnp.zeros(()))
        return module

    return nnx.split(nnx.eval_shape(layer))[0]
