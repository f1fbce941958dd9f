"""tunix as a peer: its Sampler, and one step of its GRPOLearner in an RLCluster, by its own training loop. JAX, jitted.

Prompts are strings to tunix, so ids travel as digits ("1 4093 198") through a tokenizer that is only that. Its masks
are `token != pad`: the padding id is one that no given row contains. -1 stands for the stop token: no row reaches it.
tunix 0.1.7's Llama ignores the configuration's `rope_theta` and takes 1e6. It is given the model's own here, or it
would compute another model's log-probabilities: one constant changed, no operation more or less.

Rollout: `Sampler`, prompts repeated to rows and padded on the left, a cache of exactly the length needed.

Step: the learner's `train` over two batches, for it compiles anew in every RLCluster: a first step at learning rate 0
compiles and leaves the weights as they were, the second is timed. The given completions take the place of what its
cluster generated. Actor and sampler share weights, the reference is a second copy. Settings as near to TRL's as there
are: loss "sequence-mean-token-mean" (mean over a row's tokens, then over rows), advantages divided by the group's
standard deviation + 1e-6 (TRL: 1e-4), KL "low_var_kl" (k3), AdamW without decay, gradients clipped at norm 1, float32.
Its micro-batches hold whole groups, so `micro_batch_size` rounds up to them. Its log-probabilities make logits of every
position, [rows, prompt + completion, vocabulary]. `loss` is the mean over micro-batches; `grad_norm` is that of the
accumulated gradient, before clipping. Activations are kept (`RematConfig.NONE`, the default of its ModelConfig): with
flax 0.12.8 its recomputation, of blocks or of layers, ends in a TraceContextError.
"""

from __future__ import annotations

import functools
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType
from protocol import Reply, Unsupported, peak_bytes, reset_peak, serve, threads, versions
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3 import model as llama
from tunix.models.llama3.params import create_model_from_safe_tensors
from tunix.rl import common, rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig, RolloutOutput

NO_STOP = -1
OWN_ROPE = llama.apply_rope
ROWS_AT_ONCE = 8
"""Rows of a forward pass for log-probabilities."""


class Digits:
    """A tokenizer whose text is the ids themselves."""

    def __init__(self, pad: int):
        self.pad = pad

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(str(int(token)) for token in ids)

    def bos_id(self) -> int:
        return 0  # tunix then puts none before the prompt

    def eos_id(self) -> int:
        return NO_STOP

    def pad_id(self) -> int:
        return self.pad


class Norm(NamedTuple):
    """Optimiser state that remembers the norm of the last gradient."""

    last_norm: jax.Array


def remember_norm() -> optax.GradientTransformation:
    return optax.GradientTransformation(
        lambda params: Norm(jnp.zeros(())), lambda grads, state, params=None: (grads, Norm(optax.global_norm(grads)))
    )


def text(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def unused(rows: list[list[int]]) -> int:
    """The lowest id that no row contains, for padding; not 0, for tunix takes that for the start of text."""
    seen = {token for row in rows for token in row}
    return next(token for token in range(1, 1 << 20) if token not in seen)


def padded(rows: list[list[int]], pad: int, left: bool) -> np.ndarray:
    width = max(map(len, rows))
    fill = [[pad] * (width - len(row)) for row in rows]
    return np.asarray([f + row if left else row + f for row, f in zip(rows, fill, strict=True)], np.int32)


class TunixPeer:
    """Keeps the model in the precision last asked for, and its sampler of the shape last asked for."""

    def __init__(self, model_dir: str):
        self.model_dir, self.dtype, self.model = model_dir, "", None
        self.samplers: dict[tuple[int, int], Sampler] = {}
        self.mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(AxisType.Auto, AxisType.Auto))

    def make_model(self, dtype: str) -> Any:
        shape = json.loads(Path(self.model_dir, "config.json").read_text(encoding="utf-8"))
        rope = shape.get("rope_scaling") or shape.get("rope_parameters") or {}  # as transformers: one of them
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise Unsupported("tunix's Llama has no RoPE scaling")
        theta = rope.get("rope_theta", shape.get("rope_theta", 10000.0))
        config = llama.ModelConfig(
            num_layers=shape["num_hidden_layers"],
            vocab_size=shape["vocab_size"],
            embed_dim=shape["hidden_size"],
            hidden_dim=shape["intermediate_size"],
            num_heads=shape["num_attention_heads"],
            head_dim=shape["head_dim"],
            num_kv_heads=shape["num_key_value_heads"],
            rope_theta=theta,
            norm_eps=shape["rms_norm_eps"],
            weight_tying=shape["tie_word_embeddings"],
        )
        # its attention leaves the configuration's RoPE base out and so computes with 1e6, whatever the model's is
        llama.apply_rope = functools.partial(OWN_ROPE, rope_theta=theta)
        return create_model_from_safe_tensors(self.model_dir, config, self.mesh, jnp.dtype(dtype))

    def load(self, dtype: str) -> Any:
        if dtype != self.dtype:
            self.samplers.clear()
            self.model, self.dtype = self.make_model(dtype), dtype
        return self.model

    def versions(self) -> Reply:
        self.load(self.dtype or "float32")
        return {
            "packages": versions("google-tunix", "jax", "jaxlib", "flax"),
            "dtype": self.dtype,
            "threads": threads(),
            "settings": "Sampler, compiled, prompts repeated to rows",
        }

    def rollout(
        self, prompts: list[list[int]], repeats: int, new_tokens: int, seed: int, dtype: str = "float32"
    ) -> Reply:
        model, width = self.load(dtype), max(map(len, prompts))
        config = CacheConfig(
            cache_size=width + new_tokens,
            num_layers=model.config.num_layers,
            num_kv_heads=model.config.num_kv_heads,
            head_dim=model.config.head_dim,
        )
        key = (unused(prompts), width + new_tokens)
        sampler = self.samplers.get(key) or Sampler(model, Digits(key[0]), config)
        self.samplers = {key: sampler}
        with self.mesh:
            start = time.perf_counter()
            output = sampler(
                [text(prompt) for prompt in prompts for _ in range(repeats)],
                max_generation_steps=new_tokens,
                max_prompt_length=width,
                temperature=1.0,
                top_p=1.0,
                seed=seed,
                eos_tokens=[NO_STOP],
            )
            rows = [np.asarray(row).tolist() for row in output.tokens]
            seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": sum(map(len, rows)), "rows": rows}

    def logprobs(self, rows: list[list[int]], prompt_lengths: list[int], dtype: str = "float32") -> Reply:
        pad = unused(rows)
        prompts = padded([row[:length] for row, length in zip(rows, prompt_lengths, strict=True)], pad, left=True)
        completions = padded([row[length:] for row, length in zip(rows, prompt_lengths, strict=True)], pad, left=False)
        graph, state = nnx.split(self.load(dtype))
        result = []
        for first in range(0, len(rows), ROWS_AT_ONCE):
            part = slice(first, first + ROWS_AT_ONCE)
            with self.mesh:
                found = common.compute_per_token_logps(graph, state, prompts[part], completions[part], pad, NO_STOP)
            for row, length, values in zip(rows[part], prompt_lengths[part], np.asarray(found), strict=True):
                result.append(values[: len(row) - length].tolist())
        return {"logprobs": result}

    def step(
        self,
        prompts: list[list[int]],
        completions: list[list[int]],
        rewards: list[float],
        beta: float,
        learning_rate: float,
        micro_batch_size: int,
        generate: bool,
    ) -> Reply:
        self.model, self.dtype = None, ""
        self.samplers.clear()
        gc.collect()  # what a rollout loaded is not part of the step's memory
        repeats, clock = len(completions) // len(prompts), Clock()
        groups = max(1, micro_batch_size // repeats)
        pad = unused(prompts + completions)
        cluster = self.make_cluster(prompts, completions, pad, groups, learning_rate)
        rows = [text(prompt) for prompt in prompts for _ in range(repeats)]
        given = RolloutOutput(
            text=[""] * len(rows),
            logits=None,  # type: ignore[arg-type]
            tokens=[np.asarray(completion, np.int32) for completion in completions],
            left_padded_prompt_tokens=np.repeat(padded(prompts, pad, left=True), repeats, axis=0),
            logprobs=None,
        )
        clock.watch(cluster, rows, given, generate)
        config = GRPOConfig(num_generations=repeats, num_iterations=1, beta=beta, kl_loss_mode="low_var_kl")
        learner = GRPOLearner(cluster, config, lambda prompts, completions, **_: rewards)
        with self.mesh:
            learner.train([{"prompts": [text(prompt) for prompt in prompts]} for _ in range(2)])
        state = nnx.to_flat_state(nnx.state(cluster.actor_trainer.optimizer))
        norm = next(float(value[...]) for path, value in state if "last_norm" in path)
        losses = np.asarray(clock.losses[len(clock.losses) // 2 :])
        settings = f"no recomputation, micro-batches of {groups * repeats} rows"
        del learner, cluster, state
        gc.collect()
        reply = {"loss": float(np.mean(losses)), "grad_norm": norm, "settings": settings}
        return {**clock.seconds(), "peak_bytes": clock.peak, **reply}

    def make_cluster(
        self,
        prompts: list[list[int]],
        completions: list[list[int]],
        pad: int,
        groups: int,
        learning_rate: float,
    ) -> rl_cluster.RLCluster:
        width, longest = max(map(len, prompts)), max(map(len, completions))
        optimizer = optax.chain(
            remember_norm(),
            optax.clip_by_global_norm(1.0),
            optax.adamw(lambda count: jnp.where(count == 0, 0.0, learning_rate), weight_decay=0.0),
        )
        roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
        config = rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, self.mesh),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optimizer,
                eval_every_n_steps=1000,
                max_steps=2,
                mini_batch_size=len(prompts),
                train_micro_batch_size=groups,
                rollout_micro_batch_size=len(prompts),
                compute_logps_micro_batch_size=groups,
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=longest,
                max_prompt_length=width,
                kv_cache_size=width + longest,
                temperature=1.0,
                top_p=1.0,
                eos_tokens=[NO_STOP],
            ),
        )
        actor, reference = (self.make_model("float32") for _ in range(2))
        return rl_cluster.RLCluster(actor=actor, reference=reference, tokenizer=Digits(pad), cluster_config=config)


class Clock:
    """Seconds by phase and memory of the step that ran last; every phase waits for its arrays."""

    def __init__(self) -> None:
        self.generation = self.reference = self.began = self.total = 0.0
        self.peak = 0
        self.losses: list[jax.Array] = []  # of each micro-batch, of both steps

    def watch(self, cluster: Any, rows: list[str], given: RolloutOutput, generate: bool) -> None:
        """Takes the time of the cluster's phases, and lets its generation return `given`."""
        own_generate, own_update = cluster.generate, cluster.update_actor

        def generation(prompts: list[str], **options: Any) -> RolloutOutput:
            assert list(prompts) == rows, "tunix orders prompts as they were given"
            reset_peak()
            self.began = time.perf_counter()
            if generate:
                own_generate(prompts, **options)
            self.generation = time.perf_counter() - self.began
            return given

        def update(*arguments: Any, **options: Any) -> None:
            own_update(*arguments, **options)
            jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
            self.total, self.peak = time.perf_counter() - self.began, peak_bytes()

        own_buffer = cluster.actor_trainer._buffer_metrics

        def buffer(*arguments: Any, loss: jax.Array, **options: Any) -> Any:
            self.losses.append(loss)
            return own_buffer(*arguments, loss=loss, **options)

        cluster.generate, cluster.update_actor = generation, update
        cluster.actor_trainer._buffer_metrics = buffer
        cluster.get_ref_per_token_logps = self.timed(cluster.get_ref_per_token_logps)

    def timed(self, call: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def reference(*arguments: Any, **options: Any) -> jax.Array:
            start = time.perf_counter()
            result = jax.block_until_ready(call(*arguments, **options))
            self.reference = time.perf_counter() - start
            return result

        return reference

    def seconds(self) -> dict[str, float]:
        update = self.total - self.generation - self.reference
        return {"generation": self.generation, "reference": self.reference, "update": update, "total": self.total}


if __name__ == "__main__":
    serve(TunixPeer)
