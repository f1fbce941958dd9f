"""Checks of weights against their configuration, and of values against a narrower dtype."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsp_jax.core.console import printable, warn
from lsp_jax.core.errors import InputError
from lsp_jax.core.runtime import to_host
from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.hf_names import Tensor, file_tensors
from lsp_jax.model.llama import Params
from lsp_jax.model.rope import frequencies
from lsp_jax.model.weight_files import STORED, Source

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_FREQUENCIES = ".rotary_emb.inv_freq"
_COMPARED = 1 << 22  # elements of head and embedding that are compared at a time


def head_is_tied(sources: dict[str, Source]) -> bool:
    """Whether head and embedding are equal, compared bit by bit as stored (in float32, if stored in two types).

    Host memory holds a few rows at a time.
    """
    head, embedding = (sources.get(name) for name in (HEAD, EMBEDDING))
    if head is None or embedding is None or head.shape != embedding.shape or not head.shape:
        return False
    if not {head.dtype, embedding.dtype} <= set(STORED.values()):
        return False
    rows, step = head.shape[0], max(1, _COMPARED // max(1, math.prod(head.shape[1:])))
    for start in range(0, rows, step):
        one, other = (source.read(slice(start, min(start + step, rows))) for source in (head, embedding))
        if one.dtype != other.dtype:
            one, other = one.astype(np.float32), other.astype(np.float32)
        if one.tobytes() != other.tobytes():
            return False
    return True


def check_names(sources: dict[str, Source], config: LlamaConfig) -> list[Tensor]:
    """Returns every tensor of the model; InputError for the first that is missing from the files, or unexpected.

    Tensors that are not read: the frequencies of RoPE, which old files have, and a head that equals the embedding of a
    model without one.
    """
    tensors: list[Tensor] = []
    for tensor in file_tensors(config):
        if tensor.name not in sources:
            head = "; it may be absent only with tie_word_embeddings true" if tensor.path == "lm_head/weight" else ""
            raise InputError(tensor.name, None, f"missing from the weights; expected shape {tensor.shape}{head}")
        tensors.append(tensor)
    expected = {tensor.name for tensor in tensors}
    for name in sorted(sources.keys() - expected):
        if name.endswith(_FREQUENCIES):
            continue
        if name != HEAD or not config.tie_word_embeddings:
            raise InputError(name, sources[name].shape, "is not a tensor of the model described by config.json")
        if not head_is_tied(sources):
            remedy = f"differs from {EMBEDDING}, and would be lost: the configuration has no head of its own"
            raise InputError(name, sources[name].shape, remedy)
    return tensors


def check_tensor(source: Source, tensor: Tensor) -> None:
    if source.shape != tensor.shape:
        raise InputError(tensor.name, source.shape, f"must have shape {tensor.shape} according to config.json")
    if source.dtype not in STORED.values():
        remedy = f"must be one of {', '.join(STORED.values())}; quantised weights are not supported"
        raise InputError(tensor.name, source.dtype, remedy)


def say_other_frequencies(sources: dict[str, Source], config: LlamaConfig) -> None:
    """Warns if a file stores RoPE frequencies that are not those of the configuration, which are used.

    Either the scaled or the plain ones may be stored, rounded to the type of the file.
    """
    known = config.rope_frequencies(), frequencies(config.head_dim, config.rope_theta)
    for name, source in sources.items():
        if not name.endswith(_FREQUENCIES):
            continue
        precise = {"F32": 1e-5, "F16": 2e-3, "BF16": 1e-2}.get(source.dtype, 0.0)
        equal = precise > 0 and source.shape == known[0].shape
        if equal:
            stored = source.read().astype(np.float64)
            equal = any(np.allclose(stored, each, rtol=precise, atol=1e-7) for each in known)
        if not equal:
            used = "the frequencies of config.json are used, as in transformers"
            warn(f"{printable(name)} holds others than rope_theta and rope_scaling give; {used}")
            return


# --- range -------------------------------------------------------------------------------------------------------


def _limit(dtype: str) -> float:
    """Returns the smallest magnitude that rounds to infinity: the maximum and half a unit in its last place."""
    info = jnp.finfo(dtype)
    return float(info.max) + 2.0 ** (info.maxexp - 2 - info.nmant)


def largest_lost(value: np.ndarray, dtype: str) -> float:
    """Returns the largest finite magnitude if it would become infinite in `dtype`, else 0."""
    if jnp.finfo(value.dtype).max <= jnp.finfo(dtype).max or not value.size:
        return 0.0
    limit = _limit(dtype)
    if max(float(value.max()), -float(value.min())) < limit:  # false for NaN
        return 0.0
    finite = np.abs(value[np.isfinite(value)].astype(np.float32))
    return float(finite.max()) if finite.size and finite.max() >= limit else 0.0


def overflow(name: str, magnitude: float, dtype: str) -> InputError:
    remedy = f"is its largest magnitude and would become infinite in {dtype}; use bfloat16 or float32"
    return InputError(name, magnitude, remedy)


def check_range(params: Params, config: LlamaConfig, dtype: str) -> None:
    """Raises InputError for the first tensor with a finite value that would become infinite in `dtype`."""
    lost: dict[str, np.ndarray] = {}
    for tensor in file_tensors(config):
        leaf = leaf_of(params, tensor)
        if jnp.finfo(leaf.dtype).max <= jnp.finfo(dtype).max:
            continue
        if tensor.path not in lost:
            lost[tensor.path] = to_host(_lost_by_layer(leaf, _limit(dtype), tensor.layer is not None))
        magnitude = float(lost[tensor.path][() if tensor.layer is None else tensor.layer])
        if magnitude:
            raise overflow(tensor.name, magnitude, dtype)


@partial(jax.jit, static_argnums=(1, 2))
def _lost_by_layer(leaf: jax.Array, limit: float, layers: bool) -> jax.Array:
    """The largest finite magnitude of at least `limit`, else 0, for every layer or all. (A cast to the narrow type
    and a comparison with infinity can be simplified away by the compiler.)"""
    size = jnp.abs(leaf.astype(jnp.float32))
    size = jnp.where(jnp.isfinite(size) & (size >= limit), size, 0)
    return jnp.max(size, axis=tuple(range(1 if layers else 0, leaf.ndim)))


def leaf_of(params: Params, tensor: Tensor) -> jax.Array:
    leaf: Any = params
    for key in tensor.path.split("/"):
        leaf = leaf[key]
    return leaf
