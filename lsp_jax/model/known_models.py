"""Configurations of well-known Llamas by name, for uses that need a model's shape but not its weights."""

from __future__ import annotations

from dataclasses import replace

from lsp_jax.core.errors import InputError
from lsp_jax.core.files import user_path
from lsp_jax.model.config import LlamaConfig, RopeScaling
from lsp_jax.model.weights import read_config

_LLAMA_3 = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=None,
    tie_word_embeddings=False,
    max_position_embeddings=8192,
    bos_token_id=128000,
    eos_token_id=(128001, 128008, 128009),
)
"""Llama 3 8B, of which the other Llama 3s differ in a few fields."""


def _llama31(width: int, inner: int, layers: int, heads: int, factor: float = 8.0) -> LlamaConfig:
    """A Llama 3.1 or later; `factor` is that of its RoPE scaling."""
    return replace(
        _LLAMA_3,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        rope_scaling=RopeScaling("llama3", factor),
        max_position_embeddings=131072,
    )


SHAPES: dict[str, LlamaConfig] = {
    "llama-3.2-1b": replace(_llama31(2048, 8192, 16, 32, 32.0), head_dim=64, tie_word_embeddings=True),
    "llama-3.2-3b": replace(_llama31(3072, 8192, 28, 24, 32.0), tie_word_embeddings=True),
    "llama-3.1-8b": _llama31(4096, 14336, 32, 32),
    "llama-3-8b": _LLAMA_3,
    "llama-3.1-70b": _llama31(8192, 28672, 80, 64),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=(2,),
    ),
}
"""Values as published in the models' `config.json`."""


def shape_of(name: str, field: str = "model") -> LlamaConfig:
    """Returns the configuration of `name`: a directory with config.json, a key of SHAPES, or a hub id containing one.

    `meta-llama/Llama-3.2-3B-Instruct` is `llama-3.2-3b`. Needs neither weights nor network. InputError names `field`.
    """
    path = user_path(field, name)
    if path.is_dir():
        return read_config(path)
    last = name.rsplit("/", 1)[-1].lower()
    for key in sorted(SHAPES, key=len, reverse=True):
        if key in last:
            return SHAPES[key]
    raise InputError(field, name, f"give a directory with config.json, or one of {', '.join(SHAPES)}")
