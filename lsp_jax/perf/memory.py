"""How many rows of the update a device holds at one time, estimated from shapes before anything is compiled.

`lsp-jax plan` compiles the update and says what it really takes; here a few sums stand for the compiler, with a margin.
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
"""Share of a device's memory that is planned with: the rest is for what the sums leave out."""


def device_memory() -> int | None:
    """Bytes that the first device can hold; None where it does not say (CPUs)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def host_memory() -> int | None:
    """Bytes that this process may hold: the machine's, or its container's limit; None where neither is known."""
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
    """`game` with the rows of a micro-batch: those of `config`, or as many as `micro_batch` finds."""
    if config.optimizer.micro_batch_size:
        return game
    rows = micro_batch(game, config, reward_model, mesh, memory, data_width)
    return replace(game, learner=replace(game.learner, micro_batch_size=rows))


def micro_batch(
    game: GameSpec,
    config: TrainConfig,
    reward_model: LlamaConfig | None,
    mesh: Mesh | None,
    memory: int | None,
    data_width: int = 0,
) -> int:
    """Rows of one micro-batch on a device of `memory` bytes: a power of two, at least 1, at most the rows there are.
    `data_width`: columns of the queries where they come from data."""
    if memory is None:
        return DEFAULT_MICRO_BATCH_SIZE
    room = USED * memory - _constant_bytes(game, config, reward_model, mesh)
    fitting = min(max(room / row_bytes(game, _shape(mesh)[2], data_width), 1), _rows(game, mesh))
    return 2 ** int(np.log2(fitting))


def update_bytes(
    game: GameSpec, config: TrainConfig, reward_model: LlamaConfig | None, mesh: Mesh | None, data_width: int = 0
) -> int:
    """Bytes that a device holds during the update with the micro-batch of `game`, by the same estimate."""
    rows = min(game.learner.micro_batch_size or DEFAULT_MICRO_BATCH_SIZE, _rows(game, mesh))
    each = row_bytes(game, _shape(mesh)[2], data_width)
    return int(_constant_bytes(game, config, reward_model, mesh) + rows * each)


def _constant_bytes(game: GameSpec, config: TrainConfig, reward_model: LlamaConfig | None, mesh: Mesh | None) -> float:
    """Bytes that a device holds whatever the micro-batch."""
    _, fsdp, tensor = _shape(mesh)
    model, chunk = game.model, game.learner.logprob_chunk
    constant = _spread_bytes(game, config.param_dtype) / (fsdp * tensor)
    parked, full = config.park_frozen, game.learner.loss.kl_estimator == "full"
    frozen = 0 if parked or reward_model is None else _count(reward_model)
    frozen += _count(model) if game.learner.needs_base or not parked else 0
    constant += frozen * _size(game.learner.compute_dtype) / (fsdp * tensor)
    return constant + _whole_bytes(model, chunk, game.learner.compute_dtype) * (2 if full else 1) / tensor


def _shape(mesh: Mesh | None) -> tuple[int, int, int]:
    """Devices along data, fsdp and tensor."""
    return (1, 1, 1) if mesh is None else (mesh.shape[AXES[0]], mesh.shape[AXES[1]], mesh.shape[AXES[2]])


def _rows(game: GameSpec, mesh: Mesh | None) -> int:
    """A device's share of an iteration's answers."""
    data, fsdp, _ = _shape(mesh)
    return -(-game.num_queries * game.num_generations // (data * fsdp))


def row_bytes(game: GameSpec, tensor: int = 1, data_width: int = 0) -> float:
    """Bytes of one row's activations on a device that shares it with `tensor - 1` others."""
    model, size, width = game.model, _size(game.learner.compute_dtype), _row_width(game, data_width)
    heads = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim
    products = (2 * model.intermediate_size + heads) / tensor + 2 * model.hidden_size  # of one layer with its weights
    kept = {
        "full": model.hidden_size,
        "dots": model.hidden_size + products,
        "none": 2 * model.hidden_size + 2 * products,
    }
    load_to_device = 2 * products + 6 * model.hidden_size  # one layer's values and gradients, norms in float32
    scores = 0.0
    if (
        game.learner.compute_dtype == "float32"
    ):  # no fused kernel: the scores of one layer, their softmax and its gradient
        scores = 3 * model.num_attention_heads / tensor * width * 4
    return width * (size * (model.num_hidden_layers * kept[game.learner.remat] + load_to_device) + scores)


def _row_width(game: GameSpec, data_width: int) -> int:
    """Tokens of the longest row, prompt and completion."""
    prompts, asked = game.prompts, game.challenger.max_new_tokens
    query = data_width or len(prompts.query_prefix_ids) + asked
    solver = len(prompts.solver.prefix_ids) + query + len(prompts.solver.suffix_ids) + game.solver.max_new_tokens
    return max(solver, len(prompts.challenger_ids) + asked if game.trains_challenger else 0)


def _spread_bytes(game: GameSpec, param_dtype: str) -> int:
    """Master parameters, both moments, the float32 gradient, the copy computed with and one micro-batch's gradient: of
    all parameters, or of the adapters."""
    shapes = params_shape(game.model)
    if game.learner.lora.rank:
        shapes = adapters_shape(shapes, game.learner.lora)
    each = (
        _size(param_dtype) + _size(game.learner.optimizer.moment_dtype) + 4 + 4 + 2 * _size(game.learner.compute_dtype)
    )
    return each * sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


def _whole_bytes(model: LlamaConfig, logprob_chunk: int, compute_dtype: str) -> int:
    """Bytes that a device gathers: the head with its gradient, two layers; and one chunk of logits three times over."""
    head = model.vocab_size * model.hidden_size
    layer = (_count(model) - head) // model.num_hidden_layers
    return 2 * _size(compute_dtype) * (head + layer) + 3 * 4 * logprob_chunk * model.vocab_size


def _count(model: LlamaConfig) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params_shape(model)))


def _size(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize
