"""Micro-batch size of the update, from an estimate of its memory made from shapes before anything is compiled.

The estimate is a few sums with a safety margin; `lsp-jax plan` compiles the update and reports the exact memory.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lsp_jax.algorithm.spec import GameSpec
from lsp_jax.config import TrainConfig
from lsp_jax.learn.update import DEFAULT_MICRO_BATCH_SIZE
from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.llama import params_shape
from lsp_jax.model.lora import adapters_shape
from lsp_jax.model.sharding import AXES

USED = 0.9
"""Fraction of a device's memory to plan with; the rest is for what the estimate leaves out."""


def device_memory() -> int | None:
    """Returns the memory of the first device in bytes; None if it is unknown (CPUs)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def host_memory() -> int | None:
    """Returns the bytes available to this process: the machine's, or its container's limit; None if unknown."""
    limits = []
    if {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(getattr(os, "sysconf_names", ())):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):  # "max" where there is no limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits, default=None)


def with_micro_batch_size(
    game: GameSpec,
    config: TrainConfig,
    reward_model: LlamaConfig | None,
    mesh: Mesh | None,
    memory: int | None,
    data_width: int = 0,
) -> GameSpec:
    """Returns `game` with the micro-batch size of `config`, or as many rows as fit into `memory` bytes of a device.

    Those are a power of two, at least 1, at most the device's rows. `data_width` is the width of queries from data.
    """
    if config.optimizer.micro_batch_size:
        return game
    rows = DEFAULT_MICRO_BATCH_SIZE
    if memory is not None:
        available = USED * memory - _constant_bytes(game, config, reward_model, mesh)
        fitting = min(max(available / row_bytes(game, _shape(mesh)[2], data_width), 1), _rows(game, mesh))
        rows = 2 ** int(np.log2(fitting))
    return replace(game, learner=replace(game.learner, micro_batch_size=rows))


def update_bytes(
    game: GameSpec, config: TrainConfig, reward_model: LlamaConfig | None, mesh: Mesh | None, data_width: int = 0
) -> int:
    """Returns the estimated bytes per device during the update with the micro-batch size of `game`."""
    rows = min(game.learner.micro_batch_size or DEFAULT_MICRO_BATCH_SIZE, _rows(game, mesh))
    each = row_bytes(game, _shape(mesh)[2], data_width)
    return int(_constant_bytes(game, config, reward_model, mesh) + rows * each)


def _constant_bytes(game: GameSpec, config: TrainConfig, reward_model: LlamaConfig | None, mesh: Mesh | None) -> float:
    """Bytes per device that do not depend on the micro-batch size."""
    _, fsdp, tensor = _shape(mesh)
    model, chunk = game.model, game.learner.logprob_chunk
    constant = _spread_bytes(game, config.param_dtype) / (fsdp * tensor)
    parked, full = config.park_frozen, game.learner.loss.kl_estimator == "full"
    frozen = 0 if parked or reward_model is None else _count(reward_model)
    frozen += _count(model) if game.learner.needs_base or not parked else 0
    constant += frozen * _size(game.learner.compute_dtype) / (fsdp * tensor)
    return constant + _whole_bytes(model, chunk, game.learner.compute_dtype) * (2 if full else 1) / tensor


def _shape(mesh: Mesh | None) -> tuple[int, int, int]:
    """Number of devices along data, fsdp and tensor."""
    return (1, 1, 1) if mesh is None else (mesh.shape[AXES[0]], mesh.shape[AXES[1]], mesh.shape[AXES[2]])


def _rows(game: GameSpec, mesh: Mesh | None) -> int:
    """Number of an iteration's answers per device."""
    data, fsdp, _ = _shape(mesh)
    return -(-game.num_queries * game.num_generations // (data * fsdp))


def row_bytes(game: GameSpec, tensor: int = 1, data_width: int = 0) -> float:
    """Returns the bytes per device of one row's activations, sharded over `tensor` devices."""
    model, size, width = game.model, _size(game.learner.compute_dtype), _row_width(game, data_width)
    heads = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim
    products = (
        2 * model.intermediate_size + heads
    ) / tensor + 2 * model.hidden_size  # outputs of one layer's products with weights
    kept = {
        "full": model.hidden_size,
        "dots": model.hidden_size + products,
        "none": 2 * model.hidden_size + 2 * products,
    }
    one_layer = 2 * products + 6 * model.hidden_size  # values and gradients, norms in float32
    scores = 0.0
    if game.learner.compute_dtype == "float32":  # no fused kernel: one layer's scores, their softmax and its gradient
        scores = 3 * model.num_attention_heads / tensor * width * 4
    return width * (size * (model.num_hidden_layers * kept[game.learner.remat] + one_layer) + scores)


def _row_width(game: GameSpec, data_width: int) -> int:
    """Number of tokens of the longest row, prompt and completion."""
    prompts, asked = game.prompts, game.challenger.max_new_tokens
    query = data_width or len(prompts.query_prefix_ids) + asked
    solver = len(prompts.solver.prefix_ids) + query + len(prompts.solver.suffix_ids) + game.solver.max_new_tokens
    return max(solver, len(prompts.challenger_ids) + asked if game.trains_challenger else 0)


def _spread_bytes(game: GameSpec, param_dtype: str) -> int:
    """Bytes of master parameters, both moments, the float32 gradient, the copy in the compute dtype and one
    micro-batch's gradient, of all parameters or of the adapters."""
    shapes = params_shape(game.model)
    if game.learner.lora.rank:
        shapes = adapters_shape(shapes, game.learner.lora)
    each = (
        _size(param_dtype) + _size(game.learner.optimizer.moment_dtype) + 4 + 4 + 2 * _size(game.learner.compute_dtype)
    )
    return each * sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


def _whole_bytes(model: LlamaConfig, logprob_chunk: int, compute_dtype: str) -> int:
    """Bytes that a device gathers (the head with its gradient, two layers), and three arrays of one chunk of logits."""
    head = model.vocab_size * model.hidden_size
    layer = (_count(model) - head) // model.num_hidden_layers
    return 2 * _size(compute_dtype) * (head + layer) + 3 * 4 * logprob_chunk * model.vocab_size


def _count(model: LlamaConfig) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params_shape(model)))


def _size(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize
