"""What the machine can do, measured, and how fast rollout and a GRPO step could be at that rate.

    PYTHONPATH=. python benchmarks/limits.py      # prints the measured rates and the limits of the issue's sizes

A limit counts only what cannot be left out, so at these rates no program is faster: matrix products over weights,
attention's products, the head where a logit is needed; weights and caches read once a pass. Norms, softmax, sampling
noise and the memory of activations are not counted. In each pass the slower of its operations and its bytes counts.

Letters: N prompts, B rows (B / N share a prompt), P prompt length, T new tokens, L layers, D width, F MLP width,
H heads, K kv heads, h head width, V vocabulary. A layer has w = D H h + 2 D K h + H h D + 3 D F weights, the head D V;
each is a multiplication and an addition a token, 2 operations.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp

from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.known_models import SHAPES

FLOAT32 = 4
"""Bytes of a number."""

GEMM_SHAPES = ((64, 576, 1536), (64, 576, 49152), (1536, 576, 1536), (2048, 2048, 2048))
"""[rows, inner] x [inner, columns]: a decode step's MLP and head, a learner's MLP, a large square."""

BANDWIDTH_BYTES = 1 << 29
"""Of the array that is read: far beyond every cache."""


def seconds(call: Callable[[], jax.Array], runs: int = 7, at_least: float = 0.05) -> float:
    """Median over `runs` of the seconds of one call; short calls are repeated in a run until `at_least` seconds."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    repeats = max(1, round(at_least / max(time.perf_counter() - start, 1e-9)))
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        for _ in range(repeats):
            result = call()
        jax.block_until_ready(result)
        taken.append((time.perf_counter() - start) / repeats)
    return statistics.median(taken)


def gemm_rates(shapes: tuple[tuple[int, int, int], ...] = GEMM_SHAPES) -> dict[str, float]:
    """GFLOP/s of a jitted float32 matrix product by shape."""
    product = jax.jit(jnp.matmul)
    rates = {}
    for rows, inner, columns in shapes:
        a, b = jnp.ones((rows, inner), jnp.float32), jnp.ones((inner, columns), jnp.float32)
        taken = seconds(lambda a=a, b=b: product(a, b))
        rates[f"{rows}x{inner}x{columns}"] = 2e-9 * rows * inner * columns / taken
    return rates


def decode_products(config: LlamaConfig, rows: int) -> Callable[[], float]:
    """A function that measures GFLOP/s of the matrix products of one decode step by themselves: those of every layer
    and the head, `rows` rows, each layer's weights its own as in the model."""
    width, inner = config.hidden_size, config.intermediate_size
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    sizes = (width, heads), (width, kv), (width, kv), (heads, width), (width, inner), (width, inner), (inner, width)
    layers = [[jnp.full(size, size[0] ** -0.5) for size in sizes] for _ in range(config.num_hidden_layers)]
    head = jnp.full((config.vocab_size, width), width**-0.5)

    @jax.jit
    def products(x: jax.Array, layers: list[list[jax.Array]], head: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        kept = []
        for q, k, v, o, gate, up, down in layers:
            kept += [x @ k, x @ v]
            x = x @ q @ o
            x = ((x @ gate) * (x @ up)) @ down
        return kept, jnp.einsum("bd,vd->bv", x, head)

    x = jnp.full((rows, width), 1e-3)
    operations = 2 * rows * (config.num_hidden_layers * layer_weights(config) + head_weights(config))
    return lambda: 1e-9 * operations / seconds(lambda: products(x, layers, head)[1], at_least=0.2)


def bandwidths(size: int = BANDWIDTH_BYTES) -> dict[str, float]:
    """GB/s of three jitted programs: a matrix times a vector and a sum (reading), a scaling (reading and writing)."""
    columns = 1024
    x = jnp.ones((size // FLOAT32 // columns, columns), jnp.float32)
    vector, dot, total, scale = jnp.ones(columns), jax.jit(jnp.matmul), jax.jit(jnp.sum), jax.jit(lambda x: 2 * x)
    return {
        "matrix-vector": 1e-9 * size / seconds(lambda: dot(x, vector)),
        "sum": 1e-9 * size / seconds(lambda: total(x)),
        "scale": 2e-9 * size / seconds(lambda: scale(x)),
    }


def measure() -> dict[str, dict[str, float]]:
    """`gemm` in GFLOP/s and `bandwidth` in GB/s by program, with the `best` of each: the rates for the limits."""
    gemm, bandwidth = gemm_rates(), bandwidths()
    return {
        "gemm": gemm | {"best": max(gemm.values())},
        "bandwidth": bandwidth | {"best": max(bandwidth.values())},
    }


def layer_weights(config: LlamaConfig) -> int:
    """Weights of one layer's matrices, w."""
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return config.hidden_size * (2 * heads + 2 * kv + 3 * config.intermediate_size)


def head_weights(config: LlamaConfig) -> int:
    """Weights of the head, D V; the embedding is the same matrix or is only looked up in."""
    return config.hidden_size * config.vocab_size


def token_operations(config: LlamaConfig) -> int:
    """Of one token through all layers, without attention's products and the head: 2 L w."""
    return 2 * config.num_hidden_layers * layer_weights(config)


def pair_operations(config: LlamaConfig) -> int:
    """Of one query token with one key, over all layers: scores and values, 2 x 2 L H h."""
    return 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim


def cache_bytes(config: LlamaConfig) -> int:
    """Of one token's keys and values, over all layers: 2 L K h numbers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * FLOAT32


def weight_bytes(config: LlamaConfig) -> int:
    """Of every matrix that a pass reads: layers and head."""
    return FLOAT32 * (config.num_hidden_layers * layer_weights(config) + head_weights(config))


def pass_seconds(operations: float, moved: float, gemm: float, bandwidth: float) -> float:
    """The longer of `operations` at `gemm` GFLOP/s and `moved` bytes at `bandwidth` GB/s."""
    return max(operations / (1e9 * gemm), moved / (1e9 * bandwidth))


@dataclass(frozen=True)
class RolloutLimit:
    """What generating B rows of T tokens takes at least."""

    prefill_seconds: float
    """N prompts of P tokens, once each: layers 2 L w N P, attention over P (P + 1) / 2 pairs a prompt, the head of each
    last token. Bytes: the weights, and the caches written."""
    decode_seconds: float
    """T - 1 steps, since the prefill gives the first token. Step t (from 1) has B tokens through layers and head, and
    B (P + t) pairs. Bytes: the weights, the caches of N prompts and of B rows' t tokens."""
    tokens_per_second: float
    """B T over both."""


def rollout_roofline(
    config: LlamaConfig,
    rows: int,
    prompts: int,
    prompt_length: int,
    new_tokens: int,
    gemm: float,
    bandwidth: float,
    decode_gemm: float | None = None,
) -> RolloutLimit:
    """At `gemm` GFLOP/s and `bandwidth` GB/s; a program that prefills every row is asked with `prompts=rows`.

    `decode_gemm` is the rate of a decode step's products, whose rows are few; without one it is `gemm` too.
    """
    head, pair = 2 * head_weights(config), pair_operations(config)
    weights, cache = weight_bytes(config), cache_bytes(config)
    tokens, pairs = prompts * prompt_length, prompts * prompt_length * (prompt_length + 1) // 2
    operations = tokens * token_operations(config) + pairs * pair + prompts * head
    prefill = pass_seconds(operations, weights + tokens * cache, gemm, bandwidth)
    decode = 0.0
    for step in range(1, new_tokens):
        operations = rows * (token_operations(config) + head + (prompt_length + step) * pair)
        decode += pass_seconds(operations, weights + (tokens + rows * step) * cache, decode_gemm or gemm, bandwidth)
    return RolloutLimit(prefill, decode, rows * new_tokens / (prefill + decode))


@dataclass(frozen=True)
class StepLimit:
    """What one GRPO step takes at least, in seconds."""

    generation: float
    """See RolloutLimit."""
    reference: float
    """One forward pass of the reference over all rows (0 without one), at least one reading of its weights."""
    update: float
    """Three forward passes' operations (forward, gradients of activations, gradients of weights), with recomputation
    one more of the layers alone; at least two readings of the weights and one writing of the gradient. Then AdamW,
    which waits for the gradient: parameter, gradient, two moments read, parameter, moments written: 7 numbers a
    weight."""

    @property
    def total(self) -> float:
        return self.generation + self.reference + self.update


def step_roofline(
    config: LlamaConfig,
    rows: int,
    prompts: int,
    prompt_length: int,
    new_tokens: int,
    gemm: float,
    bandwidth: float,
    *,
    reference: bool = True,
    recompute: bool = False,
    shared_prompts: bool = False,
) -> StepLimit:
    """Of rows of P + T tokens. The last token of a row is only predicted, so P + T - 1 run through the layers, with all
    their causal pairs, and the head is needed for T of them. With `shared_prompts` a prompt's P tokens, their pairs and
    the logits of the last one (which predict the first token of each of its rows) count once, not once a row.
    """
    first, rest = prompt_length * (prompt_length + 1) // 2, new_tokens - 1
    later = rest * prompt_length + rest * (rest + 1) // 2
    copies = prompts if shared_prompts else rows
    tokens, pairs = copies * prompt_length + rows * rest, copies * first + rows * later
    layers = tokens * token_operations(config) + pairs * pair_operations(config)
    head = (copies + rows * rest) * 2 * head_weights(config)
    weights = weight_bytes(config)
    scored = pass_seconds(layers + head, weights, gemm, bandwidth) if reference else 0.0
    operations = 3 * (layers + head) + (layers if recompute else 0)
    update = pass_seconds(operations, 3 * weights, gemm, bandwidth)
    matrices = weights if config.tie_word_embeddings else weights + FLOAT32 * head_weights(config)
    update += 7 * matrices / (1e9 * bandwidth)
    played = rollout_roofline(config, rows, prompts, prompt_length, new_tokens, gemm, bandwidth)
    return StepLimit(played.prefill_seconds + played.decode_seconds, scored, update)


def main() -> None:
    rates = measure()
    gemm, bandwidth = rates["gemm"]["best"], rates["bandwidth"]["best"]
    print(json.dumps(rates, indent=2))
    config = SHAPES["smollm2-135m"]
    for rows, prompts in ((1, 1), (16, 2), (64, 8), (64, 64)):
        limit = rollout_roofline(config, rows, prompts, 64, 128, gemm, bandwidth)
        print(f"rollout, {rows} rows of {prompts} prompts: {limit.tokens_per_second:.0f} tokens/s")
    for recompute in (False, True):
        step = step_roofline(config, 16, 2, 64, 128, gemm, bandwidth, recompute=recompute)
        print(f"step, 16 rows, recomputation {recompute}: {step.total:.1f} s, {asdict(step)}")


if __name__ == "__main__":
    main()
