"""The mapping between Hugging Face's tensor names and parameter paths, in one table for both directions."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import jax

from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.llama import params_shape
from lsp_jax.model.sharding import path_name

# Hugging Face's name, path in `Params`, and whether it is stored transposed ([out, in] there, [in, out] here). `{}` is
# the layer, which is the leading axis of our leaf. A model has the tensors whose path is in `params_shape(config)`,
# which gives their shapes too.
_TABLE = (
    ("model.embed_tokens.weight", "model/embed_tokens/weight", False),
    ("model.layers.{}.input_layernorm.weight", "model/layers/input_layernorm/weight", False),
    ("model.layers.{}.self_attn.q_proj.weight", "model/layers/self_attn/q_proj/weight", True),
    ("model.layers.{}.self_attn.q_proj.bias", "model/layers/self_attn/q_proj/bias", False),
    ("model.layers.{}.self_attn.k_proj.weight", "model/layers/self_attn/k_proj/weight", True),
    ("model.layers.{}.self_attn.k_proj.bias", "model/layers/self_attn/k_proj/bias", False),
    ("model.layers.{}.self_attn.v_proj.weight", "model/layers/self_attn/v_proj/weight", True),
    ("model.layers.{}.self_attn.v_proj.bias", "model/layers/self_attn/v_proj/bias", False),
    ("model.layers.{}.self_attn.o_proj.weight", "model/layers/self_attn/o_proj/weight", True),
    ("model.layers.{}.self_attn.o_proj.bias", "model/layers/self_attn/o_proj/bias", False),
    ("model.layers.{}.post_attention_layernorm.weight", "model/layers/post_attention_layernorm/weight", False),
    ("model.layers.{}.mlp.gate_proj.weight", "model/layers/mlp/gate_proj/weight", True),
    ("model.layers.{}.mlp.gate_proj.bias", "model/layers/mlp/gate_proj/bias", False),
    ("model.layers.{}.mlp.up_proj.weight", "model/layers/mlp/up_proj/weight", True),
    ("model.layers.{}.mlp.up_proj.bias", "model/layers/mlp/up_proj/bias", False),
    ("model.layers.{}.mlp.down_proj.weight", "model/layers/mlp/down_proj/weight", True),
    ("model.layers.{}.mlp.down_proj.bias", "model/layers/mlp/down_proj/bias", False),
    ("model.norm.weight", "model/norm/weight", False),
    ("lm_head.weight", "lm_head/weight", False),
    ("score.weight", "score/weight", True),
)


class Tensor(NamedTuple):
    """One Hugging Face tensor and its parameter path."""

    name: str
    path: str
    layer: int | None
    transposed: bool
    shape: tuple[int, ...]
    """Shape in the file, [out, in] for projections."""


@lru_cache
def leaf_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter leaf by its path, in the order of the table."""
    flat = jax.tree.flatten_with_path(params_shape(config))[0]
    shapes = {path_name(path): leaf.shape for path, leaf in flat}
    paths = {path: shapes.pop(path) for _, path, _ in _TABLE if path in shapes}
    if shapes:
        raise AssertionError(f"the name table lacks {sorted(shapes)}")
    return paths


def file_tensors(config: LlamaConfig) -> Iterable[Tensor]:
    """Yields every tensor of the model's files, in the order of the table, layer by layer."""
    leaves = leaf_shapes(config)
    for pattern, path, transposed in _TABLE:
        if path not in leaves:
            continue
        layers = range(config.num_hidden_layers) if "{}" in pattern else (None,)
        shape = leaves[path] if "{}" not in pattern else leaves[path][1:]
        for layer in layers:
            yield Tensor(pattern.format(layer), path, layer, transposed, shape[::-1] if transposed else shape)
