"""This project as a peer, for steps: a process of its own, so that its memory is measured as the others' is.

A step is the run's own stages: decoding by chunks, reference pass, update (`lsp_jax/algorithm/stages.py`), rows in
micro-batches of `micro_batch_size`. Loss, scaling and KL as in the TRL peer: mean over a row's tokens, then over rows
(all completions have one length here), advantages divided by the group's standard deviation + 1e-4, k3. Compiled in
the first request of a shape. Further fields: `remat`, and `share` False for the plain form, every row with its prompt.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from protocol import Reply, Unsupported, peak_bytes, reset_peak, serve, threads, versions

import lsp_jax as lsp
from lsp_jax.algorithm import stages
from lsp_jax.algorithm.spec import Game
from lsp_jax.learn.batch import LearnBatch, make_rows
from lsp_jax.learn.losses import LossConfig
from lsp_jax.learn.update import OptimizerConfig, TrainState, init_state
from lsp_jax.play.chunked_decode import Chunks
from lsp_jax.play.sampler import SamplingConfig, row_keys
from lsp_jax.play.selfplay import PlayConfig
from lsp_jax.text.prompts import PlayPrompts, TokenTemplate

SHARED = stages.prompt_sharing


def game_of(config: Any, shape: tuple[int, int, int], loss: LossConfig, optimizer: OptimizerConfig) -> Game:
    """GRPO: the Solver alone, N prompts with G answers of T tokens."""
    queries, repeats, length = shape
    play = PlayConfig(queries, repeats, max_completion_length=length)
    prompts = PlayPrompts((1,), (), TokenTemplate((), ()), ())  # what is played is given
    return Game(config, prompts, play, SamplingConfig(), SamplingConfig(), (), loss, optimizer, "float32")


def rows_of(prompts: np.ndarray, completions: np.ndarray, rewards: list[float]) -> LearnBatch:
    repeats, (count, length) = len(completions) // len(prompts), completions.shape
    groups = np.asarray(rewards, np.float32).reshape(-1, repeats)
    scaled = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
    zeros = jnp.zeros((count, length))
    rows = make_rows(
        (jnp.asarray(np.repeat(prompts, repeats, axis=0)), jnp.full(count, prompts.shape[1], jnp.int32)),
        (jnp.asarray(completions), jnp.full(count, length, jnp.int32)),
        *(zeros, zeros, jnp.asarray(scaled.ravel()), jnp.ones(count, bool), 1.0, "constant_length", length),
    )
    return LearnBatch(rows, None)


class LspJaxPeer:
    """The steps each start from the model's own weights."""

    def __init__(self, model_dir: str):
        self.policy, self.share = lsp.load_pretrained(model_dir), True

    def versions(self) -> Reply:
        packages = versions("jax", "jaxlib", "flax", "lsp-jax")
        return {"packages": packages, "dtype": "float32", "threads": threads(), "settings": "remat full"}

    def step(
        self,
        prompts: list[list[int]],
        completions: list[list[int]],
        rewards: list[float],
        beta: float,
        learning_rate: float,
        micro_batch_size: int,
        generate: bool,
        remat: Any = "full",
        share: bool = True,
    ) -> Reply:
        if len({len(row) for row in prompts}) > 1 or len({len(row) for row in completions}) > 1:
            raise Unsupported("prompts of one length and completions of one length only")
        if share != self.share:  # nothing that is compiled says which form it is of
            jax.clear_caches()
            stages.prompt_sharing, self.share = SHARED if share else lambda game: (1, 1), share
        optimizer = OptimizerConfig(learning_rate=learning_rate, micro_batch_size=micro_batch_size, remat=remat)
        shape = len(prompts), len(completions) // len(prompts), len(completions[0])
        loss = LossConfig(beta=beta, kl_estimator="k3", loss_type="constant_length", alpha_challenger=0.0)
        game = game_of(self.policy.config, shape, loss, optimizer)
        tokens = np.asarray(prompts, np.int32)
        batch = rows_of(tokens, np.asarray(completions, np.int32), rewards)
        state = jax.block_until_ready(jax.jit(init_state, static_argnums=1)(self.policy.params, optimizer))
        reset_peak()
        seconds, metrics = self._timed(state, tokens, batch, game, generate)
        kept = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
        return {**seconds, "total": sum(seconds.values()), "peak_bytes": peak_bytes(), **kept}

    def _timed(
        self, state: TrainState, tokens: np.ndarray, batch: LearnBatch, game: Game, generate: bool
    ) -> tuple[dict[str, float], Any]:
        marks = [time.perf_counter()]

        def done(result: Any) -> Any:
            jax.block_until_ready(result)
            marks.append(time.perf_counter())
            return result

        if generate:
            count, play = len(tokens), game.play
            keys = row_keys(jax.random.key(0), count * play.num_generations)
            prompts = jnp.asarray(tokens), jnp.full(count, tokens.shape[1], jnp.int32)
            chunks = Chunks(game.model, SamplingConfig(), play.max_completion_length, (), play.decode_chunk)
            jax.block_until_ready(chunks.run(state.params, *prompts, keys))
        done(None)
        references = done(stages.reference(self.policy.params, batch, game))
        _, metrics = done(stages.update(state, {}, batch, references, game))
        parts = np.diff(marks).tolist()
        return dict(zip(("generation", "reference", "update"), parts, strict=True)), metrics


if __name__ == "__main__":
    serve(LspJaxPeer)
