"""How near each phase of an iteration comes to what the devices can do: its share of the limit, logged beside its time.

The limit counts what cannot be left out: products with weights, two operations a weight and token, and in decoding the
weights read once a column. A phase's least time is the longer of operations and bytes at the devices' best rates. Real
lengths count, not padding; each prompt counts once. Attention's own products, rewards and the optimiser are left out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from lsp_jax.algorithm.spec import GameSpec
from lsp_jax.model.config import LlamaConfig
from lsp_jax.perf.chips import CHIPS

_KINDS = {"v5 lite": "v5e", "v5e": "v5e", "v6 lite": "v6e", "v6e": "v6e", "v5p": "v5p", "H100": "h100", "H200": "h200"}
"""Substrings of a device's kind, and the chip that it is."""


@dataclass(frozen=True)
class Rates:
    """The best that one device does."""

    flops: float
    """Operations a second."""
    bandwidth: float
    """Bytes a second from memory."""


@lru_cache
def rates(kind: str) -> Rates:
    """Of devices of this kind: as published for the chips that `lsp-jax plan` knows, else measured on the first one."""
    for part, name in _KINDS.items():
        if part in kind:
            return Rates(CHIPS[name].flops, CHIPS[name].bandwidth)
    size = 1024
    matrix, line = jnp.ones((size, size), jnp.float32), jnp.ones(1 << 24, jnp.float32)
    product, total = jax.jit(lambda x: x @ x), jax.jit(jnp.sum)
    return Rates(2 * size**3 / _seconds(product, matrix), line.nbytes / _seconds(total, line))


def _seconds(run: jax.stages.Wrapped, x: jax.Array) -> float:
    jax.block_until_ready(run(x))
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(run(x))
        taken.append(time.perf_counter() - start)
    return min(taken)


def weights(config: LlamaConfig) -> int:
    """Weights that a token is multiplied with, the head's included."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    layer = config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)
    return config.num_hidden_layers * layer + config.vocab_size * config.hidden_size


def least_seconds(game: GameSpec, metrics: Mapping[str, float], best: Rates, devices: int) -> dict[str, float]:
    """By phase, what the lengths in `metrics` take at least on so many devices."""
    count = weights(game.model)
    rows = {"solver": game.num_queries * game.num_generations, "challenger": game.num_queries}
    prompts = {
        "solver": game.num_queries * metrics["solver/prompts/mean_length"],
        "challenger": float(len(game.prompts.challenger_ids)),
    }
    size = jnp.dtype(game.learner.compute_dtype).itemsize
    found, learned = {}, 0.0
    for role, phase in (("challenger", "challenge"), ("solver", "solve")):
        if f"{role}/completions/mean_length" not in metrics:
            continue
        tokens = prompts[role] + rows[role] * metrics[f"{role}/completions/mean_length"]
        columns = metrics[f"{role}/completions/max_length"]
        found[phase] = max(2 * count * tokens / best.flops, columns * count * size / best.bandwidth) / devices
        learned += tokens if role == "solver" or game.trains_challenger else 0.0
    found["reference"] = 2 * count * learned / best.flops / devices
    found["update"] = 3 * game.learner.loss.num_iterations * found["reference"]
    return found


def shares(game: GameSpec, metrics: Mapping[str, float], devices: Sequence[Any]) -> dict[str, float]:
    """`limit/<phase>`: the least time over the time taken, 1 at the limit."""
    least = least_seconds(game, metrics, rates(devices[0].device_kind), len(devices))
    return {f"limit/{phase}": seconds / metrics[f"time/{phase}"] for phase, seconds in least.items()}
