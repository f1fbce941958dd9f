"""This project as a peer, for steps: a process of its own, so that its memory is measured as the others' is.

A step is the run's own stages: decoding by chunks, reference pass, update (`lsp_jax/algorithm/stages.py`), rows in
micro-batches of `micro_batch_size`. Loss, scaling and KL as in the TRL peer: mean over a row's tokens, then over rows
(all completions have one length here), advantages divided by the group's standard deviation + 1e-4, k3. Compiled in
the first request of a shape. Further fields: `remat`, and `share` False for the plain form, every row with its prompt.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from protocol import Reply, Unsupported, peak_bytes, reset_peak, serve, threads, versions

import lsp_jax as lsp
from lsp_jax.algorithm import rollout
from lsp_jax.algorithm.spec import GameSpec, hyperparameters
from lsp_jax.config import TrainConfig
from lsp_jax.learn.batch import LearnBatch, Sampled, make_rows
from lsp_jax.learn.losses import LossConfig
from lsp_jax.learn.optimizer import OptimizerConfig, TrainState, init_state
from lsp_jax.learn.spec import Hyperparameters
from lsp_jax.learn.update import reference_logprobs, update
from lsp_jax.model.config import LlamaConfig
from lsp_jax.play.sampler import row_keys
from lsp_jax.play.selfplay import PlayConfig
from lsp_jax.text.prompts import PlayPrompts, TokenTemplate


def game_of(
    model: LlamaConfig, shape: tuple[int, int, int], loss: LossConfig, optimizer: OptimizerConfig, share: bool
) -> tuple[GameSpec, Hyperparameters]:
    """GRPO: the Solver alone, N prompts with G answers of T tokens."""
    queries, repeats, length = shape
    config = TrainConfig(
        play=PlayConfig(queries, repeats, max_completion_length=length), loss=loss, optimizer=optimizer
    )
    prompts = PlayPrompts((1,), (), TokenTemplate((), ()), ())  # what is played is given
    game = GameSpec.of(config, model, prompts, (), "float32")
    if not share:
        alone = replace(game.learner.solver, prompt_group=1)
        game = replace(game, learner=replace(game.learner, solver=alone))
    return game, hyperparameters(config)


def rows_of(prompts: np.ndarray, completions: np.ndarray, rewards: list[float]) -> LearnBatch:
    repeats, (count, length) = len(completions) // len(prompts), completions.shape
    groups = np.asarray(rewards, np.float32).reshape(-1, repeats)
    scaled = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
    zeros = jnp.zeros((count, length))
    rows = make_rows(
        (jnp.asarray(np.repeat(prompts, repeats, axis=0)), jnp.full(count, prompts.shape[1], jnp.int32)),
        Sampled(jnp.asarray(completions), jnp.full(count, length, jnp.int32), zeros, zeros),
        *(jnp.asarray(scaled.ravel()), jnp.ones(count, bool), 1.0, "constant_length"),
    )
    return LearnBatch(rows, None)


class LspJaxPeer:
    """The steps each start from the model's own weights."""

    def __init__(self, model_dir: str):
        self.policy = lsp.load_pretrained(model_dir)

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
        optimizer = OptimizerConfig(learning_rate=learning_rate, micro_batch_size=micro_batch_size, remat=remat)
        shape = len(prompts), len(completions) // len(prompts), len(completions[0])
        loss = LossConfig(beta=beta, kl_estimator="k3", loss_type="constant_length", alpha_challenger=0.0)
        game, hyper = game_of(self.policy.config, shape, loss, optimizer, share)
        tokens = np.asarray(prompts, np.int32)
        batch = rows_of(tokens, np.asarray(completions, np.int32), rewards)
        state = jax.block_until_ready(jax.jit(init_state, static_argnums=1)(self.policy.params, game.learner.optimizer))
        reset_peak()
        seconds, metrics = self._timed(state, tokens if generate else None, batch, game, hyper)
        kept = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
        return {**seconds, "total": sum(seconds.values()), "peak_bytes": peak_bytes(), **kept}

    def _timed(
        self, state: TrainState, tokens: np.ndarray | None, batch: LearnBatch, game: GameSpec, hyper: Hyperparameters
    ) -> tuple[dict[str, float], Any]:
        """Seconds of each part; without `tokens` nothing is generated."""
        marks = [time.perf_counter()]

        def done(result: Any) -> Any:
            jax.block_until_ready(result)
            marks.append(time.perf_counter())
            return result

        if tokens is not None:
            count, length = tokens.shape
            keys = row_keys(jax.random.key(0), count * game.num_generations)
            prompts = jnp.asarray(tokens), jnp.full(count, length, jnp.int32)
            jax.block_until_ready(rollout.complete(state.params, prompts, keys, game.solver))
        done(None)
        references = done(reference_logprobs(self.policy.params, batch, spec=game.learner))
        _, metrics = done(update(state, batch, references, hyper, spec=game.learner))
        parts = np.diff(marks).tolist()
        return dict(zip(("generation", "reference", "update"), parts, strict=True)), metrics


if __name__ == "__main__":
    serve(LspJaxPeer)
