"""Roofline of each phase of an iteration: the minimum time on the devices, as a fraction of the measured time.

Only unavoidable work counts: products with weights, 2 operations per weight and token, and in decoding one read of the
weights per column. The minimum time of a phase is the larger of operations and bytes at the devices' peak rates. Each
prompt counts once, without padding; attention scores, rewards and the optimiser are not counted.
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
"""Substrings of `device_kind`, and the name of the chip."""


@dataclass(frozen=True)
class Rates:
    """Peak rates of one device."""

    flops: float
    """Operations per second."""
    bandwidth: float
    """Memory bandwidth in bytes per second."""


@lru_cache
def rates(kind: str) -> Rates:
    """Returns the rates of devices of this kind: published for chips known to `lsp-jax plan`, else measured once."""
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
    """Returns the number of weights that a token is multiplied with, including the head's."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    layer = config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)
    return config.num_hidden_layers * layer + config.vocab_size * config.hidden_size


def least_seconds(game: GameSpec, metrics: Mapping[str, float], best: Rates, devices: int) -> dict[str, float]:
    """Returns the minimum seconds of each phase for the lengths in `metrics` on that many devices."""
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
    """Returns `limit/<phase>`: the minimum time divided by the measured time, 1 at the limit."""
    least = least_seconds(game, metrics, rates(devices[0].device_kind), len(devices))
    return {f"limit/{phase}": seconds / metrics[f"time/{phase}"] for phase, seconds in least.items()}
